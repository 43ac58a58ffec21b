"""What reading costs at every seam: `python -m benchmarks.seams [--rounds N]`.

One model of each kind, random weights, float32, batch 1; every attention module is read. Beside Saccade stand the
ways to the same weights without it: hooks that do nothing, hooks that make the weights once more from the module's
input, and the whole model without its fused kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import timm
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from benchmarks.llama import hooked, last_row_of_llama, llama
from benchmarks.measure import Row, Variant, interleaved, write
from benchmarks.overhead import LastRow, Observe
from saccade.core.call import AttentionCall
from saccade.core.method import Method
from saccade.core.session import attach

Work = Callable[[], object]
WORDS = {"vocab_size": 8_000, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}


@dataclass(eq=False)
class AllRows(Method):
    """Computes all weights."""

    def observe(self, call: AttentionCall) -> None:
        call.weights("all")


@dataclass
class Case:
    name: str
    model: Any  # what is attached to
    work: Work
    others: dict[str, Variant] = field(default_factory=dict)  # ways to the weights without Saccade,
    instead: dict[str, Work] = field(default_factory=dict)  # and those that are other work


# ---- ways to the weights without Saccade -----------------------------------------------------------------


def nothing(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: object) -> None:
    pass


def llama_row(attention: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: object) -> None:
    last_row_of_llama(attention, kwargs)


def timm_rows(attention: Any, args: tuple[Tensor], kwargs: Mapping[str, Any], out: object) -> None:
    batch, tokens, _ = args[0].shape
    q, k, _ = attention.qkv(args[0]).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    ((q @ k.transpose(-1, -2)) * attention.scale).softmax(-1)


def eager(model: PreTrainedModel, **inputs: object) -> dict[str, Work]:
    unfused = copy.deepcopy(model)
    unfused.set_attn_implementation("eager")
    return {"whole model eager, all rows": lambda: unfused(**inputs, output_attentions=True)}


@contextlib.contextmanager
def unfused_timm(vit: Any) -> Iterator[None]:
    for block in vit.blocks:
        block.attn.fused_attn = False
    try:
        yield
    finally:
        for block in vit.blocks:
            block.attn.fused_attn = True


@contextlib.contextmanager
def unfused_unet(unet: UNet2DConditionModel) -> Iterator[None]:
    before = unet.attn_processors
    unet.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


# ---- one model of each kind ------------------------------------------------------------------------------


def llm() -> Case:
    model = llama()
    inputs = {"input_ids": torch.randint(3, 8_000, (1, 512)), "logits_to_keep": 1}
    attention = [layer.self_attn for layer in model.model.layers]
    return Case(
        "LLM: Llama, 6 layers, 512 wide, 512 tokens; interface seam",
        model,
        lambda: model(**inputs),
        {"raw hooks that make the last row": lambda: hooked(attention, llama_row)},
        eager(model, **inputs),
    )


def vlm() -> Case:
    tower = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, **WORDS
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=7)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((1, 256), 7), torch.randint(8, 8_000, (1, 64))], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 224, 224), "logits_to_keep": 1}
    return Case(
        "VLM: LLaVA, two towers of 6 layers, 256 + 64 tokens; interface seam",
        model,
        lambda: model(**inputs),
        instead=eager(model, **inputs),
    )


def vit() -> Case:
    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6)
    model = ViTModel(config, add_pooling_layer=False).eval()
    pixels = torch.randn(1, 3, 224, 224)
    return Case(
        "ViT of transformers: 6 layers, 384 wide, 197 tokens; interface seam",
        model,
        lambda: model(pixels),
        instead=eager(model, pixel_values=pixels),
    )


def timm_vit() -> Case:
    model = timm.create_model("vit_small_patch16_224", depth=6).eval()
    pixels = torch.randn(1, 3, 224, 224)
    attention = [block.attn for block in model.blocks]
    return Case(
        "ViT of timm: 6 layers, 384 wide, 197 tokens; SDPA seam",
        model,
        lambda: model(pixels),
        {
            "raw hooks that make all rows": lambda: hooked(attention, timm_rows),
            "whole model unfused": lambda: unfused_timm(model),
        },
    )


def unet() -> Case:
    network = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128), attention_head_dim=8, cross_attention_dim=64,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)), text_encoder=None, tokenizer=None, unet=network.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return Case(
        "UNet: Stable Diffusion, 1,024 and 256 places, 2 steps; SDPA seam",
        pipe,
        partial(sample, pipe, prompt_embeds=torch.randn(1, 20, 64)),
        {"whole model unfused": lambda: unfused_unet(network)},
    )


def dit() -> Case:
    network = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=256, pooled_projection_dim=64,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=network.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        vae=AutoencoderKL(block_out_channels=(32,)), tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    words = {"prompt_embeds": torch.randn(1, 20, 64), "pooled_prompt_embeds": torch.randn(1, 64)}
    return Case(
        "DiT: Stable Diffusion 3, 6 layers, 256 wide, 256 + 20 tokens, 2 steps; SDPA seam",
        pipe,
        partial(sample, pipe, **words),
        {"whole model unfused": lambda: sdpa_kernel(SDPBackend.MATH)},
    )


def sample(pipe: DiffusionPipeline, **words: Tensor) -> None:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    pipe(
        **words, height=32, width=32, guidance_scale=1.0, num_inference_steps=2, output_type="latent",
        generator=noise,
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        w = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((w @ v).transpose(1, 2).reshape(batch, tokens, width))


def by_hand() -> Case:
    layers = [nn.Sequential(Attention(384, 6), nn.LayerNorm(384), nn.Linear(384, 384)) for _ in range(8)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(1, 400, 384)
    return Case("Attention by hand: 8 layers, 384 wide, 400 tokens; softmax seam", model, lambda: model(x))


# ---- measuring -------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> list[Row]:
    with attach(case.model) as session:
        sites = [site for site in session.sites if site.seam != "module"]
    everywhere, modules = "|".join(site.name for site in sites), [site.module for site in sites]
    bare: Variant = contextlib.nullcontext
    variants: dict[str, Variant] = {
        "bare": bare,
        "bare again": bare,
        "raw hooks that do nothing": lambda: hooked(modules, nothing),
        "Saccade, observe": lambda: attach(case.model, Observe(sites=everywhere)),
        "Saccade, last row": lambda: attach(case.model, LastRow(sites=everywhere)),
        "Saccade, all rows": lambda: attach(case.model, AllRows(sites=everywhere)),
        **case.others,
        **dict.fromkeys(case.instead, bare),
    }
    return interleaved(case.name, case.work, variants, {"Saccade, observe": 1.02}, rounds, case.instead)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="more rounds, narrower quartiles (40)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with torch.no_grad():
        for make in (llm, vlm, vit, timm_vit, unet, dit, by_hand):
            torch.manual_seed(0)
            rows += measure(make(), chosen.rounds)
    notes = {name: version(name) for name in ("diffusers", "timm")}
    print(write("seams", rows, notes).read_text())
