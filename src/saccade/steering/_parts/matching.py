"""How well words and a picture fit each other, and where: a model of the user's, or BLIP of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from saccade.core.question import Question
from saccade.core.session import Session, attach
from saccade.loading import load_model
from saccade.steering._parts.watch import Watch


@dataclass(frozen=True)
class Match:
    heat: Tensor  # (rows, columns) over the picture, larger where it is what the words say
    similarity: float  # cosine of the two, at most 1


class Matcher(Protocol):
    def __call__(self, picture: Image.Image, text: str) -> Match: ...


class Scorer(Protocol):
    def __call__(self, picture: Image.Image, text: str) -> float:
        """How well a statement holds of a picture, 0 to 1."""
        ...


@dataclass
class BlipMatcher:
    """BLIP's image-text matching: its likeness of both, and what in its cross-attention raises "they match"."""

    model: Any
    processor: Any
    sites: str = "text.50%.cross"

    def __call__(self, picture: Image.Image, text: str) -> Match:
        given = dict(self.processor(images=picture, text=text, return_tensors="pt").to(self.model.device))
        watch = Watch(sites=self.sites)
        with attach(self.model) as session:
            together = session.forward({**given, "use_itm_head": True}, [watch], grad=True)
            similarity = float(session.forward({**given, "use_itm_head": False}).itm_score)
        (slope,) = torch.autograd.grad(together.itm_score[0, 1], watch.seen)
        raised = (watch.seen[0].detach() * slope.relu())[0].mean(0)  # (words, patches)
        patches = raised[1:, 1:].mean(0)  # neither of both class tokens
        return Match(patches.view(int(len(patches) ** 0.5), -1), similarity)


@cache
def blip(name: str) -> BlipMatcher:
    """From a folder or the hub."""
    return BlipMatcher(*load_model(name, any_kind=True))


def yes(session: Session, question: Question, prompt: str, picture: Image.Image, statement: str) -> float:
    """How likely the asked model says yes, of yes and no, where the prompt asks whether a {statement} holds."""
    inputs = question.inputs(session.model, [picture], prompt.format(statement=statement))
    first = session.forward(inputs, session.methods, last_only=True).logits[0, -1].float().softmax(-1)
    tokenizer = getattr(question.processor, "tokenizer", question.processor)

    def said(word: str) -> float:
        forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        return float(
            first[sorted({tokenizer(f, add_special_tokens=False)["input_ids"][0] for f in forms})].sum()
        )

    return said("yes") / (said("yes") + said("no"))


def blip_score(name: str) -> Scorer:
    """The mean of BLIP's probability that both match and of their likeness."""
    matcher = blip(name)

    @torch.no_grad()
    def score(picture: Image.Image, text: str) -> float:
        given = matcher.processor(images=picture, text=text, return_tensors="pt").to(matcher.model.device)
        together = matcher.model(**given, use_itm_head=True).itm_score.softmax(-1)[0, 1]
        return float(together + matcher.model(**given, use_itm_head=False).itm_score[0, 0]) / 2

    return score
