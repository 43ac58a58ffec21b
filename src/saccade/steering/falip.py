"""Let the class token look at a box a little more, as an eye that turns there.

    d     distance of a patch from the middle of the patches that the box touches, in patches
    m     = exp(-d^2 / (2 * sigma^2)), from its least to its largest stretched over 0 to v
    s_cls,j <- s_cls,j + m_j      before the softmax, in every head of the last third of the layers

Pixels stay as they are. `rank` tells which of several boxes fits a text best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.session import attach
from saccade.steering._parts.regions import Box, inside, patch_boxes

TOUCHED = 0.01  # of a patch must lie in the box
LEAST = 1e-6  # so that a box of one patch has the peak too


@dataclass(eq=False)
class FALIP(Method):
    card = Card(
        slug="falip",
        name="FALIP",
        kind="method",
        family="steering",
        form="method",
        target="clip",
        paper="FALIP: Visual Prompt as Foveal Attention Boosts CLIP Zero-Shot Performance (Zhuang et al., 2024)",
        summary="Let the class token attend more to the patches of a box",
        neutral={"v": 0.0},
        code="pumpkin805/FALIP",
        choices=(
            "A patch counts where the box covers a hundredth of it; the released code takes the patch before too where "
            "the box begins on a border.",
            "The box lies where the processor puts it, crops among it; the released code stretches the picture.",
            "ViT-B/16's layers 8 to 11 of 12 scale with the tower's depth.",
        ),
        tags=("visual prompt", "region", "zero-shot", "referring expression", "foveal attention"),
    )

    boxes: tuple[Box, ...] = option(
        (), "x0 y0 x1 y1 for every picture, or one for all, in pixels of the pictures given to session.locate, "
        "or else of what the tower is given"
    )  # fmt: skip
    v: float = option(0.2, "the most that is added to a score; 0 changes nothing")
    sigma: float = option(100.0, "spread of the bell in patches", low=1e-3)
    sites: Sites = option("vision.67%:.self", "layers of the vision tower")

    def bias(self, call: AttentionCall) -> Tensor | None:
        if self.v == 0:
            return None
        if not bool(call.columns("special")[..., 0].all()):
            raise InputError(
                f"FALIP turns the class token, and {call.site.name} has none.",
                "use a tower with one, such as CLIP's",
            )
        term = torch.zeros(call.q.shape[0], 1, call.q.shape[2], call.k.shape[2], device=call.q.device)
        term[:, 0, 0] = self._foveal(call)
        return term

    def _foveal(self, call: AttentionCall) -> Tensor:
        """m for every picture: (batch, tokens)"""
        patches = patch_boxes(call)
        if len(self.boxes) not in (1, patches.shape[0]):
            raise InputError(
                f"There are {len(self.boxes)} boxes for {patches.shape[0]} pictures.",
                "give one for each, or one for all",
            )
        touched = inside(patches, self.boxes) > TOUCHED
        if not bool(touched.any(1).all()):
            raise InputError(
                "A box lies outside of what the tower sees.", "give boxes in pixels, x0 y0 x1 y1"
            )
        return self.v * foveal(patches, touched, self.sigma)


def foveal(patches: Tensor, touched: Tensor, sigma: float) -> Tensor:
    """A bell over the touched ones of the patches (batch, tokens, 4), from 0 to 1: (batch, tokens)."""
    patches = patches.double()
    middles = (patches[..., :2] + patches[..., 2:]) / 2
    low = middles.masked_fill(~touched[..., None], torch.inf).amin(1, keepdim=True)
    high = middles.masked_fill(~touched[..., None], -torch.inf).amax(1, keepdim=True)
    away = (2 * middles - low - high) / (patches[..., 2:] - patches[..., :2])
    away = away.round() / 2  # they stand in a grid, which processors tell nearly
    bell = torch.exp(-away.square().sum(-1) / (2 * sigma**2))
    least = bell.masked_fill(~touched, torch.inf).amin(1, keepdim=True)
    most = bell.masked_fill(~touched, -torch.inf).amax(1, keepdim=True)
    return torch.where(touched, (bell - least + LEAST) / (most - least + LEAST), 0)


@torch.no_grad()
def rank(
    model: Any,
    processor: Any,
    picture: Image.Image,
    boxes: Sequence[Box],
    text: str,
    unrelated: Sequence[str] = (),
    **options: Any,
) -> Tensor:
    """How well each box of a picture fits a text: (boxes,), the mean fit of unrelated texts taken off."""
    pictures = [picture] * len(boxes)
    inputs = processor(text=[text, *unrelated], images=pictures, padding=True, return_tensors="pt").to(
        model.device
    )
    with attach(model, FALIP(boxes=tuple(boxes), **options)) as session:
        session.locate(processor, pictures)
        fits = model(**inputs).logits_per_image  # (boxes, texts)
        session.locate(processor, [])
    return fits[:, 0] - fits[:, 1:].mean(1) if unrelated else fits[:, 0]
