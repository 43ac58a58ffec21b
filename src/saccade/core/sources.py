"""Which tokens of the vision tower each feature of the running call is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saccade.core.probe import featurizer, lines, patch_lines, patch_of, silenced, trace
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime

CHUNK = 256  # features that are compared with all tokens at once

_known: WeakKeyDictionary[nn.Module, dict[Any, dict[str, Traced]]] = WeakKeyDictionary()


class Traced(NamedTuple):
    """What the model was asked: its features and, where one was named, the tokens at a site."""

    begins: Tensor  # (features, axes): the line where each begins, -1 for what has no place
    made_of: Tensor  # (features, most): of which tokens, -1 where there are fewer
    tokens: int

    def of_each(self, pictures: int) -> Traced:
        """Of so many pictures that are alike, one behind the other."""
        number = torch.arange(pictures).repeat_interleave(len(self.begins))[:, None]
        begins, made_of = self.begins.repeat(pictures, 1), self.made_of.repeat(pictures, 1)
        begins[:, :1] += torch.where(begins[:, :1] < 0, 0, number)
        made_of += torch.where(made_of < 0, 0, number * self.tokens)
        return Traced(begins, made_of, pictures * self.tokens)


def sources(runtime: Runtime, inputs: Mapping[str, Any], kind: str, site: Site) -> tuple[Tensor, int]:
    """Which tokens at the site, counted over all pictures of a call, each of its features is made of:
    (features, most), -1 where there are fewer; and how many tokens there are.

    Asked of the model once for each shape of a picture: its tower runs some twenty times on pixels that are
    changed here and there.
    """
    given, name, pictures, known = _pixels(runtime, inputs, kind)
    if site.name not in known:
        known[site.name] = _asked(runtime, given, name, kind, site)
    found = known[site.name].of_each(pictures)
    return found.made_of, found.tokens


def first_lines(runtime: Runtime, inputs: Mapping[str, Any], kind: str) -> Tensor:
    """Where each feature begins along the axes of `probe.lines`: (features, axes), -1 for what has no place."""
    given, name, pictures, known = _pixels(runtime, inputs, kind)
    if not known:
        known[""] = _asked(runtime, given, name, kind, None)
    return next(iter(known.values())).of_each(pictures).begins


def _pixels(
    runtime: Runtime, inputs: Mapping[str, Any], kind: str
) -> tuple[dict[str, Tensor], str, int, dict[str, Traced]]:
    """The tensors of one picture, if several are alike; which of them are pixels; how many pictures that stands for;
    and what is known of their shape, by the site's name."""
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    name = next(name for name in given if "pixel_values" in name)
    count = len(given[name]) if given[name].ndim == 4 else 1
    alike = all(len(v) == count and bool((v == v[:1]).all()) for n, v in given.items() if n != name)
    if count > 1 and alike:
        given = {n: v[:1] for n, v in given.items()}
    else:
        count = 1
    grids = tuple(
        (n, tuple(v.flatten().tolist())) for n, v in sorted(given.items()) if not v.is_floating_point()
    )
    pixels = given[name]
    filled = tuple((pixels != 0).flatten(-3).any(-1).flatten().tolist()) if pixels.ndim > 4 else ()
    shapes = _known.setdefault(runtime.model, {})
    return given, name, count, shapes.setdefault((kind, tuple(pixels.shape), grids, filled), {})


def _asked(runtime: Runtime, given: dict[str, Tensor], name: str, kind: str, site: Site | None) -> Traced:
    features, _ = featurizer(runtime.host, kind)
    pixels = given[name]
    caught: list[Tensor] = []

    def read(values: Tensor) -> list[Tensor]:
        caught.clear()
        made = features({**given, name: values.to(pixels)})
        return [made, torch.cat(caught)] if site else [made]

    drawn = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels.device)
    low, high = pixels.float().aminmax()
    new = (low + drawn * (high - low).clamp_min(1)).to(pixels)
    if pixels.ndim > 4:  # empty tiles stay empty
        new = torch.where((pixels == 0).flatten(-3).all(-1)[..., None, None, None], pixels, new)
    with runtime.alone(), torch.no_grad(), silenced(runtime.host, site, caught):
        places = given.get(f"{kind}_position_ids")
        if places is None:
            axes = lines(pixels.shape, patch_of(runtime.model))
        else:
            axes = patch_lines(places.float().masked_fill(places < 0, torch.nan), torch.arange(len(places)))
        found, *tokens = trace(read, pixels, new, axes)
    begins = found[0].masked_fill(~found[2][:, None], -1)
    made_of = _inside(found, tokens[0]) if tokens else begins.new_empty(len(begins), 0)
    return Traced(begins, made_of, len(tokens[0][0]) if tokens else 0)


def _inside(features: tuple[Tensor, Tensor, Tensor], tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Tokens between each feature's first and last lines; both are given with whether they have a place."""
    pairs = []
    for start in range(0, len(features[0]), CHUNK):
        first, last, local = (part[start : start + CHUNK, None] for part in features)
        inside = (tokens[0] >= first).all(-1) & (tokens[1] <= last).all(-1) & local & tokens[2]
        pairs.append(inside.nonzero() + torch.tensor([start, 0]))
    rows, columns = torch.cat(pairs).unbind(1)
    counts = rows.bincount(minlength=len(features[0]))
    made_of = torch.full((len(counts), max(1, int(counts.max()))), -1)
    made_of[rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]] = columns
    return made_of
