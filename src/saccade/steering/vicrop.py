"""Find where the model looks, cut that out of the picture, and ask again with the crop beside it.

    A      attention of the word that begins the answer on the picture, one layer, mean over heads
    rel    A(question) / A(reference)                                       reference: a general description
    grad   A * relu(d log p(likeliest first word) / d A)
    pure   |d log p / d pixel| (question) / the same (reference), where there is detail, mean over patches
    box    of every window size (1, 1.2, .. 2 times the encoder's input) where the map's sum is largest; of
           these the one with the largest (sum - mean of the sums one step aside) / area

The picture stays and its crop follows it. Where queries stand between picture and words, A is multiplied by
theirs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from saccade.core.boxes import picture_boxes, pixel_places, tower_boxes
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.geometry import cells, covered, on_picture
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.site import match
from saccade.core.system import option
from saccade.steering._parts.glance import placed
from saccade.steering._parts.watch import Watch

Box = tuple[int, int, int, int]
ANY_SIZE = 224  # the window where the encoder takes pictures of any size
BLUR = 0.8  # deviation of the blur over 3 x 3 pixels
MEDIAN = 7


@dataclass(eq=False)
class ViCrop(Driver):
    card = Card(
        slug="vicrop",
        name="ViCrop",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="MLLMs Know Where to Look: Training-free Perception of Small Visual Details with Multimodal "
        "LLMs (Zhang et al., 2025)",
        summary="Crop what the model looks at, and ask again with the crop beside the picture",
        needs=("image",),
        neutral={"append": False},
        code="saccharomycetes/mllms_know",
        choices=(
            "The map lies where the tokens were cut from, also of crops, tiles and merged patches; "
            "the released code stretches the tokens over the whole picture.",
            "The map is the model's own; the methods of the stack act on the answer.",
            "The layer is 14 of LLaVA's 32, scaled, or the next whose window reaches the picture; "
            "the released code reads 22 of 36 in Qwen2.5-VL.",
            "Sides beyond `blocks` are cut into equal parts no longer than it; the released code asks for "
            "the height alone.",
            "Every picture of a question is mapped by itself and gives a crop; the released code takes one.",
        ),
        tags=(
            "visual cropping",
            "small details",
            "relative attention",
            "gradient",
            "high resolution",
            "zoom",
        ),
    )

    map: str = option("rel", "what tells where the model looks", choices=("rel", "grad", "pure"))
    sites: str = option(
        "text.44%:.self", "the first of these layers that sees the whole picture; the paper's 14 of 32"
    )
    reference: str = option(
        "Write a general description of the image.", "the prompt that rel and pure divide by"
    )
    window: int | None = option(
        None, "side of the smallest window in pixels; the encoder's input unless given"
    )
    ratios: tuple[float, ...] = option(
        (1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
        "sizes of the window; where each covers the map, the box is the picture",
    )
    blocks: int = option(1024, "pixels of a side beyond which a picture is mapped in parts", low=1)
    append: bool = option(True, "ask with the crop; false only finds it and changes nothing")

    def run(self, session: Session, question: Question) -> Answer:
        if self.append:
            check_room(session, question)
        maps = [self.heat(session, question, picture) for picture in question.images]
        side = self.window or encoder_side(session, question, question.images[0])
        boxes = [best_box(h, p.size, side, self.ratios) for h, p in zip(maps, question.images, strict=True)]
        crops = [picture.crop(box) for picture, box in zip(question.images, boxes, strict=True)]
        answer = question.ask(session, [*question.images, *crops] if self.append else None)
        answer.found = {"maps": maps, "boxes": boxes}
        for number, (picture, heat, box, crop) in enumerate(
            zip(question.images, maps, boxes, crops, strict=True)
        ):
            of = f" {number}" if number else ""
            answer.pictures |= {
                f"map{of}": shown(heat, picture),
                f"box{of}": framed(picture, box),
                f"crop{of}": crop,
            }
        return answer

    def heat(self, session: Session, question: Question, picture: Image.Image) -> Tensor:
        """Where the model looks to answer: (rows, columns) over the picture, 0 where no token shows it."""
        look = self._by_pixels if self.map == "pure" else self._by_attention
        parts = [[look(session, question, part) for part in row] for row in cut(picture, self.blocks)]
        shape = (parts[0][0].shape[0], parts[0][0].shape[1])
        level = [[_resized(part, shape) for part in row] for row in parts]
        return torch.cat([torch.cat(row, 1) for row in level])

    def _by_attention(self, session: Session, question: Question, picture: Image.Image) -> Tensor:
        found, reaches = self._attention(session, question, picture, question.text)
        if self.map == "rel":
            general, too = self._attention(session, question, picture, self.reference)
            found, reaches = ratio(found, general), reaches & too
            found = found * _seen(session, question, picture)
        if not reaches.any():
            raise InputError(
                f"No layer of {self.sites} sees the whole picture from the answer's place.",
                "their windows are too short: name other layers with sites=",
            )
        return found[int(reaches.int().argmax())]

    def _attention(
        self, session: Session, question: Question, picture: Image.Image, text: str
    ) -> tuple[Tensor, Tensor]:
        """Of every layer, as a grid over the picture (layers, rows, columns); and which see all of it."""
        words = Looks(sites=self.sites, rows="last")
        queries = [Looks(sites=between)] if (between := _queries(session)) else []
        inputs = question.inputs(session.model, [picture], text)
        out = session.forward(inputs, [words, *queries], grad=self.map == "grad")
        seen = [w for watch in (words, *queries) for w in watch.seen]
        reaches = [bool((w[..., c] > 0).any(1).all()) for w, c in zip(words.seen, words.columns, strict=True)]
        if self.map == "grad":
            slopes = torch.autograd.grad(_likeliest(out), seen)
            seen = [w * slope.relu() for w, slope in zip(seen, slopes, strict=True)]
        maps = [w.detach()[0].mean(0).cpu() for w in seen]  # (rows, keys)
        found = [m[0, c.cpu()] for m, c in zip(maps, words.columns)]  # (visual tokens,)
        if queries:
            found = [tokens @ maps[-1] for tokens in found]
        boxes = _boxes(session, question, picture)
        shape = cells(boxes, picture.size)
        return torch.stack([on_picture(f, boxes, picture.size, shape) for f in found]), torch.tensor(reaches)

    def _by_pixels(self, session: Session, question: Question, picture: Image.Image) -> Tensor:
        norms = [self._slopes(session, question, picture, text) for text in (question.text, self.reference)]
        places = _of_channels(pixel_places(session.model, question.processor, picture.size))[..., 0, :]
        inside = places.isfinite().all(-1)
        where, relative = places[inside], ratio(*norms)[inside]
        detail = high_pass(picture, _resolution(norms[0], int(inside.sum()), picture.size))
        relative = relative * sample(detail > detail.median(), where, picture.size)
        seen = _seen(session, question, picture)
        return pooled(relative, where, picture.size, (seen.shape[0], seen.shape[1])) * seen

    def _slopes(self, session: Session, question: Question, picture: Image.Image, text: str) -> Tensor:
        """Norm over colours of the gradient at every pixel that the encoder is given."""
        inputs = question.inputs(session.model, [picture], text)
        name = _pixels_of(inputs)
        pixels = inputs[name] = inputs[name].detach().requires_grad_()
        out = session.forward(inputs, grad=True)
        (slope,) = torch.autograd.grad(_likeliest(out), pixels, allow_unused=True)
        if slope is None:
            raise InputError(
                f"{type(session.model).__name__} reads pictures as codes, through which no gradient comes to pixels.",
                "use map='rel' or map='grad'",
            )
        return _of_channels(slope[..., None].float().cpu())[..., 0].norm(dim=-1)


@dataclass(eq=False)
class Looks(Watch):
    """And which of the keys show a picture."""

    columns: list[Tensor] = field(default_factory=list)  # (keys,)

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        self.columns.append(call.columns("image")[0, 0, 0])
        return super().weights(call, w)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where there is nothing to compare with."""
    return torch.where(below == 0, 0, above / below)


