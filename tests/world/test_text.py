"""Texts: every answer is found again, by other means, in what stands before it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.world.kinds import COLOURS
from saccade.world.text import (
    CONTENT,
    INDEX,
    NAMES,
    NEEDLE,
    PLAIN,
    WORDS,
    Text,
    coloured,
    filler,
    given,
    haystack,
    joined,
    listed,
    repeated,
    sum_of,
)  # fmt: skip

SOME = [f"w{i}" for i in range(60)]
SEEDS = pytest.mark.parametrize("seed", range(5))
MAKERS: dict[str, Callable[[np.random.Generator], Text]] = {
    "listed": lambda rng: listed(rng, CONTENT, 10, 7),
    "repeated": lambda rng: repeated(rng, CONTENT, 300),
    "haystack": lambda rng: haystack(rng, CONTENT, 200, (0.9, 0.1, 0.5)),
    "given": lambda rng: joined(lambda: given(rng), 60),
    "coloured": lambda rng: joined(lambda: coloured(rng, 4, 3), 100),
    "sums": lambda rng: joined(lambda: sum_of(rng), 60),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_text_is_drawn_from_its_seed_in_words_that_there_are(name: str) -> None:
    make = MAKERS[name]
    text = make(np.random.default_rng(3))
    assert text == make(np.random.default_rng(3)) != make(np.random.default_rng(4))
    assert text.answers and set(text.words) <= set(WORDS) and text.answers == tuple(sorted(text.answers))
    assert [INDEX[word] for word in WORDS] == list(range(len(WORDS))) and not set(PLAIN) & set(CONTENT)


@SEEDS
def test_a_list_answers_its_queries(seed: int) -> None:
    words, answers = listed(np.random.default_rng(seed), SOME, pairs=10, queries=7)
    assert words[20] == "." and len(words) == 21 + 14 and answers == tuple(range(22, 35, 2))
    pairs = dict(zip(words[0:20:2], words[1:20:2]))
    assert len(pairs) == 10 and not set(pairs) & set(pairs.values())
    assert [pairs[words[at - 1]] for at in answers] == [words[at] for at in answers]


def test_queries_come_again_and_values_too() -> None:
    """So that nothing can be answered by elimination: at three pairs and three queries, 2/9 are without repeats."""
    rng, different, equal = np.random.default_rng(0), 0, 0
    for _ in range(900):
        words, answers = listed(rng, SOME[:6], pairs=3, queries=3)
        different += len({words[at - 1] for at in answers}) == 3
        equal += len(set(words[1:6:2])) < 3
    assert different / 900 == pytest.approx(2 / 9, abs=0.04)
    assert equal / 900 == pytest.approx(1 - 2 / 9, abs=0.04)  # three values drawn among three words


@SEEDS
def test_what_comes_again_is_what_followed_last(seed: int) -> None:
    words, answers = repeated(np.random.default_rng(seed), SOME, 400)
    assert len(words) == 400
    for at in answers:
        before = max(i for i in range(at - 1) if words[i] == words[at - 1])
        assert words[at] == words[before + 1]
    assert 0.2 < len(answers) / len(words) < 0.8
    gaps = {b - a for a, b in pairwise(answers)}
    assert len(gaps) > 6  # without a rhythm


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_needle_is_said_once_at_its_depth_and_asked_for_once(seed: int, depth: float) -> None:
    words, answers = haystack(np.random.default_rng(seed), SOME, 200, (depth,))
    key, value = words[-4], words[-1]
    assert answers == (len(words) - 1,)
    assert list(words[-5:]) == NEEDLE.format(key=key, value=value).split()[:-1]
    assert Counter(words)[key] == Counter(words)[value] == 2
    at = words.index(key) - 1
    assert " ".join(words[at : at + 6]) == NEEDLE.format(key=key, value=value)
    assert at == 0 or words[at - 1] == "."
    length = len(words) - 6 - 5
    assert 200 <= length < 210 and abs(at - depth * length) <= 12


@SEEDS
def test_many_needles_are_asked_for_in_another_order(seed: int) -> None:
    words, answers = haystack(np.random.default_rng(seed), SOME, 200, (0.2, 0.9, 0.2, 0.5))
    said = re.findall(r"the (\w+) holds the (\w+)", " ".join(words))
    assert sorted(said[:4]) == sorted(said[4:]) and len(set(said)) == 4
    assert [words[at] for at in answers] == [value for _, value in said[4:]]


def test_a_haystack_ends_a_sentence_where_all_that_could_follow_is_left_out() -> None:
    rng = np.random.default_rng(0)
    assert all(len(haystack(rng, SOME, 50, [0.5] * 25).answers) == 25 for _ in range(20))


def test_the_filler_is_a_language() -> None:
    """Every word is followed by four others at most, the same in every text, and leaving words out adds none."""
    seen: dict[str, set[str]] = {}
    for seed in range(30):
        without = SOME[seed : seed + 2]
        text = filler(np.random.default_rng(seed), SOME, 500, without)
        assert not set(without) & set(text) and text[-1] == "."
        for a, b in pairwise(text):
            if "." not in (a, b):
                seen.setdefault(a, set()).add(b)
    assert set(seen) == set(SOME) and all(2 <= len(after) <= 4 for after in seen.values())


def test_who_gives_is_named_twice_and_the_other_gets_it() -> None:
    rng, first = np.random.default_rng(0), 0
    for _ in range(200):
        text = given(rng)
        *named, giver = [word for word in text.words[: text.answers[0]] if word in NAMES]
        assert len(set(named)) == 2 and giver in named
        assert text.words[text.answers[0]] == next(name for name in named if name != giver)
        first += named[0] == giver
    assert 70 < first < 130


@SEEDS
def test_a_thing_has_the_colour_that_was_said(seed: int) -> None:
    words, answers = coloured(np.random.default_rng(seed), 4, 6)
    shown, *asked = re.split(r" \. ?", " ".join(words))[:-1]
    colour_of = {thing: colour for colour, thing in re.findall(rf"a ({'|'.join(COLOURS)}) (\w+)", shown)}
    assert len(colour_of) == 4 and len(asked) == len(answers) == 6
    for question, at in zip(asked, answers):
        thing, colour = re.fullmatch(r"what colour is the (\w+) \? (\w+)", question).groups()
        assert colour_of[thing] == colour == words[at]


def test_sums_are_right_and_those_held_out_never_seen() -> None:
    rng = np.random.default_rng(0)
    asked: dict[bool, set[frozenset[str]]] = {False: set(), True: set()}
    for held_out in (False, True):
        for _ in range(3000):
            words, answers = sum_of(rng, held_out)
            text = "".join(words)
            left, right = text.removesuffix(".").split("=")
            assert eval(left) == int(right) >= 0
            assert answers == tuple(range(words.index("=") + 1, len(words)))
            pair = frozenset(re.split(r"[+-]", left))
            if all(len(number) == 2 for number in pair):
                asked[held_out].add(pair)
    assert not asked[True] & asked[False] and min(map(len, asked.values())) > 400


@pytest.mark.parametrize("pairs", [0, 60])
def test_a_list_that_cannot_be_drawn_is_refused(pairs: int) -> None:
    with pytest.raises(InputError, match="cannot be drawn from 60 words"):
        listed(np.random.default_rng(0), SOME, pairs, 1)


@pytest.mark.parametrize(("words", "length", "depth"), [(SOME, 0, 0.5), (SOME, 9, 1.5), (SOME[:2], 9, 0.5)])
def test_a_needle_that_cannot_be_drawn_is_refused(words: list[str], length: int, depth: float) -> None:
    with pytest.raises(InputError, match="cannot be drawn"):
        haystack(np.random.default_rng(0), words, length, (depth,))
