"""Describe the picture first, and then say only what that description could have said.

    p_j      distributions from which the description's words j = 1 .. n were taken
    k(v)     min over j of KL(onehot(v) || p_j) = min over j of -log p_j(v)
    logits   -k(v)                                          where p(v) >= alpha * max p

The description stands before the question; the picture stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.passes import Pass
from saccade.core.question import Answer, Question
from saccade.core.session import Session, attach
from saccade.core.system import option
from saccade.steering._parts.contrast import plausible

TEMPERATURE = 0.5  # of the nucleus


@dataclass(eq=False)
class VDGD(Driver):
    card = Card(
        slug="vdgd",
        name="VDGD",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="VDGD: Mitigating LVLM Hallucinations in Cognitive Prompts by Bridging the Visual Perception "
        "Gap (Ghosh et al., 2024)",
        summary="Describe the picture first, and say only what that description could have said",
        needs=("image",),
        neutral={"words": 0},
        code="Sreyan88/VDGD",
        choices=(
            "Candidates are those of the paper's threshold; the released code takes the nucleus of 0.5 at a "
            "temperature of 0.5: vdgd(nucleus=0.5).",
            "The released code divides k by the size of the vocabulary, which makes sampling uniform; k is "
            "whole here, and greedy answers are the same.",
            "The end of the description is no word of it.",
        ),
        tags=("hallucination", "grounding", "description", "reasoning", "perception gap"),
    )

    alpha: float = option(0.1, "least probability of a candidate, as a share of the likeliest", low=0, high=1)
    nucleus: float = option(
        0.0, "take candidates that make up this probability instead; 0: by alpha", low=0, high=1
    )
    distance: str = option("min", "of a word over the description", choices=("min", "mean", "sum"))
    describe: str = option(
        "Describe the image in detail.", "what asks for the description; {question} is put in"
    )
    prefix: str = option(
        "The input image is described as follows: {description} {question}", "the prompt that is answered"
    )
    words: int = option(256, "most tokens of the description; 0 for none, which changes nothing", low=0)

    def run(self, session: Session, question: Question) -> Answer:
        if not self.words:
            return question.ask(session)
        description, said = self._described(session, question)
        text = self.prefix.format(description=description, question=question.text)
        with attach(session.model, Grounded(said, self.alpha, self.nucleus, self.distance)):
            answer = question.ask(session, text=text)
        answer.tokens += len(said)
        answer.found = {"description": description}
        return answer

    def _described(self, session: Session, question: Question) -> tuple[str, Tensor]:
        """The description, and the log-probabilities of which it was made: (tokens, vocabulary)."""
        model: Any = session.model
        inputs = question.inputs(model, text=self.describe.format(question=question.text))
        made = model.generate(
            **inputs,
            max_new_tokens=self.words,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokenizer = getattr(question.processor, "tokenizer", question.processor)
        ids = made.sequences[0, inputs["input_ids"].shape[1] :]
        word = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
        if not word.any():
            raise InputError(
                "The model did not describe the picture.", "ask for it otherwise, with describe="
            )
        return tokenizer.decode(ids[word]).strip(), torch.cat(made.logits)[word].log_softmax(-1)


@dataclass(eq=False)
class Grounded(Method):
    said: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # log p: (tokens, vocabulary)
    alpha: float = 0.1
    nucleus: float = 0.0
    distance: str = "min"

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        near = -far_from(self.said, self.distance).to(base).expand_as(base)
        if self.nucleus:
            return near.masked_fill(~in_nucleus(base / TEMPERATURE, self.nucleus), -torch.inf)
        return plausible(near, base, self.alpha)


def far_from(said: Tensor, distance: str) -> Tensor:
    """Of every word from distributions (tokens, vocabulary): (vocabulary,)."""
    kl = -said
    return kl.amin(0) if distance == "min" else kl.mean(0) if distance == "mean" else kl.sum(0)


def in_nucleus(logits: Tensor, p: float) -> Tensor:
    """The fewest likeliest words that make up p."""
    probable, order = logits.softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, probable.cumsum(-1) - probable < p)
