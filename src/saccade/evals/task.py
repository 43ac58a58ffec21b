"""What a task is: samples that are asked, and the rule by which the answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from saccade.core.errors import InputError
from saccade.evals.interval import Estimate, share


@dataclass(frozen=True)
class Sample:
    """A question, about pictures or none, and what is true."""

    id: str
    images: Sequence[Image.Image]
    question: str
    truth: Any
    group: str = ""  # under which it is scored too: a kind of question, a depth
    picture: str = ""  # samples that share it are not independent; the sample's own id where it is empty
    earlier: tuple[str, ...] = ()  # questions that the model answers before, in the same conversation

    @property
    def cluster(self) -> str:
        return self.picture or self.id


Row = tuple[Sample, str]  # and what the model said
Scores = dict[str, Estimate]


class Task(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int:
        """That an answer takes."""

    def samples(self, count: int, seed: int) -> list[Sample]:
        """Of so many pictures, or texts where there are none; the seed draws what is asked."""

    def parse(self, text: str) -> Any:
        """What was answered."""

    def score(self, rows: Iterable[Row]) -> Scores: ...


def by_picture(rows: Iterable[Row], tally: Callable[[Sample, str], Sequence[float]]) -> np.ndarray:
    """What is tallied of every row, summed within each picture: (columns, pictures)."""
    sums: dict[str, np.ndarray] = {}
    for sample, text in rows:
        found = np.asarray(tally(sample, text), np.float64)
        sums[sample.cluster] = sums.get(sample.cluster, 0) + found
    if not sums:
        raise InputError("There are no answers to score.", "ask the task's samples first")
    return np.stack([*sums.values()], -1)


def accuracy(rows: Iterable[Row], credit: Callable[[Sample, str], float]) -> Scores:
    """The mean credit, 0 to 1: of all rows, and of every group."""
    rows = list(rows)
    groups = sorted({sample.group for sample, _ in rows} - {""})

    def tally(sample: Sample, text: str) -> list[float]:
        own = [float(name in ("", sample.group)) for name in ("", *groups)]
        return [credit(sample, text) * one for one in own] + own

    found = by_picture(rows, tally)
    names = ("accuracy", *groups)
    return {name: share(found[i], found[len(names) + i]) for i, name in enumerate(names)}
