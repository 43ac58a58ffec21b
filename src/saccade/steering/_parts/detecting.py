"""Where on a picture something is: told by a function of the user's, or by what the asked model looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from saccade.core.question import Question
from saccade.core.session import Session
from saccade.steering._parts.masks import Box, bounds, kept, stretched, strongest
from saccade.steering.vicrop import ViCrop

SHARE = 0.1  # of the pixels make up what is looked at


@dataclass(frozen=True, eq=False)
class Region:
    box: Box
    mask: np.ndarray | None = None  # (rows, columns) of the picture, bool
    score: float = 1.0
    label: str = ""


class Detector(Protocol):
    """With `pipe = transformers.pipeline("zero-shot-object-detection", model="google/owlv2-base-patch16-ensemble")`,
    `[Region(tuple(f["box"].values()), None, f["score"], f["label"]) for f in pipe(picture, candidate_labels=[text])]`.
    """

    def __call__(self, picture: Image.Image, text: str) -> Sequence[Region]:
        """What fits the words, in any order."""
        ...


class Segmenter(Protocol):
    """With SAM: the first mask of `SamModel` and its processor for `input_boxes=[[[*box]]]`."""

    def __call__(self, picture: Image.Image, box: Box) -> np.ndarray:
        """What the box is drawn around: (rows, columns) of the picture, bool."""
        ...


def looked_at(session: Session, question: Question, picture: Image.Image) -> Region:
    """The connected region that raises the model's own answer most."""
    heat = stretched(ViCrop(map="grad").heat(session, question, picture), picture.size)
    mask = strongest(heat, kept(heat, SHARE), 1)
    return Region(bounds(mask), mask)
