"""Ask also about what is left of the picture when all that the question is not about is black.

    heat     where the picture is what the question says;  sim, how well both fit         by a matching model
    rho      1 - sim / 2
    local    the picture's pixels of the largest heat, a share rho of them, and black
    logits   f(picture) + alpha * f(local),                 where p(picture) >= beta * max p(picture)

The second prompt is the same about the local picture; it is followed beside the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.question import Answer, Question
from saccade.core.session import Session, attach
from saccade.core.system import option
from saccade.steering._parts.beside import Beside
from saccade.steering._parts.contrast import plausible
from saccade.steering._parts.matching import Match, Matcher, blip
from saccade.steering.vicrop import ViCrop

BLUR = 0.02  # deviation of the blur, of the picture's longer side
LEAST_BLACK = 1e-5  # share of the pixels
HALF = 1.0  # the similarity at which half of the pixels stay


@dataclass(eq=False)
class AGLA(Driver):
    card = Card(
        slug="agla",
        name="AGLA",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global "
        "and Local Attention (An et al., 2024)",
        summary="Add what is said of the picture's parts that the question is about",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        code="Lackel/AGLA",
        choices=(
            "Without a matching model the heat is what in the asked model's own attention raises its answer, "
            "and half of the picture stays; the paper's is matcher=Salesforce/blip-itm-large-coco.",
            "The heat is stretched over the picture as it is; the released code makes both 384 pixels square.",
            "Cross-attention is read in the middle layer, the released code's 6 of 12; of words all count "
            "but the first, which is the encoder's own.",
            "Of several pictures each has its own local one.",
            "With alpha=0 and beta=0 no second prompt is followed.",
        ),
        tags=("hallucination", "augmentation", "image-text matching", "grad-cam", "ensemble"),
    )

    alpha: float = option(2.0, "weight of what is said of the local picture", low=0)
    beta: float = option(0.5, "least probability of a word, as a share of the likeliest", low=0, high=1)
    matcher: str | Matcher | None = option(
        None,
        "how picture and words match: (picture, text) to a Match, or a folder or hub name of BLIP, such as "
        "Salesforce/blip-itm-large-coco; by the asked model's own attention unless given",
    )

    def run(self, session: Session, question: Question) -> Answer:
        matches = [self._match(session, question, picture) for picture in question.images]
        local = [local_view(picture, match) for picture, match in zip(question.images, matches, strict=True)]
        beside = Beside(question.inputs(session.model, local), self._mix)
        with attach(session.model, beside if self.alpha or self.beta else ()):
            answer = question.ask(session)
        answer.found = {"similarity": [match.similarity for match in matches]}
        answer.pictures = {f"local {number}" if number else "local": p for number, p in enumerate(local)}
        return answer

    def _match(self, session: Session, question: Question, picture: Image.Image) -> Match:
        if self.matcher is None:
            return Match(ViCrop(map="grad").heat(session, question, picture), HALF)
        matcher = blip(self.matcher) if isinstance(self.matcher, str) else self.matcher
        return matcher(picture, question.text)

    def _mix(self, whole: Tensor, local: Tensor) -> Tensor:
        return plausible(whole + self.alpha * local, whole, self.beta)


def local_view(picture: Image.Image, match: Match) -> Image.Image:
    """The picture where the heat is largest, black elsewhere."""
    pixels = np.asarray(picture.convert("RGB"))
    heat = blurred(match.heat, (pixels.shape[0], pixels.shape[1]))
    rho = min(1 - match.similarity / 2, 1 - LEAST_BLACK)
    least = heat.flatten().sort(descending=True).values[int(rho * heat.numel())]
    return Image.fromarray(pixels * (heat >= least).numpy()[..., None])


def blurred(heat: Tensor, shape: tuple[int, int]) -> Tensor:
    """A map stretched over (height, width) and smoothed by a Gaussian."""
    heat = F.interpolate(heat[None, None].double().cpu(), shape, mode="bicubic")
    deviation = BLUR * max(shape)
    reach = int(4 * deviation + 0.5)
    bell = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * deviation**2))
    kernel = (bell / bell.sum())[None, None, None]
    heat = F.conv2d(F.pad(heat, (reach, reach, 0, 0), "replicate"), kernel)
    return F.conv2d(F.pad(heat, (0, 0, reach, reach), "replicate"), kernel.mT)[0, 0]
