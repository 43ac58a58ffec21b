"""Heads scored by what a recording shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.heads import Heads
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run
from saccade.core.record import Recording
from saccade.core.recorder import Record

COVERED = 0.1  # of a token's box


@dataclass(eq=False, kw_only=True)
class Scored(Method):
    """Records what it judges heads by, and judges them in the end."""

    sites: Sites = option("text.*.self", "layers whose heads are scored")

    def recorder(self) -> Record:
        raise NotImplementedError

    def judge(self, seen: Recording, sample: int) -> list[Tensor]:
        """What the heads scored in every event of a sample: (sites, heads) each."""
        raise NotImplementedError

    def begin(self, run: Run) -> None:
        run.state["recorder"] = self.recorder()
        run.state["recorder"].begin(run)

    def observe(self, call: AttentionCall) -> None:
        call.run.state["recorder"].observe(call)

    def end(self, run: Run) -> Any:
        seen: Recording = run.state["recorder"].end(run)
        if not seen.parts:
            return None
        if seen.ids is None:
            raise InputError(f"{type(self).__name__} looks for words, and was given none.", "pass input_ids")
        judged = [self.judge(seen, sample) for sample in range(len(seen.ids))]
        return self.table(seen, [event for events in judged for event in events])

    def table(self, seen: Recording, events: list[Tensor]) -> Any:
        names, heads = tuple(site.name for site in seen.sites), seen.parts[0].weights.shape[1]
        return Heads(
            self.card.slug, names, torch.cat([torch.zeros(0, len(names), heads), *(e[None] for e in events)])
        )


def best(seen: Recording, sample: int) -> tuple[Tensor, Tensor]:
    """Positions of the rows, and those that each head attends to most in them: (rows,), (sites, heads, rows)."""
    found = seen.map(sample=sample)
    return torch.tensor(found.labels["row"]), torch.tensor(found.labels["column"])[found.tensor.argmax(-1)]


def shown(seen: Recording, sample: int, box: Sequence[float] | None) -> Tensor:
    """Which tokens of the conversation show a picture, or more than a sliver of a box in it: (tokens,), bool."""
    layout = seen.layouts[0]
    image = layout.where("image")[sample].cpu()
    if box is None:
        return image
    boxes, whole = layout.boxes[sample].cpu().double(), torch.tensor(box, dtype=torch.double)
    if not boxes[image].isfinite().any():
        raise InputError(
            "The tokens of the picture have no boxes.",
            "session.locate(processor, images), before the model runs",
        )
    sides = (torch.minimum(boxes[:, 2:], whole[2:]) - torch.maximum(boxes[:, :2], whole[:2])).clamp_min(0)
    return image & (sides.prod(1) > COVERED * (boxes[:, 2:] - boxes[:, :2]).prod(1))
