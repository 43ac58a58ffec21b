"""The rows of a measurement as a picture: a dot for the median, a line between the quartiles."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from benchmarks.measure import Row

OURS, OTHERS = "#0072b2", "#d55e00"  # told apart by the colour-blind, too
FINE = (0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5)
COARSE = (0.6, 0.8, 1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)


def draw(rows: list[Row], path: Path) -> None:
    """A block for every case, named with its first variant, which is 1."""
    lines: list[tuple[str, Row | None]] = []
    for _, members in groupby(rows, lambda row: row.case):
        first, *others = members
        lines += [(f"{first.case}  ({first.variant}: {first.milliseconds:,.1f} ms)", None)]
        lines += [(row.variant, row) for row in others]
    low = min(0.97, *(row.low for row in rows)) / 1.01
    high = max(1.1, *(row.high for row in rows)) * 1.02
    height = 0.6 + 0.23 * len(lines)
    figure = Figure(figsize=(9, height))
    axes = figure.add_axes((0.34, 0.55 / height, 0.59, 1 - 0.6 / height))  # between labels and figures
    axes.set(xscale="log", xlim=(low, high), ylim=(len(lines) - 0.3, -0.7))
    axes.set_xlabel("time over that of the variant in brackets")
    axes.axvline(1, color="0.3", linewidth=1, zorder=0)
    write = partial(axes.text, transform=axes.get_yaxis_transform(), va="center")
    for y, (label, row) in enumerate(lines):
        if row is None:
            axes.axhspan(y - 0.5, y + 0.5, xmin=-0.6, xmax=1.12, color="0.94", clip_on=False, zorder=0.5)
            write(-0.56, y, label, fontweight="bold")
            continue
        color = OURS if row.variant.startswith("Saccade") else OTHERS
        write(-0.01, y, label, color=color, ha="right")
        axes.plot([row.low, row.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(row.ratio, y, "o", color=color, markersize=5.5)
        write(1.01, y, f"{row.ratio:.2f}", color=color)
    ticks = [tick for tick in (FINE if high < 1.6 else COARSE) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
