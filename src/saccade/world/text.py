"""Text of which everything is known: what can be told from what came before, and where.

Lists with queries, needles in haystacks, words that come again, who gave what to whom, coloured objects, sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from saccade.core.errors import InputError
from saccade.world.kinds import COLOURS, KINDS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
DIGITS = tuple("0123456789")
END, COMMA, ASKED, PLUS, MINUS, EQUALS = MARKS = (".", ",", "?", "+", "-", "=")
NAMES = (
    "Ada", "Ben", "Carl", "Dora", "Emma", "Fred", "Grace", "Hugo", "Ida", "Jack", "Kate", "Leo",
    "Mary", "Nina", "Omar", "Paul", "Rosa", "Sam", "Tom", "Uma", "Vera", "Will", "Yuri", "Zoe",
)  # fmt: skip
OBJECTS = (
    *KINDS, "pen", "key", "hat", "coat", "shoe", "ring", "box", "bag", "map", "bell", "drum", "cake",
    "apple", "spoon", "knife", "plate", "clock", "brush", "candle", "pillow", "basket", "letter", "ladder", "mirror",
)  # fmt: skip
PLACES = ("kitchen", "office", "street", "park", "beach", "store", "school", "garden", "station", "library")
OTHERS = (
    "river", "mountain", "forest", "island", "valley", "desert", "bridge", "tower", "castle", "village",
    "winter", "summer", "spring", "autumn", "morning", "evening", "night", "noon", "year", "week",
    "king", "queen", "farmer", "sailor", "doctor", "baker", "singer", "painter", "teacher", "hunter",
    "horse", "sheep", "tiger", "rabbit", "snake", "eagle", "mouse", "spider", "whale", "camel",
    "bread", "butter", "sugar", "pepper", "honey", "cheese", "onion", "carrot", "lemon", "coffee",
    "iron", "silver", "copper", "glass", "paper", "cotton", "leather", "marble", "sand", "smoke",
    "music", "story", "dream", "secret", "promise", "question", "answer", "number", "shadow", "light",
)  # fmt: skip
PLAIN = (
    "the", "a", "and", "in", "on", "at", "to", "of", "is", "are", "there", "what", "which", "colour",
    "when", "then", "after", "went", "gave", "handed", "were", "had", "met", "holds",
)  # fmt: skip
CONTENT = (*NAMES, *OBJECTS, *COLOURS, *PLACES, *OTHERS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""What lists, haystacks and repeats are made of: words that no sentence is built with."""

WORDS = (*SPECIAL, *MARKS, *DIGITS, *PLAIN, *CONTENT)
INDEX = {word: index for index, word in enumerate(WORDS)}

SENTENCE = (4, 9)  # words of the haystack's sentences, the last number left out
FOLLOWERS = 4  # of every word in a haystack
NEEDLE = "the {key} holds the {value} ."
MET = (
    "when {a} and {b} went to the {place} , {giver} gave a {thing} to",
    "then {a} and {b} were at the {place} . {giver} handed the {thing} to",
    "after {a} met {b} in the {place} , {giver} gave the {thing} to",
    "{a} and {b} had a {thing} . at the {place} {giver} gave the {thing} to",
)
SHOWN = "in the {place} there is"
QUESTION = "what colour is the {thing} ?"


class Text(NamedTuple):
    words: tuple[str, ...]
    answers: tuple[int, ...]  # positions of the words that follow from those before


# ---- lists and repeats ---------------------------------------------------------------------------------------


def listed(rng: np.random.Generator, words: Sequence[str], pairs: int, queries: int) -> Text:
    """Keys with their values, and then keys, each of which its value follows: `k1 v1 k2 v2 . k2 v2 k2 v2 k1 v1`.

    Keys are different, and no value is a key. Keys are asked for with replacement and values may be the same, so
    that nothing is answered by elimination.
    """
    if not 0 < pairs < len(words) or queries < 1:
        raise InputError(
            f"{queries} queries to {pairs} pairs cannot be drawn from {len(words)} words.",
            "ask once at least, and give more words than pairs",
        )
    drawn = rng.permutation(len(words))
    keys = [words[i] for i in drawn[:pairs]]
    values = [words[i] for i in rng.choice(drawn[pairs:], pairs)]
    asked = rng.integers(pairs, size=queries)
    text = [word for pair in zip(keys, values) for word in pair] + [END]
    start = len(text) + 1
    text += [word for i in asked for word in (keys[i], values[i])]
    return Text(tuple(text), tuple(range(start, len(text), 2)))


def repeated(rng: np.random.Generator, words: Sequence[str], length: int) -> Text:
    """Blocks of words, parts of which come again, behind gaps of any length and without a sign of where.

    What follows is known where a part has begun to come again and its last word was followed by the same before.
    """
    text: list[str] = []
    latest: dict[str, int] = {}  # where a word was last
    answers: list[int] = []
    fresh: list[int] = []

    def say(word: str) -> str | None:
        """What followed the word when it was said before."""
        at = latest.get(word)
        latest[word] = len(text)
        text.append(word)
        return None if at is None else text[at + 1]

    while len(text) < length:
        for _ in range(rng.integers(3, 13)):
            fresh = fresh or rng.permutation(len(words)).tolist()
            say(words[fresh.pop()])
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(text) - 1))
            followed = None
            for word in text[start : start + int(rng.integers(2, 13))]:
                if word == followed:
                    answers.append(len(text))
                followed = say(word)
    return Text(tuple(text[:length]), tuple(at for at in answers if at < length))


