"""Every error of ours says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SaccadeError(Exception):
    """A named problem with its way out."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n  → {self.remedy}"


class UnknownMethodError(SaccadeError):
    """A slug that the catalogue does not hold."""


class StackError(SaccadeError):
    """A stack that does not parse."""


class OptionError(SaccadeError):
    """An option that a method does not have, or a value that it does not take."""


class AttachError(SaccadeError):
    """A model or a site that cannot give what a method needs."""


class InputError(SaccadeError):
    """Inputs of a call that a method or a layout cannot serve."""


class VersionError(SaccadeError):
    """A library whose inside is not the one that we know."""


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean" for error messages; empty when nothing is near."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""
