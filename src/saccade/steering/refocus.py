"""Let the model edit the picture by short programs, and look at what they make, until it answers.

    tools     focus_on_{columns, rows, x_values, y_values}_with_{mask, draw, highlight}(image, names, boxes)
    mask      paints every box that is not named white          draw       outlines the named ones in red
    highlight lays 50/255 of red over the named ones            a row of headers, the first, stays
    turn      picture, question, names and tools -> THOUGHT, ACTION (Python) -> the edited picture, or the error
    end       ANSWER: ... TERMINATE, or the last reply

Programs are read, never run: they name tools, pictures, boxes and constants, and nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError, OptionError
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.system import option
from saccade.steering._parts import marks
from saccade.steering._parts.masks import Box, inside
from saccade.steering._parts.programs import ActionError, execute, program

INSET, LINE, TINT = 2, 5, 50 / 255
KINDS = ("columns", "rows", "x_values", "y_values")

Named = Mapping[str, Sequence[float]]
"""Left, top, right and bottom by name, 0 to 1."""


class Reader(Protocol):
    """The paper's boxes come with its data, or of a table or chart parser; any gives them in this form."""

    def __call__(self, picture: Image.Image) -> Mapping[str, Named]:
        """By columns, rows, x_values or y_values."""
        ...


@dataclass(eq=False)
class ReFocus(Driver):
    card = Card(
        slug="refocus",
        name="ReFocus",
        kind="driver",
        family="steering",
        form="method",
        target="vlm with tool use",
        paper="ReFocus: Visual Editing as a Chain of Thought for Structured Image Understanding (Fu et al., 2025)",
        summary="The model masks, outlines and highlights parts of a table or chart by code before it answers",
        needs=("image",),
        neutral={"replies": 0},
        code="zeyofu/ReFocus_Code",
        choices=(
            "Programs are read by a grammar of calls, names and constants; the released code runs all Python.",
            "Names without a box are passed over; the released code fails on them.",
            "The model sees the picture and the newest edit, and all earlier turns as text.",
            "Without boxes the elements are the thirds of the picture, left to right and top to bottom.",
            "Where no reply terminates, the last one is the answer, and found['finished'] is false.",
            "The prompt is our own; the paper's fine-tuning is not part of it.",
        ),
        headline="+11.0% on table tasks and +6.8% on chart tasks over GPT-4o; 14k training set: +8.0% over QA-only "
        "and +2.6% over CoT training",
        tags=("tool use", "visual chain of thought", "tables", "charts", "code"),
    )

    boxes: dict[str, dict[str, tuple[float, ...]]] = option(
        {}, "by columns, rows, x_values or y_values: names with left, top, right and bottom from 0 to 1"
    )
    reader: Reader | None = option(None, "from a picture to such boxes; its thirds unless given")
    replies: int = option(6, "most replies; 0 answers without tools", low=0)
    words: int = option(512, "most tokens of a reply", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := set(self.boxes) - set(KINDS):
            raise OptionError(
                f"ReFocus has no tools for {', '.join(sorted(wrong))}.", f"name {', '.join(KINDS)}"
            )

    def run(self, session: Session, question: Question) -> Answer:
        if len(question.images) != 1:
            raise InputError(
                f"ReFocus edits one picture, and the question has {len(question.images)}.", "ask about one"
            )
        if not self.replies:
            return question.ask(session)
        picture = question.images[0]
        edits: list[Image.Image] = []
        boxes = self.boxes or (self.reader(picture) if self.reader else THIRDS)
        names = {"image_1": picture} | {f"{kind}_bbox": boxes.get(kind, {}) for kind in KINDS}
        asked = dataclasses.replace(question, options={**question.options, "max_new_tokens": self.words})
        talk = [prompt(question.text, boxes)]
        for _ in range(self.replies):
            reply = asked.ask(session, [picture, *edits[-1:]], "\n".join(talk))
            if done := answered(reply):
                break
            try:
                edits.append(execute(program(reply), names, TOOLS))
                observed = "the edited picture is the last one."
            except ActionError as error:
                observed = f"ERROR: {error}"
            talk += [reply, f"OBSERVATION: {observed}", GO_ON]
        answer = Answer(done or reply)
        answer.session_summary, answer.tokens = reply.session_summary, reply.tokens
        answer.found = {"finished": bool(done), "talk": [*talk, str(reply)] if done else talk}
        answer.pictures = {f"edit {number}": edit for number, edit in enumerate(edits)}
        return answer


# ---- editing ---------------------------------------------------------------------------------------------


def insets(names: Sequence[str], boxes: Named, size: tuple[int, int]) -> list[Box]:
    """Of those named that have a box, in whole pixels, the first and the last two from the edges."""
    found: list[Box] = []
    for box in (boxes[name] for name in names if name in boxes):
        x0, y0 = (int(box[i] * size[i] + INSET) for i in (0, 1))
        x1, y1 = (int(box[i + 2] * size[i] - INSET) + 1 for i in (0, 1))
        if x0 < x1 and y0 < y1:
            found.append((x0, y0, x1, y1))
    return found


def painted(
    image: Image.Image, boxes: Sequence[Box], colour: tuple[int, int, int], alpha: float
) -> Image.Image:
    covered = np.any([inside(box, image.size) for box in boxes], axis=0) if boxes else None
    return image if covered is None else marks.coloured(image, covered, colour, alpha)


def mask(kind: str, image: Image.Image, names: Sequence[str], boxes: Named) -> Image.Image:
    choice = [*boxes][1:] if kind == "rows" else [*boxes]
    others = [name for name in choice if name not in names]
    if len(others) == len(choice):
        return image
    return painted(image, insets(others, boxes, image.size), (255, 255, 255), 1.0)


def draw(kind: str, image: Image.Image, names: Sequence[str], boxes: Named) -> Image.Image:
    for box in insets(names, boxes, image.size):
        image = marks.box(image, box, LINE)
    return image


def highlight(kind: str, image: Image.Image, names: Sequence[str], boxes: Named) -> Image.Image:
    return painted(image, insets(names, boxes, image.size), marks.RED, TINT)


TOOLS: dict[str, Callable[..., Image.Image]] = {
    f"focus_on_{kind}_with_{tool.__name__}": partial(tool, kind)
    for kind, tool in itertools.product(KINDS, (mask, draw, highlight))
}

# ---- talk ----------------------------------------------------------------------------------------------


def answered(reply: str) -> str:
    """The final answer of a reply that terminates; empty where it does not."""
    if "TERMINATE" not in reply or "ANSWER:" not in reply:
        return ""
    return reply.rpartition("ANSWER:")[2].partition("TERMINATE")[0].strip().rstrip(".").strip()


THIRDS: Mapping[str, Named] = {
    "x_values": {"left": (0, 0, 1 / 3, 1), "middle": (1 / 3, 0, 2 / 3, 1), "right": (2 / 3, 0, 1, 1)},
    "y_values": {"top": (0, 0, 1, 1 / 3), "middle": (0, 1 / 3, 1, 2 / 3), "bottom": (0, 2 / 3, 1, 1)},
}
GO_ON = "Go on with a THOUGHT and an ACTION, or with a THOUGHT and ANSWER: <answer> TERMINATE."


def prompt(question: str, boxes: Mapping[str, Named]) -> str:
    there = [name for name in TOOLS if any(f"_on_{kind}_with" in name for kind in boxes)]
    tools = "\n".join(f"{name}(image, names, boxes)" for name in there)
    known = "\n".join(f"{kind}_bbox: {', '.join(named)}" for kind, named in boxes.items())
    return (
        f"The picture is image_1. Question: {question}\nYou can edit the picture to see better what matters. These "
        f"tools take a picture, a list of names and the boxes of that kind, and return a picture:\n{tools}\nmask hides "
        f"what is not named, draw outlines what is named, highlight tints it. Boxes, and the names in them:\n{known}\n"
        "First write a THOUGHT. Then write an ACTION, a Python program between ```python and ``` that calls tools and "
        "ends with display(picture); you will see that picture. When you know the answer, write ANSWER: <answer> "
        "TERMINATE instead."
    )
