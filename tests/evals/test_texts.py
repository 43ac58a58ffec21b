"""Tasks of text: what is scored is what was asked."""

from __future__ import annotations

import re

import pytest

from saccade.evals.needle import Needle
from saccade.evals.recall import Recall
from saccade.evals.writing import TASKS, Continued
from saccade.world.text import EQUALS
from saccade.world.text import WORDS as KNOWN

WORDS = [f"w{i}" for i in range(60)]


def test_recall_scores_the_first_query_apart() -> None:
    task = Recall(WORDS, pairs=4, queries=3)
    samples = task.samples(20, seed=0)
    assert [s.group for s in samples[:3]] == ["first", "later", "later"] and len(samples) == 60
    assert samples == task.samples(20, seed=0) != task.samples(20, seed=1)
    for sample in samples:
        *before, key = sample.question.split()
        assert before[before.index(key) + 1] == sample.truth
    # right at the first query only, with words behind the answer; and nothing said at all
    said = [f"{s.truth} and more" if s.group == "first" else "" for s in samples]
    found = task.score(zip(samples, said))
    assert (found["first"].value, found["later"].value) == (1, 0)
    assert found["accuracy"].value == pytest.approx(1 / 3) and found["accuracy"].count == 60


def test_needles_are_scored_by_depth() -> None:
    task = Needle(WORDS, length=40, depths=(0.0, 0.5))
    samples = task.samples(10, seed=0)
    assert all(s.truth not in s.question.split()[-3:] and s.truth in s.question for s in samples)
    found = task.score((s, s.truth if s.group == "depth 0" else "the") for s in samples)
    assert (found["depth 0"].value, found["depth 0.5"].value, found["accuracy"].value) == (1, 0, 0.5)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_tasks_of_the_language_model_are_answered_with_the_truth(task) -> None:
    samples = task.samples(10, seed=0)
    assert samples == task.samples(10, seed=0) != task.samples(10, seed=1)
    assert all({*s.question.split(), *s.truth.split()} <= {*KNOWN} for s in samples)
    assert all(len(s.truth.split()) <= task.max_new_tokens for s in samples)
    assert task.score((s, f"{s.truth} the") for s in samples)["accuracy"].value == 1
    assert task.score((s, f"the {s.truth}") for s in samples)["accuracy"].value == 0


def test_a_sum_is_right_when_it_ends() -> None:
    task = next(task for task in TASKS if task.name == "sums held out")
    assert isinstance(task, Continued)
    for sample in task.samples(50, seed=0):
        asked = re.sub(" ", "", sample.question)
        assert asked.endswith(EQUALS) and eval(asked[:-1]) == int(re.sub("[ .]", "", sample.truth))
        longer = sample.truth.replace(" .", " 1 .")
        assert task.score([(sample, longer)])["accuracy"].value == 0
        assert task.score([(sample, sample.truth)])["accuracy"].value == 1
