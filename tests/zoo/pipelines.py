"""Tiny random pipelines of diffusers with tokenizers made by hand: nothing is downloaded, nothing trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from .base import enliven, generator, require

PROMPT, NEGATIVE = "a red cat and a blue dog", "an old castle"
OTHER = "a red horse and a blue dog"
WORDS = ("a", "an", "and", "the", "red", "blue", "old", "cat", "dog", "horse", "castle", "on", "mat")
"""One token each; any other word is spelled in several."""


# ---- tokenizers and text encoders ------------------------------------------------------------------------


@cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
    pieces = [
        "!",
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(m) for m in dict.fromkeys(merges)),
    ]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=77, pad_token=pad)


@cache
def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -3.0),
        *((f"▁{word}", -1.0) for word in WORDS),
    ]
    vocab += [(letter, -4.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def clip_encoder(tokenizer: Any, *, projects: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=40, num_attention_heads=4,
        num_hidden_layers=3, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5_encoder(tokenizer: Any, width: int = 32, *, umt5: bool = False) -> nn.Module:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    model, config = (UMT5EncoderModel, UMT5Config) if umt5 else (T5EncoderModel, T5Config)
    return model(config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=40, num_layers=2, num_heads=4))


def vae(**options: Any) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip


# ---- the pipelines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """`build()` makes one, `call` are the arguments of a short sampling, latents its output."""

    name: str
    make: Callable[..., Any]
    call: dict[str, Any]
    denoiser: str = "transformer"

    def build(self, *parts: Any, **options: Any) -> Any:
        require(self.name, ("diffusers",))
        pipe = self.make(*parts, **options)
        for seed, part in enumerate(p for p in pipe.components.values() if isinstance(p, nn.Module)):
            enliven(part, seed).eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, pipe: Any, seed: int = 0, **options: Any) -> Tensor:
        asked = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "latent", **self.call, **options}
        if "negative_prompt" in asked and isinstance(asked["prompt"], list):
            asked["negative_prompt"] = [asked["negative_prompt"]] * len(asked["prompt"])
        out = pipe(**asked, generator=generator(seed))
        return out.frames if hasattr(out, "frames") else out.images

    def denoiser_of(self, pipe: Any) -> Any:
        return getattr(pipe, self.denoiser)


PIPELINES: dict[str, Pipeline] = {}


def pipeline(name: str, denoiser: str = "transformer", **call: Any) -> Callable[[Any], Any]:
    def add(make: Callable[..., Any]) -> Callable[..., Any]:
        PIPELINES[name] = Pipeline(name, make, call, denoiser)
        return make

    return add


def unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    plain = {
        "block_out_channels": (16, 16, 32), "attention_head_dim": 8, "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    shape = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**shape, **plain, **options})


@pipeline("sd", "unet", height=32, width=32, guidance_scale=7.5, negative_prompt=NEGATIVE)
def sd(scheduler: Any = None, **options: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_encoder(tokenizer), tokenizer=tokenizer, unet=unet(**options),
        scheduler=scheduler or DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pipeline("sdxl", "unet", height=32, width=32, guidance_scale=5.0, negative_prompt=NEGATIVE)
def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    one, two = clip_tokenizer(), clip_tokenizer("!")
    denoiser = unet(
        block_out_channels=(16, 32),
        attention_head_dim=(2, 4),
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        transformer_layers_per_block=(1, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(one),
        text_encoder_2=clip_encoder(two, projects=True),
        tokenizer=one,
        tokenizer_2=two,
        unet=denoiser,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


@pipeline("sd3", height=32, width=48, guidance_scale=5.0, negative_prompt=NEGATIVE, max_sequence_length=24)
def sd3(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    shape = {
        "sample_size": 32,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 64,
        "qk_norm": "rms_norm",
    }
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**{**shape, **options}),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(clip, projects=True),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip, projects=True),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5, 64),
        tokenizer_3=t5,
    )


@pipeline("flux", height=32, width=48, true_cfg_scale=3.0, negative_prompt=NEGATIVE, max_sequence_length=24)
def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return FluxPipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(clip), tokenizer=clip, text_encoder_2=t5_encoder(t5), tokenizer_2=t5,
    )  # fmt: skip


@pipeline(
    "pixart",
    height=32,
    width=48,
    use_resolution_binning=False,
    max_sequence_length=20,
    negative_prompt=NEGATIVE,
)
def pixart() -> Any:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    t5 = t5_tokenizer()
    denoiser = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=t5, text_encoder=t5_encoder(t5), vae=vae(), transformer=denoiser, scheduler=DDIMScheduler()
    )


@pipeline("wan", height=16, width=32, num_frames=9, negative_prompt=NEGATIVE, max_sequence_length=20)
def wan() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    t5 = t5_tokenizer()
    decoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    denoiser = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=t5, text_encoder=t5_encoder(t5, umt5=True), vae=decoder, transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


@pipeline("cogvideox", height=16, width=16, num_frames=9, negative_prompt=NEGATIVE, max_sequence_length=16)
def cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
        DDIMScheduler,
    )

    t5 = t5_tokenizer()
    denoiser = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    decoder = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=t5,
        text_encoder=t5_encoder(t5),
        vae=decoder,
        transformer=denoiser,
        scheduler=DDIMScheduler(),
    )


@cache
def ready(name: str) -> Any:
    """A pipeline that no test may change."""
    return PIPELINES[name].build()


__all__ = ["NEGATIVE", "OTHER", "PIPELINES", "PROMPT", "Pipeline", "ready"]
