"""Which of several regions words mean: each is marked in a copy of the picture, and a CLIP tells which fits best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from saccade.core.driver import Driver
from saccade.core.errors import InputError, OptionError
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.system import option
from saccade.steering._parts.detecting import Detector, Region, looked_at
from saccade.steering._parts.likeness import ClipLikeness, Likeness, clip


@dataclass(eq=False)
class Referring(Driver):
    """A model that writes is asked about the picture with the region marked. A CLIP itself answers with the region's
    number."""

    boxes: tuple[tuple[float, float, float, float], ...] = option(
        (), "the regions, x0 y0 x1 y1 in pixels; found by the detector unless given"
    )
    detector: Detector | None = option(
        None, "(picture, text) to regions; what the asked model looks at unless given"
    )
    clip: tuple[str | Likeness, ...] = option(
        (),
        "who chooses among regions, together: folders or hub names of CLIP, such as "
        "openai/clip-vit-large-patch14-336, or (pictures, texts) to numbers",
    )
    text: str = option("{question}", "what the regions are compared with")
    bank: tuple[str, ...] = option((), "unrelated texts; how well a region fits them is taken off")

    def marked(self, picture: Image.Image, region: Region) -> list[Image.Image]:
        """Copies in which the region is marked in all ways; the first is the one that is asked about."""
        raise NotImplementedError

    def check(self, question: Question) -> None:
        super().check(question)
        if len(question.images) != 1:
            raise InputError(
                f"{type(self).__name__} marks one picture, and the question has {len(question.images)}.",
                "ask about one",
            )

    def run(self, session: Session, question: Question) -> Answer:
        model: Any = session.model
        picture, writes = question.images[0], getattr(model, "can_generate", bool)()
        regions = self.regions(session, question, writes)
        copies = [self.marked(picture, region) for region in regions]
        found: dict[str, Any] = {"boxes": [tuple(region.box) for region in regions]}
        best = 0
        if len(regions) > 1 or not writes:
            text = self.text.format(question=question.text)
            found["scores"] = scores(copies, text, self.bank, self._likenesses(session, question, writes))
            best = int(found["scores"].argmax())
        answer = question.ask(session, [copies[best][0]]) if writes else Answer(best)
        answer.session_summary = session.summary()
        answer.found = {**found, "best": best}
        for number, ways in enumerate(copies):
            answer.pictures |= {f"region {number}, {way}": copy for way, copy in enumerate(ways)}
        answer.pictures["marked"] = copies[best][0]
        return answer

    def regions(self, session: Session, question: Question, writes: bool) -> list[Region]:
        name = type(self).__name__
        if self.boxes:
            return [Region(box) for box in self.boxes]
        if self.detector is None and writes:
            return [looked_at(session, question, question.images[0])]
        if self.detector is None:
            raise InputError(
                f"{name} has no regions, and {type(session.model).__name__} looks for none.",
                "give boxes= or detector=",
            )
        found = list(self.detector(question.images[0], question.text))
        if not found:
            raise InputError(
                f"The detector of {name} found nothing.", "ask for what is there, or give boxes="
            )
        return found

    def _likenesses(self, session: Session, question: Question, writes: bool) -> list[Likeness]:
        if not self.clip and writes:
            raise InputError(
                f"{type(self).__name__} has several regions and nobody to choose among them.",
                "give clip=openai/clip-vit-large-patch14-336, or one region",
            )
        given = [clip(one) if isinstance(one, str) else one for one in self.clip]
        return given or [ClipLikeness(session.model, question.processor)]


def scores(
    copies: Sequence[Sequence[Image.Image]], text: str, bank: Sequence[str], likenesses: Sequence[Likeness]
) -> Tensor:
    """Of every region, marked in several ways: how much more its copies are like the text than like the bank."""
    pictures = [copy for ways in copies for copy in ways]
    alike = torch.stack([like(pictures, [text, *bank]) for like in likenesses]).mean(0)
    own = alike[:, 0] - alike[:, 1:].mean(1) if bank else alike[:, 0]
    return own.view(len(copies), -1).mean(1)


def check_marks(driver: Referring, marks: Sequence[str], known: Sequence[str]) -> None:
    if not marks or not set(marks) <= set(known):
        raise OptionError(
            f"{type(driver).__name__} does not mark by {', '.join(marks) or 'nothing'}.",
            f"marks: one or several of {', '.join(known)}",
        )
