"""The vocabulary holds all that is said, and no more."""

from itertools import pairwise

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.world.captions import ASKED, caption
from saccade.world.kinds import LETTERS, NUMBERS
from saccade.world.questions import ask_pair, questions
from saccade.world.words import INDEX, ROLES, SPECIAL, WORDS, article, tokens
from world.drawn import drawn


@pytest.fixture(scope="module")
def said():
    """All words of captions, questions and answers."""
    rng, words = np.random.default_rng(0), set(ASKED.split())
    scenes = drawn()
    for scene, other in pairwise(scenes):
        asked = [*questions(scene, rng, 10), ask_pair(scene, other, rng)]
        texts = [caption(scene, rng, 0.2), *(f"{q.text} {q.answer}" for q in asked if q)]
        assert all(text == " ".join(text.split()) for text in texts)
        words.update(word for text in texts for word in text.split())
    return words


def test_the_words_begin_with_the_special_ones():
    assert WORDS[:5] == ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    assert [INDEX[word] for word in WORDS] == list(range(len(WORDS))) and len(INDEX) == len(WORDS)


def test_the_vocabulary_covers_what_is_said_and_little_else(said):
    assert said <= set(WORDS)
    assert set(WORDS) - said == {*SPECIAL, *ROLES, *NUMBERS[6:]}


def test_letters_are_not_words(said):
    assert set(LETTERS) <= said and "a" in said and "A" in LETTERS


def test_what_someone_types(said):
    assert tokens("Is there a cup in the picture?") == [
        "is",
        "there",
        "a",
        "cup",
        "in",
        "the",
        "picture",
        "?",
    ]
    assert tokens("  The  cup is red,right ?") == ["the", "cup", "is", "red", ",", "right", "?"]
    assert tokens("") == []
    rng = np.random.default_rng(0)
    for question in questions(drawn()[0], rng, 10):
        assert tokens(question.text.capitalize().replace(" ?", "?")) == question.text.split()


@pytest.mark.parametrize(
    ("text", "word", "near"),
    [
        ("How many cups are there?", "cups", "did you mean cup"),
        ("Is it a tabel?", "tabel", "did you mean table"),
        ("Is there a zzz?", "zzz", "word 'zzz'."),
        ("a red_cup", "_", "word '_'."),
        ("H", "h", "word 'h'"),
        ("<image>", "<", "word '<'."),
    ],
)
def test_a_word_that_the_world_lacks(text, word, near):
    with pytest.raises(InputError, match=f"no word '{word}'") as caught:
        tokens(text)
    assert near in caught.value.problem


def test_articles():
    assert [article(word) for word in ("orange", "office", "red", "kitchen")] == ["an", "an", "a", "a"]
