"""Figures of what was counted and timed. Times are medians of all rounds of all samples, from quartile to quartile."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from saccade.bench import costs
from saccade.bench.costs import Counted
from saccade.bench.rows import Row, Timed
from saccade.evals.interval import Estimate
from saccade.evals.task import Scores

CANNOT_TELL = "cannot tell"
FLIPS = "flips"
COUNTED = ("visual tokens", "gflops", FLIPS)
NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Measured:
    found: Estimate
    change: Estimate | None = None  # against the bare model in the same rounds
    verdict: str = ""
    note: str = ""


def counted(rows: Sequence[Row]) -> Scores:
    """Of an answer, on the mean of the few samples that were counted, and how many of those that were asked alone
    said something else in their batch. NaN where counting was refused."""
    held = [row.cost for row in rows if row.cost]
    differ = [row.text != row.alone for row in rows if row.alone is not None]
    found = dict.fromkeys(COUNTED, NOTHING) if held else {}
    if held and not refusal(rows):
        found["visual tokens"] = _plain([cost["visual"] for cost in held])
        found["gflops"] = _plain([sum(cost["flops"].values()) / 1e9 for cost in held])
    return found | ({FLIPS: _plain(differ)} if differ else {})


def refusal(rows: Sequence[Row]) -> str:
    """Why it was not counted; empty where it was."""
    return next((row.cost["refused"] for row in rows if row.cost and "refused" in row.cost), "")


def timed(
    rows: Sequence[Timed], own: Mapping[str, Counted], bare: Mapping[str, Counted]
) -> dict[str, Measured]:
    """With what was counted of the samples under the stack and bare."""
    refused = {what: why for row in rows for what, why in row.refused.items()}
    who = "stack" if "stack" in rows[0].seconds else "bare"

    def figure(what: str, values: Callable[[Timed, str], list[float]]) -> Measured:
        if what in refused:
            return Measured(NOTHING, note=refused[what])
        mine, others = ([x for row in rows for x in values(row, name)] for name in (who, "bare"))
        change = spread([a - b for a, b in zip(mine, others, strict=True)]) if who == "stack" else None
        return Measured(spread(mine), change, told(change, change.value < 0) if change else "")

    def faster(name: str) -> Measured:
        ratios = [a / b for row in rows for a, b in zip(row.seconds["bare"], row.seconds[name], strict=True)]
        found = spread(ratios)
        against = spread([ratio - 1 for ratio in ratios])
        return Measured(found, verdict=told(against, against.value > 0))

    found = {
        "first token ms": figure("first", lambda row, name: [1e3 * x for x in row.first[name]]),
        "per token ms": figure("first", _per_token),
        "peak mebibytes": figure("peak", lambda row, name: [row.peak[name] / 2**20]),
    }
    if who == "stack":
        found["speed-up"] = faster("stack")
        found["bound"] = _bound(rows, own, bare)
    if all("oracle" in row.seconds for row in rows):
        found["oracle speed-up"] = faster("oracle")
    elif "oracle" in refused:
        found["oracle speed-up"] = Measured(NOTHING, note=refused["oracle"])
    return found


def _per_token(row: Timed, name: str) -> list[float]:
    """Behind the first."""
    return [
        1e3 * (whole - first) / (row.tokens - 1)
        for whole, first in zip(row.seconds[name], row.first[name], strict=True)
    ]


def _bound(rows: Sequence[Timed], own: Mapping[str, Counted], bare: Mapping[str, Counted]) -> Measured:
    """The largest speed-up that FLOPs and bytes allow on this machine."""
    pairs = [(own[row.id], bare[row.id]) for row in rows if row.id in own and row.id in bare]
    note = next((one["refused"] for pair in pairs for one in pair if "refused" in one), "")
    if note or not pairs:
        return Measured(NOTHING, note=note or "nothing was counted")
    after, before = (costs.seconds(counts, rows[0].roofline) for counts in zip(*pairs, strict=True))
    return Measured(Estimate(before / after, math.nan, math.nan, len(pairs)))


def spread(values: list[float]) -> Estimate:
    """The median and both quartiles."""
    several = values if len(values) > 1 else values * 2
    low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
    return Estimate(middle, low, high, len(values))


def told(effect: Estimate, better: bool) -> str:
    """In words, unless the spread is wider than the effect."""
    if effect.high - effect.low >= abs(effect.value):
        return CANNOT_TELL
    return "better" if better else "worse"


def _plain(values: Sequence[float]) -> Estimate:
    return Estimate(fmean(values), math.nan, math.nan, len(values))
