"""What a method does to a model's answers, measured head by head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from saccade.core.call import AttentionCall
from saccade.core.method import Method
from saccade.core.session import Session

M = TypeVar("M", bound=Method)
Batch = Mapping[str, Any]
"""Inputs of a forward, with or without `answer`, ids (batch,) of the right next token."""


@torch.no_grad()
def score(session: Session, batches: Sequence[Batch], methods: Sequence[Method]) -> tuple[float, float]:
    """Accuracy and mean probability of the answers; without answers, 0 and minus the mean entropy."""
    right = sure = total = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "answer"}
        p = session.forward(inputs, methods).logits[:, -1].float().softmax(-1)
        total += p.shape[0]
        if (answer := batch.get("answer")) is None:
            sure -= float(torch.special.entr(p).sum())
            continue
        right += float((p.argmax(-1) == answer).sum())
        sure += float(p.gather(1, answer[:, None]).sum())
    return right / total, sure / total


@dataclass(eq=False)
class Count(Method):
    """How many heads every layer has."""

    heads_of: dict[int, int] = field(default_factory=dict)

    def observe(self, call: AttentionCall) -> None:
        self.heads_of[call.site.layer] = call.q.shape[1]


def heads_of(session: Session, batch: Batch, method: Method) -> dict[int, int]:
    """How many heads every layer has in which the method acts."""
    count = Count(sites=method.sites)
    score(session, [batch], [count])
    return count.heads_of


def one_by_one(method: M, heads: Mapping[int, int]) -> Iterator[tuple[int, int, M]]:
    """The method on every head alone: layer, head, method."""
    for layer, count in heads.items():
        for head in range(count):
            yield layer, head, replace(method, sites=f"text.{layer}.self", heads=(head,), calibrated=False)  # type: ignore[call-arg]
