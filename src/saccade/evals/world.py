"""The tasks of the embedded world, on scenes as they are and on scenes whose co-occurrence is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL.Image import Image

from saccade.evals import embedding, pope, vqa, writing, yesno
from saccade.evals.asking import answers
from saccade.evals.chair import Chair
from saccade.evals.interval import bootstrap, share
from saccade.evals.task import Row, Sample, Scores, Task, by_picture
from saccade.world.captions import ASKED
from saccade.world.kinds import CO_OCCURRENCE, KINDS, PARTNER
from saccade.world.questions import WEIGHTS, Question, ask, ask_pair, questions
from saccade.world.scenes import Scene, scenes
from saccade.world.words import article

NATURAL, BROKEN, CALIBRATION = "test", "broken", "calibration"

# What models of another vocabulary may call the things.
SYNONYMS = {kind: kind for kind in KINDS} | {
    "desk": "table", "mug": "cup", "teacup": "cup", "automobile": "car", "puppy": "dog", "bookcase": "shelf",
    "bookshelf": "shelf", "book shelf": "shelf", "ship": "boat", "sailboat": "boat", "stool": "chair",
    "armchair": "chair", "table lamp": "lamp", "street lamp": "lamp", "street sign": "sign", "home": "house",
    "cottage": "house", "blossom": "flower",
}  # fmt: skip


@lru_cache(4)
def _scenes(count: int, split: str) -> tuple[Scene, ...]:
    return tuple(scenes(count, split))


@lru_cache(4)
def _pictures(count: int, split: str) -> tuple[Image, ...]:
    return tuple(one.picture() for one in _scenes(count, split))


@dataclass(frozen=True)
class Pope:
    """Negatives are counted on the natural scenes: where co-occurrence is broken they are still what it suggests."""

    strategy: str
    split: str = NATURAL
    max_new_tokens: int = 8
    parse = staticmethod(yesno.parse)
    score = staticmethod(yesno.scores)

    @property
    def name(self) -> str:
        return f"pope-{self.strategy}"

    def samples(self, count: int, seed: int) -> list[Sample]:
        rng = np.random.default_rng(seed)
        pictures = _pictures(count, self.split)
        objects = [rng.permutation(sorted(one.counts())).tolist() for one in _scenes(count, self.split)]
        habitual = NATURAL if self.split == BROKEN else self.split
        habits = [sorted(one.counts()) for one in _scenes(count, habitual)]
        made = []
        for number, asked in enumerate(pope.questions(objects, self.strategy, rng, habits)):
            text = f"is there {article(asked.name)} {asked.name} in the image ?"
            truth = "yes" if asked.present else "no"
            images = (pictures[asked.picture],)
            made.append(Sample(str(number), images, text, truth, picture=str(asked.picture)))
        return made


@dataclass(frozen=True)
class Questions:
    """A question of every kind that a scene admits, and one about every two scenes."""

    split: str = NATURAL
    name: str = "questions"
    max_new_tokens: int = 8
    parse = staticmethod(vqa.plain)
    score = staticmethod(vqa.exact)

    def samples(self, count: int, seed: int) -> list[Sample]:
        rng, own = np.random.default_rng(seed), _scenes(count, self.split)
        pictures, made = _pictures(count, self.split), []
        for at, one in enumerate(own):
            every = (ask(one, rng, kind) for kind in WEIGHTS)
            made += [_sample(at, pictures[at : at + 1], asked) for asked in every if asked]
            if at % 2 and (asked := ask_pair(own[at - 1], one, rng)):
                made.append(_sample(at, pictures[at - 1 : at + 1], asked))
        return made


@dataclass(frozen=True)
class Conversation(Questions):
    """Two questions about a scene; the second is scored, behind what the model said to the first."""

    name: str = "conversation"

    def samples(self, count: int, seed: int) -> list[Sample]:
        rng, pictures, made = np.random.default_rng(seed), _pictures(count, self.split), []
        for at, one in enumerate(_scenes(count, self.split)):
            first, second = questions(one, rng, 2)
            made.append(_sample(at, pictures[at : at + 1], second, (first.text,)))
        return made


@dataclass(frozen=True)
class Captions:
    """Beside CHAIR, how often a partner is invented where its anchor stands alone, and how that goes with the two
    kinds' co-occurrence."""

    split: str = NATURAL
    name: str = "captions"
    max_new_tokens: int = 96

    def samples(self, count: int, seed: int) -> list[Sample]:
        shown = zip(_scenes(count, self.split), _pictures(count, self.split), strict=True)
        return [Sample(str(at), (p,), ASKED, frozenset(one.counts())) for at, (one, p) in enumerate(shown)]

    def parse(self, text: str) -> list[str]:
        return _CHAIR.named(text)

    def score(self, rows: Iterable[Row]) -> Scores:
        rows = list(rows)
        return _CHAIR.score(rows) | self._by_anchor(rows)

    def _by_anchor(self, rows: list[Row]) -> Scores:
        def tally(sample: Sample, text: str) -> list[bool]:
            named = set(self.parse(text))
            alone = [a in sample.truth and p not in sample.truth for a, p in PARTNER.items()]
            return [one and p in named for one, p in zip(alone, PARTNER.values())] + alone

        found = by_picture(rows, tally)
        anchors = len(PARTNER)
        strength = np.array([CO_OCCURRENCE[anchor] for anchor in PARTNER])

        def correlation(seen_as: Callable[[np.ndarray], np.ndarray], totals: np.ndarray) -> np.ndarray:
            rates = totals[..., :anchors] / totals[..., anchors:]
            return pearson(seen_as(strength), seen_as(rates))

        each = {
            f"{partner} beside {anchor}": share(found[i], found[anchors + i])
            for i, (anchor, partner) in enumerate(PARTNER.items())
        }
        return each | {
            "spearman": bootstrap(found, partial(correlation, ranks)),
            "pearson": bootstrap(found, partial(correlation, np.asarray)),
        }


