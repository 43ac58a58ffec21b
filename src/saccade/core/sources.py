"""Which tokens of the vision tower each feature of the running call is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saccade.core.probe import featurizer, lines, patch_of, silenced, trace
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime

CHUNK = 256  # features that are compared with all tokens at once

_known: WeakKeyDictionary[nn.Module, dict[Any, tuple[Tensor, int]]] = WeakKeyDictionary()


def sources(runtime: Runtime, inputs: Mapping[str, Any], kind: str, site: Site) -> tuple[Tensor, int]:
    """Which tokens at the site, counted over all pictures of a call, each of its features is made of:
    (features, most), -1 where there are fewer; and how many tokens there are.

    Asked of the model once for each shape of its inputs: its tower runs some twenty times on pixels that are
    changed here and there.
    """
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    name = next(name for name in given if name.startswith("pixel_values"))
    grids = tuple(
        (n, tuple(v.flatten().tolist())) for n, v in sorted(given.items()) if not v.is_floating_point()
    )
    pixels = given[name]
    filled = tuple((pixels != 0).flatten(-3).any(-1).flatten().tolist()) if pixels.ndim > 4 else ()
    key = (kind, site.name, tuple(pixels.shape), grids, filled)
    known = _known.setdefault(runtime.model, {})
    if key not in known:
        with runtime.alone(), torch.no_grad():
            known[key] = _asked(runtime, given, name, kind, site)
    return known[key]


def _asked(
    runtime: Runtime, given: dict[str, Tensor], name: str, kind: str, site: Site
) -> tuple[Tensor, int]:
    features, _ = featurizer(runtime.host, kind)
    pixels = given[name]
    caught: list[Tensor] = []

    def read(values: Tensor) -> list[Tensor]:
        caught.clear()
        made = features({**given, name: values.to(pixels)})
        return [made, torch.cat(caught)]

    drawn = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels.device)
    low, high = pixels.float().aminmax()
    new = (low + drawn * (high - low).clamp_min(1)).to(pixels)
    if pixels.ndim > 4:  # empty tiles stay empty
        new = torch.where((pixels == 0).flatten(-3).all(-1)[..., None, None, None], pixels, new)
    with silenced(runtime.host, site, caught):
        axes = lines(pixels.shape, patch_of(runtime.model))
        features_from, tokens_from = trace(read, pixels, new, axes)
    return _inside(features_from, tokens_from), len(tokens_from[0])


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
