"""Denoisers of diffusers: a UNet with cross-attention and transformers with joint attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .base import noise, register

TEXT_LENGTH = 7


def unet_inputs(batch: int = 2) -> dict[str, Any]:
    return {
        "sample": noise(batch, 4, 16, 16),
        "timestep": torch.full((batch,), 5),
        "encoder_hidden_states": noise(batch, TEXT_LENGTH, 32, seed=3),
    }


def sd3_inputs(batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 16, 16),
        "encoder_hidden_states": noise(batch, TEXT_LENGTH, 32, seed=3),
        "pooled_projections": noise(batch, 16, seed=4),
        "timestep": torch.full((batch,), 5),
    }


def flux_inputs(batch: int = 2, side: int = 4) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": noise(batch, side * side, 4),
        "encoder_hidden_states": noise(batch, TEXT_LENGTH, 32, seed=3),
        "pooled_projections": noise(batch, 16, seed=4),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(TEXT_LENGTH, 3),
        "guidance": torch.ones(batch),
    }


denoiser = partial(register, needs=("diffusers",))


@denoiser("unet", "unet", "diffusers", inputs=unet_inputs)
def unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


@denoiser("sd3", "dit", "diffusers", inputs=sd3_inputs)
def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
    )


@denoiser("flux", "dit", "diffusers", inputs=flux_inputs)
def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