# ---- the box --------------------------------------------------------------------------------------------


def best_box(heat: Tensor, size: tuple[int, int], window: float, ratios: Sequence[float]) -> Box:
    """The window on a picture of `size` (width, height) whose sum of heat (rows, columns) stands out most."""
    rows, columns = heat.shape
    across, down = size[0] / columns, size[1] / rows  # of a cell
    best: tuple[float, float, float, float] | None = None
    for times in ratios:
        side = window * times
        w, h = min(columns, max(1, int(side / across))), min(rows, max(1, int(side / down)))
        if (w, h) == (columns, rows):
            continue
        sums = F.avg_pool2d(heat[None, None], (h, w), 1, divisor_override=1)[0, 0]
        y, x = divmod(int(sums.argmax()), sums.shape[1])
        beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        near = [float(sums[at]) for at in beside if 0 <= at[0] < sums.shape[0] and 0 <= at[1] < sums.shape[1]]
        sharpness = (float(sums[y, x]) - sum(near) / len(near)) / (w * h)
        if best is None or sharpness > best[0]:
            best = sharpness, max(side, across, down), (x + w / 2) * across, (y + h / 2) * down
    if best is None:
        return 0, 0, *size
    (left, right), (top, bottom) = (_around(best[2 + i], best[1], size[i]) for i in (0, 1))
    return left, top, right, bottom


