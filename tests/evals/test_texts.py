"""Recall lists and needles: what is written is what the task says, and what is scored is what was asked."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.evals.needle import NEEDLE, Needle, filler, hidden
from saccade.evals.recall import BETWEEN, Recall, listed

WORDS = [f"w{i}" for i in range(60)]


@pytest.mark.parametrize("seed", range(5))
def test_a_list_answers_its_queries(seed: int) -> None:
    words, answers = listed(np.random.default_rng(seed), WORDS, pairs=10, queries=7)
    assert words[20] == BETWEEN and len(words) == 21 + 14 and answers == tuple(range(22, 35, 2))
    pairs = dict(zip(words[0:20:2], words[1:20:2]))
    assert len(pairs) == 10 and not set(pairs) & set(pairs.values())
    assert [pairs[words[at - 1]] for at in answers] == [words[at] for at in answers]


def test_queries_come_again_and_values_too() -> None:
    """So that nothing can be answered by elimination: at three pairs and three queries, 2/9 are without repeats."""
    rng, different, equal = np.random.default_rng(0), 0, 0
    for _ in range(900):
        words, answers = listed(rng, WORDS[:6], pairs=3, queries=3)
        different += len({words[at - 1] for at in answers}) == 3
        equal += len(set(words[1:6:2])) < 3
    assert different / 900 == pytest.approx(2 / 9, abs=0.04)
    assert equal / 900 == pytest.approx(1 - 2 / 9, abs=0.04)  # three values drawn among three words


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


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_needle_is_said_once_at_its_depth_and_asked_for_once(seed: int, depth: float) -> None:
    words, at = hidden(np.random.default_rng(seed), WORDS, 200, depth)
    said = NEEDLE.split()
    key, value = words[at + said.index("{key}")], words[at + said.index("{value}")]
    assert " ".join(words[at : at + len(said)]) == NEEDLE.format(key=key, value=value)
    asked = NEEDLE.format(key=key, value=value).split()[: said.index("{value}") + 1]
    assert list(words[-len(asked) :]) == asked and words[-1] == value
    assert Counter(words)[key] == Counter(words)[value] == 2
    assert at == 0 or words[at - 1] == "."
    length = len(words) - len(said) - len(asked)
    assert 200 <= length < 210 and abs(at - depth * length) <= 12


def test_the_filler_is_a_language() -> None:
    """Every word is followed by four others at most, the same in every text, and leaving words out adds none."""
    seen: dict[str, set[str]] = {}
    for seed in range(30):
        without = WORDS[seed : seed + 2]
        text = filler(np.random.default_rng(seed), WORDS, 500, without)
        assert not set(without) & set(text) and text[-1] == "."
        for a, b in pairwise(text):
            if "." not in (a, b):
                seen.setdefault(a, set()).add(b)
    assert set(seen) == set(WORDS) and all(2 <= len(after) <= 4 for after in seen.values())


def test_needles_are_scored_by_depth() -> None:
    task = Needle(WORDS, length=40, depths=(0.0, 0.5))
    samples = task.samples(10, seed=0)
    assert all(s.truth not in s.question.split()[-3:] and s.truth in s.question for s in samples)
    found = task.score((s, s.truth if s.group == "depth 0" else "the") for s in samples)
    assert (found["depth 0"].value, found["depth 0.5"].value, found["accuracy"].value) == (1, 0, 0.5)


@pytest.mark.parametrize("pairs", [0, 60])
def test_a_list_that_cannot_be_drawn_is_refused(pairs: int) -> None:
    with pytest.raises(InputError, match="cannot be drawn from 60 words"):
        listed(np.random.default_rng(0), WORDS, pairs, 1)


@pytest.mark.parametrize(
    ("words", "length", "depth"), [(WORDS, 0, 0.5), (WORDS, 9, 1.5), (WORDS[:2], 9, 0.5)]
)
def test_a_needle_that_cannot_be_drawn_is_refused(words: list[str], length: int, depth: float) -> None:
    with pytest.raises(InputError, match="cannot be drawn"):
        hidden(np.random.default_rng(0), words, length, depth)
