"""Multi-query recall in context (Arora et al., 2023): a list of keys with their values, then keys, each of which its
value must follow.

    k1 v1 k2 v2 k3 v3 . k2 v2 k2 v2 k1 v1

Keys are asked for with replacement and values may be the same, so that nothing is answered by elimination; yet a
later query may repeat an earlier one beside its answer, and so the first is scored apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saccade.core.errors import InputError
from saccade.evals.task import Row, Sample, Scores, accuracy

BETWEEN = "."  # the list and the queries


class Listed(NamedTuple):
    words: tuple[str, ...]
    answers: tuple[int, ...]  # their positions, each behind its query


def listed(rng: np.random.Generator, words: Sequence[str], pairs: int, queries: int) -> Listed:
    """Keys are different, and no value is a key."""
    if not 0 < pairs < len(words) or queries < 1:
        raise InputError(
            f"{queries} queries to {pairs} pairs cannot be drawn from {len(words)} words.",
            "ask once at least, and give more words than pairs",
        )
    drawn = rng.permutation(len(words))
    keys = [words[i] for i in drawn[:pairs]]
    values = [words[i] for i in rng.choice(drawn[pairs:], pairs)]
    asked = rng.integers(pairs, size=queries)
    text = [word for pair in zip(keys, values) for word in pair] + [BETWEEN]
    start = len(text) + 1
    text += [word for i in asked for word in (keys[i], values[i])]
    return Listed(tuple(text), tuple(range(start, len(text), 2)))


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
