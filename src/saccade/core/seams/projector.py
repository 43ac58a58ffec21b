"""What makes features of a vision tower's tokens: found by watching it, for every family names it differently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.seams.plain import PlainHost

MOVED = 0.01  # of the change that a token makes to its own feature: less is rounding


@dataclass
class Projection:
    """One call of the projector: what it was given, first of all the tokens, and what it made of them."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor  # (..., tokens, width)
    out: Tensor  # (..., features, width of the text)

    @property
    def tokens(self) -> Tensor:
        """(tokens, width), those of all pictures."""
        return self.x.flatten(0, -2)

    @property
    def features(self) -> Tensor:
        """(features, width of the text), those of all pictures."""
        return self.out.flatten(0, -2)

    def shares(self, features: Sequence[int]) -> tuple[Tensor, ...]:
        """The tokens of pictures that have so many features each."""
        each = len(self.tokens) // len(self.features)
        return self.tokens.split([count * each for count in features])

    def of(self, tokens: Tensor) -> Tensor:
        """The features that it makes of other tokens."""
        x = tokens.reshape(self.x.shape)
        args = [x if value is self.x else value for value in self.args]
        kwargs = {name: x if value is self.x else value for name, value in self.kwargs.items()}
        return self.module(*args, **kwargs).flatten(0, -2)

    @cached_property
    def merges(self) -> str:
        """Why a feature is not made of one token alone; empty where it is."""
        name, tokens, features = type(self.module).__name__, len(self.tokens), len(self.features)
        if tokens != features:
            return f"{name} makes {features} features of {tokens} tokens"
        odd = torch.arange(tokens, device=self.x.device) % 2 == 1
        with torch.no_grad():
            other = self.of(torch.where(odd[:, None], -self.tokens, self.tokens))
            moved = (other - self.features).abs().amax(-1)
        mixed = tokens > 1 and bool(moved[~odd].max() > MOVED * moved[odd].median())
        return f"{name} makes every feature of several tokens" if mixed else ""

    def gives(self, parts: Sequence[Tensor]) -> bool:
        """Whether the features of all pictures are what it made, in that order."""
        return torch.equal(torch.cat([*parts]), self.features)


class _Open:
    """A module that runs."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.behind = True  # no part of the tower has run since it began


def watched(host: PlainHost, features: Callable[[], Any]) -> tuple[Any, Projection | None]:
    """What the model's features are, and how they were projected: of the modules behind the tower that are in no
    other such module, by the last whose output is as wide as the text."""
    tower = {site.module for site in host.sites if site.tower not in (host.main_tower, "projector")}
    model: Any = host.model
    width = model.get_input_embeddings().weight.shape[-1]
    running: list[_Open] = []
    found: Projection | None = None
    thread = threading.get_ident()

    def began(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            running.append(_Open(module, args, kwargs))

    def ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal found
        if threading.get_ident() != thread:
            return
        call = running.pop()
        if module in tower:
            for around in running:
                around.behind = False
        if not call.behind or any(around.behind for around in running):
            return
        x = next((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not x.is_floating_point() or not isinstance(output, Tensor):
            return
        if output.shape[-1] == width:
            found = Projection(module, call.args, call.kwargs, x, output)

    hooks = [module.register_forward_pre_hook(began, with_kwargs=True) for module in host.modules()]
    hooks += [module.register_forward_hook(ended) for module in host.modules()]
    try:
        out = features()
    finally:
        for hook in hooks:
            hook.remove()
    return out, found
