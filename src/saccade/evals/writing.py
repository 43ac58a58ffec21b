"""What follows from a text, told by a language model: the tasks of the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from saccade.evals.needle import Needle
from saccade.evals.recall import Recall
from saccade.evals.task import Row, Sample, Scores, Task, accuracy
from saccade.world.text import CONTENT, Text, coloured, given, haystack, repeated, sum_of


@dataclass(frozen=True)
class Continued:
    """The last words in a row that follow from a text, all of them; what is said behind them is no mistake."""

    name: str
    make: Callable[[np.random.Generator], Text]
    max_new_tokens: int = 4  # and as many are asked for

    def samples(self, count: int, seed: int) -> list[Sample]:
        rng, made = np.random.default_rng(seed), []
        for number in range(count):
            text = self.make(rng)
            end = text.answers[-1] + 1
            start = next(at for at in reversed(range(end + 1)) if at - 1 not in text.answers)
            truth = " ".join(text.words[start:end][: self.max_new_tokens])
            made.append(Sample(str(number), (), " ".join(text.words[:start]), truth))
        return made

    def parse(self, text: str) -> str:
        return " ".join(text.split())

    def score(self, rows: Iterable[Row]) -> Scores:
        return accuracy(rows, lambda sample, text: f"{self.parse(text)} ".startswith(f"{sample.truth} "))


TASKS: tuple[Task, ...] = (
    Recall(CONTENT, pairs=8),
    Recall(CONTENT, pairs=32, name="recall of 32"),
    Needle(CONTENT, length=128, name="needle in 128"),
    Needle(CONTENT, length=512, name="needle in 512"),
    Needle(CONTENT, length=1900, name="needle in 1900"),
    Continued(
        "needle among four", partial(haystack, words=CONTENT, length=200, depths=(0.1, 0.35, 0.6, 0.85))
    ),
    Continued("copying", partial(repeated, words=CONTENT, length=64)),
    Continued("given", given),
    Continued("coloured", partial(coloured, things=4, queries=1)),
    Continued("sums", sum_of),
    Continued("sums held out", partial(sum_of, held_out=True)),
)
