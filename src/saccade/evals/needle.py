"""A needle in a haystack: one sentence that says a thing, far back in others, and one question for it.

Asked for a second time, the answer would stand beside the question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from saccade.evals.task import Row, Sample, Scores, accuracy
from saccade.world.text import NEEDLE, haystack


@dataclass(frozen=True)
class Needle:
    """As many texts at every depth."""

    words: Sequence[str]
    length: int = 256
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle: str = NEEDLE
    name: str = "needle"
    max_new_tokens: int = 2

    def samples(self, count: int, seed: int) -> list[Sample]:
        rng, made = np.random.default_rng(seed), []
        for number in range(count):
            depth = self.depths[number % len(self.depths)]
            *text, answer = haystack(rng, self.words, self.length, (depth,), self.needle).words
            made.append(Sample(str(number), (), " ".join(text), answer, group=f"depth {depth:g}"))
        return made

    def parse(self, text: str) -> str:
        return next(iter(text.split()), "")

    def score(self, rows: Iterable[Row]) -> Scores:
        return accuracy(rows, lambda sample, text: self.parse(text) == sample.truth)
