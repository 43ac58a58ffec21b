"""What goes into the linear layers of a module, how large their weights are, and some of these off for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from saccade.core.errors import InputError
from saccade.core.seams.discovery import is_linear
from saccade.core.seams.projections import weight


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """By their names inside of the module."""
    return {name: part for name, part in module.named_modules() if is_linear(part)}


def sizes(linear: nn.Module) -> Tensor:
    """Of all weights: (width in, width out)."""
    w = weight(linear)
    if not w.is_floating_point():
        raise InputError(
            f"The weights of a {type(linear).__name__} are of {w.dtype}.",
            "load the model without quantization",
        )
    return w.abs().float()


@contextlib.contextmanager
def listening(found: Mapping[Any, nn.Module], tell: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """`tell` is called with the key of a linear layer and what it is given."""

    def hear(key: Any, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        tell(key, args[0].detach())

    hooks = [part.register_forward_pre_hook(functools.partial(hear, key)) for key, part in found.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def thinned(found: Mapping[Any, nn.Module], masks: Mapping[Any, Tensor]) -> Iterator[None]:
    """Weights are 0 where the masks (width in, width out) are False."""
    before = {key: weight(found[key]).clone() for key in masks}
    try:
        for key, mask in masks.items():
            weight(found[key]).mul_(mask.to(before[key].device))
        yield
    finally:
        for key, kept in before.items():
            weight(found[key]).copy_(kept)
