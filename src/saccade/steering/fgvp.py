"""Blur what is outside of a region's mask, so that a region is told from its surroundings to the pixel.

    x'         = m * x + (1 - m) * blur(x)             of the picture, as large as the encoder takes it
    score      cosine of CLIP's vectors of x' and of "a photo of" the text, less the mean over unrelated texts
    region     the one with the largest score          mean over ways of marking and over CLIPs

Pixels within the mask stay as they are, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.system import option
from saccade.steering._parts import marks
from saccade.steering._parts.detecting import Region, Segmenter
from saccade.steering._parts.masks import Box, inside
from saccade.steering._parts.referring import Referring, check_marks

KEYPOINT = 0.06  # radius of its circle, of the longer side


@dataclass(eq=False)
class FGVP(Referring):
    card = Card(
        slug="fgvp",
        name="FGVP",
        kind="driver",
        family="steering",
        form="method",
        target="clip and other vlm",
        paper="Fine-Grained Visual Prompting (Yang et al., 2023)",
        summary="Blur what is outside of a region's mask, and choose among regions by CLIP",
        neutral={"sigma": 0.0, "side": None},
        code="ylingfeng/FGVP",
        choices=(
            "The picture's longer side is made as long as the encoder's input; the released code takes the shorter "
            "side where CLIP crops.",
            "The region with the largest similarity is also that of the largest softmax, which is not told.",
            "A contour's line is drawn inwards, so that the mask bounds it; the released code's stands on the border.",
            "Without a segmenter a mask is what the detector gives, or the box; where no region is named it is what "
            "the model looks at. A model that writes is asked about the picture with the region marked.",
            "Relations that a parse finds in the text are not used.",
        ),
        headline="3.0% to 4.6% average over prior methods on RefCOCO/+/g, up to 12.5% on RefCOCO+ testA",
        tags=("visual prompt", "mask", "segmentation", "blur", "zero-shot", "referring expression"),
    )

    marks: tuple[str, ...] = option(
        ("blur",),
        "ways of marking: blur and grey act outside of the mask, colour in it, contour on its border; box, circle, "
        "keypoint and crop know the box alone",
    )
    segmenter: Segmenter | None = option(None, "(picture, box) to a mask; the box itself unless given")
    sigma: float = option(100.0, "deviation of the blur in pixels", low=0)
    side: int | None = option(224, "of the marked picture, the longer one in pixels; none leaves it as it is")
    text: str = option("a photo of {question}", "what the regions are compared with")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_marks(self, self.marks, tuple(WAYS))

    def marked(self, picture: Image.Image, region: Region) -> list[Image.Image]:
        mask = region.mask
        if mask is None:
            mask = self.segmenter(picture, region.box) if self.segmenter else inside(region.box, picture.size)
        if not mask.any():
            raise InputError(f"The mask of the region {tuple(region.box)} is empty.", "leave the region out")
        side = self.side or max(picture.size)
        small, within, box = resized(picture, mask, region.box, side)
        return [WAYS[mark](small, within, box, self.sigma) for mark in self.marks]


def resized(
    picture: Image.Image, mask: np.ndarray, box: Box, side: int
) -> tuple[Image.Image, np.ndarray, Box]:
    """With `side` pixels on the longer side; the mask is what it touches."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    share = F.interpolate(torch.from_numpy(mask)[None, None].float(), size[::-1], mode="bilinear")[0, 0]
    return picture.resize(size, Image.Resampling.BICUBIC), (share > 0).numpy(), [scale * edge for edge in box]


def _keypoint(picture: Image.Image, box: Box) -> Image.Image:
    x, y, radius = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, KEYPOINT * max(picture.size)
    return marks.ellipse(picture, (x - radius, y - radius, x + radius, y + radius))


WAYS: dict[str, Callable[[Image.Image, np.ndarray, Box, float], Image.Image]] = {
    "blur": lambda picture, mask, box, sigma: marks.blur_outside(picture, mask, sigma),
    "grey": lambda picture, mask, box, sigma: marks.grey_outside(picture, mask),
    "colour": lambda picture, mask, box, sigma: marks.coloured(picture, mask),
    "contour": lambda picture, mask, box, sigma: marks.contour(picture, mask),
    "box": lambda picture, mask, box, sigma: marks.box(picture, box),
    "circle": lambda picture, mask, box, sigma: marks.ellipse(picture, box),
    "keypoint": lambda picture, mask, box, sigma: _keypoint(picture, box),
    "crop": lambda picture, mask, box, sigma: marks.crop(picture, box),
}
