"""Which way the picture takes through the layers to the answer: keep tokens from seeing others, a few layers at
a time.

    change(l) = 100 * (p(T does not see S in layers l - k/2 .. l + k/2) - p) / p

where p is the probability of the answer's first token. Beside it, how likely every layer alone finds the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError, OptionError
from saccade.core.layout import Layout
from saccade.core.method import Method
from saccade.core.passes import HiddenCall
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.site import layers, match
from saccade.core.system import option
from saccade.probes._parts.asked import read, said, shows, tokenizer_of
from saccade.probes._parts.knockout import Cut, Cuts
from saccade.probes._parts.sweep import sweep
from saccade.probes._parts.table import Table, mean
from saccade.probes._parts.table import layers as numbers

Box = tuple[float, float, float, float]


@dataclass(eq=False)
class XmodalFlow(Driver):
    """`answer.found["flow"]` is a `Flow`; `average` takes those of many questions together."""

    card = Card(
        slug="xmodal_flow",
        name="Cross-modal information flow",
        kind="driver",
        family="probes",
        form="probe",
        target="vlm",
        paper="Cross-modal Information Flow in Multimodal Large Language Models (Zhang et al., 2025)",
        summary="In which layers picture, question and answer speak to each other, by attention knockout",
        needs=("image",),
        code="FightingFighting/cross-modal-information-flow-in-MLLM",
        choices=(
            "The token is the likeliest of the model alone, also where a stack or sampling answers otherwise.",
            "The paper's window of 9 of 32 layers scales with the model's depth.",
            "A question that ends the prompt leaves its last token out of `question`.",
            "A visual token belongs to an object where the part that it was cut from touches the box.",
            "Of the answer's two spellings the first token is followed, where the tokenizer knows it.",
        ),
        tags=("attention knockout", "information flow", "interpretability", "layers", "logit lens"),
    )

    pairs: tuple[str, ...] = option(
        ("image->question", "question->last", "image->last", "last->last"),
        "who is not seen by whom: question, object and rest (of the picture, see boxes), or segments",
    )
    window: str | int = option("28%", "layers at a time, a number or a share; the paper's 9 of 32")
    suffix: str = option("", "instruction behind the question, no part of it")
    answer: str = option("", "the right answer, with which the model's is compared")
    boxes: tuple[Box, ...] = option((), "x0 y0 x1 y1 of objects in the first picture, in its pixels")
    rows: int = option(32, "knockouts in one batch", low=1)
    sites: str = option("text.*.self", "where attention is cut")

    def __post_init__(self) -> None:
        super().__post_init__()
        for pair in self.pairs:
            if pair.count("->") != 1:
                raise OptionError(f"XmodalFlow(pairs=): {pair!r} is no pair.", 'write "image->question"')

    def run(self, session: Session, question: Question) -> Answer:
        asked = replace(question, text=question.text + self.suffix)
        inputs = asked.inputs(session.model)
        lens = Lens()
        logits = session.forward(inputs, [lens], last_only=True).logits[0, -1]
        token = int(logits.argmax())
        p = float(logits.float().softmax(-1)[token])
        change = self._changes(session, asked, question.text, inputs, token, p)
        early = lens.words(session)
        answer = asked.ask(session)
        answer.found["flow"] = Flow(
            change=change,
            words=spelled(tokenizer_of(asked), self.answer or str(answer), early),
            token=tokenizer_of(asked).decode([token]),
            p=p,
            right=answer.strip().lower() == self.answer.lower() if self.answer else None,
        )
        return answer

    def _changes(
        self, session: Session, asked: Question, text: str, inputs: Mapping[str, Any], token: int, p: float
    ) -> Table:
        layout, _ = read(session, asked, inputs, located=bool(self.boxes))

        def tokens(name: str) -> Tensor:
            if name == "question":
                return said(asked, text, inputs, layout) & ~layout.where("last")[0].cpu()
            if name in ("object", "rest"):
                return self._of_picture(name, layout)
            return layout.where(name)[0].cpu()

        depth = match(self.sites, session.sites)[0].depth
        width = max(1, len(layers(f":{self.window}", depth)))
        ends = [tuple(tokens(name) for name in pair.split("->")) for pair in self.pairs]
        cuts = [
            Cut(source, target, around(layer, width, depth))
            for layer in range(depth)
            for source, target in ends
        ]
        blocked = sweep(
            session,
            inputs,
            cuts,
            lambda some: Cuts(sites=self.sites, cuts=some),
            lambda logits: logits.float().softmax(-1)[:, token],
            self.rows,
        )
        change = 100 * (blocked.double().cpu() - p) / p
        return Table(change.view(depth, len(self.pairs)), {"layer": numbers(depth), "pair": self.pairs})

    def _of_picture(self, name: str, layout: Layout) -> Tensor:
        if not self.boxes:
            raise InputError(f"Nobody has said where the {name} of the picture is.", "give boxes=")
        touched = torch.stack([shows(layout, box) for box in self.boxes]).any(0)
        picture = layout.where("image:0")[0].cpu() & layout.boxes[0].cpu().isfinite().all(-1)
        return picture & (touched if name == "object" else ~touched)


@dataclass(frozen=True, repr=False)
class Flow:
    """What the knockouts did to the first token of one answer, in percent of its probability, and how likely
    every layer finds the answer's spellings."""

    change: Table  # (layer, pair)
    words: Table  # (layer, spelling)
    token: str
    p: float
    right: bool | None = field(default=None)  # None where nobody said what is

    def __repr__(self) -> str:
        return f"{self.token!r}, probability {self.p:.3g}; change in percent\n{self.change!r}"


def average(flows: Sequence[Flow]) -> Table:
    """Of the changes, over the questions that were not answered wrongly."""
    right = [flow.change for flow in flows if flow.right is not False]
    if not right:
        raise InputError(f"None of {len(flows)} questions was answered rightly.", "ask what the model knows")
    return mean(right)


def around(layer: int, width: int, depth: int) -> range:
    """`width` layers with that one in the middle, as far as there are."""
    return range(max(0, layer - width // 2), min(depth, layer - (-width // 2)))


@dataclass(eq=False)
class Lens(Method):
    """The last token's state behind every layer."""

    sites: str = "text.*.layer"
    states: dict[int, Tensor] = field(default_factory=dict)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.states[call.site.layer] = call.last(h)
        return h

    def words(self, session: Session) -> Tensor:
        """What every layer would say, without the final norm but in the last: (layers, words)."""
        *early, last = (h for _, h in sorted(self.states.items()))
        with torch.no_grad():
            found = [session.unembed(h[:, None], norm=h is last)[0, 0] for h in (*early, last)]
        return torch.stack(found).float().softmax(-1).cpu()


def spelled(tokenizer: Any, answer: str, early: Tensor) -> Table:
    """Of every layer's words (layers, words), an answer in lower case and capitalised, by its first token."""
    tokens: dict[str, int] = {}
    for form in (answer.lower(), answer.capitalize()):
        ids = tokenizer.encode(form, add_special_tokens=False)
        if ids and ids[0] != tokenizer.unk_token_id:
            tokens[form] = ids[0]
    axes = {"layer": numbers(len(early)), "spelling": tuple(tokens)}
    return Table(early[:, list(tokens.values())], axes)
