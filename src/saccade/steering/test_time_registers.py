"""Give a tower of pictures a token to put there what it would put into patches that say little.

    score_j    mean over pictures of |a_j| at their outliers: tokens of a norm above `threshold` in a late layer
    R          the k neurons of the lower layers with the largest scores
    a_j(extra) <- scale * the a_j of largest size over all tokens,   a_j(patches) <- 0        neurons j of R

a is what an mlp's last linear layer is given. The extra token begins as zeros before the first layer, and does not
leave the tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run
from saccade.core.session import Session
from saccade.core.site import layers
from saccade.core.tokens import Tokens, TokensCall


@dataclass(eq=False)
class Registers(Method):
    card = Card(
        slug="test_time_registers",
        name="Test-time registers",
        kind="method",
        family="steering",
        form="method",
        target="vit",
        paper="Vision Transformers Don't Need Trained Registers (Jiang et al., 2025)",
        summary="Move the activations that make outlier patches to an extra token",
        neutral={"k": 0, "visible": False},
        code="nickjiang2378/test-time-registers",
        choices=(
            "Each neuron has a maximum of its own, as in the paper; the released code takes one for all "
            "register neurons of a layer: joint=true.",
            "The extra token joins before the first layer, behind a norm of the embeddings where there is one.",
            "In vision-language models it is dropped before the projector.",
            "The defaults are OpenCLIP-B's; DINOv2-L has k=50, up_to=:75%, threshold=150, outliers=-2.",
        ),
        tags=("register tokens", "outlier tokens", "attention sink", "register neurons", "artifacts"),
    )

    k: int = option(10, "neurons whose activations are moved", low=0)
    up_to: str = option(":50%", "layers that they are sought in; the paper's first 6 of 12")
    scale: float = option(1.0, "factor on what the extra token gets")
    joint: bool = option(False, "one maximum for all neurons of a layer")
    visible: bool = option(True, "whether other tokens attend to the extra one")
    threshold: float = option(30.0, "of a calibration: norm from which a token is an outlier", low=0)
    outliers: str = option("-1", "of a calibration: layer whose outputs' norms count")
    sites: Sites = option(
        {"tokens": "vision.0.layer", "hidden": "vision.*.neurons", "bias": "vision.*.self"},
        "where the token joins, where activations are moved, and where it may be hidden",
    )

    def tokens(self, call: TokensCall) -> Tokens:
        return Tokens(append=call.h.new_zeros(1, call.h.shape[2]))

    def bias(self, call: AttentionCall) -> Tensor | None:
        if self.visible:
            return None
        term = call.q.new_zeros(call.k.shape[2])
        term[call.appended] = -torch.inf
        return term

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        chosen = self._neurons(call.run, call.site.depth)
        mine = chosen[chosen[:, 0] == call.site.layer, 1].to(h.device)
        if not len(mine):
            return h
        return moved(h, mine, call.rows("image", h), call.appended, self.scale, self.joint)

    def _neurons(self, run: Run, depth: int) -> Tensor:
        """Layer and number of the chosen neurons: (k, 2)."""
        if "neurons" not in run.state:
            run.state["neurons"] = loudest(run.calibration()["scores"], self.k, layers(self.up_to, depth))
        return run.state["neurons"]

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are inputs of a forward with pictures."""
        total: Tensor | float = 0.0
        pictures = 0
        for sample in samples:
            watch = Watch(sites=("vision.*.neurons", f"vision.{self.outliers}.layer"))
            session.forward(sample, [watch], last_only=True)
            marked = watch.norms > self.threshold  # (pictures, tokens)
            some = marked.any(1)
            share = (marked / marked.sum(1, keepdim=True).clamp_min(1))[some]
            loud = torch.stack([watch.sizes[layer][some] for layer in sorted(watch.sizes)], 1)
            total = total + torch.einsum("pt,pltn->ln", share.to(loud), loud)
            pictures += int(some.sum())
        if not pictures:
            raise InputError(
                f"No token has a norm above {self.threshold}: there are no outliers.",
                "lower the threshold, or give more pictures",
            )
        return {"scores": (total / pictures).float()}  # type: ignore[union-attr]


@dataclass(eq=False)
class Watch(Method):
    norms: Tensor = field(default_factory=lambda: torch.empty(0))  # (pictures, tokens)
    sizes: dict[int, Tensor] = field(default_factory=dict)  # by layer: (pictures, tokens, neurons)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        wide = h.detach().to(torch.promote_types(h.dtype, torch.float32)).cpu()
        if call.site.kind == "layer":
            self.norms = wide.norm(dim=-1)
        else:
            self.sizes[call.site.layer] = wide.abs()
        return h


def loudest(scores: Tensor, k: int, among: range) -> Tensor:
    """Layer and number of the k neurons with the largest scores (layers, neurons) in some layers: (k, 2)."""
    some = scores[among.start : among.stop]
    if k > some.numel():
        raise InputError(
            f"There are {some.numel()} neurons, not {k}.", "choose fewer, or more layers (up_to)"
        )
    at = some.flatten().topk(k).indices
    return torch.stack([at // scores.shape[1] + among.start, at % scores.shape[1]], 1)


def moved(a: Tensor, mine: Tensor, patches: Tensor, extra: slice, scale: float, joint: bool) -> Tensor:
    """Activations (pictures, tokens, neurons), those of some neurons `mine` taken from patches (pictures, tokens, 1)
    and the largest given to the extra token."""
    old = a[..., mine]
    flat = old.flatten(1)[..., None] if joint else old
    most = flat.gather(1, flat.abs().argmax(1, keepdim=True))  # (pictures, 1, neurons or 1)
    new = old.masked_fill(patches, 0)
    new[:, extra] = scale * most
    return a.index_copy(2, mine, new)
