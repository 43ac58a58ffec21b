"""Turn the attention to the first token up or down, and with it the sharpness of all the rest.

    a_0 <- gamma * a_0 / D,    a_i <- a_i / D,    D = (gamma - 1) * a_0 + 1

which is a bias of log(gamma) on the first token's score: it stays on the fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import OptionError
from saccade.core.method import Method, Sites, option
from saccade.core.session import Session
from saccade.steering._parts.profiling import heads_of, one_by_one, score

GAMMAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@dataclass(eq=False)
class ZeroTuning(Method):
    card = Card(
        slug="zerotuning",
        name="ZeroTuning",
        kind="method",
        family="steering",
        form="method",
        target="llm",
        paper="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without "
        "Training (Han et al., 2025)",
        summary="Scale the attention to the first token, head by head",
        needs=("first_token",),
        neutral={"gamma": 1.0},
        code="FeijiangHan/ZeroTuning",
        choices=(
            "The exact bias on the score, not the scaled key that is offered for fused kernels.",
            "A head whose accuracy moves neither way is classed by the probability of the answers.",
            "With unlabelled samples, accuracy is replaced by less entropy of the next token.",
        ),
        headline="Llama-3.1-8B: +11.71% classification, +2.64% QA, multi-turn 7.804 to 7.966",
        tags=("attention sink", "initial token", "head profiling", "sharpen", "classification"),
    )

    gamma: float = option(1.5, "factor on the first token's weight; 1 changes nothing, above it flattens")
    sites: Sites = option("text.*.self", "layers")
    calibrated: bool = option(False, "take heads and gamma from a calibration of this model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise OptionError(f"gamma={self.gamma} has no logarithm.", "use a factor above 0")

    def bias(self, call: AttentionCall) -> Tensor | None:
        gamma, heads = self.gamma, self._heads(call)
        if self.calibrated:
            gamma = float(call.run.calibration()["gamma"])
        if gamma == 1 or not heads.any():
            return None
        return math.log(gamma) * (call.columns("first") & heads.view(1, -1, 1, 1)).to(call.q.dtype)

    def _heads(self, call: AttentionCall) -> Tensor:
        """(heads,), bool"""
        count = call.q.shape[1]
        if self.calibrated:
            return call.run.calibration()["heads"][call.site.layer].to(call.q.device)
        chosen, heads = torch.zeros(count, dtype=torch.bool, device=call.q.device), self.heads_at(call.site)
        chosen[list(range(count) if heads is None else heads)] = True
        return chosen

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are inputs of a forward, with or without `answer`, ids (batch,) of the right next token.

        One head at a time is scaled up and down; the larger class of heads is kept, and gamma is taken from a
        grid that contains 1.
        """
        batches = [dict(sample) for sample in samples]
        counts = heads_of(session, batches[0], self)
        effect = torch.zeros(max(counts) + 1, max(counts.values()), 2)
        for layer, head, one in one_by_one(self, counts):
            up, down = (score(session, batches, [replace(one, gamma=gamma)]) for gamma in (2.0, 0.5))
            effect[layer, head] = torch.tensor(up) - torch.tensor(down)
        lean = torch.where(effect[..., 0] != 0, effect[..., 0], effect[..., 1])
        keep_up = (lean > 0).sum() >= (lean < 0).sum()
        heads = lean > 0 if keep_up else lean < 0

        def tuned(gamma: float) -> list[Method]:
            chosen = {layer: tuple(heads[layer].nonzero()[:, 0].tolist()) for layer in counts}
            here = replace(self, gamma=gamma, calibrated=False)
            return [replace(here, sites=f"text.{layer}.self", heads=h) for layer, h in chosen.items() if h]

        best = max(GAMMAS, key=lambda gamma: (score(session, batches, tuned(gamma)), -abs(math.log(gamma))))
        return {"heads": heads, "gamma": torch.tensor(best), "effect": effect}
