"""Attention weights that a pass with gradients is differentiated by."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.method import Method


@dataclass(eq=False)
class Watch(Method):
    """The weights of every call, on the graph where there is one."""

    seen: list[Tensor] = field(default_factory=list)  # (batch, heads, rows, keys)

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not w.requires_grad:
            w.requires_grad_()
        self.seen.append(w)
        return w
