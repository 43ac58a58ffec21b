"""Benchmarks in their own files, by the rules that are here already: POPE, CHAIR, GQA, VQAv2 and TextVQA."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from saccade.core.errors import InputError
from saccade.evals import vqa, yesno
from saccade.evals.chair import Chair
from saccade.evals.files import (
    BRIEFLY,
    OFFICIAL,
    Entry,
    FileTask,
    Picture,
    read_json,
    read_lines,
    read_text,
    some,
    unique,
)
from saccade.evals.task import Row, Sample, Scores, accuracy

ASKED = "Describe the picture in detail."
PEOPLE = 10  # who answered every question

# In CHAIR's rule a young one of these is none of the people, and a passenger's is none either.
ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
VEHICLES = ("jet", "train")


@dataclass(frozen=True)
class Pope(FileTask):
    """`coco_pope_random.json` and the like: a line for every question."""

    images: Path

    slug = "pope"

    def every(self) -> Iterator[Sample]:
        for number, entry in unique(read_lines(self.file), "question_id").items():
            shown = entry.text("image")
            images = Picture(entry, self.images / shown)
            yield Sample(number, images, entry.text("text"), entry.yes_or_no("label"), picture=shown)

    def parse(self, text: str) -> str:
        return yesno.parse(text)

    def score(self, rows: Iterable[Row]) -> Scores:
        return yesno.scores(rows)


@dataclass(frozen=True)
class Coco(FileTask):
    """CHAIR on pictures of COCO, from `instances_val2014.json` and `captions_val2014.json`: what a picture shows is
    what is annotated, and what people's captions name.

    `synonyms` is the list of its authors, `synonyms.txt`, a line "object, word, word" for every object of COCO.
    Figures are comparable only at the same `max_new_tokens`: who says more invents more.
    """

    captions: Path
    synonyms: Path
    images: Path
    max_new_tokens: int = 512

    slug = "chair"

    def every(self) -> Iterator[Sample]:
        return iter(self.samples(sys.maxsize, 0))

    def samples(self, count: int, seed: int) -> list[Sample]:
        """What captions name is found for these pictures only, for it takes long."""
        instances = read_json(self.file)
        pictures, categories = (unique(instances.entries(name), "id") for name in ("images", "categories"))
        kept = some(pictures, count, seed)
        shown: dict[str, set[str]] = {picture: set() for picture in pictures if picture in kept}
        for entry in instances.entries("annotations"):
            if (picture := entry.id("image_id")) in kept:
                shown[picture].add(self._object(entry, categories))
        for entry in read_json(self.captions).entries("annotations"):
            if (picture := entry.id("image_id")) in kept:
                shown[picture].update(self._chair.named(entry.text("caption")))
        return [
            Sample(picture, self._picture(pictures[picture]), ASKED, frozenset(objects))
            for picture, objects in shown.items()
        ]

    def parse(self, text: str) -> list[str]:
        return self._chair.named(text)

    def score(self, rows: Iterable[Row]) -> Scores:
        return self._chair.score(rows)

    @cached_property
    def _chair(self) -> Chair:
        return coco_chair(self.synonyms)

    def _picture(self, entry: Entry) -> Picture:
        return Picture(entry, self.images / entry.text("file_name"))

    def _object(self, entry: Entry, categories: Mapping[str, Entry]) -> str:
        number = entry.id("category_id")
        if number not in categories:
            raise entry.wrong(f"there is no category {number}.")
        category = categories[number]
        name = category.text("name")
        if name not in self._chair.synonyms:
            raise category.wrong(f"{self.synonyms} has no line for {name!r}.", "add it there")
        return self._chair.synonyms[name]


def coco_chair(synonyms: Path) -> Chair:
    """With the pairs of words that the official rule reads as one, and a seat beside a toilet as none."""
    lines = read_text(synonyms).split("\n")
    names = [[word.strip() for word in line.split(",")] for line in lines if line.strip()]
    for at, words in enumerate(names, 1):
        if not all(words):
            raise InputError(f"{synonyms}, object {at}: {', '.join(words)!r} has an empty word.", OFFICIAL)
    known = {word: words[0] for words in names for word in words}
    pairs = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
    pairs |= {"bow tie": "tie", "toilet seat": "toilet", "home plate": ""}
    return Chair(known | {pair: known.get(word, "") for pair, word in pairs.items()}, {"seat": "toilet"})


@dataclass(frozen=True)
class Gqa(FileTask):
    """`testdev_balanced_questions.json` and the like. Of others the balanced questions are asked. An answer must be
    the true one to the letter, but for capitals and a full stop."""

    images: Path

    slug = "gqa"

    def every(self) -> Iterator[Sample]:
        balanced = [
            (number, entry)
            for number, entry in read_json(self.file).each().items()
            if entry.value("isBalanced", bool)
        ]
        if not balanced:
            raise InputError(f"{self.file} has no balanced question.", "give the balanced file")
        for number, entry in balanced:
            shown, group = entry.id("imageId"), entry.inside("types").text("structural")
            images = Picture(entry, self.images / f"{shown}.jpg")
            question = f"{entry.text('question')}\n{BRIEFLY}"
            yield Sample(number, images, question, entry.text("answer"), group, shown)

    def parse(self, text: str) -> str:
        return text.strip().rstrip(".").lower()

    def score(self, rows: Iterable[Row]) -> Scores:
        return accuracy(rows, lambda sample, text: self.parse(text) == sample.truth)


@dataclass(frozen=True)
class VqaV2(FileTask):
    """`v2_OpenEnded_mscoco_val2014_questions.json`, and `v2_mscoco_val2014_annotations.json` with the answers."""

    annotations: Path
    images: Path

    slug = "vqav2"

    def every(self) -> Iterator[Sample]:
        top = read_json(self.file)
        split = top.text("data_subtype")
        answered = unique(read_json(self.annotations).entries("annotations"), "question_id")
        for number, entry in unique(top.entries("questions"), "question_id").items():
            if number not in answered:
                raise entry.wrong(f"{self.annotations} has no answers.", "give the annotations of this split")
            shown, truth = entry.value("image_id", int), answered[number]
            people = [one.value("answer", str) for one in truth.entries("answers")]
            images = Picture(entry, self.images / f"COCO_{split}_{shown:012}.jpg")
            question = f"{entry.text('question')}\n{BRIEFLY}"
            yield Sample(number, images, question, _ten(truth, people), truth.text("answer_type"), str(shown))

    def parse(self, text: str) -> str:
        return vqa.normalised(text)

    def score(self, rows: Iterable[Row]) -> Scores:
        return vqa.soft(rows)


@dataclass(frozen=True)
class TextVqa(FileTask):
    """`TextVQA_0.5.1_val.json`. All answers are normalised, and 's is a word of its own."""

    images: Path

    slug = "textvqa"

    def every(self) -> Iterator[Sample]:
        for number, entry in unique(read_json(self.file).entries("data"), "question_id").items():
            shown = entry.id("image_id")
            images = Picture(entry, self.images / f"{shown}.jpg")
            question = f"{entry.text('question')}\n{BRIEFLY}"
            yield Sample(number, images, question, _ten(entry, entry.texts("answers")), picture=shown)

    def parse(self, text: str) -> str:
        return vqa.normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))

    def score(self, rows: Iterable[Row]) -> Scores:
        def credit(sample: Sample, text: str) -> float:
            return vqa.agreement(self.parse(text), [self.parse(truth) for truth in sample.truth])

        return accuracy(rows, credit)


def _ten(entry: Entry, people: list[str]) -> list[str]:
    if len(people) != PEOPLE:
        raise entry.wrong(f"{len(people)} people answered, not {PEOPLE}.")
    return people