_CHAIR = Chair(SYNONYMS)


def tasks(split: str) -> tuple[Task, ...]:
    popes = (Pope(strategy, split) for strategy in pope.STRATEGIES)
    return (*popes, Questions(split), Conversation(split), Captions(split))


def measure(
    model: Any, processor: Any, count: int, seed: int = 0, batch: int = 64
) -> dict[str, dict[str, Scores]]:
    """Scores by split and task, on so many scenes of each split; on so many texts, where the model has no eyes."""
    if hasattr(model, "get_text_features"):
        return embedding.measure(model, processor, count, seed, batch)
    sees = hasattr(processor, "image_processor")
    asked = {NATURAL: tasks(NATURAL), BROKEN: tasks(BROKEN)} if sees else {NATURAL: writing.TASKS}
    scored: dict[str, dict[str, Scores]] = {split: {} for split in asked}
    for split, tasks_scored in scored.items():
        for task in asked[split]:
            samples, title = task.samples(count, seed), f"{split} {task.name}"
            most = task.max_new_tokens
            said = answers(model, processor, samples, batch=batch, max_new_tokens=most, title=title)
            tasks_scored[task.name] = task.score(zip(samples, said, strict=True))
    return scored


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where either is constant, or has NaN."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Along the last axis, equal ones sharing the mean of theirs; NaN stays NaN."""
    one, other = values[..., :, None], values[..., None, :]
    ranked = (one > other).sum(-1) + (one == other).sum(-1) / 2
    return np.where(np.isnan(values), np.nan, ranked)


def _sample(at: int, images: Sequence[Image], asked: Question, earlier: tuple[str, ...] = ()) -> Sample:
    return Sample(f"{at}/{asked.kind}", images, asked.text, asked.answer, asked.kind, str(at), earlier)
