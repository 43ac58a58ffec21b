"""Towers that only look, and pairs of a looking and a reading tower."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as T
from torch import Tensor

from .base import HEADS, TOWER, noise, register, words
from .words import EOS, PAD, bare, tokenizer

EYE = {**TOWER, "image_size": 48, "patch_size": 8}
"""A grid of 6 x 6 patches."""
SQUARE = {"height": 48, "width": 48}


def pixels(batch: int = 2, size: int = 48) -> dict[str, Tensor]:
    return {"pixel_values": noise(batch, 3, size, size)}


def captions(batch: int = 2) -> dict[str, Tensor]:
    ids = words(batch, 10)
    ids[:, -1] = EOS  # where CLIP reads its sentence
    return {"input_ids": ids, **pixels(batch)}


def clip_processor() -> Any:
    eye = T.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE)
    return T.CLIPProcessor(image_processor=eye, tokenizer=tokenizer(eos=True))


def siglip_processor() -> Any:
    return T.SiglipProcessor(
        image_processor=T.SiglipImageProcessor(size=SQUARE), tokenizer=tokenizer(bos=False)
    )


eye = partial(register, inputs=pixels)


@register("clip", "vision", "dual", inputs=captions, processor=clip_processor, prompt=bare)
def clip() -> Any:
    reader = {**TOWER, "vocab_size": 512, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    return T.CLIPModel, T.CLIPConfig(text_config=reader, vision_config=EYE, projection_dim=32)


@register("siglip", "vision", "dual", inputs=captions, processor=siglip_processor, prompt=bare)
def siglip() -> Any:
    reader = {**TOWER, "vocab_size": 512, "max_position_embeddings": 64, "pad_token_id": PAD}
    return T.SiglipModel, T.SiglipConfig(text_config=reader, vision_config=EYE)


@eye("siglip_vision", "vision", "pooling_head")
def siglip_vision() -> Any:
    return T.SiglipVisionModel, T.SiglipVisionConfig(**EYE)


@eye("dinov2", "vision")
def dinov2() -> Any:
    return T.Dinov2Model, T.Dinov2Config(hidden_size=32, **HEADS, image_size=48, patch_size=8)


@eye("vit", "vision")
def vit() -> Any:
    return T.ViTModel, T.ViTConfig(**EYE)


@register("swin", "vision", "windows", "softmax", inputs=partial(pixels, size=32))
def swin() -> Any:
    return T.SwinModel, T.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )


@register("sam_vision", "vision", "windows", inputs=partial(pixels, size=64))
def sam_vision() -> Any:
    windows = {"window_size": 4, "global_attn_indexes": [1]}
    return T.SamVisionModel, T.SamVisionConfig(
        hidden_size=32, mlp_dim=64, **HEADS, output_channels=16, image_size=64, patch_size=8, **windows
    )
