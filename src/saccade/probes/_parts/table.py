"""Small results: numbers along axes whose places have names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """`axes` names every axis of the values, in order, and its places."""

    values: Tensor
    axes: Mapping[str, tuple[str, ...]]

    def at(self, **places: str | int) -> Table:
        """What stands at one place of each axis that is named, which is then gone."""
        chosen = tuple(
            self.axes[axis].index(str(places[axis])) if axis in places else slice(None) for axis in self.axes
        )
        return Table(
            self.values[chosen], {axis: names for axis, names in self.axes.items() if axis not in places}
        )

    def __float__(self) -> float:
        return float(self.values)

    def __repr__(self) -> str:
        """The last axis across, the one before it down, a block for each place of the others."""
        if len(self.axes) < 2:
            names = next(iter(self.axes.values()), ("",))
            return "  ".join(
                f"{name} {value:.3g}".strip() for name, value in zip(names, self.values.view(-1).tolist())
            )
        *outer, down, across = self.axes
        blocks = []
        for places in itertools.product(*(self.axes[axis] for axis in outer)):
            title = ", ".join(f"{axis} {place}" for axis, place in zip(outer, places, strict=True))
            values = self.at(**dict(zip(outer, places, strict=True))).values
            blocks.append(
                (f"{title}\n" if title else "") + _drawn(values, down, self.axes[down], self.axes[across])
            )
        return "\n\n".join(blocks)


def mean(tables: Sequence[Table]) -> Table:
    """Of tables with the same axes."""
    return Table(torch.stack([table.values for table in tables]).mean(0), tables[0].axes)


def layers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _drawn(values: Tensor, corner: str, rows: Sequence[str], columns: Sequence[str]) -> str:
    left = max(map(len, (corner, *rows)))
    widths = [max(8, len(name)) for name in columns]
    lines = [(corner, columns)]
    lines += [
        (name, [f"{value:.3g}" for value in row]) for name, row in zip(rows, values.tolist(), strict=True)
    ]
    return "\n".join(
        f"{head:<{left}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for head, cells in lines
    )
