"""Find the heads that copy text out of a picture.

    e_h(w) = |longest run of the answer that was written| / |answer|     where, in the row of the answer's word w,
             the key of the prompt that h attends to most shows a part of the answer's box; 0 elsewhere
    S_h    = mean of e_h over the words of the answer that were written

OCR heads have S_h >= 0.1, and e_h > 0 in a tenth of the events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.heads import Heads
from saccade.core.method import option
from saccade.core.record import Recording
from saccade.core.recorder import Record
from saccade.probes._parts.scored import Scored, best, shown


@dataclass(eq=False)
class OCRHeads(Scored):
    """`session.results["ocr_heads"]` is a table of heads with an event for every word; of many pictures,
    `Heads.joined(tables).reaching(0.1, often=0.1)` are the OCR heads."""

    card = Card(
        slug="ocr_heads",
        name="OCR heads",
        kind="method",
        family="probes",
        form="probe",
        target="vlm",
        paper="How Do Large Vision-Language Models See Text in Image? Unveiling the Distinctive Role of OCR Heads "
        "(Baek et al., 2025)",
        summary="Which heads copy written text out of a picture into the answer",
        needs=("image",),
        code="baekingeol/OCR_Head",
        choices=(
            "The row of a word is the one in which it is read, as in the release; predicting=true takes the row "
            "that says it.",
            "OCR heads are above zero in a tenth of the events; the release counts the zeros.",
            "Only what was written is compared with the answer; the release compares the prompt too.",
            "Without an answer every written word counts; without a box the whole picture does.",
        ),
        tags=("ocr", "text in images", "document", "retrieval heads", "head scores"),
    )

    answer: tuple[int, ...] = option((), "ids of the text that is asked for; none: all that is written")
    box: tuple[float, ...] | None = option(
        None, "where it stands in the picture: x0, y0, x1, y1; none: anywhere"
    )
    predicting: bool = option(False, "take the row that says a word, not the one in which it is read")

    def recorder(self) -> Record:
        return Record(sites=self.sites, columns="prompt", reduce="topk(1)")

    def judge(self, seen: Recording, sample: int) -> list[Tensor]:
        assert seen.ids is not None
        ids, start = seen.ids[sample].cpu(), seen.answer_start
        rows, attended = best(seen, sample)
        read = torch.isin(attended, shown(seen, sample, self.box).nonzero()[:, 0])  # (sites, heads, rows)
        words = rows + self.predicting
        written = (words >= start) & (words < len(ids))
        if self.answer:
            written &= torch.isin(ids[words.clamp_max(len(ids) - 1)], torch.tensor(self.answer))
        part = longest_run(self.answer, ids[start:].tolist()) / len(self.answer) if self.answer else 1.0
        return [*(read[..., written] * part).unbind(-1)]


def longest_run(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest sequence of neighbours that is in both."""
    longest, row = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0, *(row[j] + 1 if x == y else 0 for j, y in enumerate(b))]
        longest = max(longest, *row)
    return longest


def likeness(a: Heads, b: Heads) -> tuple[float, float]:
    """Of two tables, such as of OCR heads and of retrieval heads: Jaccard's index of the heads that reach 0.1, and
    the cosine of all scores."""
    mine, theirs = ({(s, h) for s, heads in table.reaching(0.1).items() for h in heads} for table in (a, b))
    cosine = torch.cosine_similarity(a.scores.flatten(), b.scores.flatten(), 0)
    return len(mine & theirs) / max(1, len(mine | theirs)), float(cosine)