def _around(middle: float, side: float, limit: int) -> tuple[int, int]:
    start = min(max(0, round(middle - side / 2)), max(0, limit - round(side)))
    return start, min(limit, start + round(side))


def encoder_side(session: Session, question: Question, picture: Image.Image) -> int:
    """Pixels of a side of the encoder's input, where it has one size."""
    config = getattr(session.model.config, "vision_config", None)
    known: Any = getattr(config, "image_size", None)
    side = known[-1] if isinstance(known, list | tuple) else known
    inputs = question.inputs(session.model, [picture])
    shape = inputs[_pixels_of(inputs)].shape
    return side if len(shape) > 3 and tuple(shape[-2:]) == (side, side) else ANY_SIZE


def check_room(session: Session, question: Question) -> None:
    """More pictures make a longer prompt, or else they are not read."""
    lengths = [
        question.inputs(session.model, images)["input_ids"].shape[1]
        for images in (question.images, [*question.images, *question.images])
    ]
    if lengths[1] <= lengths[0]:
        raise InputError(
            f"{type(session.model).__name__} has no place for a crop beside the picture.",
            "use a model that takes several pictures, or ViCrop(append=False) to find the crop only",
        )


def cut(picture: Image.Image, limit: int) -> list[list[Image.Image]]:
    """Rows of equal parts, no side of which is longer than the limit."""
    edges = (np.linspace(0, side, math.ceil(side / limit) + 1).round() for side in picture.size)
    columns, rows = (list(itertools.pairwise(map(int, at))) for at in edges)
    return [[picture.crop((left, top, right, bottom)) for left, right in columns] for top, bottom in rows]


# ---- pixels ---------------------------------------------------------------------------------------------


