"""Models of timm and modules of torch itself."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .base import noise, register


def picture(batch: int = 2, size: int = 64) -> tuple[Tensor]:
    return (noise(batch, 3, size, size),)


def states(batch: int = 2) -> tuple[Tensor]:
    return (noise(batch, 10, 32),)


def _timm(name: str, **sizes: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **sizes)


eye = partial(register, needs=("timm",))
plain = partial(register, inputs=states)


@eye("timm_vit", "timm", "vision", inputs=picture)
def timm_vit() -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=3, num_heads=4)


@eye("timm_eva", "timm", "vision", inputs=partial(picture, size=56))
def timm_eva() -> nn.Module:
    return _timm("eva02_tiny_patch14_224", img_size=56, embed_dim=48, depth=2, num_heads=4)


@eye("timm_swin", "timm", "vision", "windows", "softmax", inputs=partial(picture, size=56))
def timm_swin() -> nn.Module:
    return _timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 1), num_heads=(2, 4))


@eye("timm_maxvit", "timm", "vision", "windows", inputs=picture, slow=True)
def timm_maxvit() -> nn.Module:
    """Convolutions, then attention over windows, then over a grid with holes."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4))
    shape = MaxxVitCfg(
        embed_dim=(16, 32), depths=(1, 1), block_type=("M", "M"), stem_width=16, transformer_cfg=attention
    )
    return MaxxVit(shape, img_size=32, num_classes=5)


@eye("timm_davit", "timm", "vision", "windows", inputs=picture, slow=True)
def timm_davit() -> nn.Module:
    """Attention over windows, then between channels."""
    return _timm("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4)


@eye("timm_siglip", "timm", "vision", "pooling_head", inputs=picture)
def timm_siglip() -> nn.Module:
    return _timm("vit_base_patch16_siglip_224", img_size=64, embed_dim=48, depth=2, num_heads=4)


class Attend(nn.Module):
    """A bare `nn.MultiheadAttention` over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@plain("torch_mha", "torch")
def torch_mha() -> nn.Module:
    return Attend()


@plain("torch_encoder", "torch", "encoder")
def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2)
