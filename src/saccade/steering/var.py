"""Give the attention that sinks waste back to the picture.

    sinks   tokens whose massive dimensions exceed tau, |h[d]| / RMS(h) > tau, at the layer's input
    S       attention of a row and head on the picture;  r  the share of S that is on no sink
    where S >= least and r >= rho:
        w_sink  <- p * w_sink
        w_image <- w_image + (1 - p) * sum(w_sink) * w_image / sum(w_image)      picture without its sinks

Only rows behind the picture are changed, and they still sum to one. Sets of sinks are fixed at prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall
from saccade.steering._parts.rules import redistribute


@dataclass(eq=False)
class VAR(Method):
    card = Card(
        slug="var",
        name="VAR",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="See What You Are Told: Visual Attention Sink in Large Multimodal Models (Kang et al., 2025)",
        summary="Give the attention that sinks waste back to the picture",
        needs=("image",),
        neutral={"p": 1.0},
        code="seilk/VisAttnSink",
        choices=(
            "Heads are picked by the share of non-sink attention, r >= rho, as in the paper; the released "
            "code tests the sink share <= rho, which is the same at rho=0.5 only.",
            "Without dims, the massive dimensions of a layer are those in which the first token, the sink "
            "that every model has, exceeds tau; the paper lists them by model.",
            "Pictures of a later turn can be sinks too: sets grow with the prompt, never with the answer.",
        ),
        tags=("attention sink", "hallucination", "redistribution", "massive activations"),
    )

    p: float = option(0.6, "share of its attention that a sink keeps; 1 changes nothing", low=0, high=1)
    rho: float = option(0.5, "least share of a head's picture attention that is on no sink", low=0, high=1)
    least: float = option(0.2, "least attention on the picture for a head to be changed", low=0, high=1)
    tau: float = option(20.0, "activation over RMS from which a token is a sink", low=0)
    dims: tuple[int, ...] | None = option(
        None, "massive dimensions: LLaVA-1.5-7B (1415, 2533), 13B (2100, 4743), Qwen2-VL-7B (458, 2570)"
    )
    sites: Sites = option({"hidden": "text.2:-1.input", "weights": "text.2:-1.self"}, "layers")
    rows: str | int = option("after_image", "query rows that are changed")

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        if call.phase != "decode":
            name = f"sinks of {call.site.layer}"  # (batch, tokens so far)
            before = call.state.get(name, h.new_zeros(h.shape[0], 0, dtype=torch.bool))
            gap = call.start - before.shape[1]  # answers of earlier turns, which are no sinks
            call.state[name] = torch.cat([F.pad(before, (0, gap)), call.spread(self._sinks(call, h))], 1)
        return h

    def _sinks(self, call: HiddenCall, h: Tensor) -> Tensor:
        x = h.float()
        massive = x.abs() * x.square().mean(-1, keepdim=True).rsqrt() > self.tau  # (batch, tokens, width)
        massive &= ~call.rows("generated", h)
        if self.dims is not None:
            return massive[..., list(self.dims)].any(-1)
        name = f"dims of {call.site.layer}"
        if name not in call.state:
            call.state[name] = (massive & call.rows("first", h)).any(1, keepdim=True)  # (batch, 1, width)
        return (massive & call.state[name]).any(-1)

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        image = call.columns("visual")  # (batch, 1, 1, keys)
        sinks = call.at_columns(call.state[f"sinks of {call.site.layer}"])
        useful = image & ~sinks
        total = (w * image).sum(-1, keepdim=True)  # (batch, heads, rows, 1)
        on_useful = (w * useful).sum(-1, keepdim=True)
        chosen = (
            (total >= self.least)
            & (on_useful >= self.rho * total)
            & (image & sinks).any(-1, keepdim=True)
            & call.rows("after_image")
        )
        return torch.where(chosen, redistribute(w, sinks, useful, self.p), w)
