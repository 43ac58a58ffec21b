"""Sites: the places in a model where a method can act, by names that do not depend on the family."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from saccade.core.errors import AttachError, nearest

if TYPE_CHECKING:
    from torch import nn

Seam = Literal["interface", "sdpa", "softmax", "module"]


@dataclass(frozen=True, eq=False)
class Site:
    """One place: `text.3.self`, `vision.11.self`, `text.3.cross`, `text.3.mlp`, `text.embed`.

    `depth` is the number of layers of the tower, also where only some of them attend, so that
    `text.-1.self` and `text.50%:.self` mean the same in every model.
    """

    name: str
    path: str  # of the module in the model
    module: nn.Module
    tower: str
    index: int | None  # None for towers whose places are not one numbered stack (a UNet)
    kind: str  # self, cross, joint; layer, input, mlp, neurons, embed
    seam: Seam
    depth: int

    @property
    def layer(self) -> int:
        """Number of the layer, where there is one."""
        if self.index is None:
            raise AttachError(
                f"{self.name} stands in no numbered layer.", "narrow with sites= to numbered ones"
            )
        return self.index

    def __repr__(self) -> str:
        return f"Site({self.name} <- {self.path or 'the model itself'} [{self.seam}])"


_INDEX = re.compile(r"-?\d+%?|(-?\d+%?)?:(-?\d+%?)?")


def match(patterns: str | Iterable[str], sites: Sequence[Site]) -> list[Site]:
    """The sites that one of the patterns names, in the model's order.

    A pattern is a name with wildcards (`*.self`) or with one place for layers: `text.8:24.self`,
    `text.-2.self`, `text.25%:75%.self`. Several are joined by `|`. A pattern that names nothing is
    an error: a method that silently acts nowhere helps nobody.
    """
    wanted = [
        p for pattern in ([patterns] if isinstance(patterns, str) else patterns) for p in pattern.split("|")
    ]
    found: set[str] = set()
    for pattern in wanted:
        names = _named(pattern, sites)
        if not names:
            known = sorted({site.name for site in sites})
            hint = nearest(pattern, known)
            raise AttachError(
                f"No site of this model is named {pattern!r}.",
                f"{hint or 'use one of its names'}; it has {_brief(known)}.",
            )
        found.update(names)
    return [site for site in sites if site.name in found]


def _named(pattern: str, sites: Sequence[Site]) -> list[str]:
    parts = pattern.split(".")
    at = next((i for i, part in enumerate(parts) if _INDEX.fullmatch(part) and not part.isdigit()), None)
    if at is None:
        return [site.name for site in sites if fnmatch.fnmatchcase(site.name, pattern)]
    head, tail = ".".join(parts[:at]), ".".join(parts[at + 1 :])
    return [
        site.name
        for site in sites
        if site.index is not None
        and fnmatch.fnmatchcase(site.tower, head)
        and fnmatch.fnmatchcase(site.kind, tail)
        and site.index in layers(parts[at], site.depth)
    ]


def layers(span: str | int, depth: int) -> range:
    """`8:24`, `-2`, `25%:75%`, `3` as layer numbers of a tower of that depth."""
    text = str(span)
    if ":" not in text:
        layer = _layer(text, depth)
        return range(layer, layer + 1)
    start, stop = text.split(":")
    return range(_layer(start, depth) if start else 0, _layer(stop, depth) if stop else depth)


def _layer(text: str, depth: int) -> int:
    number = round(int(text[:-1]) / 100 * depth) if text.endswith("%") else int(text)
    return number + depth if number < 0 else number


def _brief(names: list[str]) -> str:
    """`text.0.self, text.1.self, text.2.self` as `text.0:3.self`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return (
        ", ".join(g[0] if len(g) == 1 else f"{key} ({len(g)})" for key, g in groups.items())
        or "no sites at all"
    )
