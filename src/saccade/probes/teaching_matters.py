"""How the heads of a vision transformer look around in the picture, and how alike the features of two are.

    a        = attention between patches, every row made to sum to one without the class token
    distance = mean_i sum_j a_ij |p_i - p_j|       p: places in the grid, 0 to 1 along each side
    aligned  = mean_i of row a_i moved so that i is in the middle
    offset   = |centre of mass of the aligned map|    its middle is 0, its edges are -1 and 1
    CKA      = |Y'X|^2 / (|X'X| |Y'Y|)              X, Y: features of the same patches, columns centred

A head is offset-local where one of the eight places around the middle is the peak of its aligned map and holds
more than half of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.heads import Heads, Selection
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run
from saccade.core.session import Session
from saccade.probes._parts.features import cka
from saccade.probes._parts.table import Table

MASS = 0.6  # of a class token's map, which its brightest patches hold
LOCAL = 0.5


@dataclass(eq=False)
class TeachingMatters(Method):
    """`session.results["teaching_matters"]` is a `Looks`; `features` and `alike` compare what layers make of
    pictures, `_parts.features` scores them by labels, keypoints and videos."""

    card = Card(
        slug="teaching_matters",
        name="ViT Supervision Analysis",
        kind="method",
        family="probes",
        form="probe",
        target="vit",
        paper="Teaching Matters: Investigating the Role of Supervision in Vision Transformers "
        "(Walmer et al., 2022)",
        summary="How far and where heads of a vision transformer look, and how alike two networks' features are",
        code="mwalmer-umd/vit_analysis",
        choices=(
            "Attention to the class token is that in its own column; the release reads the first patch's.",
            "Offset-local heads are found by a rule; the paper picks them by eye from their aligned maps.",
            "CKA is computed over all samples at once; the release averages minibatches.",
            "Deviations over tokens and heads are of the weights as they are, over classes of what each token gets.",
            "Videos are scored patch by patch; the accuracy of contours is left out.",
        ),
        headline="none",
        tags=("vision transformer", "attention distance", "offset", "self-supervised", "CKA", "head scores"),
    )

    sites: Sites = option("vision.:.self", "layers whose heads are measured")

    def observe(self, call: AttentionCall) -> None:
        w = call.weights().detach().cpu()  # (images, heads, tokens, tokens)
        patches = call.klayout.where("image")[0].cpu()
        call.run.state.setdefault(call.site.name, []).append(measured(w, patches))

    def end(self, run: Run) -> Looks | None:
        if not run.state:
            return None
        layers = [
            {name: torch.cat([one[name] for one in calls]) for name in calls[0]}
            for calls in run.state.values()
        ]
        if len({layer["of_class"].shape for layer in layers}) > 1:
            raise InputError(
                "The layers differ in heads or in patches.", "narrow with sites= to layers that are alike"
            )
        stacked = {name: torch.stack([layer[name] for layer in layers], 1) for name in layers[0]}
        return Looks(tuple(run.state), **stacked)


@dataclass(frozen=True, eq=False)
class Looks:
    """Of every image, site and head."""

    sites: tuple[str, ...]
    distance: Tensor  # (images, sites, heads)
    to_class: Tensor  # what patches give to the class token; NaN where there is none
    over_tokens: Tensor  # deviation over the patches that look
    over_heads: Tensor  # (images, sites), deviation over heads
    received: Tensor  # (images, sites, heads, tokens), what each token gets from all on average
    aligned: Tensor  # (images, sites, heads, 2P-1, 2P-1)
    of_class: Tensor  # (images, sites, heads, P, P), what the class token looks at

    def heads(self, name: str = "distance") -> Heads:
        """A table of `distance`, `to_class` or `over_tokens`, with an event for every image, or of `offset`."""
        events = self.offset()[None] if name == "offset" else getattr(self, name)
        return Heads(f"teaching_matters {name}", self.sites, events)

    def offset(self) -> Tensor:
        """(sites, heads)"""
        mean = self._mean_map()
        line = torch.linspace(-1, 1, mean.shape[-1], dtype=mean.dtype)
        down, across = (mean.sum(-1) * line).sum(-1), (mean.sum(-2) * line).sum(-1)
        return torch.hypot(down, across)

    def offset_local(self) -> Selection:
        """The heads that look next to themselves, at one place."""
        mean = self._mean_map()
        middle = mean.shape[-1] // 2
        peak = mean.flatten(-2).argmax(-1)
        down, across = peak // mean.shape[-1] - middle, peak % mean.shape[-1] - middle
        beside = torch.maximum(down.abs(), across.abs()) == 1
        local = beside & (mean.flatten(-2).amax(-1) > LOCAL)
        return {
            site: tuple(row.nonzero()[:, 0].tolist())
            for site, row in zip(self.sites, local)
            if bool(row.any())
        }

    def over_classes(self, labels: Sequence[int]) -> Tensor:
        """Deviation, over the means of classes, of what tokens get: (sites, heads)."""
        of = torch.as_tensor(labels)
        means = torch.stack([self.received[of == label].mean(0) for label in of.unique()])
        return means.std(0, correction=0).mean(-1)

    def iou(self, masks: Tensor) -> Heads:
        """Of masks (images, P, P), bool, and the brightest patches of the class token's map, those that together
        hold 60% of it."""
        maps = self.of_class.flatten(-2)
        order = maps.argsort(dim=-1, descending=True, stable=True)
        sorted_ = maps.gather(-1, order)
        before = sorted_.cumsum(-1) - sorted_
        bright = torch.zeros_like(maps, dtype=torch.bool)
        bright.scatter_(-1, order, before < MASS * maps.sum(-1, keepdim=True))
        there = masks.flatten(-2)[:, None, None]
        both, either = (bright & there).sum(-1), (bright | there).sum(-1)
        return Heads("teaching_matters iou", self.sites, both / either)

    @staticmethod
    def joined(looks: Sequence[Looks]) -> Looks:
        """The images of several runs."""
        if len({one.sites for one in looks}) != 1:
            raise InputError("These are of different sites.", "join what one model gave")
        names = [f.name for f in dataclasses.fields(Looks)][1:]
        return Looks(looks[0].sites, *(torch.cat([getattr(one, name) for one in looks]) for name in names))

    def _mean_map(self) -> Tensor:
        """Over the images, of sum one, or zero where a head looks at the class token alone."""
        mean = self.aligned.double().mean(0)
        total = mean.sum((-1, -2), keepdim=True)
        return mean / total.where(total > 0, 1)


def measured(w: Tensor, patches: Tensor) -> dict[str, Tensor]:
    """Of one layer's weights (images, heads, tokens, tokens), by the names of `Looks`."""
    side = round(int(patches.sum()) ** 0.5)
    if side < 2 or side**2 != int(patches.sum()):
        raise InputError(
            f"{int(patches.sum())} patches are no square.", "give square pictures, to a tower without windows"
        )
    inner = w[:, :, patches][..., patches]
    total = inner.sum(-1, keepdim=True)
    a = inner / total.where(total > 0, 1)
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # row and column of every patch
    places = at.to(w.dtype) / (side - 1)
    first = (~patches).nonzero()[:1, 0]  # the class token, or none, whose means are NaN
    return {
        "distance": (a * torch.cdist(places, places)).sum(-1).mean(-1),
        "to_class": w[:, :, patches][..., first].mean((-1, -2)),
        "over_tokens": inner.std(-2).mean(-1),
        "over_heads": inner.std(1).mean((-1, -2)),
        "received": w.mean(-2),
        "aligned": aligned(a, at, side),
        "of_class": w[:, :, first][..., patches].mean(2).unflatten(-1, (side, side)),
    }


