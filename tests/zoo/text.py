"""Decoders, encoders and encoder-decoders of text, and of sound."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as T
from torch import Tensor

from .base import HEADS, TEXT, TOWER, noise, register, words

ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def tokens(batch: int = 2, length: int = 24) -> dict[str, Tensor]:
    return {"input_ids": words(batch, length)}


def pairs(batch: int = 2, length: int = 10) -> dict[str, Tensor]:
    return {"input_ids": words(batch, length), "decoder_input_ids": words(batch, 6, seed=3)}


def sound(batch: int = 2) -> dict[str, Tensor]:
    return {"input_features": noise(batch, 8, 40), "decoder_input_ids": words(batch, 6)}


decoder = partial(register, inputs=tokens)
encoder = partial(register, inputs=partial(tokens, length=12))


@decoder("llama", "llm", "generates")
def llama() -> Any:
    return T.LlamaForCausalLM, T.LlamaConfig(**TEXT)


@decoder("mistral", "llm", "generates", "sliding")
def mistral() -> Any:
    return T.MistralForCausalLM, T.MistralConfig(**TEXT, sliding_window=8)


@decoder("qwen2", "llm", "generates")
def qwen2() -> Any:
    return T.Qwen2ForCausalLM, T.Qwen2Config(**TEXT)


@decoder("qwen3", "llm", "generates")
def qwen3() -> Any:
    return T.Qwen3ForCausalLM, T.Qwen3Config(**TEXT, head_dim=16)


@decoder("gemma2", "llm", "generates", "sliding", "softcap")
def gemma2() -> Any:
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    eager = {"attn_implementation": "eager"}  # SDPA has no softcap: refused, or in older versions ignored
    return T.Gemma2ForCausalLM, T.Gemma2Config(**TEXT, **ALTERNATING, **caps, **eager, head_dim=16)


@decoder("gpt_oss", "llm", "generates", "sliding", "sinks", "moe")
def gpt_oss() -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return T.GptOssForCausalLM, T.GptOssConfig(
        **TEXT, **ALTERNATING, **experts, head_dim=16, rope_parameters=rope
    )


@decoder("gemma3n", "llm", "generates", "sliding", "softcap", "shared_keys")
def gemma3n() -> Any:
    """The last two layers read the keys of the two before them."""
    extra = {
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    }
    return T.Gemma3nForCausalLM, T.Gemma3nTextConfig(
        **TEXT, **ALTERNATING, **extra, num_kv_shared_layers=2, head_dim=16, final_logit_softcapping=5.0
    )


@decoder("deepseek_v3", "llm", "generates", "latent", "moe")
def deepseek_v3() -> Any:
    """Keys and values from a small latent; queries and keys are wider than values."""
    ranks = {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    }
    return T.DeepseekV3ForCausalLM, T.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4}, **ranks, **experts, first_k_dense_replace=2
    )


hybrid = partial(register, inputs=tokens)
"""Decoders in which only some layers attend; the others keep a state of one size."""


@hybrid("lfm2", "llm", "generates", "hybrid")
def lfm2() -> Any:
    kinds = ["conv", "full_attention"] * 2
    return T.Lfm2ForCausalLM, T.Lfm2Config(**TEXT, layer_types=kinds, block_multiple_of=32)


@hybrid("jamba", "llm", "generates", "hybrid", "moe", slow=True)
def jamba() -> Any:
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "expert_layer_offset": 0}
    return T.JambaForCausalLM, T.JambaConfig(**TEXT, **periods, use_mamba_kernels=False, mamba_d_state=8)


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8}


@hybrid("bamba", "llm", "generates", "hybrid", slow=True)
def bamba() -> Any:
    return T.BambaForCausalLM, T.BambaConfig(**TEXT, **MAMBA, attn_layer_indices=[1, 3])


@hybrid("granitemoehybrid", "llm", "generates", "hybrid", "moe", slow=True)
def granitemoehybrid() -> Any:
    kinds = {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope"}
    experts = {"num_local_experts": 4, "shared_intermediate_size": 32}
    return T.GraniteMoeHybridForCausalLM, T.GraniteMoeHybridConfig(
        **TEXT, **MAMBA, **kinds, **experts, attention_multiplier=0.25
    )


@hybrid("qwen3_next", "llm", "generates", "hybrid", "moe", slow=True)
def qwen3_next() -> Any:
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    kinds = ["linear_attention", "full_attention"] * 2
    return T.Qwen3NextForCausalLM, T.Qwen3NextConfig(
        **TEXT, **linear, **experts, num_experts_per_tok=2, layer_types=kinds, head_dim=16
    )


@decoder("gpt2", "llm", "generates", "learned_positions")
def gpt2() -> Any:
    return T.GPT2LMHeadModel, T.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=4, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    )


@decoder("falcon", "llm", "generates")
def falcon() -> Any:
    return T.FalconForCausalLM, T.FalconConfig(
        vocab_size=512,
        hidden_size=64,
        **HEADS,
        new_decoder_architecture=True,
        num_kv_heads=2,
        ffn_hidden_size=96,
    )


@decoder("bloom", "llm", "generates", "softmax")
def bloom() -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return T.BloomForCausalLM, T.BloomConfig(vocab_size=512, hidden_size=32, n_layer=3, n_head=4, **special)


@encoder("bert", "encoder")
def bert() -> Any:
    return T.BertModel, T.BertConfig(vocab_size=512, **TOWER)


@encoder("deberta_v2", "encoder", "softmax")
def deberta_v2() -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return T.DebertaV2Model, T.DebertaV2Config(vocab_size=512, **TOWER, **relative)


@encoder("modernbert", "encoder", "sliding")
def modernbert() -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return T.ModernBertModel, T.ModernBertConfig(
        vocab_size=512, **TOWER, **special, local_attention=8, global_attn_every_n_layers=2
    )


@register("t5", "encdec", "generates", inputs=pairs)
def t5() -> Any:
    return T.T5ForConditionalGeneration, T.T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )


@register("bart", "encdec", "generates", "learned_positions", inputs=pairs, slow=True)
def bart() -> Any:
    depth = {
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return T.BartForConditionalGeneration, T.BartConfig(
        vocab_size=512, **depth, **widths, **special, forced_eos_token_id=None
    )


@register("t5gemma", "encdec", "generates", "sliding", "softcap", inputs=pairs)
def t5gemma() -> Any:
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    part = {**TEXT, **ALTERNATING, **caps, "head_dim": 16}
    return T.T5GemmaForConditionalGeneration, T.T5GemmaConfig(
        encoder=part, decoder=part, vocab_size=512, attn_implementation="eager"
    )


@register("whisper", "encdec", "generates", "audio", inputs=sound)
def whisper() -> Any:
    return T.WhisperForConditionalGeneration, T.WhisperConfig(
        vocab_size=512,
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
