"""Which part of a picture each visual feature, and each token of a vision tower, was cut from.

No family says it, so two probes ask. Pictures of known brightness through the processor tell which pixel
each element of its output shows. The tower with its attention silenced is local: exchanging chosen lines
of its input tells which of them each token comes from. What gathers from everywhere (a class token, a
Q-former's queries) or nowhere (newlines, padding) has no box: NaN.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from saccade.core.errors import InputError
from saccade.core.probe import featurizer, lines, patch_lines, patch_of, silenced, trace
from saccade.core.runtime import Runtime
from saccade.core.seams.plain import PlainHost
from saccade.core.site import Site, match
from saccade.models.towers import EMBEDDER

SHOWN = 0.5  # of an element must be picture; the rest is padding that was mixed in
ALIKE = 1.05  # how much larger the patches of a tile may be than those of another tile of the same view
STEPS = 120  # pixels, or frames, that one ramp of 255 levels tells apart
RAMPS = 8  # at most, along one side


def picture_boxes(
    model: nn.Module, processor: Any, size: tuple[int, int], *, crowded: bool = False
) -> Tensor:
    """Boxes of the features of one picture of `size` (width, height), in the order in which they fill its
    placeholders: (features, 4) x0 y0 x1 y1 in its pixels.

    `crowded`: another picture stands in the same sample, which makes some models cut fewer tiles.
    """
    return _origins(model, processor, "image", size, crowded=crowded)[0].boxes()


def tower_boxes(model: nn.Module, processor: Any, size: tuple[int, int], site: Site | str) -> Tensor:
    """Boxes of the tokens that come to a site of the vision tower, tile after tile: (tokens, 4)."""
    return _origins(model, processor, "image", size, site)[1].boxes()


def source(model: nn.Module, processor: Any, size: tuple[int, int], site: Site | str) -> Tensor:
    """Which tokens at a site of the vision tower each feature is made of: (features, tokens), bool."""
    features, tokens = _origins(model, processor, "image", size, site)
    inside = (tokens.first >= features.first[:, None]) & (tokens.last <= features.last[:, None])
    return inside.all(-1) & features.local[:, None] & tokens.local


def clip_boxes(model: nn.Module, processor: Any, size: tuple[int, int], frames: int) -> tuple[Tensor, Tensor]:
    """Boxes of the features of a clip (features, 4), and the first and last of its frames that each of
    them shows (features, 2), -1 for none."""
    origin = _origins(model, processor, "video", size, frames=frames)[0]
    shown = origin.extent()[:, 2]
    return origin.boxes(), torch.where(shown.isnan(), -1, shown).long()


def pixel_places(model: nn.Module, processor: Any, size: tuple[int, int]) -> Tensor:
    """Where in a picture of `size` (width, height) every number that the processor makes of it comes
    from: its x and y on a last axis, NaN for padding."""
    model = getattr(model, "_orig_mod", model)
    host = Runtime.of(model).host
    process = functools.partial(_processed, processor, "image", False, featurizer(host, "image")[1])
    return _Pixels(process, (1, size[1], size[0]), (2, 1), patch_of(model)).places


@dataclass(frozen=True)
class Located:
    """Pictures that are given to a model together, and where their tokens come from."""

    pictures: dict[str, list[int]]  # by kind: tokens of every picture, in order
    boxes: dict[str, Tensor]  # by kind, or by the space that text reads by cross-attention: (tokens, 4)
    tower_boxes: Callable[[Site], Tensor]  # of the tokens of all pictures at a site of the tower


def locate(model: nn.Module, processor: Any, images: Sequence[Any]) -> Located:
    """Boxes of pictures as the processor is given them: a list, or a list for every sample."""
    nested = all(isinstance(image, list | tuple) for image in images)
    samples = images if nested else [images]
    found = [(_size(image), nested and len(group) > 1) for group in samples for image in group]
    origins = [_origins(model, processor, "image", size, crowded=crowded)[0] for size, crowded in found]
    boxes = [origin.boxes() for origin in origins]

    def tower(site: Site) -> Tensor:
        parts = [_origins(model, processor, "image", size, site, crowded=crowded) for size, crowded in found]
        return torch.cat([part[1].boxes() for part in parts])

    if _fills_placeholders(model):
        return Located({"image": [len(part) for part in boxes]}, {"image": torch.cat(boxes)}, tower)
    missing = torch.full_like(boxes[0], torch.nan)  # samples with fewer pictures are filled up
    most, rest = max(len(group) for group in samples), iter(boxes)
    rows = [[*itertools.islice(rest, len(group)), *[missing] * (most - len(group))] for group in samples]
    return Located({}, {"text.context": torch.cat([part for row in rows for part in row])}, tower)


def _size(image: Any) -> tuple[int, int]:
    size = getattr(image, "size", None)
    if not isinstance(size, tuple):
        raise InputError(
            f"A {type(image).__name__} is no picture.", "pass pictures of PIL: Image.fromarray(array)"
        )
    return size


# ---- what is found --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """For every token the first and last line, along each axis, of the cells that it comes from."""

    first: Tensor  # (tokens, axes)
    last: Tensor
    local: Tensor  # (tokens,), False for what has no place
    cells: Tensor  # (*axes, coordinates, 2), lowest and highest, NaN for padding

    def extent(self) -> Tensor:
        """(tokens, coordinates, 2), lowest and highest in the picture."""
        shape = (len(self.first), *self.cells.shape[-2:])
        low, high = torch.full(shape[:2], torch.nan), torch.full(shape[:2], torch.nan)
        for step in itertools.product(*(range(n + 1) for n in (self.last - self.first).amax(0).tolist())):
            at = torch.minimum(self.first + torch.tensor(step), self.last)
            part = self.cells[tuple(at.T)]
            low, high = low.fmin(part[..., 0]), high.fmax(part[..., 1])
        return torch.stack([low, high], -1).masked_fill(~self.local[:, None, None], torch.nan)

    def boxes(self) -> Tensor:
        return self.extent()[:, :2].transpose(1, 2).flatten(1)


_found: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, dict[Any, tuple[Origin, ...]]]] = (
    WeakKeyDictionary()
)


def _origins(
    model: nn.Module,
    processor: Any,
    kind: str,
    size: tuple[int, int],
    site: Site | str | None = None,
    *,
    frames: int = 1,
    crowded: bool = False,
) -> tuple[Origin, ...]:
    """Of the features and, where one is asked for, of the tokens at a site."""
    model = getattr(model, "_orig_mod", model)
    name = site.name if isinstance(site, Site) else site
    settings = repr(getattr(processor, "image_processor", None) or processor)  # they may be changed in place
    key = (kind, size, name, frames, crowded, settings)
    known = _found.setdefault(model, WeakKeyDictionary()).setdefault(processor, {})
    if key not in known:
        runtime = Runtime.of(model)
        place = None if name is None else match(name, runtime.host.sites)[0]
        with runtime.alone(), torch.no_grad():
            known[key] = _probe(runtime.host, processor, kind, size, place, frames, crowded)
    return known[key]


# ---- through the processor ------------------------------------------------------------------------------


class _Pixels:
    """What the processor makes of a picture, and where in the picture each element of it comes from."""

    def __init__(
        self,
        process: Callable[[Tensor], dict[str, Any]],
        shape: tuple[int, ...],
        sides: tuple[int, ...],
        patch: tuple[int, int],
    ) -> None:
        """`process` takes brightness, 0 to 1, of `shape`: frames, height, width. `sides` are the axes of
        that which are of interest."""
        self.inputs = process(torch.zeros(shape))
        self.name = next(name for name in self.inputs if "pixel_values" in name)
        black = self.inputs[self.name].float()
        white = process(torch.ones(shape))[self.name].float()
        self.black, self.range = black, white - black
        self.shown = self.range.abs() > SHOWN * self.range.abs().max()
        self.packed = black.ndim < 4  # rows of patches instead of pictures
        self.tiles = black.shape[: -2 if self.packed else -3].numel()
        self.patch = patch
        coordinates = []
        for axis in sides:
            value = torch.zeros_like(black)
            for ramp in _ramps(shape, axis):
                value += (process(ramp)[self.name].float() - black) / self.range
            coordinates.append((value * shape[axis] / _ramp_count(shape[axis])).where(self.shown, torch.nan))
        self.places = torch.stack(coordinates, -1)
        extents = [self._extent(c, shape[axis], axis) for c, axis in zip(coordinates, sides)]
        self.cells, self.lines = torch.stack(extents, -2), lines(black.shape, patch)
        if black.ndim == 3:
            self.cells, self.lines = _in_views(self.cells.view(*black.shape[:2], -1, 2))

    def _extent(self, coordinate: Tensor, limit: int, axis: int) -> Tensor:
        """Lowest and highest of every cell, half an element beyond the middles of its outer elements."""
        parts = self._split(coordinate)
        nothing = parts.isnan()
        low = parts.masked_fill(nothing, torch.inf).amin(-1)
        high = parts.masked_fill(nothing, -torch.inf).amax(-1)
        gone = nothing.all(-1)
        if axis == 0:
            low, high = low.floor(), high.floor()
        else:  # a base view has other steps than its tiles
            steps = (high - low).masked_fill(gone, 0) / max(1, self.patch[axis - 1] - 1)
            steps = steps.view(self.tiles, -1)
            half = steps.amax(-1, keepdim=True).expand_as(steps).reshape(low.shape) / 2
            low, high = (low - half).clamp_min(0), (high + half).clamp_max(limit)
        return torch.stack([low, high], -1).masked_fill(gone[..., None], torch.nan)

    def _split(self, value: Tensor) -> Tensor:
        """Into cells: (*axes, elements)."""
        if self.packed:
            return value.reshape(-1, value.shape[-1])
        height, width = self.patch
        value = value.reshape(-1, *value.shape[-3:])
        over = (-value.shape[-1] % width, -value.shape[-2] % height)
        value = nn.functional.pad(value, (0, over[0], 0, over[1]), value=torch.nan)
        tiles, channels, rows, columns = value.shape
        value = value.view(tiles, channels, rows // height, height, columns // width, width)
        return value.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def noise(self, seed: int) -> Tensor:
        """Pixels that a picture could have; padding stays what it is."""
        drawn = torch.rand(self.black.shape, generator=torch.Generator().manual_seed(seed))
        return torch.where(self.shown, self.black + drawn * self.range, self.black)


def _in_views(extents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Cells (views, rows, columns, sides, 2), and the lines, of patches in rows with these extents (tiles, patches,
    sides, 2). Tiles whose patches are of one size are parts of one view, unless they are frames."""
    sizes = (extents[..., 1] - extents[..., 0])[..., :2].nan_to_num(0).amax(1)  # (tiles, sides)
    view = torch.arange(len(sizes))
    if extents.shape[-2] == 2:
        ratio = sizes[:, None] / sizes
        view = ((ratio < ALIKE) & (ratio > 1 / ALIKE)).all(-1).int().argmax(1).unique(return_inverse=True)[1]
    axes = patch_lines(extents[..., :2, :].mean(-1) / sizes[:, None], view)
    shape = [int(axis.max()) + 1 for axis in axes]
    table = torch.arange(int(np.prod(shape))).view(shape)
    cell = table[torch.broadcast_tensors(*axes)].flatten()[:, None].expand(-1, extents.shape[-2])
    empty = torch.full((table.numel(), extents.shape[-2]), torch.inf)
    low, high = extents.flatten(0, 1).unbind(-1)
    low = empty.scatter_reduce(0, cell, low.nan_to_num(torch.inf), "amin")
    high = -empty.scatter_reduce(0, cell, (-high).nan_to_num(torch.inf), "amin")
    cells = torch.stack([low, high], -1)
    return cells.where(cells.isfinite(), torch.nan).view(*shape, -1, 2), axes


