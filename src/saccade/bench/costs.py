"""What an answer costs, as counted beside a stack, and by how much its time can differ from another's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from saccade.core.cost import Count
from saccade.core.errors import AttachError, InputError
from saccade.core.session import attach
from saccade.evals.asking import answers
from saccade.evals.task import Sample

Counted = dict[str, Any]


def counted(model: Any, processor: Any, sample: Sample, max_new_tokens: int) -> tuple[Counted, str | None]:
    """Of a sample that is asked alone, under what is attached, and what was said; or why it cannot be counted."""
    try:
        with attach(model, Count()) as session:
            (said,) = answers(model, processor, [sample], max_new_tokens=max_new_tokens)
    except (AttachError, InputError) as e:
        return {"refused": e.problem}, None
    found = session.results["Count"]
    return {
        "visual": fmean(found["prefill"].visual.values()),  # tokens, over the layers of the decoder
        "flops": {phase: cost.flops.total() for phase, cost in found.items()},
        "bytes": {phase: cost.read.total() for phase, cost in found.items()},
    }, str(said)


def seconds(counts: Iterable[Counted], roofline: Mapping[str, float]) -> float:
    """That a machine needs at least, its arithmetic or its memory being the limit of each phase."""
    return sum(
        max(count["flops"][phase] / roofline["flops"], count["bytes"][phase] / roofline["bytes"])
        for count in counts
        for phase in count["flops"]
    )
