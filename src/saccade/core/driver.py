"""What stands beside methods in the catalogue: drivers, which own passes, and experiments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saccade.core.card import Card
from saccade.core.errors import AttachError, InputError, StackError
from saccade.core.method import Method
from saccade.core.system import System

if TYPE_CHECKING:
    from saccade.core.question import Answer, Question
    from saccade.core.session import Session


@dataclass(eq=False, kw_only=True)
class Driver(System):
    """Answers by several passes, or by a decoding loop of its own: crops and looks again, searches, votes.

    `session.run(driver, question)` lets it answer, with the methods of the session attached.
    """

    def run(self, session: Session, question: Question) -> Answer:
        """The answer; pictures and facts that were met on the way are kept on it."""
        raise NotImplementedError

    def check(self, question: Question) -> None:
        """Refuse, before anything runs, what the driver cannot do."""
        name = type(self).__name__
        card: Card | None = getattr(self, "card", None)
        if card and "image" in card.needs and not question.images:
            raise InputError(f"{name} looks at a picture, and the question has none.", "ask about one")
        for field in dataclasses.fields(self):
            if field.metadata.get("helper") and getattr(self, field.name) is None:
                raise InputError(
                    f"{name} has no {field.name}, without which it does not run.",
                    f"{field.name}: {field.metadata['doc']}",
                )


@dataclass(eq=False, kw_only=True)
class Experiment(System):
    """Shows a finding, on models and data of its own."""

    def run(self) -> Any:
        """What was found."""
        raise NotImplementedError


def split(parts: Iterable[System]) -> tuple[Driver | None, list[Method]]:
    """The driver of a stack, where it has one, and its methods."""
    parts = list(parts)
    if wrong := crowded(parts):
        raise wrong[1]
    driver = next((part for part in parts if isinstance(part, Driver)), None)
    methods = [part for part in parts if part is not driver]
    for part in methods:
        if not isinstance(part, Method):
            raise refusal(part)
    return driver, methods  # type: ignore[return-value]


def crowded(parts: Sequence[System]) -> tuple[int, StackError] | None:
    """The first part of a stack that has no place beside the others, and why."""
    driver: Driver | None = None
    for index, part in enumerate(parts):
        if isinstance(part, Driver):
            if driver is not None:
                names = f"{type(driver).__name__} and {type(part).__name__}"
                return index, StackError(
                    f"{names} both drive, and a stack has one driver.", "take one of them out"
                )
            driver = part
        elif isinstance(part, Experiment) and len(parts) > 1:
            return index, StackError(
                f"{type(part).__name__} is an experiment, which runs by itself.", "take the others out"
            )
    return None


def refusal(part: Any) -> AttachError:
    """Why something that is no method cannot be attached, and what to do with it."""
    name = type(part).__name__
    if isinstance(part, Driver):
        slug = repr(part.card.slug) if hasattr(part, "card") else "driver"
        return AttachError(
            f"{name} is a driver: it runs passes of its own and is not attached.",
            f"sc.ask(model, processor, image, question, stack={slug}), or session.run(driver, question)",
        )
    if isinstance(part, Experiment):
        return AttachError(
            f"{name} is an experiment: it runs on models of its own and is not attached.",
            f"sc.{name}().run()",
        )
    return AttachError(f"{part!r} is no method.", "attach instances, such as sc.VAR() or sc.load('var')")
