"""Answers in a word or a few: VQA's own normalisation and soft accuracy (Antol et al., 2015; Goyal et al., 2017),
and plain equality."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from saccade.evals.task import Row, Scores, accuracy

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
MARKS = ';/[]"{}()=+\\_-><@`,?!'
AGREE = 3  # people who must have said it for full credit

# Every apostrophe may have been forgotten, but for those of words that are other words without it.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've 'ow's'at
"""

_WITHOUT = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i, c in enumerate(word) if c == "'"
}


def normalised(text: str) -> str:
    """A mark that touches a space goes, or all do where a comma divides a number; other marks become spaces. Then
    digits for numbers, no articles, and apostrophes where they belong."""
    text = _one_line(text)
    divided = re.search(r"\d,\d", text)
    kept = text
    for mark in MARKS:
        loose = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if loose or divided else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    words = [NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(_WITHOUT.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(text: str, people: Sequence[str]) -> float:
    """The share of three others who said the same, at most 1, averaged over leaving out each who was asked.

    Only where people differ are answers normalised: where all gave one, it must be said to the letter.
    """
    said, truths = _one_line(text), [_one_line(truth) for truth in people]
    if len(set(truths)) > 1:
        said, truths = normalised(said), [normalised(truth) for truth in truths]
    return agreement(said, truths)


def agreement(said: str, truths: Sequence[str]) -> float:
    agree = sum(truth == said for truth in truths)
    credits = [min(1.0, (agree - (truth == said)) / AGREE) for truth in truths]
    return sum(credits) / len(credits)


def plain(text: str) -> str:
    """Letters and digits alone: "T A P" is "tap", and "two ." is "2"."""
    return "".join(NUMBERS.get(word, word) for word in re.findall(r"\w+", text.lower()))


def exact(rows: Iterable[Row]) -> Scores:
    """All answers, and those to every kind of question. Articles count, for the A of a sign looks like one."""
    return accuracy(rows, lambda sample, text: plain(text) == plain(sample.truth))


def soft(rows: Iterable[Row]) -> Scores:
    """The truth is what people said, ten of them."""
    return accuracy(rows, lambda sample, text: soft_accuracy(text, sample.truth))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
