"""MMBench (Liu et al., 2023): a question counts if it is answered rightly in every order of its choices that the file
has. Row 1000003 is row 3 with its choices turned by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import NamedTuple

from saccade.evals.files import FileTask, encoded, multiple_choice, read_table, unique
from saccade.evals.task import Row, Sample, Scores, accuracy

TURN = 1_000_000
LAST = 4  # words among which the letter must be


class Truth(NamedTuple):
    letter: str
    choices: Mapping[str, str]


def chosen(text: str, choices: Mapping[str, str]) -> str:
    """The one letter of a choice that is said, towards the end; or else the one choice that is said. None where it is
    unclear, which is wrong: no other model is asked what may be meant."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    said = [letter for letter in choices if letter in words]
    if len(said) == 1 and words.index(said[0]) >= len(words) - LAST:
        return said[0]
    if len(text) > 2 * sum(map(len, choices.values())):
        return ""
    said = [letter for letter, choice in choices.items() if choice.lower() in text.lower()]
    return said[0] if len(said) == 1 else ""


@dataclass(frozen=True)
class MmBench(FileTask):
    """A table with the columns index, question, hint, A to D or further, answer, category, image in base64."""

    slug = "mmbench"

    def every(self) -> Iterator[Sample]:
        rows = unique(read_table(self.file), "index")
        for index, entry in rows.items():
            if not index.isdecimal():
                raise entry.wrong(f"'index' is {index!r}, no number.")
            first = str(int(index) % TURN)
            if first not in rows:
                raise entry.wrong(f"row {first}, of which it is a turn, is not there.")
            choices = {letter: entry.text(letter) for letter in ascii_uppercase if letter in entry.fields}
            answer = entry.text("answer")
            if answer not in choices:
                raise entry.wrong(f"'answer' is {answer!r}, and the choices are {', '.join(choices)}.")
            question = multiple_choice(entry.optional("hint"), entry.text("question"), choices)
            group, truth = entry.text("category"), Truth(answer, choices)
            yield Sample(index, encoded(entry, rows), question, truth, group, first)

    def parse(self, text: str) -> str:
        """Which choice is meant depends on the choices."""
        return text.strip()

    def score(self, rows: Iterable[Row]) -> Scores:
        rows = list(rows)
        missed = {
            sample.picture
            for sample, text in rows
            if (truth := Truth(*sample.truth)).letter != chosen(text, truth.choices)
        }
        firsts = [(sample, text) for sample, text in rows if sample.id == sample.picture]
        return accuracy(firsts, lambda sample, text: sample.picture not in missed)
