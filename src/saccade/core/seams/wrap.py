"""Putting something around a method of an object, and taking it off in any order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Around = Callable[..., Any]  # around(inner, *args, **kwargs)


class _Chain:
    def __init__(self, original: Callable[..., Any], *, own: bool) -> None:
        self.original, self.own = original, own
        self.arounds: list[tuple[bool, Around]] = []  # outermost or not, what stands around
        self.composed = original
        self.wrapper: Callable[..., Any] | None = None  # what stands in the object's place

    def compose(self) -> None:
        self.composed = self.original
        for _, around in self.arounds:
            self.composed = functools.partial(around, self.composed)


def wrap(obj: Any, name: str, around: Around, *, outermost: bool = False) -> Callable[[], None]:
    """`obj.name(...)` becomes `around(obj.name, ...)`; returns what undoes it.

    The wrapper is an attribute of the instance with the original's signature, for libraries inspect it.
    An `outermost` one stays outside of the others. Where somebody has wrapped over ours since, ours stays and
    passes everything through.
    """
    attribute = obj.__dict__.get(name)
    chain: _Chain | None = getattr(attribute, "_saccade_chain", None)
    if chain is None or chain.wrapper is not attribute:  # a foreign wrapper copies our attributes
        chain = _Chain(getattr(obj, name), own=name in obj.__dict__)

        @functools.wraps(chain.original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return chain.composed(*args, **kwargs)

        wrapper._saccade_chain = chain  # type: ignore[attr-defined]
        chain.wrapper = wrapper
        object.__setattr__(obj, name, wrapper)
    entry = (outermost, around)
    chain.arounds.append(entry)
    chain.arounds.sort(key=lambda e: e[0])
    chain.compose()

    def undo() -> None:
        chain.arounds.remove(entry)
        chain.compose()
        if not chain.arounds and obj.__dict__.get(name) is chain.wrapper:
            if chain.own:
                object.__setattr__(obj, name, chain.original)
            else:
                del obj.__dict__[name]

    return undo


def wrap_call(obj: Any, around: Around) -> Callable[[], None]:
    """`obj(...)` becomes `around(obj, ...)`; returns what undoes it, in any order.

    Python looks a call up in the class, so the object is given a subclass of its own. What a compiler has made
    of the object's `forward` stays inside.
    """
    cls: Any = type(obj)
    chain: _Chain | None = vars(cls).get("_saccade_chain")
    if chain is None:
        original = cls
        chain = _Chain(functools.partial(original.__call__, obj), own=False)
        made = chain

        @functools.wraps(original.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return made.composed(*args, **kwargs)

        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
        }
        obj.__class__ = type(
            original.__name__, (original,), {**names, "__call__": call, "_saccade_chain": chain}
        )
    entry = (False, around)
    chain.arounds.append(entry)
    chain.compose()

    def undo() -> None:
        chain.arounds.remove(entry)
        chain.compose()
        if not chain.arounds and vars(type(obj)).get("_saccade_chain") is chain:
            obj.__class__ = type(obj).__mro__[1]

    return undo
