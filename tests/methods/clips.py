"""Tiny CLIPs, and scores that stand for one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from zoo import family

from saccade.steering._parts.likeness import ClipLikeness


def tiny(name: str = "clip") -> ClipLikeness:
    return ClipLikeness(shared(name), family(name).processor())  # type: ignore[misc]


@cache
def saved(name: str) -> str:
    """The folder of a model of the zoo."""
    folder = Path(tempfile.mkdtemp())
    shared(name).save_pretrained(folder)
    family(name).processor().save_pretrained(folder)  # type: ignore[misc]
    return str(folder)


def cosines(name: str, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """From the model's own logits: (pictures, texts)."""
    model, processor = shared(name), family(name).processor()  # type: ignore[misc]
    inputs = processor(text=list(texts), images=list(pictures), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
        return (logits - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()


def numbers_of(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """Some number for every picture and text, of its bytes."""
    return torch.tensor(
        [[np.sin(float(np.asarray(p, float).mean()) * (1 + len(t))) for t in texts] for p in pictures]
    )
