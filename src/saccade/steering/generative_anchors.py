"""Describe the picture, have the description drawn, and write on towards the one and away from the other.

    c, I'      a greedy caption of the pictures I, and what a text-to-image model draws of it
    f(.)       mean of a picture's visual tokens behind the projector
    d          alpha * unit(f(I)) - beta * unit(f(I'))
    h       <- ||h|| * unit(h + ||h|| * d)                     generated tokens, outputs of late layers

What the caption invents can be seen in the drawing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.method import Method
from saccade.core.passes import HiddenCall
from saccade.core.question import Answer, Question
from saccade.core.session import Session, attach
from saccade.core.system import option
from saccade.core.tokens import Tokens
from saccade.steering._parts.drawing import Drawer, drawer


@dataclass(eq=False)
class GenerativeAnchors(Driver):
    card = Card(
        slug="generative_anchors",
        name="Generative Anchors",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="Exposing Hallucinations To Suppress Them: VLMs Representation Editing With Generative Anchors "
        "(Shi et al., 2025)",
        summary="Steer towards the picture and away from a drawing of its own caption",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        sure="abstract",
        choices=(
            "How features are pooled and scaled, the norm that is kept, the layers and both weights are "
            "reconstructed, for the paper's text and code were not readable.",
            "The last token of the prompt is not edited, and the first word is thus the bare model's.",
            "Of several pictures the mean over all of their tokens is the anchor, and one drawing is made.",
            "The drawing is encoded by reading it with the words that asked for the caption.",
            "With alpha=0 and beta=0 nothing is described and drawn.",
        ),
        headline="hallucination reduction by over 5% on CHAIR with LLaVA-v1.5-7B",
        tags=("hallucination", "representation editing", "text-to-image", "anchors", "self-feedback"),
    )

    alpha: float = option(0.1, "pull of the picture, as a share of a state's length", low=0)
    beta: float = option(0.1, "push of the drawing, as a share of a state's length", low=0)
    layers: str = option("67%:", "layers whose outputs are edited; the last third")
    draw: str | Drawer | None = option(
        None,
        "who draws: a function from a text to a picture; a folder or hub name of a text-to-image pipeline, such as "
        "stabilityai/stable-diffusion-xl-base-1.0; or world, for captions of the embedded world",
        helper=True,
    )
    describe: str = option("Describe the image.", "what asks for the caption")
    words: int = option(256, "most tokens of the caption", low=1)

    def run(self, session: Session, question: Question) -> Answer:
        if not (self.alpha or self.beta):
            return question.ask(session)
        caption, own = self._captioned(session, question)
        drawn = self._drawn(caption)
        direction = self.alpha * own - self.beta * self._embedded(session, question, drawn)
        pulled = Pull(direction=direction, sites=f"text.{self.layers}.layer", phases=("decode",))
        with attach(session.model, pulled if direction.any() else ()):
            answer = question.ask(session)
        answer.tokens += caption.tokens
        answer.found, answer.pictures = {"caption": str(caption)}, {"drawn": drawn}
        return answer

    def _captioned(self, session: Session, question: Question) -> tuple[Answer, Tensor]:
        """The caption, and the direction of the pictures that were read for it: (width,)."""
        asked = dataclasses.replace(question, text=self.describe, options={"max_new_tokens": self.words})
        embed = Embed()
        with attach(session.model, embed):
            caption = asked.ask(session)
        if not caption:
            raise InputError(
                "The model did not describe the picture.", "ask for it otherwise, with describe="
            )
        return caption, embed.direction

    def _drawn(self, caption: str) -> Image.Image:
        assert self.draw is not None
        drawn = drawer(self.draw)(str(caption))
        if not isinstance(drawn, Image.Image):
            raise InputError(
                f"What should draw returned a {type(drawn).__name__}, no picture.",
                "let it return a PIL.Image.Image",
            )
        return drawn.convert("RGB")

    def _embedded(self, session: Session, question: Question, picture: Image.Image) -> Tensor:
        embed = Embed()
        session.forward(question.inputs(session.model, [picture], self.describe), [embed], last_only=True)
        return embed.direction


@dataclass(eq=False)
class Embed(Method):
    """The mean of all features that go to the text tower."""

    parts: list[Tensor] = field(default_factory=list)

    def features(self, item: Item) -> Tokens | None:
        self.parts.append(item.x)
        return None

    @property
    def direction(self) -> Tensor:
        return F.normalize(_wide(torch.cat(self.parts)).mean(0), dim=-1)


@dataclass(eq=False)
class Pull(Method):
    direction: Tensor = field(default_factory=lambda: torch.empty(0))

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        return pulled(h, self.direction.to(h.device))


def pulled(h: Tensor, direction: Tensor) -> Tensor:
    """States (..., width) along a direction (width,), with their own length."""
    wide = _wide(h)
    length = wide.norm(dim=-1, keepdim=True)
    return (length * F.normalize(wide + length * direction, dim=-1)).to(h.dtype)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
