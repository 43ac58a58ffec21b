"""Follow attention through the layers back to the input.

    A_l = (W_l + I) / 2                      W_l: weights averaged over heads; I: the residual stream
    rollout   R_1 = A_1,  R_l = A_l R_{l-1}
    flow      of input j to output i: the maximum flow from (L, i) to (0, j), the edge (l, i) - (l-1, j)
              having capacity A_l[i, j]

Rollout mixes what it meets on the way; flow asks how much could get through at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from networkx.algorithms.flow import edmonds_karp
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Run


@dataclass(eq=False)
class AttentionRollout(Method):
    """`session.results["attention_rollout"]` is, by tower, the relevance (batch, tokens, tokens) of every
    input token for every position; a list of them where the tower takes pictures one by one."""

    card = Card(
        slug="attention_rollout",
        name="Attention rollout and flow",
        kind="method",
        family="probes",
        form="probe",
        target="any-transformer",
        paper="Quantifying Attention Flow in Transformers (Abnar and Zuidema, 2020)",
        summary="How much each input token reaches each position, through all layers",
        code="samiraabnar/attention_flow",
        choices=(
            "W is averaged over heads; the release also takes the maximum.",
            "A decoder's causal mask is kept, and decoding steps are left out: the map is the prompt's.",
        ),
        tags=("attention map", "relevance", "interpretability", "rollout", "max flow", "explain"),
    )

    sites: Sites = option("*.self", "layers that are followed")
    phases: tuple[str, ...] = option(("prefill",), "passes that are followed")

    def observe(self, call: AttentionCall) -> None:
        if call.site.index is None:
            raise InputError(
                f"{call.site.name} stands beside the layers and cannot be followed through them.",
                f"narrow with sites='{call.site.tower}.:.self'",
            )
        w = call.weights(heads=self.heads_at(call.site)).mean(1)  # (batch, tokens, tokens)
        calls = call.run.state.setdefault(call.site.tower, {}).setdefault(call.site.index, [])
        calls.append(with_residual(w))

    def end(self, run: Run) -> dict[str, Tensor | list[Tensor]] | None:
        relevance = {
            tower: [rollout(matrices) for matrices in zip(*(layers[i] for i in sorted(layers)), strict=False)]
            for tower, layers in run.state.items()
        }
        return {tower: found[0] if len(found) == 1 else found for tower, found in relevance.items()} or None


def with_residual(w: Tensor) -> Tensor:
    """Half attention, half the stream that passes by it."""
    return 0.5 * w + 0.5 * torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)


def rollout(matrices: Sequence[Tensor]) -> Tensor:
    """Product of the layers' matrices (..., tokens, tokens), the first layer's last."""
    sizes = {m.shape[-1] for m in matrices}
    if len(sizes) > 1:
        raise InputError(
            f"The layers see {', '.join(map(str, sorted(sizes)))} tokens: there is no way through.",
            "narrow with sites= to layers that see the same tokens",
        )
    relevance = matrices[0]
    for matrix in matrices[1:]:
        relevance = matrix @ relevance
    return relevance


def flow(matrices: Sequence[Tensor], outputs: Sequence[int], normalise: bool = True) -> Tensor:
    """Maximum flow of every input to the given outputs of one sample: (outputs, tokens).

    The matrices are (tokens, tokens), from the first layer to the last. One max-flow for each pair of
    tokens: for short inputs.
    """
    tokens = matrices[0].shape[-1]
    graph = nx.DiGraph()
    for layer, matrix in enumerate(matrices):
        for i, row in enumerate(matrix.tolist()):
            for j, capacity in enumerate(row):
                if capacity > 0:
                    graph.add_edge((layer + 1, i), (layer, j), capacity=capacity)
    top = len(matrices)
    flows = torch.zeros(len(outputs), tokens, dtype=torch.float64)
    for at, i in enumerate(outputs):
        for j in range(tokens):
            if (0, j) in graph:
                flows[at, j] = nx.maximum_flow_value(graph, (top, i), (0, j), flow_func=edmonds_karp)
    return flows / flows.sum(1, keepdim=True) if normalise else flows
