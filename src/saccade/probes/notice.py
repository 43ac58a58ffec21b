"""Which states and heads carry what tells two prompts apart: states of the clean prompt are put back, one at a
time, into a run that differs from it in a single thing, a word or a picture.

    effect = (LD(patched) - LD(corrupted)) / (LD(clean) - LD(corrupted))
    LD     = logit(correct) - logit(incorrect)        of the next token
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.heads import Heads, Selection
from saccade.core.layout import Layout
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.site import Site, match
from saccade.core.system import option
from saccade.core.words import pieces
from saccade.probes._parts.asked import placed, read, said, token_of, tokenizer_of
from saccade.probes._parts.table import Table, layers
from saccade.probes._parts.tracing import Patch, Traced, trace

MEASURES = ("effect", "logits", "probability")


@dataclass(eq=False)
class Notice(Driver):
    """`answer.found["notice"]` is a `Noticed`; `universal` names the heads that stand out in several."""

    card = Card(
        slug="notice",
        name="NOTICE",
        kind="driver",
        family="probes",
        form="probe",
        target="vlm",
        paper="What Do VLMs NOTICE? A Mechanistic Interpretability Pipeline for Noise-free Text-Image "
        "Corruption and Evaluation (Golovanevsky et al., 2024)",
        summary="Which layers, tokens and heads tell a prompt from one that differs in a word or a picture",
        needs=("image",),
        code="wrudman/NOTICE",
        choices=(
            "Every patch is a row of a batch; the released code runs three rows for each.",
            "Heads are patched at the last token of the right answer's name in the prompt, as released for "
            "LLaVA; at= takes another place.",
            "States are patched at the text's tokens, as released for LLaVA; visual=true adds the picture's.",
            "The text tower's self-attention is patched; the paper's BLIP has heads of cross-attention too.",
        ),
        tags=("activation patching", "causal tracing", "interpretability", "heads", "minimal pairs"),
    )

    correct: str = option("yes", "the right answer, one token")
    incorrect: str = option("no", "the answer that the corrupted prompt has, one token")
    word: str = option("", "the word of the question that is replaced; none where a picture is")
    instead: str = option("", "what replaces it, of as many tokens")
    picture: Image.Image | None = option(None, "a picture that differs in one thing, in place of the first")
    parts: tuple[str, ...] = option(("layer", "self", "mlp"), "kinds of sites whose states are patched")
    at: str = option("", "where heads are patched: a word, or last; the right answer's name unless given")
    visual: bool = option(False, "patch states of visual tokens too")
    rows: int = option(32, "patches in one batch", low=1)

    def run(self, session: Session, question: Question) -> Answer:
        clean = question.inputs(session.model)
        corrupted = self.corrupted(question).inputs(session.model)
        layout, counts = read(session, question, clean)
        if self.word:
            check_replaced(clean, corrupted, said(question, self.word, clean, layout))
        places = layout.where("text|visual" if self.visual else "text")[0].nonzero()[:, 0].tolist()
        where = placed(question, self.at or self.correct, clean, layout)
        states = [
            (part, site, place)
            for part in self.parts
            for site in match(f"text.*.{part}", session.sites)
            for place in places
        ]
        heads = [(s, head) for s in match("text.*.self", session.sites) for head in range(counts[s.name])]
        patches = [Patch(site, only(place, len(where))) for _, site, place in states]
        patches += [Patch(site, where, (head,)) for site, head in heads]
        tokens = [token_of(question, word) for word in (self.correct, self.incorrect)]
        traced = trace(session, clean, corrupted, patches, lambda logits: scored(logits, *tokens), self.rows)
        measured = measures(traced)  # (patches, measures)
        answer = question.ask(session)
        answer.found["notice"] = Noticed(
            states=self._of_states(states, measured[: len(states)], _named(question, clean, layout, places)),
            heads=_of_heads(heads, measured[len(states) :]),
            clean=float(traced.clean[0]),
            corrupted=float(traced.corrupted[0]),
        )
        return answer

    def corrupted(self, question: Question) -> Question:
        """The question with the other word, or the other picture."""
        if bool(self.word) == (self.picture is not None):
            raise InputError(
                "NOTICE corrupts a word or a picture, and "
                + ("both are given." if self.word else "neither is given."),
                "give word= and instead=, or picture=",
            )
        if self.picture is not None:
            return replace(question, images=[self.picture.convert("RGB"), *question.images[1:]])
        text, count = re.subn(rf"\b{re.escape(self.word)}\b", self.instead, question.text)
        if not count:
            raise InputError(f"{self.word!r} is not in {question.text!r}.", "name a word that is")
        return replace(question, text=text)

    def _of_states(
        self, states: Sequence[tuple[str, Site, int]], measured: Tensor, names: Mapping[int, str]
    ) -> Table:
        depth, places = max(site.layer for _, site, _ in states) + 1, [*names]
        values = torch.full((len(MEASURES), len(self.parts), depth, len(places)), torch.nan)
        for (part, site, place), found in zip(states, measured, strict=True):
            values[:, self.parts.index(part), site.layer, places.index(place)] = found
        axes = {"measure": MEASURES, "part": self.parts, "layer": layers(depth), "token": (*names.values(),)}
        return Table(values, axes)


@dataclass(frozen=True, repr=False)
class Noticed:
    """Of every patch the effect, the change of LD and that of the right answer's probability; LD of both runs."""

    states: Table  # (measure, part, layer, token)
    heads: Table  # (measure, layer, head)
    clean: float
    corrupted: float

    @property
    def scores(self) -> Heads:
        """The heads by their effect."""
        effect = self.heads.at(measure="effect")
        return Heads(
            "notice", tuple(f"text.{layer}.self" for layer in effect.axes["layer"]), effect.values[None]
        )

    def __repr__(self) -> str:
        told = f"logit difference: clean {self.clean:.3g}, corrupted {self.corrupted:.3g}; effects"
        return f"{told}\n{self.states.at(measure='effect')!r}\n\n{self.heads.at(measure='effect')!r}"


