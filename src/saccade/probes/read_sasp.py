"""Take from a segmentation model the places that its <SEG> token is similar to, as points that prompt SAM.

    m_i = h_i . s               h: last states of the picture's tokens; s: the last state that says <SEG>
    points, of m at half its resolution, from 0 to 1: cells of at least 0.8, the highest first (label 1); cells of
             at most 0.2, the lowest first (label 0); then the others (label -1)
    x~  = sum_u u p_u e^(-|u - x|^2) / sum_u p_u e^(-|u - x|^2)        u: pixels; p: softmax of m over them

The soft points x~ carry gradients to the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.boxes import picture_boxes
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.passes import HiddenCall, Run
from saccade.core.question import Answer, Question
from saccade.core.session import Session, attach
from saccade.core.system import option
from saccade.core.words import find, pieces, words
from saccade.probes._parts.asked import tokenizer_of

REACH = 8  # pixels around a point; further away e^(-81) is left

Region = tuple[float, float, float, float]  # x0, y0, x1, y1 in the picture


@dataclass(eq=False)
class ReadSASP(Driver):
    """`answer.found["read_sasp"]` is a `Similar`. Of a model that was not trained to segment, any word of its answer
    stands for <SEG>."""

    card = Card(
        slug="read_sasp",
        name="READ",
        kind="driver",
        family="probes",
        form="probe",
        target="segmentation vlm with a <SEG> token (LLaVA + SAM, LISA-like)",
        paper="Reasoning to Attend: Try to Understand How <SEG> Token Works (Qian et al., 2024)",
        summary="Where in the picture a <SEG> token, or another word of the answer, is similar to, as points for SAM",
        needs=("image",),
        code="rui-qian/READ",
        choices=(
            "The state that says <SEG> is the one before it, as in the release.",
            "Where the map lies in the picture is asked of the processor; the release takes the middle square.",
            "The map is brought to the picture's size in one step; the release goes over 336 pixels.",
            "Points prompt any SAM of transformers; the projected state of <SEG> beside them, and training, are "
            "left out.",
        ),
        headline="none",
        tags=("segmentation", "SEG token", "points", "SAM", "similarity map", "grounding"),
    )

    say: str = option("", "the word of the answer whose state is taken, such as <SEG>; none: the first")
    keep: int = option(30, "points, at most; 60 in the 13B release", low=1)
    high: float = option(0.8, "from where cells are positive; 0.6 in the 13B release", low=0, high=1)
    low: float = option(0.2, "up to where cells are negative", low=0, high=1)
    shrink: int = option(2, "how much coarser the map is from which points are taken", low=1)

    def run(self, session: Session, question: Question) -> Answer:
        watch = Watch()
        with attach(session.model, watch):
            answer = question.ask(session)
        states, at, picture = (torch.cat(part) for part in (watch.states, watch.at, watch.picture))
        s = states[at == self._place(question, watch) - 1][0]
        size = question.images[0].size
        boxes = picture_boxes(session.model, question.processor, size)
        if len(boxes) < int(picture.sum()):
            raise InputError("More tokens than the picture's own show it.", "ask about one picture")
        sim, region = gridded(states[picture] @ s, boxes[: int(picture.sum())])
        hard, labels = points(sim, region, size, self.keep, self.high, self.low, self.shrink)
        soft = soften(hard, spread(sim, region, size))
        answer.found["read_sasp"] = Similar(sim, region, size, hard, soft, labels)
        return answer

    def _place(self, question: Question, watch: Watch) -> int:
        """Of the token of the answer that is asked for."""
        if not self.say:
            return watch.start
        spoken = words(pieces(tokenizer_of(question), watch.ids), watch.start)
        found = find(self.say, [word for word in spoken if word.said])
        if not found:
            raise InputError(f"The answer does not say {self.say!r}.", "name a word that it says with say=")
        return found[0]


@dataclass(frozen=True, eq=False, repr=False)
class Similar:
    sim: Tensor  # (rows, columns) of the picture's tokens
    region: Region  # where they lie in the picture
    size: tuple[int, int]  # width and height
    hard: Tensor  # (points, 2) x and y of the cells' middles
    points: Tensor  # (points, 2), softened
    labels: Tensor  # (points,) 1 for positive, 0 for negative, -1 for neither

    @property
    def map(self) -> Tensor:
        """From 0 to 1, over the picture: (height, width)."""
        return spread(self.sim, self.region, self.size)

    @property
    def prompts(self) -> dict[str, list[Any]]:
        """For a processor of SAM, beside the picture."""
        return {"input_points": [[self.points.tolist()]], "input_labels": [[self.labels.tolist()]]}

    def consistency(self, mask: Tensor) -> float:
        """Pearson's correlation with a mask (height, width)."""
        return float(torch.stack([self.map.flatten(), mask.flatten()]).double().corrcoef()[0, 1])

    def __repr__(self) -> str:
        return "\n".join(
            f"{x:7.1f} {y:7.1f}  {label:2}"
            for (x, y), label in zip(self.points.tolist(), self.labels.tolist())
        )


