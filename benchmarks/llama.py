"""The Llama that all are measured on, and what one writes for it without a library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

ABOUT = "Llama, 512 wide, 6 layers, 8 heads on 4 key heads, 8,000 words, random weights, float32, batch 1"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def hooked(modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_row(q: Tensor, k: Tensor) -> Tensor:
    """Weights (batch, heads, 1, keys)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return ((q[:, :, -1:] @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1)


def last_row_of_llama(attention: Any, given: Mapping[str, Any]) -> Tensor:
    """From what the attention module was given; the keys are in the cache by now."""
    x: Tensor = given["hidden_states"][:, -1:]
    q = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q, _ = apply_rotary_pos_emb(q, q, *(t[:, -1:] for t in given["position_embeddings"]))
    return last_row(q, given["past_key_values"].layers[attention.layer_idx].keys)
