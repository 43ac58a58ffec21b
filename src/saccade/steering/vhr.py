"""Make the heads that listen to the picture louder.

    VHD_h = || o_h(with the picture) - o_h(without it) ||          last position, before the output projection
    VHD_h <- 0  where VHD_h and ||o_h(without)||^2 both exceed their layer's mean + deviation
    o_h   <- alpha * o_h  for the heads with VHD_h > the layer's median

Chosen once for a conversation, when its first prompt is read, layer by layer, with the layers below already
louder in both streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall, take_rows
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run
from saccade.steering._parts.prompts import without_pictures


@dataclass(eq=False)
class VHR(Method):
    card = Card(
        slug="vhr",
        name="VHR",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence "
        "(He et al., 2025)",
        summary="Reinforce the heads whose output changes most when the picture is taken away",
        needs=("image",),
        neutral={"alpha": 1.0},
        choices=(
            "The stream without the picture is a second row of one extra pass, so that both are reinforced "
            "alike while the heads are being chosen; the paper does not say how its stream is treated.",
            "A conversation keeps the heads of its first prompt, also where a picture comes later.",
            "The paper's layers of 32 (the second and the last 14) scale with the model's depth.",
        ),
        tags=("hallucination", "head selection", "vision-aware heads", "reinforcement"),
    )

    alpha: float = option(2.0, "factor on the chosen heads; 1 changes nothing", low=0)
    sites: Sites = option("text.1.self|text.56%:.self", "layers; the paper's second and last 14 of 32")

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        name = f"heads of {call.site.layer}"
        if name not in call.state:
            call.state[name] = call.by_sample(self._chosen(call.run)[call.site.layer])  # (batch, heads)
        return louder(o, call.state[name], self.alpha)

    def _chosen(self, run: Run) -> Mapping[int | None, Tensor]:
        """Of every layer, by one pass beside the prompt's: (samples, heads)."""
        if "chosen" not in run.state:
            measure = Measure(alpha=self.alpha, sites=self.sites)
            run.forward(run.beside(without_pictures(run)), [measure], last_only=True)
            run.state.update(chosen=measure.chosen, vhd=measure.vhd)
        return run.state["chosen"]

    def end(self, run: Run) -> Mapping[str, Any] | None:
        """`chosen` and `vhd` (before outliers are taken out): by layer, (samples, heads)."""
        return dict(run.state) or None


@dataclass(eq=False)
class Measure(Method):
    """Chooses heads in one pass whose second half of rows sees no picture."""

    alpha: float = 2.0
    chosen: dict[int, Tensor] = field(default_factory=dict)
    vhd: dict[int, Tensor] = field(default_factory=dict)

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        last = take_rows(o, call.resolve("last")).squeeze(2).float()
        seeing, blind = last.chunk(2)  # (samples, heads, dim)
        vhd = (seeing - blind).norm(dim=-1)
        self.vhd[call.site.layer] = vhd
        self.chosen[call.site.layer] = chosen = choose(vhd, blind.square().sum(-1))
        return louder(o, torch.cat([chosen, chosen]), self.alpha)


def choose(vhd: Tensor, strength: Tensor) -> Tensor:
    """Heads (samples, heads) above the median, outliers that are as strong without the picture taken out."""
    outlier = _outstanding(vhd) & _outstanding(strength)
    vhd = vhd.masked_fill(outlier, 0)
    return vhd > vhd.quantile(0.5, dim=-1, keepdim=True)


def _outstanding(x: Tensor) -> Tensor:
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=0)


def louder(o: Tensor, chosen: Tensor, alpha: float) -> Tensor:
    return o * torch.where(chosen, alpha, 1.0).to(o.dtype)[:, :, None, None]


def total_vhd(vhd: Mapping[int, Tensor], k: int) -> Tensor:
    """T-VHD: the k largest divergences of every layer, summed: (samples,)."""
    return torch.stack([layer.topk(min(k, layer.shape[-1])).values.sum(-1) for layer in vhd.values()]).sum(0)
