"""Leave out cross-attention once it has settled.

    steps 0 .. m-1   as ever, with guidance;  at m-1 every cross-attention keeps the mean of its two outputs
    steps m ..       that mean in its place; no unconditional rows, and the single prediction without guidance

with m = gate * steps. The outputs are those behind the output projection, before the residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Denoising, HiddenCall, Pass
from saccade.core.site import Site


@dataclass(eq=False)
class TGate(Method):
    card = Card(
        slug="tgate",
        name="TGATE",
        kind="method",
        family="diffusion",
        form="method",
        target="unet/dit diffusion",
        paper="Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models "
        "(Zhang et al., 2024)",
        summary="Leave out cross-attention and the unconditional half once they have settled",
        needs=("sampling",),
        neutral={"gate": 1.0},
        code="HaozheLiu-ST/T-GATE",
        choices=(
            "The gate is a share of the steps: the paper's 10 of 25 is 0.4.",
            "Self-attention is never reused between steps, as in the paper (later code: sp_interval 1).",
            "Where the two halves are calls of their own, the unconditional one is not made after the gate.",
        ),
        tags=("efficiency", "caching", "guidance", "cross-attention"),
    )

    gate: float = option(0.4, "share of the steps that run in full; 1 changes nothing", low=0, high=1)
    sites: Sites = option("*.cross", "cross-attention that is kept")

    def enter(self, p: Denoising, inputs: dict[str, Any]) -> dict[str, Any] | None:
        return p.narrow(inputs, "cond") if self._steps_left(p) <= 0 else inputs

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        p = call.pass_
        if isinstance(p, Denoising) and self._steps_left(p) == 1 and p.purpose == "sample":
            halves = call.run.state.setdefault(call.site.name, {})
            halves.update({name: h[index.to(h.device)] for name, index in p.rows.items()})
        return h

    def skip(self, site: Site, p: Pass) -> Tensor | None:
        if isinstance(p, Denoising) and self._steps_left(p) <= 0:
            return torch.stack([*p.run.state[site.name].values()]).mean(0)
        return None

    def _steps_left(self, p: Denoising) -> int:
        """In full, this one among them; there is one at least."""
        return max(1, round(self.gate * p.total)) - p.i
