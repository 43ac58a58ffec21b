"""The words of a sequence, and the tokens that they are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# One character of a script without spaces; letters and digits that belong together; one mark.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+(?:['’-]\w+)*|[^\w\s]|_")
_PART = "\ufffd"  # what a tokenizer writes for a part of a character


class Word(NamedTuple):
    """A word and the logical positions of its tokens. `said` by the model, or given to it."""

    text: str
    positions: tuple[int, ...]
    said: bool


def pieces(tokenizer: Any, ids: Sequence[int | None]) -> list[str | None]:
    """The text that every token adds; None stays None: what is no text, such as a picture's token.

    Each is read behind the one before, for a tokenizer may write a token in another way at the start.
    A character that is spread over several tokens is written at the last of them.
    """
    texts: list[str | None] = []
    before = read = 0  # ids[before:read] is the context, and `known` its text
    known = ""
    for i, token in enumerate(ids):
        if token is None:
            texts.append(None)
            before, read, known = i + 1, i + 1, ""
            continue
        text = tokenizer.decode([*ids[before : i + 1]], clean_up_tokenization_spaces=False)
        if text.endswith(_PART):
            texts.append("")
            continue
        texts.append(text[len(known) :])
        before, read = read, i + 1
        known = tokenizer.decode([*ids[before:read]], clean_up_tokenization_spaces=False)
    return texts


def words(texts: Sequence[str | None], answer: int) -> list[Word]:
    """The words. None goes over a token without text, nor into the answer, which begins at `answer`."""
    whole, owners = "", []  # the text, and for every character the tokens that wrote it
    first = 0
    for position, text in enumerate(texts):
        if text is None or position == answer:
            whole, first = whole + "\n", position
            owners.append((position, position))
        if text:
            whole += text
            owners += [(first, position)] * len(text)
        if text != "":
            first = position + 1
    found = []
    for match in _WORD.finditer(whole):
        start, stop = owners[match.start()][0], owners[match.end() - 1][1] + 1
        found.append(Word(match.group(), tuple(range(start, stop)), start >= answer))
    return found


def find(phrase: str, spoken: Sequence[Word]) -> list[int]:
    """Positions of the tokens of a word, or of several in a row, wherever they are said; case does not matter."""
    wanted = [match.group().lower() for match in _WORD.finditer(phrase)]
    texts = [word.text.lower() for word in spoken]
    starts = [
        i for i in range(len(texts) - len(wanted) + 1) if wanted and texts[i : i + len(wanted)] == wanted
    ]
    return sorted({p for i in starts for word in spoken[i : i + len(wanted)] for p in word.positions})
