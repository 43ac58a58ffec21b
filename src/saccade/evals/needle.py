"""A needle in a haystack: one sentence that says a thing, far back in others, and one question for it.

Asked for a second time, the answer would stand beside the question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saccade.core.errors import InputError
from saccade.evals.task import Row, Sample, Scores, accuracy

END = "."
NEEDLE = "the {key} holds the {value} ."
SENTENCE = (4, 9)  # words, the last number left out
FOLLOWERS = 4  # of every word in the filler


class Hidden(NamedTuple):
    words: tuple[str, ...]  # the last one is the answer
    needle: int  # the position of its first word


def filler(
    rng: np.random.Generator, words: Sequence[str], length: int, without: Sequence[str] = ()
) -> list[str]:
    """Sentences in which every word is followed by one of four, always the same ones: enough of a language for a
    model to learn."""
    starts = [i for i, word in enumerate(words) if word not in without]
    made: list[str] = []
    while len(made) < length:
        at = starts[rng.integers(len(starts))]
        for _ in range(rng.integers(*SENTENCE)):
            made.append(words[at])
            nexts = [(FOLLOWERS * at + 1 + i) % len(words) for i in range(FOLLOWERS)]
            nexts = [i for i in nexts if words[i] not in without]
            at = nexts[rng.integers(len(nexts))]
        made.append(END)
    return made


def hidden(
    rng: np.random.Generator, words: Sequence[str], length: int, depth: float, needle: str = NEEDLE
) -> Hidden:
    """A haystack of about `length` words, the needle behind a share `depth` of its sentences, and the needle once
    more up to its value. Key and value are words that the haystack lacks."""
    candidates = [word for word in words if word not in needle.split()]
    if length < 1 or not 0 <= depth <= 1 or len(candidates) < 3:
        raise InputError(
            f"A needle at {depth} of {length} words cannot be drawn from {len(candidates)} words.",
            "give a depth from 0 to 1, and three words at least that the needle has not",
        )
    key, value = (candidates[i] for i in rng.choice(len(candidates), 2, replace=False))
    said = needle.format(key=key, value=value).split()
    hay = filler(rng, words, length, without=(key, value))
    ends = [0, *(i + 1 for i, word in enumerate(hay) if word == END)]
    at = ends[round(depth * (len(ends) - 1))]
    asked = said[: said.index(value) + 1]
    return Hidden((*hay[:at], *said, *hay[at:], *asked), at)


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
            *text, answer = hidden(rng, self.words, self.length, depth, self.needle).words
            made.append(Sample(str(number), (), " ".join(text), answer, group=f"depth {depth:g}"))
        return made

    def parse(self, text: str) -> str:
        return next(iter(text.split()), "")

    def score(self, rows: Iterable[Row]) -> Scores:
        return accuracy(rows, lambda sample, text: self.parse(text) == sample.truth)
