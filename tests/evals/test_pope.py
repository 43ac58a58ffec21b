"""POPE's negatives, against a set that was worked out by hand and a plain search."""

from __future__ import annotations

import random

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.evals import pope

# cup 3, table 3, dog 2, ball 1, car 1; beside table: cup 2, dog 1, ball 1; beside cup: table 2, dog 1, car 1
SET = [["table", "cup"], ["cup", "table", "dog"], ["cup", "car"], ["table", "ball"], ["dog"]]


def asked(strategy: str, **options: object) -> list[tuple[int, str, bool]]:
    return [tuple(one) for one in pope.questions(SET, strategy, np.random.default_rng(0), **options)]


def test_popular_by_hand() -> None:
    """By number of pictures, then by who was seen first: table, cup, dog, car, ball."""
    assert asked("popular") == [
        (0, "table", True), (0, "dog", False), (0, "cup", True), (0, "car", False),
        (1, "cup", True), (1, "car", False), (1, "table", True), (1, "ball", False), (1, "dog", True),
        (2, "cup", True), (2, "table", False), (2, "car", True), (2, "dog", False),
        (3, "table", True), (3, "cup", False), (3, "ball", True), (3, "dog", False),
        (4, "dog", True), (4, "table", False),
    ]  # fmt: skip


def test_adversarial_by_hand() -> None:
    found = asked("adversarial")
    assert found[:2] == [(0, "table", True), (0, "dog", False)]  # beside a table: cup, then dog, then ball
    assert found[2:4] == [(0, "cup", True), (0, "car", False)]  # beside a cup: table, dog (asked), car
    *_, ball, other = [one for one in found if one[0] == 3]
    assert ball == (3, "ball", True) and other[1] in {
        "dog",
        "car",
    }  # beside a ball is a table alone: any other


def test_habits_of_other_pictures_can_be_asked_for() -> None:
    habits = [["table", "lamp"], ["table", "lamp"], ["table", "cup"], ["dog", "car"]]
    found = pope.questions([["table"]], "adversarial", np.random.default_rng(0), habits)
    assert [tuple(one) for one in found] == [(0, "table", True), (0, "lamp", False)]


@pytest.mark.parametrize("strategy", pope.STRATEGIES)
@pytest.mark.parametrize("seed", range(5))
def test_any_set_is_asked_for_as_a_plain_search_would(strategy: str, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"n{i}" for i in range(20)]
    objects = [draw.sample(names, draw.randrange(8)) for _ in range(80)]
    found = list(pope.questions(objects, strategy, np.random.default_rng(seed)))
    for picture, there in enumerate(objects):
        own = [one for one in found if one.picture == picture]
        assert [one.name for one in own if one.present] == there[:3]
        absent = [one.name for one in own if not one.present]
        assert len(set(absent)) == len(absent) == min(3, len(there)) and not set(absent) & set(there)
        for at, name in enumerate(absent):
            free = [other for other in names if other not in there and other not in absent[:at]]
            if strategy == "popular":
                assert _shown(objects, name) == max(_shown(objects, other) for other in free)
            if strategy == "adversarial":
                beside = {other: _shown(objects, other, there[at]) for other in free}
                assert beside[name] == max(beside.values())


def _shown(objects: list[list[str]], *names: str) -> int:
    return sum(all(name in there for name in names) for there in objects)


def test_random_takes_every_absent_object_alike() -> None:
    objects = [["a"], ["b"], ["c"], ["d"]] * 600
    found = pope.questions(objects, "random", np.random.default_rng(0))
    absent = [one.name for one in found if not one.present and objects[one.picture] == ["a"]]
    shares = [absent.count(name) / len(absent) for name in "bcd"]
    assert sum(shares) == 1 and shares == pytest.approx([1 / 3] * 3, abs=0.06)


def test_a_picture_that_shows_everything_has_no_negative() -> None:
    assert [one.present for one in pope.questions([["a", "b"]], "random", np.random.default_rng(0))] == [
        True
    ] * 2


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(InputError, match="no 'hard' negatives"):
        asked("hard")
