"""Let pictures take their content from the first one: its keys and values, their own queries.

    from step start * steps on, in the self-attention of the later layers:
        out_target = softmax(q_target k_source^T / sqrt(d)) v_source

With the object's words, masks of source and target keep object and background apart. They are made of the
step's own cross-attention at a quarter of the latents' side:

        out_target = M_target * (attention over keys inside M_source) + (1 - M_target) * (over those outside)

The prompts are one batch, the source first, and begin from the same latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run
from saccade.core.site import Site
from saccade.diffusion._parts.editing import attention_to, sampling, saying


@dataclass(eq=False)
class MasaCtrl(Method):
    card = Card(
        slug="masactrl",
        name="MasaCtrl",
        kind="method",
        family="diffusion",
        form="method",
        target="unet diffusion",
        paper="MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and "
        "Editing (Cao et al., 2023)",
        summary="Take keys and values of self-attention from the source picture",
        needs=("sampling",),
        neutral={"start": 1.0},
        code="TencentARC/MasaCtrl",
        choices=(
            "Steps and layers are shares: the paper's step 4 of 50 and layer 10 of 16 are 0.08 and 0.625.",
            "A mask without a single position is no mask: all keys are seen.",
        ),
        tags=("editing", "consistency", "self-attention", "mutual attention"),
    )

    start: float = option(0.08, "share of the steps that stay as they are; 1 changes nothing", low=0, high=1)
    first: float = option(0.625, "share of the self-attention layers that stay as they are", low=0, high=1)
    source: str = option("", "the object's word in the first prompt, for masks; no masks without it")
    target: str = option("", "its word in the other prompts; the source's unless given")
    threshold: float = option(
        0.1, "of the normalised map, from which a position is the object's", low=0, high=1
    )
    sites: Sites = option(
        {"inputs": "unet.*.self", "replace": "unet.*.self", "observe": "unet.*.cross"},
        "self-attention that is mutual, and cross-attention for the masks",
    )

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._acts(call):
            k, v = k.clone(), v.clone()
            for index in call.pass_.rows.values():
                k[index[1:]], v[index[1:]] = k[index[:1]], v[index[:1]]
        return q, k, v

    def observe(self, call: AttentionCall) -> None:
        p = sampling(call)
        if not self.source or "cond" not in p.rows:
            return
        index = p.rows["cond"].to(call.q.device)
        words = saying(call, self.source)
        words[index[1:]] = saying(call, self.target or self.source)[index[1:]]
        seen = attention_to(call, words)
        if seen is not None:
            maps = call.run.state.setdefault("maps", {})
            call.run.state["maps"] = {p.i: [*maps.get(p.i, ()), seen[index]]}

    def replace(self, call: AttentionCall) -> Tensor | None:
        mask = self._mask(call) if self.source and self._acts(call) else None
        if mask is None:
            return None
        mask = mask[call.qlayout.sample.to(mask.device)]  # (batch, tokens)
        inside, outside = torch.ones_like(mask), torch.ones_like(mask)
        for index in call.pass_.rows.values():
            inside[index[1:]], outside[index[1:]] = _some(mask[index[:1]]), _some(~mask[index[:1]])
        queries = mask.shape[1]
        object_, ground = (
            call.native(mask=keys[:, None, None, :].expand(-1, 1, queries, -1)) for keys in (inside, outside)
        )
        return torch.where(mask[:, None, :, None], object_, ground)

    def _acts(self, call: AttentionCall) -> bool:
        p = sampling(call)
        return p.i >= round(self.start * p.total) and call.site in self._layers(call.run)

    def _layers(self, run: Run) -> list[Site]:
        """In the order in which a UNet runs them."""
        if "layers" not in run.state:
            order = {"down": 0, "mid": 1, "up": 2}
            sites = sorted(run.places(self, "inputs"), key=lambda site: order[site.name.split(".")[1]])
            run.state["layers"] = sites[round(self.first * len(sites)) :]
        return run.state["layers"]

    def _mask(self, call: AttentionCall) -> Tensor | None:
        """(samples, tokens) of this site that show the object; None before there is a map of this step."""
        p = sampling(call)
        maps = call.run.state.get("maps", {}).get(p.i)
        grid = p.grid(call.q.shape[2])
        if not maps or grid is None:
            return None
        seen = torch.stack(maps).mean(0)
        low, high = (edge[:, None, None] for edge in seen.flatten(1).aminmax(dim=1))
        mask = seen - low >= self.threshold * (high - low)
        return F.interpolate(mask[:, None].float(), grid, mode="nearest").flatten(1) > 0


def _some(mask: Tensor) -> Tensor:
    return mask | ~mask.any(-1, keepdim=True)