def _ramps(shape: tuple[int, ...], axis: int) -> Iterator[Tensor]:
    """Brightness along an axis, one ramp after another, so that each has levels enough for its pixels.
    Their sum says where an element is."""
    length = shape[axis]
    steps = _ramp_count(length)
    middles = (torch.arange(length) + 0.5) * steps / length
    across = [1] * len(shape)
    across[axis] = length
    for step in range(steps):
        yield (middles - step).clamp(0, 1).view(across).expand(shape)


def _ramp_count(length: int) -> int:
    return min(RAMPS, -(-length // STEPS))


def _processed(
    processor: Any, kind: str, crowded: bool, needed: set[str], brightness: Tensor
) -> dict[str, Any]:
    """Two equal ones in one sample where `crowded`."""
    colours = (brightness * 255).round().to(torch.uint8)[..., None].expand(*brightness.shape, 3)
    frames = np.ascontiguousarray(colours.numpy())
    item = frames if kind == "video" else Image.fromarray(frames[0])
    items = [[item, item]] if crowded else [item]
    token = str(getattr(processor, f"{kind}_token", ""))
    problem: Exception | None = None
    for words in ({}, {"text": [token * (2 if crowded else 1)]}):  # some want words beside their pictures
        try:
            made = dict(processor(**{f"{kind}s": items}, **words, return_tensors="pt"))
        except Exception as error:  # processors raise whatever befalls them
            problem = problem or error
            continue
        if any("pixel_values" in name for name in made) and needed <= set(made):
            return made
    raise InputError(
        f"{type(processor).__name__} makes no {kind} for this model of a {kind}.",
        f"pass the model's own processor, one that takes {kind}s",
    ) from problem


# ---- through the tower ----------------------------------------------------------------------------------


def _probe(
    host: PlainHost,
    processor: Any,
    kind: str,
    size: tuple[int, int],
    site: Site | None,
    frames: int,
    crowded: bool,
) -> tuple[Origin, ...]:
    features, needed = featurizer(host, kind)
    process = functools.partial(_processed, processor, kind, crowded, needed)
    sides = (2, 1, 0) if kind == "video" else (2, 1)
    pixels = _Pixels(process, (frames, size[1], size[0]), sides, patch_of(host.model))
    parameter = next(p for p in host.model.parameters() if p.is_floating_point())
    given = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in pixels.inputs.items()
        if isinstance(value, Tensor)
    }
    caught: list[Tensor] = []

    def read(values: Tensor) -> list[Tensor]:
        """Features, and tokens at the site."""
        caught.clear()
        made = [features({**given, pixels.name: values.to(given[pixels.name])})]
        if site is not None:
            if not caught:
                raise InputError(
                    f"No {kind} passes {site.name} of {type(host.model).__name__}.",
                    "name a site of its vision tower, such as vision.-2.self",
                )
            made.append(torch.cat(caught))
        return [t[: len(t) // 2] for t in made] if crowded else made

    with silenced(host, site, caught):
        parts = trace(read, pixels.noise(0), pixels.noise(1), pixels.lines)
    local = parts[0][2]  # one feature alone is the picture's mean, or its class
    if len(local) > 1 and not local.any() and not any(site.tower == "qformer" for site in host.sites):
        raise InputError(
            f"No feature of {kind}s of {type(host.model).__name__} comes from a place of its own.",
            "look at this model without boxes",
        )
    return tuple(Origin(*part, pixels.cells) for part in parts)


def _fills_placeholders(model: nn.Module) -> bool:
    """False where text reads pictures by cross-attention instead."""
    base = getattr(model, "base_model", model)
    return hasattr(base, "get_image_features") or hasattr(base, EMBEDDER)
