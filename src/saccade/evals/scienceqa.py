"""ScienceQA (Lu et al., 2022): its questions with a picture, answered by letter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saccade.evals.files import FileTask, Picture, lettered, multiple_choice, read_json
from saccade.evals.task import Row, Sample, Scores, accuracy


def parse(text: str) -> str:
    """The letter that stands alone or before a full stop at the start, or behind "The answer is"; or none, which is
    wrong. (The authors' own script takes a choice at random instead.)"""
    found = re.match(r"([A-Z])(?:\.?\s*$|\.\s|\n)", text.strip()) or re.search(
        r"The answer is ([A-Z])\b", text
    )
    return found[1] if found else ""


@dataclass(frozen=True)
class ScienceQa(FileTask):
    """The folder of `problems.json` and `pid_splits.json`; `images` has a folder for every problem of the split."""

    images: Path
    split: str = "test"

    slug = "scienceqa"

    def every(self) -> Iterator[Sample]:
        problems, splits = (
            read_json(self.file / "problems.json").each(),
            read_json(self.file / "pid_splits.json"),
        )
        for number in splits.texts(self.split):
            if number not in problems:
                raise splits.wrong(f"problem {number} of {self.split!r} is not in problems.json.")
            entry = problems[number]
            if not entry.optional("image"):
                continue
            choices, answer = lettered(entry.texts("choices")), entry.value("answer", int)
            if not 0 <= answer < len(choices):
                raise entry.wrong(f"'answer' is {answer}, and there are {len(choices)} choices.")
            images = Picture(entry, self.images / number / entry.text("image"))
            question = multiple_choice(entry.optional("hint"), entry.text("question"), choices)
            yield Sample(number, images, question, [*choices][answer], entry.text("subject"))

    def parse(self, text: str) -> str:
        return parse(text)

    def score(self, rows: Iterable[Row]) -> Scores:
        return accuracy(rows, lambda sample, text: parse(text) == sample.truth)
