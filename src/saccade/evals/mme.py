"""MME: of two questions about a picture, one to be answered with yes and one with no (Fu et al., 2023).

accuracy    of the questions
accuracy+   of the pictures, both questions
perception, cognition   100 times the sum of both over the tasks of either kind, 2000 and 800 at most
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from saccade.core.errors import InputError
from saccade.evals.files import Entry, FileTask, Picture, encoded, read_table, read_text, unique
from saccade.evals.interval import bootstrap, share
from saccade.evals.task import Row, Sample, Scores, by_picture

KINDS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
TASKS = tuple(chain(*KINDS.values()))
SUFFIXES = (".jpg", ".png", ".jpeg")


def parse(text: str) -> str:
    """Yes, or else no, within the first four letters; or neither."""
    start = text.lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), "other")


@dataclass(frozen=True)
class Mme(FileTask):
    """A folder of tasks, each with pictures and texts side by side or in `images` and `questions_answers_YN`; or one
    table with the columns index, category, image_path, image, question, answer."""

    slug = "mme"

    def every(self) -> Iterator[Sample]:
        pairs: defaultdict[str, list[Sample]] = defaultdict(list)
        for task, shown, entry, images in self._table() if self.file.suffix == ".tsv" else self._folder():
            picture = f"{task}/{shown}"
            pair = pairs[picture]
            question, truth = entry.text("question"), entry.yes_or_no("answer")
            if len(pair) == 2:
                raise entry.wrong(f"{picture} has a third question.")
            pair.append(Sample(f"{picture}/{len(pair)}", images, question, truth, task, picture))
        for picture, pair in pairs.items():
            if len(pair) != 2:
                raise InputError(f"{self.file}: {picture} has one question only.", "give it the second")
        return chain.from_iterable(pairs.values())

    def parse(self, text: str) -> str:
        return parse(text)

    def score(self, rows: Iterable[Row]) -> Scores:
        def tally(sample: Sample, text: str) -> list[float]:
            own = [float(task == sample.group) for task in TASKS]
            return [(parse(text) == sample.truth) * one for one in own] + own

        right, asked = np.split(by_picture(rows, tally), 2)  # (tasks, pictures)
        both, shown = right == 2, asked > 0
        scores = {
            "accuracy": share(right.sum(0), asked.sum(0)),
            "accuracy+": share(both.sum(0), shown.sum(0)),
        }
        for kind, tasks in KINDS.items():
            own = [TASKS.index(task) for task in tasks]
            if shown[own].any(1).all():
                sums = np.concatenate([right[own], asked[own], both[own], shown[own]])
                scores[kind] = bootstrap(sums[:, shown[own].any(0)], _points)
        for task, *found in zip(TASKS, right, asked, both, shown):
            if found[1].any():
                scores[f"{task} accuracy"] = share(found[0], found[1])
                scores[f"{task} accuracy+"] = share(found[2], found[3])
        return scores

    def _table(self) -> Iterator[tuple[str, str, Entry, Picture]]:
        rows = unique(read_table(self.file), "index")
        for entry in rows.values():
            task = entry.text("category")
            if task not in TASKS:
                raise entry.wrong(f"'category' is {task!r}, no task.", f"use {', '.join(TASKS)}")
            yield task, entry.text("image_path"), entry, encoded(entry, rows)

    def _folder(self) -> Iterator[tuple[str, str, Entry, Picture]]:
        there = [task for task in TASKS if (self.file / task).is_dir()]
        if not there:
            raise InputError(f"{self.file} has no folder of a task.", f"give the one with {', '.join(TASKS)}")
        for task in there:
            folder = self.file / task
            apart = (folder / "questions_answers_YN").is_dir()
            texts, pictures = (
                (folder / "questions_answers_YN", folder / "images") if apart else (folder, folder)
            )
            for path in sorted(texts.glob("*.txt")):
                for entry in _lines(path):
                    places = [pictures / f"{path.stem}{suffix}" for suffix in SUFFIXES]
                    place = next((one for one in places if one.is_file()), places[0])
                    yield task, path.stem, entry, Picture(entry, place)


def _lines(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            question, _, answer = line.partition("\t")
            yield Entry(path, f"line {number}", {"question": question, "answer": answer})


def _points(sums: np.ndarray) -> np.ndarray:
    right, asked, both, shown = np.split(sums, 4, axis=-1)
    return 100 * (right / asked + both / shown).sum(-1)
