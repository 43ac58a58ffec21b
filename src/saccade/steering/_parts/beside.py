"""Another prompt, made from words or pictures, beside the one that a driver asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saccade.core.branch import Branch
from saccade.core.method import Method
from saccade.core.passes import Pass, Run


@dataclass(eq=False)
class Beside(Method):
    """Follows a prompt, and says what `mix` makes of the logits (batch, words) of both."""

    prompt: Mapping[str, Any] = field(default_factory=dict)
    mix: Callable[[Tensor, Tensor], Tensor] = lambda base, other: base

    def branches(self, run: Run) -> Iterable[Branch]:
        return [Branch(self.prompt)]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        return self.mix(base, branches[0])
