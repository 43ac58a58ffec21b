"""Switch off the heads without which the loss stays as it is.

    o_h <- xi_h * o_h,   xi_h = 1, and 0 for the heads that are pruned
    I_h  = mean over examples of |dL / d xi_h| at xi_h = 1,   divided by the L2 norm of its layer's
    pruned are the heads with the smallest I_h, as many as `share` of all says

A calibration ranks them, all at once or step by step, those of the steps before switched off. `ablations` looks at
each head without the others; `without_heads` makes a model whose matrices have lost them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.heads import Selection
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run
from saccade.core.session import Session, attach


@dataclass(eq=False)
class HeadImportancePrune(Method):
    card = Card(
        slug="head_importance_prune",
        name="Sixteen Heads (head pruning)",
        kind="method",
        family="reduction",
        form="method",
        target="any-transformer",
        paper="Are Sixteen Heads Really Better than One? (Michel et al., 2019)",
        summary="Switch off the heads to which the loss is least sensitive",
        neutral={"pruned": {}},
        code="pmichel31415/are-16-heads-really-better-than-1",
        choices=(
            "An example's inner product is summed over its tokens before its absolute value is taken.",
            "Heads that the loss does not reach, as in a layer above the features that a text reads, count as 0.",
            "Of heads that share a key head the matrices are taken out when all of them go.",
        ),
        tags=("heads", "pruning", "importance", "gradient", "ablation"),
    )

    share: float = option(0.1, "of the heads of all sites, the share that is switched off", low=0, high=1)
    portion: float = option(
        1.0, "of a calibration: share of the heads that one measurement ranks", low=1e-4, high=1
    )
    pruned: str | dict[str, tuple[int, ...]] = option(
        "calibrated", "calibrated, or the heads by the names of their sites"
    )
    sites: Sites = option(
        "*.self", "attentions whose heads are ranked together; *.self|*.cross where there are both"
    )

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        heads = self._pruned(call.run).get(call.site.name)
        if not heads:
            return o
        return o.index_fill(1, torch.tensor(heads, device=o.device), 0)

    def _pruned(self, run: Run) -> Selection:
        if isinstance(self.pruned, Mapping):
            return self.pruned
        if "pruned" not in run.state:
            run.state["pruned"] = least(run.calibration(), self.share)
        return run.state["pruned"]

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The rank of every head, by site: (heads,), 0 for the first to go. Samples are one example each, inputs of a
        forward with its labels, or with `loss`, a function of what it returns."""
        samples = list(samples)
        closed: Selection = {}
        scores = importance(session, samples, self.sites)
        ranks = {site: torch.zeros(len(values), dtype=torch.long) for site, values in scores.items()}
        total = sum(map(len, ranks.values()))
        done, each = 0, max(1, round(self.portion * total))
        while True:
            left = [
                (float(value), site, head)
                for site, values in scores.items()
                for head, value in enumerate(values)
                if head not in closed.get(site, ())
            ]
            for _, site, head in sorted(left, key=lambda one: one[0])[:each]:
                ranks[site][head], done = done, done + 1
                closed[site] = (*closed.get(site, ()), head)
            if done == total:
                return ranks
            scores = importance(session, samples, self.sites, closed)


def least(ranks: Mapping[str, Tensor], share: float) -> Selection:
    """The share of all heads that goes first, from the ranks of a calibration."""
    count = round(share * sum(map(len, ranks.values())))
    found = {site: tuple((rank < count).nonzero()[:, 0].tolist()) for site, rank in ranks.items()}
    return {site: heads for site, heads in found.items() if heads}


@dataclass(eq=False)
class Gates(Method):
    """A factor for every head, with a gradient."""

    closed: Selection = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        name = call.site.name
        if name not in self.made:
            gate = o.new_ones(o.shape[1])
            gate[[*self.closed.get(name, ())]] = 0
            self.made[name] = gate.requires_grad_()
        return o * self.made[name][:, None, None]


def importance(
    session: Session, samples: Iterable[Mapping[str, Any]], sites: Sites, closed: Selection | None = None
) -> dict[str, Tensor]:
    """I_h of every head, by site: (heads,). Heads that are `closed` are switched off meanwhile."""
    totals: dict[str, Tensor] = {}
    for sample in samples:
        inputs = dict(sample)
        loss, gates = inputs.pop("loss", _own_loss), Gates(sites=sites, closed=closed or {})
        with torch.enable_grad():
            value = loss(session.forward(inputs, (gates,), grad=True))
            slopes = torch.autograd.grad(value, [*gates.made.values()], allow_unused=True)
        for (site, gate), slope in zip(gates.made.items(), slopes, strict=True):
            new = torch.zeros_like(gate, dtype=torch.float32) if slope is None else slope.abs().float()
            new[[*gates.closed.get(site, ())]] = 0
            totals[site] = totals.get(site, 0) + new.detach().cpu()
    if not totals:
        raise InputError("No example says which heads matter.", "give inputs of a forward with their labels")
    return {site: F.normalize(total, dim=0) for site, total in totals.items()}


def _own_loss(out: Any) -> Tensor:
    loss = getattr(out, "loss", None)
    if loss is None:
        raise InputError(
            f"This forward gives a {type(out).__name__} without a loss.",
            "give labels with the inputs, or loss=, a function of what the forward returns",
        )
    return loss


def ablations(
    model: nn.Module, metric: Callable[[], float], sites: str = "*.self", *, alone: bool = False
) -> dict[str, Tensor]:
    """By how much a metric changes when one head is off, or, `alone`, when it is the only one of its attention that
    is on: by site, (heads,)."""
    counts: dict[str, int] = {}

    @dataclass(eq=False)
    class Count(Method):
        def output(self, call: AttentionCall, o: Tensor) -> Tensor:
            counts[call.site.name] = o.shape[1]
            return o

    with attach(model, Count(sites=sites)):
        before = metric()
    found = {}
    for site, heads in counts.items():
        changes = []
        for head in range(heads):
            off = tuple(other for other in range(heads) if other != head) if alone else (head,)
            with attach(model, HeadImportancePrune(pruned={site: off}, sites=site)):
                changes.append(metric() - before)
        found[site] = torch.tensor(changes, dtype=torch.float64)
    return found


def without_heads(model: nn.Module, heads: Mapping[str, Iterable[int]]) -> nn.Module:
    """A copy of the model whose matrices have lost these heads."""
    smaller = copy.deepcopy(model)
    with attach(smaller) as session:
        for site, gone in heads.items():
            session.cut(site, gone)
    return smaller