# ---- needles -------------------------------------------------------------------------------------------------


def filler(
    rng: np.random.Generator, words: Sequence[str], length: int, without: Sequence[str] = ()
) -> list[str]:
    """Sentences in which every word is followed by one of four, always the same ones: enough of a language for a
    model to learn."""
    starts = [i for i, word in enumerate(words) if word not in without]
    made: list[str] = []
    while len(made) < length:
        at = starts[rng.integers(len(starts))]
        for _ in range(rng.integers(*SENTENCE)):
            made.append(words[at])
            nexts = [(FOLLOWERS * at + 1 + i) % len(words) for i in range(FOLLOWERS)]
            nexts = [i for i in nexts if words[i] not in without]
            if not nexts:
                break
            at = nexts[rng.integers(len(nexts))]
        made.append(END)
    return made


def haystack(
    rng: np.random.Generator,
    words: Sequence[str],
    length: int,
    depths: Sequence[float],
    needle: str = NEEDLE,
) -> Text:
    """A haystack of about `length` words, a needle behind each share `depths` of its sentences, and the needles
    once more, in any order; the last ends with its value. Keys and values are words that the haystack lacks."""
    candidates = [word for word in words if word not in needle.split()]
    count = len(depths)
    if length < 1 or not all(0 <= depth <= 1 for depth in depths) or len(candidates) <= 2 * count:
        raise InputError(
            f"Needles at {', '.join(f'{d:g}' for d in depths)} of {length} words cannot be drawn from "
            f"{len(candidates)} words.",
            "give depths from 0 to 1, and more than two words for each that the needle has not",
        )
    drawn = [candidates[i] for i in rng.choice(len(candidates), 2 * count, replace=False)]
    said = [needle.format(key=key, value=value).split() for key, value in zip(drawn[::2], drawn[1::2])]
    hay = filler(rng, words, length, without=drawn)
    ends = [0, *(i + 1 for i, word in enumerate(hay) if word == END)]
    text: list[str] = []
    begun = 0
    for number in sorted(range(count), key=lambda i: depths[i]):
        end = ends[round(depths[number] * (len(ends) - 1))]
        text += hay[begun:end]
        text += said[number]
        begun = end
    text += hay[begun:]
    answers = []
    for number in rng.permutation(count):
        answers.append(len(text) + said[number].index(drawn[2 * number + 1]))
        text += said[number]
    return Text(tuple(text[: answers[-1] + 1]), tuple(answers))


# ---- sentences -----------------------------------------------------------------------------------------------


def given(rng: np.random.Generator) -> Text:
    """Of two who were named, one gives a thing to the other (Wang et al., 2022)."""
    a, b = _different(rng, NAMES, 2)
    giver, other = (a, b) if rng.random() < 0.5 else (b, a)
    said = _one(rng, MET).format(a=a, b=b, giver=giver, place=_one(rng, PLACES), thing=_one(rng, OBJECTS))
    words = (*said.split(), other, END)
    return Text(words, (len(words) - 2,))


def coloured(rng: np.random.Generator, things: int, queries: int) -> Text:
    """Things of a colour, and what colour some of them are; colours may be the same, and things asked for again."""
    named = _different(rng, OBJECTS, things)
    colours = [_one(rng, tuple(COLOURS)) for _ in named]
    text = SHOWN.format(place=_one(rng, PLACES)).split()
    for number, (thing, colour) in enumerate(zip(named, colours)):
        text += ["and"] * (number == things - 1 > 0) + ["a", colour, thing] + [COMMA] * (number < things - 2)
    text.append(END)
    answers = []
    for i in rng.integers(things, size=queries):
        text += [*QUESTION.format(thing=named[i]).split(), colours[i], END]
        answers.append(len(text) - 2)
    return Text(tuple(text), tuple(answers))


def sum_of(rng: np.random.Generator, held_out: bool = False) -> Text:
    """Two numbers of a digit or two, added or subtracted; what comes out follows, digit by digit, and where it ends.
    An eighth of the pairs of numbers of two digits is held out, in either order."""
    low, high = (0, 10) if rng.random() < 0.5 and not held_out else (10, 100)
    a, b = (int(one) for one in rng.integers(low, high, 2))
    while high == 100 and held_out != ((a + 1) * (b + 1) % 7 == 1):
        a, b = (int(one) for one in rng.integers(low, high, 2))
    plus = rng.random() < 0.5
    a, b = (a, b) if plus else (max(a, b), min(a, b))
    asked = (*str(a), PLUS if plus else MINUS, *str(b), EQUALS)
    words = (*asked, *str(a + b if plus else a - b), END)
    return Text(words, tuple(range(len(asked), len(words))))


def joined(make: Callable[[], Text], length: int) -> Text:
    """As many as fit."""
    words: list[str] = []
    answers: list[int] = []
    while len(words) < length:
        text = make()
        answers += [len(words) + at for at in text.answers]
        words += text.words
    return Text(tuple(words[:length]), tuple(at for at in answers if at < length))


def _one(rng: np.random.Generator, among: Sequence[str]) -> str:
    return among[int(rng.integers(len(among)))]


def _different(rng: np.random.Generator, among: Sequence[str], count: int) -> list[str]:
    return [among[i] for i in rng.choice(len(among), count, replace=False)]
