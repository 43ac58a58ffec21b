"""Describe a picture part by part, several times each, and keep what holds.

    boxes     around each quadrant and every detection of which more than a share lies in it; and a main one around
              what a short caption names
    kept      of the captions of a box: what all say; of statements that contradict the best scored; what some say
              the latter two where they score more than 0.3 on the box's crop
    merged    boxes whose IoU is over 0.4, by their captions in the same way
    caption   the picture's own, with the main box's in it where that one's IoU with the picture is under 0.4, and
              then with all boxes'

Every statement that is kept was said of the box that it is kept for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError, OptionError
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.system import option
from saccade.steering._parts.detecting import Detector, Region, looked_at
from saccade.steering._parts.editing import Editor, Plain, Written
from saccade.steering._parts.marks import crop
from saccade.steering._parts.masks import Box, area, around, iou, shared
from saccade.steering._parts.matching import Scorer, blip_score, yes


@dataclass(frozen=True)
class Part:
    """Of a picture, with its caption and the statements that made it."""

    box: Box
    caption: str
    kept: tuple[str, ...]


@dataclass(eq=False)
class PatchMatters(Driver):
    card = Card(
        slug="patch_matters",
        name="Patch Matters",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="Patch Matters: Training-free Fine-grained Image Caption Enhancement via Local Perception "
        "(Peng et al., 2025)",
        summary="Caption a picture part by part, drop what does not hold, and fuse the captions",
        needs=("image",),
        neutral={"tries": 0},
        code="GeWu-Lab/Patch-Matters",
        choices=(
            "A detection belongs to a quadrant by the share of its area in it, as in the paper; the released code "
            "compares the area in pixels.",
            "Statements are sorted and joined by rule unless a language model is named: editor=model asks the asked "
            "model, and the paper's is an Editor of Llama-3.1-8B-Instruct.",
            "Without a scorer a statement scores the asked model's probability of yes; the paper's mean of matching "
            "probability and similarity is scorer=Salesforce/blip-itm-large-coco.",
            "Without a detector the boxes are the quadrants, and the main one is what the model looks at.",
            "An object is named by a caption that holds its label; the paper lets a language model compare them.",
            "Any two boxes over the threshold are merged, the first two first, and their statements are scored on the "
            "box around both.",
        ),
        tags=("captioning", "divide and conquer", "hallucination", "local perception", "image-text matching"),
    )

    detector: Detector | None = option(None, "(picture, words) to regions with scores and labels")
    editor: str | Editor = option(
        "plain", "who sorts and joins: plain, by rule; model, the asked one; or an Editor"
    )
    scorer: str | Scorer | None = option(
        None, "(picture, statement) to a score, or a folder or hub name of BLIP; the asked model unless given"
    )
    tries: int = option(3, "captions of every box; 0 asks about the picture only", low=0)
    temperature: float = option(0.7, "of the boxes' captions; 0 for the likeliest words", low=0)
    calm: float = option(0.2, "temperature of the picture's caption; 0 for the likeliest words", low=0)
    sure: float = option(0.3, "a detection's score above which it counts", low=0, high=1)
    share: float = option(0.3, "of a detection above which it belongs to a quadrant", low=0, high=1)
    holds: float = option(0.3, "score above which a statement is kept", low=0, high=1)
    overlap: float = option(
        0.4, "IoU above which boxes are merged, and from which the main box is left out", low=0
    )
    short: str = option(
        "Describe this image in one short sentence.", "the prompt that names the main objects"
    )
    verify: str = option(
        "{statement}. Is that true of the image? Answer yes or no.", "how the asked model scores"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.editor, str) and self.editor not in ("plain", "model"):
            raise OptionError(f"No editor is called {self.editor!r}.", "use plain, model, or an Editor")

    def run(self, session: Session, question: Question) -> Answer:
        if len(question.images) != 1:
            raise InputError(
                f"PatchMatters describes one picture, and the question has {len(question.images)}.",
                "ask about one",
            )
        if not self.tries:
            return question.ask(session)
        picture = question.images[0]
        editor, score = self._editor(session, question), self._score(session, question)
        quarters, main = self.divide(session, question)
        whole = self._said(session, question, picture, self.calm)
        boxes = [*quarters, main]
        said = [
            [self._said(session, question, crop(picture, box), self.temperature) for _ in range(self.tries)]
            for box in boxes
        ]
        *parts, middle = [
            self.part(editor, score, picture, box, captions)
            for box, captions in zip(boxes, said, strict=True)
        ]
        caption: str = whole
        if iou(main, (0, 0, *picture.size)) < self.overlap:
            caption = editor.fuse(caption, [(middle.caption, scaled(main, picture.size))])
        merged = self.merge(editor, score, picture, parts)
        answer = Answer(editor.fuse(caption, [(p.caption, scaled(p.box, picture.size)) for p in merged]))
        answer.session_summary, answer.tokens = (
            session.summary(),
            sum(one.tokens for one in (whole, *itertools.chain(*said))),
        )
        answer.found = {"whole": str(whole), "main": middle, "parts": parts, "merged": merged}
        answer.pictures = {f"part {number}": crop(picture, part.box) for number, part in enumerate(parts)}
        answer.pictures["main"] = crop(picture, main)
        return answer

    # ---- boxes -------------------------------------------------------------------------------------------

    def divide(self, session: Session, question: Question) -> tuple[list[Box], Box]:
        """Those of the quadrants, and the main one."""
        picture = question.images[0]
        if self.detector is None:
            return quadrants(picture.size, [], self.share), looked_at(session, question, picture).box
        named = str(question.ask(session, text=self.short)).lower().split()
        detected = [found for found in self.detector(picture, " ".join(named)) if found.score > self.sure]
        meant = [
            found.box for found in detected if found.label and set(found.label.lower().split()) <= set(named)
        ]
        return quadrants(picture.size, detected, self.share), around(meant or [(0, 0, *picture.size)])

    # ---- statements --------------------------------------------------------------------------------------

    def part(
        self, editor: Editor, score: Scorer, picture: Image.Image, box: Box, captions: Sequence[str]
    ) -> Part:
        """What holds of several captions of a box."""
        groups, shown = editor.group(captions), crop(picture, box)
        best = [max((score(shown, one), one) for one in group) for group in groups.contradictory]
        best += [(score(shown, one), one) for one in groups.unique]
        kept = (*groups.same, *(one for value, one in best if value > self.holds))
        return Part(box, editor.rewrite(captions, kept), kept)

    def merge(self, editor: Editor, score: Scorer, picture: Image.Image, parts: Sequence[Part]) -> list[Part]:
        left = list(parts)
        while pair := next(
            ((a, b) for a, b in itertools.combinations(left, 2) if iou(a.box, b.box) > self.overlap), None
        ):
            box, captions = around([part.box for part in pair]), [part.caption for part in pair]
            left[left.index(pair[0])] = self.part(editor, score, picture, box, captions)
            left.remove(pair[1])
        return left

    # ---- who helps ---------------------------------------------------------------------------------------

    def _said(self, session: Session, question: Question, picture: Image.Image, temperature: float) -> Answer:
        how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return dataclasses.replace(question, options={**question.options, **how}).ask(session, [picture])

    def _editor(self, session: Session, question: Question) -> Editor:
        if not isinstance(self.editor, str):
            return self.editor
        return (
            Plain() if self.editor == "plain" else Written(lambda prompt: question.ask(session, [], prompt))
        )

    def _score(self, session: Session, question: Question) -> Scorer:
        if isinstance(self.scorer, str):
            return blip_score(self.scorer)
        return self.scorer or partial(yes, session, question, self.verify)


def quadrants(size: tuple[int, int], detected: Sequence[Region], share: float) -> list[Box]:
    """Around every quadrant of a picture, row by row, and all of which more than a share lies in it."""
    x, y = size[0] // 2, size[1] // 2
    quarters = [(0, 0, x, y), (x, 0, size[0], y), (0, y, x, size[1]), (x, y, *size)]
    return [
        around([one, *(f.box for f in detected if shared(f.box, one) > share * area(f.box))])
        for one in quarters
    ]


def scaled(box: Box, size: tuple[int, int]) -> Box:
    return [edge / size[i % 2] for i, edge in enumerate(box)]