def universal(found: Sequence[Noticed], count: int) -> Selection:
    """The heads that are among the `count` strongest in each."""
    tops = [noticed.scores.top(count) for noticed in found]
    common = {
        site: set(heads).intersection(*(top.get(site, ()) for top in tops)) for site, heads in tops[0].items()
    }
    return {site: tuple(sorted(heads)) for site, heads in common.items() if heads}


def scored(logits: Tensor, correct: int, incorrect: int) -> Tensor:
    """Logit difference, and probability of the right answer: (rows, 2)."""
    logits = logits.double()
    return torch.stack([logits[:, correct] - logits[:, incorrect], logits.softmax(-1)[:, correct]], 1).cpu()


def measures(traced: Traced) -> Tensor:
    """(patches, measures)"""
    effect = Traced(traced.clean[0], traced.corrupted[0], traced.patched[:, 0]).recovery
    change = traced.patched - traced.corrupted
    return torch.cat([effect[:, None], change], 1)


def check_replaced(clean: Mapping[str, Any], corrupted: Mapping[str, Any], word: Tensor) -> None:
    """Refuse a replacement that moves or changes other tokens than the word's."""
    mine, theirs = (inputs["input_ids"][0].cpu() for inputs in (clean, corrupted))
    if len(mine) != len(theirs) or bool((mine != theirs)[~word].any()):
        raise InputError(
            f"The replacement makes {len(theirs)} tokens of {len(mine)}, or changes more than the word.",
            "replace it by a word of as many tokens",
        )


def only(place: int, length: int) -> Tensor:
    return torch.arange(length) == place


def _of_heads(heads: Sequence[tuple[Site, int]], measured: Tensor) -> Table:
    depth, most = max(site.layer for site, _ in heads) + 1, max(head for _, head in heads) + 1
    values = torch.full((len(MEASURES), depth, most), torch.nan)
    for (site, head), found in zip(heads, measured, strict=True):
        values[:, site.layer, head] = found
    return Table(values, {"measure": MEASURES, "layer": layers(depth), "head": layers(most)})


def _named(
    question: Question, inputs: Mapping[str, Any], layout: Layout, places: Sequence[int]
) -> dict[int, str]:
    """Place and text of tokens, by place."""
    picture = layout.where("visual")[0].tolist()
    ids = [None if seen else i for i, seen in zip(inputs["input_ids"][0].tolist(), picture, strict=True)]
    texts = pieces(tokenizer_of(question), ids)
    return {place: f"{place} {(texts[place] or '').strip()}" for place in places}
