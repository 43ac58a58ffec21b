"""What is put around a method goes off again in any order, and others' wrappers stay."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest

from saccade.core.seams.wrap import wrap


class Thing:
    def call(self, x: int, *, scale: int = 1) -> list[Any]:
        """Doc."""
        return [x * scale]


def named(name: str) -> Callable[..., Any]:
    """Not a function of its own name: every call makes another object."""
    return lambda inner, *args, **kwargs: [name, *inner(*args, **kwargs)]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_wrappers_leave_in_any_order(order: tuple[int, ...]) -> None:
    thing = Thing()
    undos = [wrap(thing, "call", named(str(i))) for i in range(3)]
    left = [0, 1, 2]
    assert thing.call(7) == ["2", "1", "0", 7]
    for i in order:
        undos[i]()
        left.remove(i)
        assert thing.call(7) == [*map(str, reversed(left)), 7]
    assert "call" not in thing.__dict__


def test_an_attribute_of_the_instance_comes_back() -> None:
    thing = Thing()
    own = lambda x: ["own", x]  # noqa: E731
    thing.call = own  # type: ignore[method-assign]
    undo = wrap(thing, "call", named("a"))
    assert thing.call(1) == ["a", "own", 1]
    undo()
    assert thing.__dict__["call"] is own


def test_the_wrapper_has_the_signature_of_the_original() -> None:
    thing = Thing()
    before = inspect.signature(thing.call)
    undo = wrap(thing, "call", named("a"))
    assert inspect.signature(thing.call) == before
    assert thing.call.__doc__ == "Doc."
    assert thing.call(2, scale=3) == ["a", 6]
    undo()


def foreign(thing: Any, *, polite: bool) -> Callable[[], None]:
    """Another library's wrapper, with `functools.wraps` or without; returns what restores what it found."""
    found = thing.call

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ["foreign", *found(*args, **kwargs)]

    ours = functools.wraps(found)(wrapper) if polite else wrapper
    thing.call = ours

    def undo() -> None:
        thing.call = found

    return undo


@pytest.mark.parametrize("polite", [True, False])
def test_a_foreign_wrapper_over_ours_stays_when_ours_leaves(polite: bool) -> None:
    thing = Thing()
    undo = wrap(thing, "call", named("a"))
    foreign(thing, polite=polite)
    assert thing.call(1) == ["foreign", "a", 1]
    undo()
    assert thing.call(1) == ["foreign", 1]


@pytest.mark.parametrize("polite", [True, False])
def test_a_foreign_wrapper_leaves_before_or_between(polite: bool) -> None:
    thing = Thing()
    undo = wrap(thing, "call", named("a"))
    unforeign = foreign(thing, polite=polite)
    second = wrap(thing, "call", named("b"))
    assert thing.call(1) == ["b", "foreign", "a", 1]
    second()
    assert thing.call(1) == ["foreign", "a", 1]
    unforeign()
    assert thing.call(1) == ["a", 1]
    undo()
    assert "call" not in thing.__dict__


@pytest.mark.parametrize("polite", [True, False])
def test_ours_leaves_first_and_the_foreign_one_then_restores_it(polite: bool) -> None:
    thing = Thing()
    undo = wrap(thing, "call", named("a"))
    unforeign = foreign(thing, polite=polite)
    undo()
    unforeign()
    assert thing.call(1) == [1]
    again = wrap(thing, "call", named("b"))
    assert thing.call(1) == ["b", 1]
    again()
    assert thing.call(1) == [1]


def test_an_exception_passes_through() -> None:
    thing = Thing()
    undo = wrap(thing, "call", named("a"))
    with pytest.raises(TypeError):
        thing.call()  # type: ignore[call-arg]
    undo()
    assert thing.call(1) == [1]