@dataclass(eq=False)
class Watch(Method):
    """The last state of every token, and which of them show the first picture."""

    sites: str = "text.-1.layer"
    at: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    picture: list[Tensor] = field(default_factory=list)
    ids: Sequence[int] = ()
    start: int = 0  # of the answer

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        real = call.rows("all", h)[..., 0]
        self.at.append(call.start + call.spread(real)[0].nonzero()[:, 0].cpu())
        with torch.no_grad():
            self.states.append(call.run.final(h[0, real[0]]).float().cpu())
        self.picture.append(call.rows("image:0", h)[0, real[0], 0].cpu())
        return h

    def end(self, run: Run) -> None:
        assert run.answer is not None
        self.ids, self.start = run.answer[0].tolist(), run.inputs["input_ids"].shape[1]


def gridded(values: Tensor, boxes: Tensor) -> tuple[Tensor, Region]:
    """Values of tokens (tokens,) with boxes (tokens, 4) as (rows, columns), and the part of the picture that they
    cover."""
    placed = boxes.isfinite().all(-1)
    boxes = boxes[placed]
    rows, columns = (len(boxes[:, side].round().unique()) for side in (1, 0))
    if not len(boxes) or rows * columns != len(boxes):
        raise InputError(
            "The picture's tokens stand in no grid.",
            "take a model that reads a picture in one piece, not in tiles",
        )
    low, high = boxes[:, :2].amin(0).tolist(), boxes[:, 2:].amax(0).tolist()
    return values[placed].view(rows, columns), (low[0], low[1], high[0], high[1])


def spread(sim: Tensor, region: Region, size: tuple[int, int]) -> Tensor:
    """A map (rows, columns), from 0 to 1, at the size of the picture, 0 outside of its region: (height, width)."""
    x0, y0, x1, y1 = (round(side) for side in region)
    part = F.interpolate(scaled(sim)[None, None], (y1 - y0, x1 - x0), mode="bilinear")[0, 0]
    return F.pad(part, (x0, size[0] - x1, y0, size[1] - y1))


def points(
    sim: Tensor,
    region: Region,
    size: tuple[int, int],
    keep: int = 30,
    high: float = 0.8,
    low: float = 0.2,
    shrink: int = 2,
) -> tuple[Tensor, Tensor]:
    """Places (points, 2), x and y in whole pixels, and labels (points,)."""
    rows, columns = (side // shrink for side in sim.shape)
    small = scaled(F.interpolate(sim[None, None], (rows, columns), mode="bilinear")[0, 0]).flatten()
    order = small.argsort(stable=True)
    positive = small.argsort(descending=True, stable=True)
    positive, negative = positive[small[positive] >= high], order[small[order] <= low]
    neutral = ((small > low) & (small < high)).nonzero()[:, 0]
    chosen = torch.cat([positive, negative, neutral])[:keep]
    labels = (
        torch.full_like(small, -1, dtype=torch.long)
        .masked_fill(small <= low, 0)
        .masked_fill(small >= high, 1)
    )
    x0, y0, x1, y1 = region
    x = x0 + (chosen % columns + 0.5) * (x1 - x0) / columns
    y = y0 + (chosen // columns + 0.5) * (y1 - y0) / rows
    limits = torch.tensor(size) - 1
    return torch.minimum(torch.stack([x, y], 1).long(), limits), labels[chosen]


def soften(hard: Tensor, full: Tensor) -> Tensor:
    """Every place (points, 2) as the mean of pixels around it, by nearness and by the map (height, width)."""
    found = []
    for x, y in hard.tolist():
        left, top = max(0, x - REACH), max(0, y - REACH)
        near = full[top : y + REACH + 1, left : x + REACH + 1]
        down = torch.arange(top, top + near.shape[0], dtype=full.dtype)
        across = torch.arange(left, left + near.shape[1], dtype=full.dtype)
        w = torch.exp(near - (down - y)[:, None] ** 2 - (across - x) ** 2)  # the sum of the softmax cancels
        w = w / w.sum()
        found.append(torch.stack([(w.sum(0) * across).sum(), (w.sum(1) * down).sum()]))
    return torch.stack(found)


def scaled(values: Tensor) -> Tensor:
    """From 0 to 1."""
    low, high = values.amin(), values.amax()  # torch 2.9 does not differentiate aminmax
    if low == high:
        raise InputError(
            "The map is the same everywhere: it shows no place.", "ask about what is in the picture"
        )
    return (values - low) / (high - low)
