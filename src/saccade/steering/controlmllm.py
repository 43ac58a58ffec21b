"""Point at a part of a picture, and let what is added to its tokens learn that the words look there.

    a    attention on the visual tokens, mean over layers, heads and the words behind the picture
    E    = (1 - sum(a * M) / sum(a))^2          M  the region: the share of a token inside, or how near it is
    o_t  = beta * p + (1 - beta) * o_{t-1}      o  what is added to the visual tokens before the first layer
    p    <- p - lr * alpha * dE/dp              `steps` times, from p = o = 0

Only p learns. The answer is then written with the tokens moved by o.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.layout import Layout
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run
from saccade.steering._parts.regions import Box, inside, token_boxes

FIRST = "text.0.input"
SIGMA = 0.1  # of nearness, in the largest distance of the picture


@dataclass(eq=False)
class ControlMLLM(Method):
    card = Card(
        slug="controlmllm",
        name="ControlMLLM",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="ControlMLLM: Training-Free Visual Prompt Learning for Multimodal Large Language Models "
        "(Wu et al., 2024)",
        summary="Let the words look at a region, by what a few steps of gradient add to the visual tokens",
        needs=("image",),
        neutral={"lr": 0.0},
        code="mrwu-mac/ControlMLLM",
        choices=(
            "Every step starts from the picture's own tokens; the released loop adds to those of the step before, "
            "which accumulate=true does too.",
            "The gradient passes through the mean, as a factor beta.",
            "A conversation keeps what its first prompt learnt; pictures of later turns are not changed.",
            "Nearness is measured from the box to the middles of tokens; the released code transforms a drawn mask.",
        ),
        tags=("visual prompt", "region", "referring", "test-time optimisation", "latent variable"),
    )

    boxes: tuple[Box, ...] = option(
        (),
        "x0 y0 x1 y1 for every picture, or one for all; in pixels of the pictures given to session.locate, or else of "
        "what the tower is given",
    )
    near: bool = option(False, "points and scribbles: tokens count by their nearness to the box")
    steps: int = option(5, "steps of the gradient; the paper's 4 for regions of text", low=0)
    lr: float = option(1.0, "length of a step; 0 changes nothing", low=0)
    alpha: float = option(400.0, "weight of the energy", low=0)
    beta: float = option(0.5, "share of the newest in the running mean", low=0, high=1)
    stop: float | None = option(
        None, "end early where the energy has changed by that share, or rises; none: never"
    )
    accumulate: bool = option(False, "add what every step adds on that of the steps before")
    sites: Sites = option("text.*.self", "where words look")

    def sites_of(self, event: str) -> tuple[str, ...]:
        return (FIRST,) if event == "hidden" else super().sites_of(event)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        if call.phase == "decode" or call.run.start or not call.rows("visual", h).any():
            return h
        if "added" not in call.run.state:
            call.run.state.update(self._learn(call, h))
        added = call.by_sample(call.run.state["added"])
        removal = call.pass_.removal(call.site)
        if removal is None:
            return h + added[:, call.start : call.start + h.shape[1]].to(h.dtype)
        places = removal.keep.clamp_min(0)[..., None].expand(-1, -1, h.shape[2])
        return h + added[:, call.start :].gather(1, places).to(h.dtype) * call.rows("visual", h)

    def _learn(self, call: HiddenCall, h: Tensor) -> dict[str, Any]:
        """What is added to the prompt's tokens (samples, tokens, width), and the energies (steps, samples)."""
        run, energies = call.run, []
        shape = (*run.inputs["input_ids"].shape, h.shape[-1])
        wide = torch.promote_types(h.dtype, torch.float32)
        p, mean, before = (torch.zeros(shape, dtype=wide, device=h.device) for _ in range(3))
        for _ in range(self.steps):
            now = self.beta * p + (1 - self.beta) * mean
            energy, slope = self._energy(run, before + now)
            energies.append(energy)
            if self._done(energies):
                break
            mean, before = now, before + now if self.accumulate else before
            p = p - self.lr * self.alpha * self.beta * slope
        return {"added": before + self.beta * p + (1 - self.beta) * mean, "energies": energies}

    def _energy(self, run: Run, added: Tensor) -> tuple[Tensor, Tensor]:
        """Of every sample (samples,), and its slope by what is added."""
        added.requires_grad_()
        look = Look(method=self, sites=self.sites_of("weights"), rows="after_image")
        with torch.enable_grad():
            run.forward(run.inputs, [Add(added=added, sites=FIRST), look], grad=True, last_only=True)
            energy = (1 - (look.seen * look.region).sum(1) / look.seen.sum(1)).square()
            (slope,) = torch.autograd.grad(energy.sum(), added)
        return energy.detach(), slope.detach()

    def _done(self, energies: list[Tensor]) -> bool:
        if self.stop is None or len(energies) < 2:
            return False
        first, last, newest = (float(energies[i].mean()) for i in (0, -2, -1))
        return newest > last or abs(newest - first) > self.stop * first

    def end(self, run: Run) -> Mapping[str, Any] | None:
        """`energies` of every step (samples,), and what was `added` (samples, tokens, width)."""
        return dict(run.state) or None


@dataclass(eq=False)
class Add(Method):
    added: Tensor | None = None

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        assert self.added is not None
        return h + self.added.to(h.dtype) * call.rows("visual", h)


@dataclass(eq=False)
class Look(Method):
    """Where the words behind the picture look, on the graph; and the region."""

    method: Any = None
    seen: Any = 0.0  # (samples, tokens)
    region: Any = None

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        if self.region is None:
            self.region = region(call, self.method.boxes, self.method.near).to(w.dtype)
        looking = (w * call.rows("after_image") * call.columns("visual")).mean(1).sum(1)
        self.seen = self.seen + looking
        return w


def region(call: AttentionCall, boxes: tuple[Box, ...], near: bool) -> Tensor:
    """M for every token: (samples, tokens)"""
    places = token_boxes(call)
    layout: Layout = call.klayout
    pictures = [
        (row, item)
        for row in range(len(places))
        for item in layout.item[row][layout.item[row] >= 0].unique().tolist()
    ]
    if len(boxes) not in (1, len(pictures)):
        raise InputError(
            f"There are {len(boxes)} boxes for {len(pictures)} pictures.", "give one for each, or one for all"
        )
    m = torch.zeros(places.shape[:2], dtype=places.dtype, device=places.device)
    for number, (row, item) in enumerate(pictures):
        mine = layout.item[row] == item
        measure = nearness if near else inside
        m[row, mine] = measure(places[row, mine][None], [boxes[number % len(boxes)]])[0]
    return m


def nearness(places: Tensor, regions: list[Box]) -> Tensor:
    """A bell of the distance between the middles of tokens (pictures, tokens, 4) and their picture's box, 1 being the
    largest: (pictures, tokens)."""
    box = torch.as_tensor(regions, dtype=places.dtype, device=places.device)[:, None]
    middles = (places[..., :2] + places[..., 2:]) / 2
    away = torch.maximum(box[..., :2] - middles, middles - box[..., 2:]).clamp_min(0).norm(dim=-1)
    low, high = away.amin(1, keepdim=True), away.amax(1, keepdim=True)
    distance = torch.where(high > low, (away - low) / (high - low), 0)
    return (-(distance**2) / (2 * SIGMA**2)).exp() / (math.sqrt(2 * math.pi) * SIGMA)
