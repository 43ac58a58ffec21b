"""Learn how the picture looks to answers that are wrong, and subtract what they would say.

    P-         a copy of the projector, trained on -log p(rejected answer) alone;  P+  on that of the chosen one
    logits     (1 + alpha) * f(P+(picture)) - alpha * f(P-(picture)),    where p+ >= beta * max p+

P+ is the model's own projector unless it is trained too. The second prompt is the same, its picture projected by
P-; it is followed beside the first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from saccade.core.branch import Branch
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, option
from saccade.core.passes import Pass, Run
from saccade.core.session import Session
from saccade.steering._parts.contrast import contrast, plausible
from saccade.steering._parts.prompts import answered, with_pictures

SIDES = {"negative": "rejected", "positive": "chosen"}
Weights = Mapping[str, Tensor]


@dataclass(eq=False)
class DCD(Method):
    card = Card(
        slug="dcd",
        name="DCD",
        kind="method",
        family="steering",
        form="tuning",
        target="vlm",
        paper="Decoupling Contrastive Decoding: Robust Hallucination Mitigation in Multimodal Large Language "
        "Models (Chen et al., 2025)",
        summary="Contrast the picture with how it looks through a projector that was trained on wrong answers",
        needs=("image",),
        neutral={"alpha": 0.0, "beta": 0.0},
        trains="light",
        sure="abstract",
        choices=(
            "That the language model is frozen and without adapters, alpha, beta and the learning rate are "
            "reconstructed.",
            "With positive=true both projectors have prompts of their own beside the model's.",
            "Features that a model takes past its projector (deepstack) are not projected anew.",
        ),
        tags=(
            "hallucination",
            "contrastive decoding",
            "preference data",
            "projector",
            "likelihood displacement",
        ),
    )

    alpha: float = option(1.0, "how much of the wrong view is subtracted; 0 changes nothing", low=0)
    beta: float = option(0.1, "least probability of a token, as a share of the likeliest", low=0, high=1)
    positive: bool = option(False, "train a projector on right answers too, and read the picture through it")
    steps: int = option(1000, "of a calibration: steps of Adam, one sample each", low=1)
    lr: float = option(1e-4, "of a calibration: length of a step", low=0)

    def branches(self, run: Run) -> Iterable[Branch]:
        inputs = with_pictures(run)
        if inputs is None:  # nothing but words
            return []
        projector, kept = run.projector(inputs), run.calibration()
        found = []
        for side in self._sides:
            weights = {n.removeprefix(f"{side}."): t for n, t in kept.items() if n.startswith(f"{side}.")}
            if not weights:
                raise InputError(
                    f"The calibration of DCD has no {side} projector.", "calibrate with positive=true"
                )
            other = functools.partial(exchanged, projector, with_weights(projector, weights))
            found.append(Branch(inputs, around=other))
        return found

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        if not branches:
            return base
        wrong, *right = branches
        right_or_own = right[0] if right else base
        return plausible(contrast(right_or_own, wrong, self.alpha), right_or_own, self.beta)

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are inputs of a forward for one prompt about pictures, with `rejected`, ids (tokens,) of a wrong
        answer, and for positive=True with `chosen`, those of a right one."""
        samples = list(samples)
        found: dict[str, Tensor] = {}
        for side in self._sides:
            trained = learned(session, samples, SIDES[side], self.steps, self.lr)
            found |= {f"{side}.{name}": value for name, value in trained.items()}
        return found

    @property
    def _sides(self) -> tuple[str, ...]:
        return tuple(SIDES) if self.positive else ("negative",)


def with_weights(projector: nn.Module, weights: Weights) -> nn.Module:
    """A copy that has other weights, by name, and shares none."""
    given = {
        id(old): nn.Parameter(weights[name].to(old, copy=True), requires_grad=old.requires_grad)
        for name, old in projector.named_parameters()
    }
    return copy.deepcopy(projector, given)


@contextlib.contextmanager
def exchanged(projector: nn.Module, other: nn.Module) -> Iterator[None]:
    """In this thread the other answers in place of the projector."""
    here = threading.get_ident()

    def answer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return other(*args, **kwargs) if threading.get_ident() == here else out

    hook = projector.register_forward_hook(answer, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def learned(
    session: Session, samples: Sequence[Mapping[str, Any]], answer: str, steps: int, lr: float
) -> dict[str, Tensor]:
    """The weights of a copy of the projector that makes these answers likelier; nothing else is trained."""
    if not samples or any(answer not in sample for sample in samples):
        raise InputError(
            f"DCD learns from {answer} answers, and there are samples without.", f"give each {answer}=ids"
        )
    projector = session.projector(samples[0])
    mine = with_weights(projector, dict(projector.named_parameters())).requires_grad_()
    weights = dict(mine.named_parameters())
    optimiser, order = torch.optim.Adam(weights.values(), lr), torch.Generator().manual_seed(0)
    for _ in trange(steps, desc=f"{answer} answers", mininterval=1):
        sample = samples[int(torch.randint(len(samples), (), generator=order))]
        for weight, slope in zip(weights.values(), slopes(session, mine, sample, answer), strict=True):
            weight.grad = slope
        optimiser.step()
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def slopes(session: Session, mine: nn.Module, sample: Mapping[str, Any], answer: str) -> tuple[Tensor, ...]:
    """Of -log p of an answer's tokens, their mean, by the weights of a projector in place of the model's."""
    inputs = {name: value for name, value in sample.items() if name not in SIDES.values()}
    ids = torch.as_tensor(sample[answer], device=inputs["input_ids"].device)
    with torch.enable_grad(), exchanged(session.projector(inputs), mine):
        logits = session.forward(answered(inputs, ids), grad=True).logits[0, -len(ids) - 1 : -1]
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids)
        return torch.autograd.grad(loss, [*mine.parameters()])
