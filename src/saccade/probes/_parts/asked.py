"""What is where in a question as a model reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.layout import KINDS, Layout
from saccade.core.method import Method
from saccade.core.question import Question
from saccade.core.session import Session
from saccade.core.words import find, pieces, words

EDGE = 0.05  # of a token's side: boxes are not known more finely


@dataclass(eq=False)
class Reading(Method):
    """The layout of a prompt's tokens, and how many heads attend at every site."""

    sites: str = "text.*.self"
    layout: Layout | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def observe(self, call: AttentionCall) -> None:
        self.layout = call.klayout
        self.counts[call.site.name] = call.q.shape[1]


def read(
    session: Session, question: Question, inputs: Mapping[str, Any], *, located: bool = False
) -> tuple[Layout, dict[str, int]]:
    """Of one prompt, its layout, with boxes where its pictures are to be located, and the heads by site."""
    reading = Reading()
    if located:
        session.locate(question.processor, question.images)
    try:
        session.forward(inputs, [reading], last_only=True)
    finally:
        if located:
            session.locate(question.processor, [])
    assert reading.layout is not None
    return reading.layout, reading.counts


def tokenizer_of(question: Question) -> Any:
    return getattr(question.processor, "tokenizer", question.processor)


def said(question: Question, phrase: str, inputs: Mapping[str, Any], layout: Layout) -> Tensor:
    """The tokens of a word or phrase in a prompt, wherever it is said: (tokens,), bool."""
    tokenizer, kind = tokenizer_of(question), layout.kind[0]
    ids, written = inputs["input_ids"][0].tolist(), (kind == KINDS.index("text")).tolist()
    texts = pieces(tokenizer, [i if w else None for i, w in zip(ids, written, strict=True)])
    at = find(phrase, words(texts, len(ids)))
    if not at:
        raise InputError(
            f"{phrase!r} is not said in the prompt {tokenizer.decode(ids)!r}.", "name words that are"
        )
    found = torch.zeros(len(ids), dtype=torch.bool)
    found[at] = True
    return found


def placed(question: Question, at: str, inputs: Mapping[str, Any], layout: Layout) -> Tensor:
    """The prompt's `last` token, or that of a word: (tokens,), bool, one of them."""
    if at == "last":
        return layout.where("last")[0].cpu()
    found = said(question, at, inputs, layout)
    return torch.arange(len(found)) == found.nonzero()[-1]


def shows(layout: Layout, box: tuple[float, float, float, float]) -> Tensor:
    """The visual tokens that were cut from a part of the picture that a box touches: (tokens,), bool."""
    x0, y0, x1, y1 = layout.boxes[0].cpu().unbind(-1)  # NaN touches nothing
    across = x1.clamp_max(box[2]) - x0.clamp_min(box[0])
    down = y1.clamp_max(box[3]) - y0.clamp_min(box[1])
    return (across > EDGE * (x1 - x0)) & (down > EDGE * (y1 - y0))


def token_of(question: Question, word: str) -> int:
    """The only token of a word; a space before it may matter."""
    tokenizer = tokenizer_of(question)
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(
            f"{word!r} is not one token of this model, but {len(ids)}: {ids}.",
            "give words of one token, with the space before them where the tokenizer keeps it",
        )
    return int(ids[0])
