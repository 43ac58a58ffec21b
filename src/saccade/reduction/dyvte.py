"""Let all visual tokens leave once the words have taken from the picture what they need.

    behind layer l    f = [mean of the words behind the picture but the last; the last]
                      keep, exit = W2 gelu(W1 f)              W1 (2048, 2 * width) and W2 (2, 2048) of that layer
                      exit > keep: every visual token leaves, the first time that it is so

    training    of a drawn layer, cross-entropy with a label that is 1 where without visual tokens behind that layer
                more than 99% of the answer's words stay the likeliest, and the loss is below 1.03 of the whole one's

The words keep their positions, the layers up to l their cache of the picture. The model stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.session import Session
from saccade.core.tokens import Tokens, TokensCall

HIDDEN = 2048
AGREE = 0.99  # more of the answer's words than this
LOSS = 1.03  # parts of the whole prompt's


@dataclass(eq=False)
class DyVTE(Method):
    card = Card(
        slug="dyvte",
        name="DyVTE",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical "
        "Findings (Wu et al., 2024)",
        summary="Let all visual tokens leave behind the layer at which a trained router says so",
        needs=("image",),
        neutral={"threshold": 1.0},
        trains="light",
        code="DoubtedSteam/DyVTE",
        choices=(
            "Every sample of a batch leaves behind a layer of its own; the released code serves one sample.",
            "Of several pictures the words behind the last one decide, and all leave together.",
            "The second layer of a router has no bias, as in the released code.",
            "The last layer has no router, for nothing follows it.",
            "A single word behind the picture is its own mean.",
            "In training visual tokens leave, where the released code masks them for the layers above.",
        ),
        tags=("visual token exit", "router", "early exit", "token pruning", "prefill"),
    )

    threshold: float = option(
        0.5, "probability of exit above which pictures leave; at 1 they never do", low=0, high=1
    )
    steps: int = option(2000, "of a calibration: steps of Adam, one sample each", low=1)
    lr: float = option(2e-5, "of a calibration: length of a step", low=0)
    sites: Sites = option("text.1:.layer", "the layers before which pictures may leave")
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which pictures leave")

    def tokens(self, call: TokensCall) -> Tokens | None:
        visual = call.tokens("visual")
        seeing = visual.any(1)
        if not bool(seeing.any()):
            return None
        call.pass_.check_complete()
        f = heard(call.h, words_behind(call, seeing))
        leave = routed(f, *router(call.run.calibration(), call.layer - 1)).softmax(-1)[:, 1] > self.threshold
        leave &= seeing
        return Tokens(~(visual & leave[:, None])) if bool(leave.any()) else None

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are inputs of a forward with an answer behind the question, and `labels`, the answer's ids in their
        place and -100 elsewhere."""
        return learned(session, list(samples), self.sites, self.steps, self.lr)


def words_behind(call: TokensCall, seeing: Tensor) -> Tensor:
    """Words behind the last picture (batch, tokens), of samples that have one."""
    words = call.tokens("after_image")
    if not bool(words.any(1)[seeing].all()):
        raise InputError(
            "DyVTE decides by the words behind a picture, and a prompt ends with its picture.",
            "put the question behind it",
        )
    return words


def heard(h: Tensor, words: Tensor) -> Tensor:
    """What a router is given, (batch, 2 * width), of states (batch, tokens, width) of `words` (batch, tokens)."""
    h, counts = h.to(torch.promote_types(h.dtype, torch.float32)), words.sum(1, keepdim=True)
    last = words & (words.cumsum(1) == counts)
    others = words & ~(last & (counts > 1))
    mean = (h * others[..., None]).sum(1) / others.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([mean, (h * last[..., None]).sum(1)], -1)


def routed(f: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """Logits of keep and exit: (batch, 2)."""
    return F.linear(F.gelu(F.linear(f, inner.to(f))), outer.to(f))


def router(weights: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """The router behind a layer: (2048, 2 * width) and (2, 2048)."""
    if f"inner.{layer}" not in weights:
        raise InputError(
            f"The calibration of DyVTE has no router behind layer {layer}.", "calibrate with the same sites"
        )
    return weights[f"inner.{layer}"], weights[f"outer.{layer}"]


@dataclass(eq=False)
class Hear(Method):
    """What routers would be given, by layer: (batch, 2 * width). `starts` (batch,) is where answers begin."""

    starts: Tensor = field(default_factory=lambda: torch.zeros(0))
    by_layer: dict[int, Tensor] = field(default_factory=dict)

    def tokens(self, call: TokensCall) -> Tokens | None:
        asked = torch.arange(call.h.shape[1], device=call.h.device) < self.starts[:, None]
        words = words_behind(call, call.tokens("visual").any(1)) & asked
        self.by_layer[call.layer - 1] = heard(call.h, words).detach()
        return None


@dataclass(eq=False)
class Leave(Method):
    """All pictures leave."""

    def tokens(self, call: TokensCall) -> Tokens | None:
        return Tokens(~call.tokens("visual"))


class Answered(NamedTuple):
    likeliest: Tensor  # (batch, tokens)
    loss: Tensor  # (batch,), mean over the answer's words


def learned(
    session: Session, samples: Sequence[Mapping[str, Any]], sites: Sites, steps: int, lr: float
) -> dict[str, Tensor]:
    """Routers for all layers but the last of those that the sites name."""
    if not samples or not all("labels" in s and bool((s["labels"] != -100).any(1).all()) for s in samples):
        raise InputError("DyVTE learns from answers, and there are samples without.", "give each its labels")
    order = torch.Generator().manual_seed(0)

    @functools.cache
    def whole(number: int) -> tuple[dict[int, Tensor], Answered]:
        starts = (samples[number]["labels"] != -100).int().argmax(1)
        hear = Hear(sites=sites, starts=starts)
        return hear.by_layer, answered(session, samples[number], hear)

    @functools.cache
    def label(number: int, layer: int) -> Tensor:
        short = answered(session, samples[number], Leave(sites=f"text.{layer + 1}.layer"))
        return exits(whole(number)[1], short, samples[number]["labels"])

    first = whole(0)[0]
    weights = {}
    for layer, f in first.items():
        for name, shape in (("inner", (HIDDEN, f.shape[1])), ("outer", (2, HIDDEN))):
            drawn = torch.nn.init.xavier_uniform_(torch.empty(shape), generator=order)
            weights[f"{name}.{layer}"] = drawn.to(f.device).requires_grad_()
    optimiser = torch.optim.Adam(weights.values(), lr)
    with torch.enable_grad(), trange(steps, desc="routers", mininterval=1) as progress:
        for _ in progress:
            number = int(torch.randint(len(samples), (), generator=order))
            layer = [*first][int(torch.randint(len(first), (), generator=order))]
            f = whole(number)[0][layer].float()
            loss = F.cross_entropy(routed(f, *router(weights, layer)), label(number, layer))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def answered(session: Session, sample: Mapping[str, Any], method: Method) -> Answered:
    inputs, labels = {n: v for n, v in sample.items() if n != "labels"}, sample["labels"][:, 1:]
    logits = session.forward(inputs, [method]).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.mT, labels, reduction="none")  # 0 where there is no label
    return Answered(logits.argmax(-1), losses.sum(1) / (labels != -100).sum(1))


def exits(whole: Answered, short: Answered, labels: Tensor) -> Tensor:
    """1 for samples that answer without visual tokens as they do with them, 0 for others: (batch,)."""
    there = labels[:, 1:] != -100
    same = ((whole.likeliest == short.likeliest) & there).sum(1) / there.sum(1)
    return ((same > AGREE) & (short.loss < LOSS * whole.loss)).long()
