"""Putting something around a method of an object, and taking it off in any order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Around = Callable[..., Any]  # around(inner, *args, **kwargs)


class _Chain:
    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.arounds: list[Around] = []
        self.composed = original

    def compose(self) -> None:
        self.composed = self.original
        for around in self.arounds:
            self.composed = functools.partial(around, self.composed)


def wrap(obj: Any, name: str, around: Around) -> Callable[[], None]:
    """`obj.name(...)` becomes `around(obj.name, ...)`; returns what undoes it.

    The wrapper is an attribute of the instance with the original's signature, for libraries inspect it.
    Where somebody has wrapped over ours since, ours stays and passes everything through.
    """
    attribute = obj.__dict__.get(name)
    chain: _Chain | None = getattr(attribute, "_saccade_chain", None)
    if chain is None:
        chain = _Chain(getattr(obj, name))
        own = name in obj.__dict__

        @functools.wraps(chain.original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return chain.composed(*args, **kwargs)

        wrapper._saccade_chain = chain  # type: ignore[attr-defined]
        wrapper._saccade_own = own  # type: ignore[attr-defined]
        object.__setattr__(obj, name, wrapper)
    chain.arounds.append(around)
    chain.compose()

    def undo() -> None:
        chain.arounds.remove(around)
        chain.compose()
        ours = obj.__dict__.get(name)
        if not chain.arounds and getattr(ours, "_saccade_chain", None) is chain:
            if ours._saccade_own:
                object.__setattr__(obj, name, chain.original)
            else:
                del obj.__dict__[name]

    return undo
