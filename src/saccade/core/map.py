"""Attention weights with named axes, and where they lie on a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.geometry import cells, cover, covered, on_picture, spread
from saccade.core.layout import KINDS
from saccade.core.site import Site, layers

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image

    from saccade.core.picture import Picture
    from saccade.core.record import Recording

AXES = ("layer", "head", "row", "column")


class Token(NamedTuple):
    """A column and its weight."""

    position: int
    weight: float
    kind: str
    text: str


@dataclass
class Map:
    """Weights with named axes, of which `mean`, `max`, `heads` and `layers` leave fewer."""

    tensor: Tensor
    labels: dict[str, tuple[Any, ...]]  # by axis, in order
    recording: Recording
    sample: int
    space: int  # the layout of the columns
    sites: list[Site]
    caption: str = ""
    gone: Tensor | None = None  # like `tensor`, bool: keys that were not there, so without weight

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.labels)

    def mean(self, *axes: str) -> Map:
        return self._over(axes, lambda t, at: t.mean(at))

    def max(self, *axes: str) -> Map:
        return self._over(axes, lambda t, at: t.amax(at))

    def heads(self, *heads: int) -> Map:
        count = self.tensor.shape[self._axis("head")]
        wrong = [h for h in heads if not -count <= h < count]
        if wrong:
            raise InputError(f"There is no head {wrong[0]} here.", f"use heads from 0 to {count - 1}")
        return self._choose("head", [h % count for h in heads])

    def layers(self, span: str | int) -> Map:
        """`8:24`, `-2`, `25%:75%` or `3`, as in patterns of sites."""
        self._axis("layer")
        chosen = [i for i, site in enumerate(self.sites) if site.index in layers(span, site.depth)]
        if not chosen:
            known = ", ".join(site.name for site in self.sites)
            raise InputError(f"No layer {span} was recorded.", f"there are {known}")
        return replace(self._choose("layer", chosen), sites=[self.sites[i] for i in chosen])

    def on_picture(self, item: int = 0, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Weights on one picture in its own geometry: (height, width), or a coarser `shape` of the same area.

        A token's weight is spread evenly over the part of its box that lies in the picture; where tiles and
        base views overlap they add up. So the array's sum is the share of attention on this picture, save
        tokens that show no place of it, such as the ends of rows. Axes that are left are averaged.
        """
        boxes, (width, height) = self._places(item), self.size(item)
        weights = self._flat().tensor
        return on_picture(weights, boxes, (width, height), shape or (height, width)).float().numpy()

    def grid(self, item: int = 0) -> np.ndarray:
        """`on_picture` as coarse as the tokens are."""
        return self.on_picture(item, self.cells(item))

    def grids(self, item: int = 0) -> Tensor:
        """The same by all other axes: (..., rows, columns)."""
        each = spread(self._places(item), self.size(item), self.cells(item)).to(self.tensor)
        return (self.tensor.movedim(self._axis("column"), -1) @ each.flatten(1)).unflatten(-1, each.shape[1:])

    def absent(self, item: int = 0) -> np.ndarray:
        """The places of `grid` that no token showed, for they were removed: bool."""
        found: np.ndarray = self._flat().absents(item).numpy()
        return found

    def absents(self, item: int = 0) -> Tensor:
        """The same by all other axes: (..., rows, columns), or (rows, columns) where it is the same in all."""
        size, shape, boxes = self.size(item), self.cells(item), self._places(item)
        shown = covered(self._boxes(item), size, shape)
        if self.recording.options["columns"] == "sinks":  # of the others nothing is known
            return torch.zeros_like(shown)
        there = boxes.isfinite().all(-1)
        if self.gone is not None and (gone := self.gone.movedim(self._axis("column"), -1)[..., there]).any():
            each = cover(boxes[there], size, shape).flatten(1).float()
            return shown & (((~gone).float() @ each).unflatten(-1, shape) <= 0.5)
        return shown & ~covered(boxes, size, shape)

    def cells(self, item: int = 0) -> tuple[int, int]:
        """Rows and columns of a picture that are as coarse as its tokens are."""
        return cells(self._boxes(item), self.size(item))

    def overlay(self, image: Image | None = None, item: int = 0) -> Image:
        """The picture with this map over it."""
        from saccade.report import overlay

        image = image or self.picture(item)
        return overlay.overlay(image, self.grid(item), self.caption, gone=self.absent(item))

    def picture(self, item: int = 0) -> Image:
        """The picture as it was kept, or a grey one."""
        from PIL import Image

        return kept.image() if (kept := self._kept(item)) else Image.new("RGB", self.size(item), (96, 96, 96))

    def top(self, k: int = 10) -> list[Token]:
        """The columns with the largest weights, a mean over the other axes."""
        weights = self._flat().tensor
        found = []
        for i in weights.topk(min(k, len(weights))).indices.tolist():
            position = self.labels["column"][i]
            if isinstance(position, str):
                found.append(Token(-1, float(weights[i]), position, ""))
                continue
            found.append(Token(position, float(weights[i]), *self._told(position)))
        return found

    def to_pandas(self) -> DataFrame:
        """A line for every weight: the axes, what a key is and writes, and the weight."""
        try:
            import pandas
        except ImportError as e:
            raise InputError("pandas is not installed.", "pip install pandas") from e
        lines = pandas.MultiIndex.from_product(self.labels.values(), names=self.labels)
        table = pandas.DataFrame({"weight": self.tensor.flatten().numpy()}, lines).reset_index()
        keys = self.labels.get("column", ())
        if keys and not isinstance(keys[0], str):
            kinds, texts = (dict(zip(keys, told)) for told in zip(*map(self._told, keys)))
            table.insert(len(self.labels), "kind", table["column"].map(kinds))
            table.insert(len(self.labels) + 1, "text", table["column"].map(texts))
        return table

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {len(labels)}" for axis, labels in self.labels.items())
        return f"<Map of {sizes or 'one number'}>"

    # ---- inside --------------------------------------------------------------------------------------

    def _axis(self, name: str) -> int:
        if name not in self.labels:
            raise InputError(f"This map has no axis {name!r}.", f"it has {', '.join(self.labels) or 'none'}")
        return list(self.labels).index(name)

    def _over(self, axes: Iterable[str], reduction: Any) -> Map:
        smaller = self
        for axis in axes:
            at = smaller._axis(axis)
            if smaller.tensor.shape[at] == 0:
                raise InputError(f"This map is empty along {axis!r}.", "record rows and columns that exist")
            labels = {name: value for name, value in smaller.labels.items() if name != axis}
            gone = None if smaller.gone is None else smaller.gone.all(at)
            smaller = replace(smaller, tensor=reduction(smaller.tensor, at), labels=labels, gone=gone)
        return smaller

    def _choose(self, axis: str, index: list[int]) -> Map:
        at = self._axis(axis)
        labels = {**self.labels, axis: tuple(self.labels[axis][i] for i in index)}
        chosen = torch.tensor(index)
        gone = None if self.gone is None else self.gone.index_select(at, chosen)
        return replace(self, tensor=self.tensor.index_select(at, chosen), labels=labels, gone=gone)

    def _flat(self) -> Map:
        self._axis("column")
        return self.mean(*(axis for axis in self.labels if axis != "column"))

    def _told(self, position: int) -> tuple[str, str]:
        """The kind and the text of a key."""
        texts = self.recording.texts[self.sample] if self.recording.texts and self.space == 0 else []
        kind = KINDS[int(self.recording.layouts[self.space].kind[self._row(), position])]
        return kind, (texts[position] if position < len(texts) else None) or ""

    def _row(self) -> int:
        """Of the layout: in other spaces than the main one beams and pictures may be more than rows."""
        return self.sample % self.recording.layouts[self.space].shape[0]

    def _boxes(self, item: int) -> Tensor:
        """Boxes (tokens, 4) of the space's tokens, NaN for those that show no place of the picture."""
        self._axis("column")
        columns = list(self.labels["column"])
        if columns and isinstance(columns[0], str):
            raise InputError("Sums have no place in a picture.", "record reduce=None, mean_heads or topk(k)")
        layout, row = self.recording.layouts[self.space], self._row()
        shows = (layout.where("image")[row] & (layout.item[row] == item)).cpu()
        if not shows[columns].any():
            raise InputError(
                f"Nothing was recorded of a picture {item}.", "count the sample's pictures from 0"
            )
        boxes = layout.boxes[row].cpu().double().masked_fill(~shows[:, None], torch.nan)
        if not boxes[columns].isfinite().all(-1).any():
            raise InputError(
                "The tokens of this picture have no boxes.",
                "session.locate(processor, images), before the model runs",
            )
        return boxes

    def _places(self, item: int) -> Tensor:
        """Of the recorded columns: (columns, 4)."""
        return self._boxes(item)[list(self.labels["column"])]

    def _kept(self, item: int) -> Picture | None:
        pictures, layout = self.recording.pictures, self.recording.layouts[self.space]
        sample = int(layout.sample[self._row()])
        return pictures[sample][item] if sample < len(pictures) and item < len(pictures[sample]) else None

    def size(self, item: int) -> tuple[int, int]:
        """Width and height in the units of the boxes."""
        if kept := self._kept(item):
            return kept.width, kept.height
        boxes = self._boxes(item).nan_to_num(0)
        right, bottom = (max(1, round(float(boxes[:, side].max()))) for side in (2, 3))
        return right, bottom
