"""Multi-query recall in context (Arora et al., 2023): a list of keys with their values, then keys, each of which its
value must follow. A later query may repeat an earlier one beside its answer, and so the first is scored apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from saccade.evals.task import Row, Sample, Scores, accuracy
from saccade.world.text import listed


@dataclass(frozen=True)
class Recall:
    """Every query is a sample of its own, behind the list and the right answers to the queries before it."""

    words: Sequence[str]
    pairs: int = 8
    queries: int = 4
    name: str = "recall"
    max_new_tokens: int = 2

    def samples(self, count: int, seed: int) -> list[Sample]:
        rng, made = np.random.default_rng(seed), []
        for number in range(count):
            text, answers = listed(rng, self.words, self.pairs, self.queries)
            for query, at in enumerate(answers):
                group = "later" if query else "first"
                asked = " ".join(text[:at])
                made.append(Sample(f"{number}/{query}", (), asked, text[at], group, picture=str(number)))
        return made

    def parse(self, text: str) -> str:
        return next(iter(text.split()), "")

    def score(self, rows: Iterable[Row]) -> Scores:
        return accuracy(rows, lambda sample, text: self.parse(text) == sample.truth)
