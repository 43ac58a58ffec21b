"""Many interventions on one prompt, each in a row of its own of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.session import Session

T = TypeVar("T")
Score = Callable[[Tensor], Tensor]  # logits (rows, words) to numbers (rows, ...)


def sweep(
    session: Session,
    inputs: Mapping[str, Any],
    interventions: Sequence[T],
    method: Callable[[Sequence[T]], Method],
    score: Score,
    rows: int,
) -> Tensor:
    """Scores of the next token under each intervention (interventions, ...). `method` makes of as many of them
    as there are rows what does one in each."""
    found = []
    for start in range(0, len(interventions), rows):
        some = interventions[start : start + rows]
        out = session.forward(repeated(inputs, len(some)), [method(some)], last_only=True)
        found.append(score(out.logits[:, -1]))
    return torch.cat(found)


def repeated(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The inputs of one prompt as that many rows: pictures stand one behind the other, as prompts do."""
    if inputs["input_ids"].shape[0] != 1:
        raise InputError(
            f"{inputs['input_ids'].shape[0]} prompts are given, and one at a time is taken apart.",
            "give them one by one",
        )
    return {
        name: torch.cat([value] * times) if isinstance(value, Tensor) and value.ndim else value
        for name, value in inputs.items()
    }
