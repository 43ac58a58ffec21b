"""How well words and a picture fit each other, and where: a model of the user's, or BLIP of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from saccade.core.session import attach
from saccade.loading import load_model
from saccade.steering._parts.watch import Watch


@dataclass(frozen=True)
class Match:
    heat: Tensor  # (rows, columns) over the picture, larger where it is what the words say
    similarity: float  # cosine of the two, at most 1


class Matcher(Protocol):
    def __call__(self, picture: Image.Image, text: str) -> Match: ...


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
