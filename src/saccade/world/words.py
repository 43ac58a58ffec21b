"""The closed vocabulary: all that questions and captions say, and a casual question with it."""

from __future__ import annotations

import re

from saccade.core.errors import InputError, nearest
from saccade.world.kinds import COLOURS, KINDS, LETTERS, NUMBERS, PLACES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("user", "assistant", ":")
MARKS = (".", ",", "?")
PLAIN = (
    "a", "an", "the", "this", "there", "here", "it", "is", "are", "has", "have",
    "does", "and", "or", "not", "no", "yes", "in", "on", "at", "of", "with",
    "what", "which", "where", "how", "many", "do", "you", "see", "can", "say", "tell",
    "me", "describe", "read", "image", "picture", "photo", "first", "second", "same", "another", "more",
    "thing", "colour", "place", "word", "left", "right", "above", "below", "top", "bottom", "empty",
)  # fmt: skip

WORDS: list[str] = [*SPECIAL, *ROLES, *MARKS, *PLAIN, *KINDS, *COLOURS, *PLACES, *NUMBERS, *LETTERS]
INDEX: dict[str, int] = {word: index for index, word in enumerate(WORDS)}

_TYPED = [word for word in WORDS if word not in SPECIAL]
_PIECE = re.compile(r"[^\W_]+|[^\w\s]|_")


def tokens(text: str) -> list[str]:
    """The words of a sentence that someone typed."""
    found = _PIECE.findall(text.lower())
    for word in found:
        if word not in _TYPED:
            near = nearest(word, _TYPED)
            raise InputError(
                f"The world has no word {word!r}{f': {near}' if near else '.'}",
                "say it in the words of saccade.world.words.WORDS",
            )
    return found


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
