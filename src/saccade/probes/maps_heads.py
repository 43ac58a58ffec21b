"""Read from a head's parameters which words it maps to which.

    M_h = E' W_v W_o U        E' = MLP_0(LN_0(E)), in layer 0 the embeddings E themselves;  U: the unembedding
    S_h = share of the pairs (s, t) for which t is among the k largest entries of row s of M_h

With suppress, of -M_h. A head implements an operation, such as country to capital, whose S_h is above 0.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.heads import Heads
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run

if TYPE_CHECKING:
    from saccade.core.seams.projections import Matrices

COPIED = 500  # words of which copying is asked, where nothing else is


@dataclass(eq=False)
class MAPSHeads(Method):
    """`session.results["maps_heads"]` is a table of heads with an event for every pair."""

    card = Card(
        slug="maps_heads",
        name="MAPS",
        kind="method",
        family="probes",
        form="probe",
        target="llm",
        paper="Inferring Functionality of Attention Heads from their Parameters (Elhelo and Geva, 2024)",
        summary="Which heads implement an operation on words, read from their parameters alone",
        code="amitelhelo/MAPS",
        choices=(
            "Where a model keeps its matrices is seen once, in a forward of four words; scores are of parameters.",
            "Without pairs it asks for copying, of 500 words spread over the vocabulary.",
        ),
        headline="20 operations across 6 LLMs",
        tags=("parameters", "OV circuit", "operations", "relations", "suppression", "head scores"),
    )

    pairs: tuple[tuple[int, int], ...] = option((), "ids (source, target), 30 and more; none: copying")
    k: int = option(10, "of the largest entries: 1 for copying; of Llama 3 the paper takes 25 and 3", low=1)
    suppress: bool = option(False, "count what is suppressed")
    first_mlp: bool = option(True, "pass embeddings through the first MLP, for layers above it")
    sites: Sites = option("text.*.self", "layers whose heads are scored")

    def end(self, run: Run) -> Heads:
        model: Any = run.runtime.model
        words = model.get_input_embeddings().weight.detach()
        copied = torch.arange(len(words))[:: max(1, len(words) // COPIED)]
        sources, targets = (
            torch.tensor(self.pairs) if self.pairs else torch.stack([copied, copied], 1)
        ).unbind(1)
        raw, made = words[sources.to(words.device)], None
        sites = run.matching(self.sites_of("end"))
        hits = []  # of every site: (heads, pairs)
        for site in sites:
            if made is None and self.first_mlp and site.layer > 0:
                made = run.mlp(f"{site.tower}.0.mlp", raw)
            rows = mapped(raw if made is None else made, run.matrices(site.name), run.unembed)
            hits.append(torch.stack([hit(-row if self.suppress else row, targets, self.k) for row in rows]))
        return Heads(
            self.card.slug, tuple(site.name for site in sites), torch.stack(hits).movedim(2, 0).float()
        )


def mapped(x: Tensor, matrices: Matrices, unembed: Callable[..., Tensor]) -> Iterator[Tensor]:
    """For every head, the rows of M that the words' states (words, width) give: (words, vocabulary)."""
    bias = unembed(torch.zeros_like(x[:1]), norm=False)
    for head, out in enumerate(matrices.o):
        yield unembed(x @ matrices.value(head) @ out, norm=False) - bias


def hit(rows: Tensor, targets: Tensor, k: int) -> Tensor:
    """Whether each row (words, vocabulary) has its target, equals counted, among the k largest: (words,), bool."""
    return ((rows >= rows.gather(1, targets[:, None].to(rows.device))).sum(-1) <= k).cpu()


def salient(
    x: Tensor, matrices: Matrices, head: int, unembed: Callable[..., Tensor], words: int = 30, k: int = 5
) -> tuple[Tensor, Tensor]:
    """What a head does to a vocabulary's states (vocabulary, width): ids of the words that it makes largest, and
    of those that it maps each to: (words,), (words, k)."""
    growth = (x @ matrices.value(head) @ matrices.o[head]).norm(dim=-1) / x.norm(dim=-1)
    ids = growth.topk(words).indices
    return ids, [*mapped(x[ids], matrices, unembed)][head].topk(k).indices
