"""Draw a red circle around a region, as one does to show it.

    s(r, t)    cosine of CLIP's vectors of the picture with region r marked and of the text t
    score      s(r, t) - mean of s(r, b) over unrelated texts b          mean over ways of marking and over CLIPs
    region     the one with the largest score

The ellipse touches the sides of the region's box from within. `keypoints` finds where on a picture several things are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.system import option
from saccade.steering._parts.detecting import Region
from saccade.steering._parts.likeness import Likeness
from saccade.steering._parts.marks import blur_outside, ellipse, grey_outside
from saccade.steering._parts.masks import inside_ellipse
from saccade.steering._parts.referring import Referring, check_marks

BLUR = 0.3  # deviation, of the longer side
LINE = 0.01  # of a keypoint's circle, of the longer side
TINY = 1e-6


@dataclass(eq=False)
class RedCircle(Referring):
    card = Card(
        slug="red_circle",
        name="Red Circle",
        kind="driver",
        family="steering",
        form="method",
        target="clip",
        paper="What does CLIP know about a red circle? Visual prompt engineering for VLMs (Shtedritski et al., 2023)",
        summary="Draw a red circle around a region, and choose among regions by CLIP",
        neutral={"thickness": 0.0},
        choices=(
            "The ellipse is inscribed in the box, not slightly larger: what is asked for is what is marked.",
            "What is outside of the ellipse is blurred by 0.3 of the longer side, which the paper does not tell.",
            "A model that writes is asked about the picture with the region marked; of one region nothing is chosen, "
            "and where none is named it is what the model looks at.",
            "Several CLIPs and ways of marking count alike.",
        ),
        tags=("visual prompt", "region", "zero-shot", "referring expression", "keypoints"),
    )

    marks: tuple[str, ...] = option(
        ("circle",), "ways of marking: circle, blur and grey, which act on what is outside of it"
    )
    thickness: float = option(0.01, "of the line, as a share of the longer side; 0 for none", low=0)
    opacity: float = option(1.0, "of the line", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_marks(self, self.marks, ("circle", "blur", "grey"))

    def marked(self, picture: Image.Image, region: Region) -> list[Image.Image]:
        return [self._marked(picture, region, mark) for mark in self.marks]

    def _marked(self, picture: Image.Image, region: Region, mark: str) -> Image.Image:
        side = max(picture.size)
        if mark == "circle":
            width = max(1, round(self.thickness * side)) if self.thickness else 0
            return Image.blend(picture, ellipse(picture, region.box, width), self.opacity)
        mask = inside_ellipse(region.box, picture.size)
        return grey_outside(picture, mask) if mark == "grey" else blur_outside(picture, mask, BLUR * side)


def keypoints(
    like: Likeness,
    picture: Image.Image,
    parts: Sequence[str],
    grid: tuple[int, int] = (7, 7),
    distinct: bool = False,
    text: str = "an image of a {}",
) -> list[tuple[float, float]]:
    """Of every part the middle, x and y, of the circle on a grid of rows and columns that is most like it; with
    `distinct` every part has a place of its own."""
    rows, columns = grid
    across, down = picture.width / columns, picture.height / rows
    middles = [((x + 0.5) * across, (y + 0.5) * down) for y in range(rows) for x in range(columns)]
    radius = max(across, down) / 2
    width = max(1, round(LINE * max(picture.size)))
    copies = [ellipse(picture, (x - radius, y - radius, x + radius, y + radius), width) for x, y in middles]
    alike = like(copies, [text.format(part) for part in parts]).T  # (parts, places)
    places = assigned(alike) if distinct else alike.argmax(1).tolist()
    return [middles[place] for place in places]


def assigned(scores: Tensor) -> list[int]:
    """Of scores (parts, places) a place of its own for every part, those with the largest shares first."""
    parts, places = scores.shape
    if parts > places:
        raise InputError(f"{parts} parts have no place of their own among {places}.", "take a finer grid")
    idle = scores.new_zeros(1, places)  # takes the places that no part does
    sums = torch.cat([scores.new_ones(parts), scores.new_tensor([max(places - parts, TINY)])])
    shares = sinkhorn(torch.cat([scores, idle]), sums, scores.new_ones(places))[:-1]
    taken = [0] * parts
    for _ in range(parts):
        part, place = divmod(int(shares.argmax()), places)
        taken[part] = place
        shares[part], shares[:, place] = -1, -1
    return taken


def sinkhorn(
    scores: Tensor, rows: Tensor, columns: Tensor, sharpness: float = 100.0, rounds: int = 500
) -> Tensor:
    """Shares (rows, columns) that grow with the scores and sum to `rows` and `columns`."""
    left, right = torch.zeros_like(rows), torch.zeros_like(columns)
    logits = sharpness * scores
    for _ in range(rounds):
        left = rows.log() - (logits + right).logsumexp(1)
        right = columns.log() - (logits + left[:, None]).logsumexp(0)
    return (logits + left[:, None] + right).exp()
