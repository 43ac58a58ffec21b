"""The world's tasks, answered with the truth and with mistakes that are known, and the command that measures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo import family

from saccade.evals.task import Sample, Scores, Task
from saccade.evals.world import Captions, Conversation, Pope, Questions, pearson, ranks, tasks
from saccade.world import evaluate
from saccade.world.captions import caption, mentioned
from saccade.world.kinds import CO_OCCURRENCE, KINDS, PARTNER
from saccade.world.questions import WEIGHTS
from saccade.world.scenes import scene

SPLITS = ("test", "broken")
COUNT = 40


def said(task: Task, samples: list[Sample], text: Any) -> Scores:
    return task.score((sample, text(sample)) for sample in samples)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_pope_asks_for_what_is_there_and_for_what_is_not(strategy: str, split: str) -> None:
    task = Pope(strategy, split)
    samples = task.samples(COUNT, seed=0)
    for sample in samples:
        shown = scene(int(sample.picture), split)
        kind = next(word for word in sample.question.split() if word in KINDS)
        assert sample.truth == ("yes" if shown.counts()[kind] else "no")
        assert np.array_equal(np.asarray(sample.images[0]), shown.image)
    truths = Counter(sample.truth for sample in samples)
    assert truths["yes"] == truths["no"] > 2 * COUNT
    assert said(task, samples, lambda s: s.truth)["f1"].value == 1
    assert said(task, samples, lambda s: "yes")["accuracy"].value == 0.5
    assert samples == task.samples(COUNT, seed=0) != task.samples(COUNT, seed=1)


def test_adversarial_negatives_are_partners_where_co_occurrence_is_broken() -> None:
    """Behind an anchor that stands alone, its partner is asked for more than any other, if it is usual there."""
    behind: dict[str, Counter[str]] = {anchor: Counter() for anchor in PARTNER}
    samples = Pope("adversarial", "broken").samples(300, seed=0)
    for yes, no in zip(samples[::2], samples[1::2]):
        kinds = [next(word for word in one.question.split() if word in KINDS) for one in (yes, no)]
        if kinds[0] in PARTNER and not scene(int(yes.picture), "broken").counts()[PARTNER[kinds[0]]]:
            behind[kinds[0]][kinds[1]] += 1
    for anchor in ("table", "car", "dog", "shelf"):
        assert behind[anchor].most_common(1)[0][0] == PARTNER[anchor]


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_of_question_is_asked_and_scored(split: str) -> None:
    task = Questions(split)
    samples = task.samples(COUNT, seed=0)
    assert {sample.group for sample in samples} == {*WEIGHTS, "compare"}
    assert {len(s.images) for s in samples if s.group == "compare"} == {2}
    assert len({sample.id for sample in samples}) == len(samples)
    found = said(task, samples, lambda s: "red" if s.group == "place" else f" {s.truth} . ".upper())
    assert found.pop("place").value == 0
    places = sum(sample.group == "place" for sample in samples)
    assert found.pop("accuracy").value == pytest.approx(1 - places / len(samples))
    assert {estimate.value for estimate in found.values()} == {1}


def test_a_conversation_goes_on() -> None:
    samples = Conversation().samples(COUNT, seed=0)
    assert len(samples) == COUNT and all(len(s.earlier) == 1 != s.question for s in samples)
    assert all(s.question not in s.earlier for s in samples)
    assert said(Conversation(), samples, lambda s: s.truth)["accuracy"].value == 1


@pytest.mark.parametrize("split", SPLITS)
def test_a_true_caption_invents_nothing(split: str) -> None:
    task = Captions(split)
    samples = task.samples(COUNT, seed=0)
    found = said(task, samples, lambda s: caption(scene(int(s.id), split)))
    assert (found["chair_i"].value, found["chair_s"].value, found["recall"].value) == (0, 0, 1)
    for sample in samples:
        text = caption(scene(int(sample.id), split))
        assert [*dict.fromkeys(task.parse(text))] == mentioned(text)


def test_what_is_invented_is_told_by_anchor() -> None:
    """Partners are invented beside lonely anchors as often as they would be there, and then as often alike."""
    task, rng = Captions("broken"), np.random.default_rng(0)
    samples = task.samples(400, seed=0)

    def text(sample: Sample, strength: dict[str, float]) -> str:
        lonely = [a for a, p in PARTNER.items() if a in sample.truth and p not in sample.truth]
        return " , ".join([*sample.truth, *(PARTNER[a] for a in lonely if rng.random() < strength[a])])

    found = said(task, samples, lambda s: text(s, CO_OCCURRENCE))
    for anchor, partner in PARTNER.items():
        rate = found[f"{partner} beside {anchor}"]
        assert rate.low <= CO_OCCURRENCE[anchor] <= rate.high and rate.count > 20
    assert found["spearman"].value > 0.85 < found["pearson"].value and found["pearson"].low > 0.7
    rng = np.random.default_rng(1)
    flat = said(task, samples, lambda s: text(s, dict.fromkeys(PARTNER, 0.5)))
    assert flat["pearson"].low < 0 < flat["pearson"].high


def test_correlations_by_other_formulas() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 8)), rng.integers(0, 4, (5, 8)).astype(float)
    for x, y, found in zip(a, b, pearson(a, b)):
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1])
    for row, found in zip(b, ranks(b)):
        order = sorted(row)
        mean = [np.mean([i for i, value in enumerate(order) if value == one]) for one in row]
        assert found - found.min() == pytest.approx(mean - np.min(mean))


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llava"
    family("llava").build().save_pretrained(path)
    family("llava").processor().save_pretrained(path)
    return path


def test_the_command_measures_and_writes_the_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.json"
    card.write_text('{"recipe": "none", "figures": "old"}')
    assert evaluate.main([str(folder), "--scenes", "2", "--json", "--card", str(card)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == set(SPLITS)
    assert list(figures["test"]) == [task.name for task in tasks("test")]
    accuracy = figures["test"]["pope-random"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    written = json.loads(card.read_text())
    assert written.pop("recipe") == "none"
    assert written == {"figures": {"scenes": 2, "seed": 0, **figures}}
    lines = evaluate.table(figures).splitlines()
    shown = next(line for line in lines[lines.index("pope-random") :] if "accuracy" in line)
    assert shown.split()[1:4] == [f"{accuracy[end]:.3f}" for end in ("value", "low", "high")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenes", "0"], "count 0 is out of range"),
        (["--scenes", "1", "--batch", "0"], "0 questions at a time"),
        (["--card", "nowhere.json"], "nowhere.json is no card"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(folder), *options]) == 2
    assert message in capsys.readouterr().err
