"""Of which heads, places and layers CLIP makes the vector of a picture, and which texts tell what a head gives.

    vector = sum_l,h,i c_lhi + sum_l mlp_l + first
    c_lhi  = P (gamma * (w_hi v_hi W_o + b_o / nH - mean / m) / std + beta / m) / |vector|      m = (2L + 1) nH

Mean and std are those that the final norm takes of the class token's whole state; mlps and what the first layer is
given are read alike, with m = 2L + 1. The texts of a head, whose sums over i are the rows of C:

    t* = argmax_t std(C t)        C <- C - C t* t*^T / |t*|^2,  and so every t        of centred C, again and again
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run


@dataclass(eq=False)
class TextSpan(Method):
    """`session.results["clip_textspan"]` are the `Parts` of the pictures' vectors; `parts.span(...)` tells a head by
    texts, `parts.heat(...)` where a class is seen, `parts.ablated(...)` what is left without some."""

    card = Card(
        slug="clip_textspan",
        name="CLIP TextSpan",
        kind="method",
        family="probes",
        form="probe",
        target="clip",
        paper="Interpreting CLIP's Image Representation via Text-Based Decomposition (Gandelsman et al., 2023)",
        summary="What every head, place and layer gives to CLIP's vector of a picture, and texts that tell it",
        code="yossigandelsman/clip_prs",
        choices=(
            "A text is chosen as the release does, by the spread of what it projects to: longer ones come first.",
            "Heat is clipped at zero before it is brought to 0 and 1, as released, for every picture by itself.",
            "Sums over places and sums over heads are kept, not every head at every place.",
            "It ends when no text is left; the release goes on dividing by zero.",
        ),
        tags=("decomposition", "direct effect", "text explanations", "zero-shot segmentation", "head roles"),
    )

    sites: Sites = option(
        {
            "observe": "vision.*.self",
            "hidden": ("vision.embed", "vision.*.self", "vision.*.mlp", "vision.-1.layer"),
        },
        "attention, mlps, and both ends of the stream",
    )

    def begin(self, run: Run) -> None:
        run.state.update(readout=run.readout(), heads=[], mlps=[], places=0)

    def observe(self, call: AttentionCall) -> None:
        assert call.out is not None
        seen = call.weights(0).to(call.v.dtype)[:, :, 0, :, None]  # of the class token's row
        call.run.state["taken"] = seen * call.v.repeat_interleave(call.groups, 1)
        call.run.state["given"] = call.out.transpose(1, 2).flatten(2)
        call.run.state["patches"] = int(call.columns("image")[0].sum())

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        state = call.run.state
        if call.site.kind == "layer":
            state["last"] = h[:, 0]
        elif call.site.kind == "self":
            self._split(call, h)
        else:
            state["mlps"].append(h[:, 0])
        return h

    def _split(self, call: HiddenCall, h: Tensor) -> None:
        state = call.run.state
        taken = state.pop("taken")  # (pictures, heads, tokens, dim)
        weight, bias = call.run.taking(call.site, state.pop("given"), h)
        heads, tokens = taken.shape[1:3]
        out = weight.unflatten(0, (heads, -1))  # (heads, dim, width)
        state["heads"].append(torch.einsum("bhnd,hdw->bhw", taken, out) + bias / heads)
        state["places"] = state["places"] + torch.einsum("bhnd,hdw->bnw", taken, out) + bias / tokens

    def end(self, run: Run) -> Parts | None:
        state = run.state
        if "last" not in state:
            return None
        norm, projection = state["readout"]
        last, heads, mlps = state["last"], torch.stack(state["heads"], 1), torch.stack(state["mlps"], 1)
        mean = last.mean(-1, keepdim=True)
        std = (last.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        length = projection(norm(last)).norm(dim=-1, keepdim=True)

        def read(part: Tensor, share: float) -> Tensor:
            """The vector's part (pictures, ..., width) of a part of the state, with its share of mean and shift."""
            by_picture = (len(part), *(1,) * (part.ndim - 2), 1)
            centred = (part - share * mean.view(by_picture)) * norm.weight / std.view(by_picture)
            return (centred @ projection.weight.mT + share * projection(norm.bias)) / length.view(by_picture)

        parts, layers = heads.shape[1] + mlps.shape[1], heads.shape[1]
        places = state["places"]
        return Parts(
            heads=read(heads, 1 / (parts * heads.shape[2])).detach(),
            mlps=read(mlps, 1 / parts).detach(),
            places=read(places, layers / (parts * places.shape[1])).detach(),
            grid=_grid(run, state["patches"]),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Parts:
    """Of the vectors of pictures, which have length 1."""

    heads: Tensor  # (pictures, layers, heads, width)
    mlps: Tensor  # (pictures, 1 + layers, width), what the first layer was given before all
    places: Tensor  # (pictures, tokens, width) of all heads and layers, by the token that they looked at
    grid: tuple[int, int]  # rows and columns of the last tokens, the patches

    @property
    def vectors(self) -> Tensor:
        return self.mlps.sum(1) + self.heads.sum((1, 2))

    def ablated(self, heads: Tensor, mlps: Tensor) -> Tensor:
        """The vectors with a mean over the pictures in the place of these heads (layers, heads), bool, and mlps
        (1 + layers,)."""
        return torch.where(mlps[:, None], self.mlps.mean(0), self.mlps).sum(1) + torch.where(
            heads[..., None], self.heads.mean(0), self.heads
        ).sum((1, 2))

    def span(self, layer: int, head: int, texts: Tensor, count: int = 60, rank: int = 80) -> Span:
        """Of a head, by vectors of texts (texts, width)."""
        return textspan(self.heads[:, layer, head], texts, count, rank)

    def heat(self, classes: Tensor, size: tuple[int, int]) -> Tensor:
        """How much of a picture's predicted class, more than of any (classes, width), is seen where: 0 to 1,
        (pictures, *size). Above its mean is the object."""
        best = (self.vectors @ classes.mT).argmax(-1)
        scores = self.places[:, -self.grid[0] * self.grid[1] :] @ classes.mT  # (pictures, patches, classes)
        own = scores.take_along_dim(best[:, None, None], -1) - scores.mean(-1, keepdim=True)
        heat = F.interpolate(own.view(-1, 1, *self.grid), size, mode="bilinear")[:, 0].clamp_min(0)
        low, high = heat.flatten(1).aminmax(dim=1)
        return (heat - low[:, None, None]) / (high - low).clamp_min(torch.finfo(heat.dtype).tiny)[
            :, None, None
        ]

    @staticmethod
    def joined(parts: Iterable[Parts]) -> Parts:
        """The pictures of several runs."""
        parts = list(parts)

        def together(name: str) -> Tensor:
            return torch.cat([getattr(p, name) for p in parts])

        return Parts(together("heads"), together("mlps"), together("places"), parts[0].grid)

    def __repr__(self) -> str:
        pictures, layers, heads, width = self.heads.shape
        return f"<Parts of {pictures} vectors of width {width}: {layers} layers of {heads} heads>"


@dataclass(frozen=True, eq=False)
class Span:
    chosen: list[int]  # texts, in the order in which they were found
    directions: Tensor  # (chosen, width), of length 1
    explained: Tensor  # (chosen,) share of the variance with those so far
    made: Tensor  # (pictures, width) what these texts alone make of the head's outputs


def textspan(c: Tensor, texts: Tensor, count: int = 60, rank: int = 80) -> Span:
    """Outputs of a head (pictures, width) by vectors of texts (texts, width)."""
    if len(c) < 2:
        raise InputError(
            "One picture has no spread that texts could tell.", "join the parts of many pictures"
        )
    c, texts = c.double(), texts.double()
    basis = torch.linalg.svd(c, full_matrices=False).Vh[:rank]
    texts = texts @ basis.mT @ basis
    rest = c - c.mean(0)
    whole, given = rest.square().sum(), texts.square().sum(-1)
    chosen, directions, explained = [], [c[:0]], [c[:0, 0]]
    for _ in range(count):
        best = int((rest @ texts.mT).std(0).argmax())
        if texts[best].square().sum() <= 1e-12 * given[best]:
            break
        direction = texts[best] / texts[best].norm()
        rest = rest - (rest @ direction)[:, None] * direction
        texts = texts - (texts @ direction)[:, None] * direction
        chosen.append(best)
        directions.append(direction[None])
        explained.append((1 - rest.square().sum() / whole)[None])
    return Span(chosen, torch.cat(directions), torch.cat(explained), c - rest)


def _grid(run: Run, patches: int) -> tuple[int, int]:
    height, width = run.inputs["pixel_values"].shape[-2:]
    rows = round((patches * height / width) ** 0.5)
    return rows, patches // rows