def high_pass(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Where the picture has detail: the norm over colours of what a blur takes away, its noise taken out by a
    median: (rows, columns) at `size` (width, height)."""
    small = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    colours = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)[:, None]
    bell = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * BLUR**2))
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    blurred = F.conv2d(F.pad(colours, (1, 1, 1, 1), "reflect"), kernel[None, None])
    detail = (colours - blurred).norm(dim=0)[0].numpy()
    framed = np.pad(detail, MEDIAN // 2, mode="symmetric")
    return torch.from_numpy(
        np.median(np.lib.stride_tricks.sliding_window_view(framed, (MEDIAN, MEDIAN)), (2, 3))
    )


def sample(values: Tensor, where: Tensor, size: tuple[int, int]) -> Tensor:
    """Values (rows, columns) over a picture at places (n, 2), x and y, in it."""
    row, column = _cells_of(where, size, (values.shape[0], values.shape[1]))
    return values[row, column]


def pooled(values: Tensor, where: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Means of values (n,) at places (n, 2) in the cells of a grid (rows, columns); 0 for none."""
    row, column = _cells_of(where, size, shape)
    total, count = torch.zeros(2, *shape, dtype=torch.float64)
    total.index_put_((row, column), values.double(), accumulate=True)
    count.index_put_((row, column), torch.ones_like(values, dtype=torch.float64), accumulate=True)
    return total / count.clamp_min(1)


def _cells_of(where: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    row, column = ((where[:, i] / size[i] * shape[1 - i]).long().clamp(0, shape[1 - i] - 1) for i in (1, 0))
    return row, column


def _of_channels(values: Tensor) -> Tensor:
    """Numbers of a processor's pixels (..., n) with their colours before the last axis: (..., 3, n)."""
    if values.ndim > 4:  # (..., colours, rows, columns, n)
        return values.movedim(-4, -2)
    if values.shape[-2] % 3:
        raise InputError("The pixels of this model do not have three colours.", "make the map by attention")
    return values.unflatten(-2, (3, -1)).movedim(-3, -2)  # rows of patches, one colour after another


def _resolution(norms: Tensor, inside: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the picture as the encoder is given it."""
    if norms.ndim > 2:
        return norms.shape[-1], norms.shape[-2]
    step = math.sqrt(size[0] * size[1] / inside)
    return max(2, round(size[0] / step)), max(2, round(size[1] / step))


# ---- the model ------------------------------------------------------------------------------------------


def _likeliest(out: Any) -> Tensor:
    """Log-probability of the likeliest next word."""
    return out.logits[0, -1].float().log_softmax(-1).max()


def _pixels_of(inputs: Mapping[str, Any]) -> str:
    return next(name for name in inputs if "pixel_values" in name)


def _queries(session: Session) -> str:
    """Where queries read the picture, the third of the paper's six such layers; empty without queries."""
    between = [site.name for site in session.sites if site.tower == "qformer" and site.kind == "cross"]
    return between[len(between) // 3] if between else ""


def _boxes(session: Session, question: Question, picture: Image.Image) -> Tensor:
    """Of the tokens on which the map lies: (tokens, 4)."""
    if _queries(session):
        last = match("vision.-1.self", session.sites)[0]
        boxes = tower_boxes(session.model, question.processor, picture.size, last)
    else:
        boxes = picture_boxes(session.model, question.processor, picture.size)
    return placed(boxes, session.model)


def _seen(session: Session, question: Question, picture: Image.Image) -> Tensor:
    """The cells of the map that tokens show."""
    boxes = _boxes(session, question, picture)
    return covered(boxes, picture.size, cells(boxes, picture.size))


# ---- pictures of it -------------------------------------------------------------------------------------


def shown(heat: Tensor, picture: Image.Image) -> Image.Image:
    """A map in grey, as large as its picture."""
    level = (heat / heat.max().clamp_min(1e-12) * 255).round().to(torch.uint8)
    return Image.fromarray(level.numpy()).resize(picture.size, Image.Resampling.NEAREST)


def framed(picture: Image.Image, box: Box) -> Image.Image:
    copy = picture.copy()
    ImageDraw.Draw(copy).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 0, 0), width=2)
    return copy


def _resized(heat: Tensor, shape: tuple[int, int]) -> Tensor:
    """The parts of a cut picture may differ by a cell."""
    return heat if tuple(heat.shape) == shape else F.interpolate(heat[None, None], shape, mode="area")[0, 0]
