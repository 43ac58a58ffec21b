"""Every error of ours says what is wrong and what to do about it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ParamSpec

Given = ParamSpec("Given")


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


def plainly(command: Callable[Given, int]) -> Callable[Given, int]:
    """A command that tells an error of ours on stderr, without a traceback, and ends with 2."""

    @functools.wraps(command)
    def told(*args: Given.args, **kwargs: Given.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except SaccadeError as e:
            print(f"saccade: {e}", file=sys.stderr)
            return 2

    return told


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean" for error messages; empty when nothing is near."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""
