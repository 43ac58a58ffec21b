"""Towers that only look, and pairs of a looking and a reading tower."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
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


def patches(batch: int = 2) -> dict[str, Tensor]:
    """Rows of patches of pictures of two shapes, filled up to one length."""
    shapes = torch.tensor([[6, 6], [4, 8]])[torch.arange(batch) % 2]
    mask = (torch.arange(36) < shapes.prod(1)[:, None]).long()
    return {
        "pixel_values": noise(batch, 36, 3 * 8 * 8),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def shuffled(batch: int = 2) -> dict[str, Tensor]:
    """Which patches stay unseen is drawn from noise that is given."""
    return {**pixels(batch), "noise": noise(batch, 36, seed=4).sigmoid()}


@register(
    "siglip2",
    "vision",
    "dual",
    "pooling_head",
    inputs=lambda batch=2: {**captions(batch), **patches(batch)},
    slow=True,
)
def siglip2() -> Any:
    reader = {**TOWER, "vocab_size": 512, "max_position_embeddings": 64, "pad_token_id": PAD}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return T.Siglip2Model, T.Siglip2Config(
        text_config={**reader, **special}, vision_config={**TOWER, "patch_size": 8, "num_patches": 36}
    )


@eye("dinov3", "vision")
def dinov3() -> Any:
    return T.DINOv3ViTModel, T.DINOv3ViTConfig(**EYE, num_register_tokens=2)


@register("sam2_vision", "vision", "windows", inputs=partial(pixels, size=64), slow=True)
def sam2_vision() -> Any:
    """Four stages; the first block of the later ones pools its queries four into one."""
    stages = {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128]}
    heads = {"num_attention_heads_per_stage": [2, 2, 4, 4], "window_size_per_stage": [4, 2, 4, 2]}
    backbone = T.Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[64, 64],
        **stages,
        **heads,
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    sizes = {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 16}
    return T.Sam2VisionModel, T.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], **sizes
    )


@register("vit_mae", "vision", inputs=shuffled, slow=True)
def vit_mae() -> Any:
    decoder = {f"decoder_{name}": size for name, size in TOWER.items()}
    return T.ViTMAEForPreTraining, T.ViTMAEConfig(**EYE, **decoder, mask_ratio=0.5)


@eye("depth_anything", "vision", "dense", slow=True)
def depth_anything() -> Any:
    backbone = T.Dinov2Config(
        hidden_size=32,
        **{**HEADS, "num_hidden_layers": 4},
        image_size=48,
        patch_size=8,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    necks = {"neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16, "head_hidden_size": 8}
    return T.DepthAnythingForDepthEstimation, T.DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, **necks
    )


def frames(batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": noise(batch, 4, 3, 32, 32)}


@register("videomae", "vision", "video_tower", inputs=frames, slow=True)
def videomae() -> Any:
    return T.VideoMAEModel, T.VideoMAEConfig(**{**EYE, "image_size": 32}, num_frames=4, tubelet_size=2)


@register("hiera", "vision", "windows", "softmax", inputs=partial(pixels, size=64), slow=True)
def hiera() -> Any:
    return T.HieraModel, T.HieraConfig(
        embed_dim=16,
        image_size=[64, 64],
        depths=[1, 2],
        num_heads=[2, 4],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
    )


@eye("detr", "detector", "cross", slow=True)
def detr() -> Any:
    """Queries of objects read a picture through a small ResNet, an encoder and a decoder."""
    seen = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    depth = {
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5}
    return T.DetrModel, T.DetrConfig(
        backbone_config=seen, use_timm_backbone=False, use_pretrained_backbone=False, **depth, **widths
    )
