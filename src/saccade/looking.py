"""Asking a vision-language model about pictures, and seeing where it looks while it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from saccade.core.driver import Driver, split
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.question import Answer, Question, pictures_of
from saccade.core.question import prepare as prepare
from saccade.core.record import Recording, Words
from saccade.core.recorder import Record
from saccade.core.session import attach
from saccade.core.system import System
from saccade.evals.faithfulness import faithfulness
from saccade.loading import load_model as load_model
from saccade.stack import load, written

if TYPE_CHECKING:
    Images = Image.Image | Sequence[Image.Image] | None
    Stacked = str | System | Iterable[System] | None

# ---- asking -------------------------------------------------------------------------------------------


def ask(
    model: Any,
    processor: Any,
    image: Images,
    question: str,
    stack: Stacked = None,
    max_new_tokens: int = 64,
    **generate: Any,
) -> Answer:
    """The answer to a question about a picture, several, or none; greedy unless `generate` says otherwise. A
    driver in the stack runs with the stack's methods attached.

    >>> sc.ask(model, processor, image, "What is on the table?", stack="var")
    """
    driver, methods = _parts(stack)
    asked = Question(processor, pictures_of(image), question, {"max_new_tokens": max_new_tokens, **generate})
    with attach(model, methods) as session:
        return session.run(driver, asked) if driver else asked.ask(session)


def look(
    model: Any,
    processor: Any,
    image: Images,
    question: str,
    stack: Stacked = None,
    *,
    sites: str = "text.*.self",
    rows: str | int | slice = "generated",
    columns: str = "all",
    heads: tuple[int, ...] | None = None,
    reduce: str | None = None,
    dtype: str = "float16",
    max_new_tokens: int = 64,
    **generate: Any,
) -> Recording:
    """Where the model looks while it answers, the methods of the stack being at work. See `Record` for the
    choice of what is kept; `recording.answer()` is the answer.

    >>> seen = sc.look(model, processor, image, "What is on the table?")
    >>> seen.map("text.*.self", word="cup").mean("layer", "head").overlay().save("cup.png")
    """
    images = pictures_of(image)
    asked = Question(processor, images, question, {"max_new_tokens": max_new_tokens, **generate})
    driver, methods = _parts(stack)
    if driver:
        name = type(driver).__name__
        raise InputError(
            f"{name} is a driver: it runs several times, and one run is looked at.",
            "take it out of the stack; sc.ask(...).pictures shows what it met",
        )
    record = Record(sites=sites, rows=rows, columns=columns, heads=heads, reduce=reduce, dtype=dtype)
    with attach(model, methods, record) as session:
        session.locate(processor, images)
        asked.ask(session)
        session.locate(processor, [])
        recording: Recording = session.results["Record"]
    recording.prompt = question
    recording.stack = "+".join(written(m) if hasattr(m, "card") else type(m).__name__ for m in methods)
    return recording.with_words(processor).with_pictures(images)


def weigh(
    model: Any,
    processor: Any,
    image: Images,
    seen: Recording,
    word: Words = None,
    stack: Stacked = None,
) -> Recording:
    """Measure how faithful the map of a word is, or of the answer, and keep it with the recording, whose pictures
    tell it from then on: see `core/faithfulness.py`."""
    if not seen.measured(word):
        _, methods = _parts(stack)
        seen.faithfulness.append(faithfulness(model, processor, pictures_of(image), seen, word, methods))
    return seen


def _parts(stack: Stacked) -> tuple[Driver | None, list[Method]]:
    """The driver of a stack, where it has one, and its methods."""
    if stack is None:
        return None, []
    if isinstance(stack, System):
        return split([stack])
    return split(load(stack) if isinstance(stack, str) else stack)