def aligned(a: Tensor, at: Tensor, side: int) -> Tensor:
    """Mean of the rows (images, heads, patches, patches), each moved so that its patch is in the middle:
    (images, heads, 2 side - 1, 2 side - 1)."""
    width = 2 * side - 1
    away = at[None] - at[:, None] + side - 1  # (patches, patches, 2)
    place = (away[..., 0] * width + away[..., 1]).flatten()
    moved = a.new_zeros(*a.shape[:2], width**2).index_add_(-1, place, a.flatten(-2))
    return (moved / a.shape[-1]).unflatten(-1, (width, width))


# ---- features ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Features(Method):
    """States behind every layer, of the class token and of the patches."""

    sites: Sites = "vision.:.layer"
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    patches: Tensor | None = None

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.patches = call.rows("image", h)[0, :, 0].cpu()
        self.seen.setdefault(call.site.name, []).append(h.detach().float().cpu())
        return h


def features(session: Session, inputs: Any, of: str = "patches") -> dict[str, Tensor]:
    """Of every layer, states (images, patches, width), or `of="class"` those of the class token (images, width)."""
    method = Features()
    session.forward(inputs, [method])
    assert method.patches is not None
    first = (~method.patches).nonzero()[:1, 0]
    if of == "class" and not len(first):
        raise InputError("The tower has no class token.", 'take of="patches"')
    states = {site: torch.cat(seen) for site, seen in method.seen.items()}
    if of == "class":
        return {site: h[:, first[0]] for site, h in states.items()}
    return {site: h[:, method.patches] for site, h in states.items()}


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> Table:
    """CKA of the layers of two networks, or of one."""
    values = [[cka(x.flatten(0, -2), y.flatten(0, -2)) for y in b.values()] for x in a.values()]
    return Table(torch.tensor(values, dtype=torch.float64), {"layer": tuple(a), "other": tuple(b)})
