"""How alike pictures and words are: a function of the user's, or a CLIP of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.samples import to_model
from saccade.loading import load_model


class Likeness(Protocol):
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Of every picture and every text: (pictures, texts)"""
        ...


@dataclass(frozen=True)
class ClipLikeness:
    """The cosine by a CLIP or SigLIP."""

    model: Any
    processor: Any

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            text=list(texts), images=list(pictures), padding=True, truncation=True, return_tensors="pt"
        )
        out = self.model(**{name: to_model(self.model, value) for name, value in inputs.items()})
        pairs = (out.image_embeds.float(), out.text_embeds.float())
        images, words = (vectors / vectors.norm(dim=-1, keepdim=True) for vectors in pairs)
        return (images @ words.mT).cpu()


@cache
def clip(name: str) -> ClipLikeness:
    """Embedded, from a folder, or from the hub, such as openai/clip-vit-large-patch14-336."""
    model, processor = load_model(name, any_kind=True)
    if not hasattr(model, "get_text_features"):
        raise InputError(
            f"{name} is a {type(model).__name__}, which does not compare pictures with words.",
            "give a CLIP, such as openai/clip-vit-large-patch14-336",
        )
    return ClipLikeness(model, processor)
