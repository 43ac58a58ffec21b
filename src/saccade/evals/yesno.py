"""Yes or no, by the rule of POPE: a first sentence that says no or not is a no, and all else is a yes.

So an empty answer is a yes, and "yes, there is no doubt" a no: figures are comparable only where all follow the
one rule. What is taken for a yes without saying so is counted beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from saccade.evals.interval import share
from saccade.evals.task import Row, Sample, Scores, by_picture

NO = {"no", "No", "not"}  # as they are written: "NO" is none of them


def parse(text: str) -> str:
    first = text.partition(".")[0].replace(",", "")
    return "no" if NO & {*first.split(" ")} else "yes"


def scores(rows: Iterable[Row]) -> Scores:
    """`yes` and `assumed` are shares of the answers. Precision has no value where nothing was answered with yes."""

    def tally(sample: Sample, text: str) -> list[float]:
        yes, true = parse(text) == "yes", sample.truth == "yes"
        assumed = yes and "yes" not in re.findall(r"\w+", text.lower())
        return [yes and true, yes and not true, not yes and true, not yes and not true, assumed]

    hit, false, missed, rejected, assumed = by_picture(rows, tally)
    every = hit + false + missed + rejected
    return {
        "accuracy": share(hit + rejected, every),
        "precision": share(hit, hit + false),
        "recall": share(hit, hit + missed),
        "f1": replace(share(2 * hit, 2 * hit + false + missed), count=int(every.sum())),
        "yes": share(hit + false, every),
        "assumed": share(assumed, every),
    }
