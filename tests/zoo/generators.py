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


def sdxl_inputs(batch: int = 2) -> dict[str, Any]:
    added = {"text_embeds": noise(batch, 16, seed=4), "time_ids": torch.full((batch, 6), 16.0)}
    return {**unet_inputs(batch), "added_cond_kwargs": added}


def captioned(batch: int = 2) -> dict[str, Any]:
    """A picture's latents and a caption whose last two tokens are padding."""
    mask = torch.arange(TEXT_LENGTH).repeat(batch, 1) < TEXT_LENGTH - 2
    return {
        "hidden_states": noise(batch, 4, 16, 16),
        "encoder_hidden_states": noise(batch, TEXT_LENGTH, 32, seed=3),
        "encoder_attention_mask": mask.long(),
        "timestep": torch.full((batch,), 5),
    }


def clip_inputs(batch: int = 2) -> dict[str, Any]:
    """Three frames of latents."""
    return {
        "hidden_states": noise(batch, 4, 3, 8, 8),
        "encoder_hidden_states": noise(batch, TEXT_LENGTH, 32, seed=3),
        "timestep": torch.full((batch,), 5),
    }


def cogvideox_inputs(batch: int = 2) -> dict[str, Any]:
    inputs = clip_inputs(batch)
    return {**inputs, "hidden_states": inputs["hidden_states"].transpose(1, 2)}


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


@denoiser("sdxl", "unet", "diffusers", inputs=sdxl_inputs, slow=True)
def sdxl() -> Any:
    """Two transformer blocks where the picture is small, and conditions beside the text."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


@denoiser("pixart", "dit", "diffusers", "cross", inputs=captioned, slow=True)
def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=32,
        norm_num_groups=8,
        use_additional_conditions=False,
    )


@denoiser("sana", "dit", "diffusers", "cross", inputs=captioned, slow=True)
def sana() -> Any:
    """Its self-attention is linear: no softmax, no weights; its cross-attention is the usual one."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
    )


@denoiser("wan", "dit", "diffusers", "cross", inputs=clip_inputs, slow=True)
def wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=48,
        rope_max_seq_len=32,
    )


@denoiser("cogvideox", "dit", "diffusers", inputs=cogvideox_inputs, slow=True)
def cogvideox() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        time_embed_dim=16,
        text_embed_dim=32,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT_LENGTH,
    )
