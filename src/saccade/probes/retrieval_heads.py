"""Find the heads that copy a needle out of a long context.

    g_h = { w written : the key that h attends to most, in the row that predicts w, lies in the needle and is w }
    S_h = |g_h & k| / |k|                       k: the needle's words, each once

A mean over the samples whose answer has more than half of the needle. Heads above 0.1 are retrieval heads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import option
from saccade.core.record import Recording
from saccade.core.recorder import Record
from saccade.probes._parts.scored import Scored, best

ALIKE = 0.9  # of the needle's words, for a place to be the needle's: its first word may be cut otherwise


@dataclass(eq=False)
class RetrievalHeads(Scored):
    """`session.results["retrieval_heads"]` is a table of heads with an event for every sample that was
    answered; join those of many lengths, depths and needles: `Heads.joined(tables).reaching(0.1)`."""

    card = Card(
        slug="retrieval_heads",
        name="Retrieval heads",
        kind="method",
        family="probes",
        form="probe",
        target="llm",
        paper="Retrieval Head Mechanistically Explains Long-Context Factuality (Wu et al., 2024)",
        summary="Which heads copy a sentence out of a long context into the answer",
        code="nightdessert/Retrieval_Head",
        choices=(
            "A word counts once, as in the paper; the release adds 1/|k| for every hit (raw=true).",
            "The needle is the place that has most of its words; the release takes the first with nine in ten.",
            "Recall is counted over ids, not over stemmed words.",
            "Without a needle the whole prompt is one, and every sample counts.",
        ),
        headline="fewer than 5% of heads; 12 heads always active in Llama-2 7B",
        tags=("long context", "needle in a haystack", "copying", "induction", "head scores", "factuality"),
    )

    needle: tuple[int, ...] = option((), "ids of the phrase that is looked for; none: the whole prompt")
    recall: float = option(0.5, "share of the needle that an answer must exceed to count", low=0, high=1)
    raw: bool = option(False, "count every hit, repeats too")

    def recorder(self) -> Record:
        return Record(sites=self.sites, reduce="topk(1)")

    def judge(self, seen: Recording, sample: int) -> list[Tensor]:
        assert seen.ids is not None
        ids, rows_best = seen.ids[sample].cpu(), best(seen, sample)
        place = seen.layouts[0].where("prompt")[sample].cpu().nonzero()[:, 0]
        place = place[find(ids[place], self.needle)] if self.needle else place
        rows, attended = rows_best
        known = rows + 1 < len(ids)  # a forward does not say what its last row predicts
        said = ids[rows[known] + 1]
        if self.needle and recalled(said, ids[place]) <= self.recall:
            return []
        return [score(attended[..., known], said, ids, place, self.raw)]


def score(attended: Tensor, said: Tensor, ids: Tensor, place: Tensor, raw: bool = False) -> Tensor:
    """(sites, heads), from the positions attended to most (sites, heads, rows), the words that these rows said
    (rows,), all ids, and the needle's positions in them."""
    hits = torch.isin(attended, place) & (ids[attended] == said)
    if raw:
        return hits.sum(-1) / len(place)
    words = ids[place].unique()
    return torch.stack([(hits & (said == word)).any(-1) for word in words]).float().mean(0)


def find(ids: Tensor, needle: tuple[int, ...]) -> Tensor:
    """Positions of the needle."""
    words = torch.tensor(needle).unique()
    if len(ids) >= len(needle):
        windows = ids.unfold(0, len(needle), 1)  # (places, words)
        alike = (windows[:, :, None] == words).any(1).float().mean(1)
        if alike.max() > ALIKE:
            return alike.argmax() + torch.arange(len(needle))
    raise InputError(f"The needle {needle} is not in the prompt.", "give its ids as they are in the prompt")


def recalled(said: Tensor, needle: Tensor) -> float:
    """Share of the needle's words that were said, each as often as it was."""
    return (Counter(needle.tolist()) & Counter(said.tolist())).total() / len(needle)
