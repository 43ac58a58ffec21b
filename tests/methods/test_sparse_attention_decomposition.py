"""Terms, signals and edges against the models' own scores and streams, taken by hooks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as T
from helpers import Look, heads_input, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import enliven, words

import saccade as sc
from saccade.core.errors import InputError
from saccade.probes.sparse_attention_decomposition import (
    Circuit,
    Edge,
    Intervention,
    SparseAttentionDecomposition,
    contributed,
    decompose,
    signal,
)

EXAMPLE: dict[str, Any] = {"weight": 0.1}
MODELS = ("gpt2",)
DOUBLE = torch.float64
TOKENS = 10


@cache
def opt() -> Any:
    config = T.OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=96, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64,
    )  # fmt: skip
    return enliven(T.OPTForCausalLM(config)).double().eval()


def models() -> dict[str, Any]:
    return {"gpt2": shared("gpt2", DOUBLE), "opt": opt()}


def prompt() -> dict[str, Tensor]:
    return {"input_ids": words(1, TOKENS)}


def circuit(model: Any, **options: Any) -> Circuit:
    with sc.attach(model, SparseAttentionDecomposition(**{**EXAMPLE, **options})) as session:
        run(model, prompt())
    return session.results["sparse_attention_decomposition"][0]


def parts(model: Any, layer: int) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Norm of a layer, and W_Q, b_Q, W_K, b_K by head, from GPT-2's or OPT's own parameters."""
    if hasattr(model, "transformer"):
        block = model.transformer.h[layer]
        q, k = (block.attn.c_attn.weight[:, i * 64 : i * 64 + 64] for i in (0, 1))
        qb, kb = (block.attn.c_attn.bias[i * 64 : i * 64 + 64] for i in (0, 1))
        norm = block.ln_1
    else:
        block = model.model.decoder.layers[layer]
        q, k = block.self_attn.q_proj.weight.T, block.self_attn.k_proj.weight.T
        qb, kb = block.self_attn.q_proj.bias, block.self_attn.k_proj.bias
        norm = block.self_attn_layer_norm
    by_head = [w.detach().view(64, 4, 16).transpose(0, 1) for w in (q, k)]
    return norm, by_head[0], qb.detach().view(4, 16), by_head[1], kb.detach().view(4, 16)


def given(model: Any, layer: int) -> Tensor:
    """The stream before a layer: (tokens, width)."""
    with torch.no_grad():
        return model(**prompt(), output_hidden_states=True).hidden_states[layer][0]


# ---- the decomposition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_terms_add_up_to_the_score(name: str) -> None:
    model = models()[name]
    for layer in (0, 2):
        norm, q, qb, k, kb = parts(model, layer)
        x = norm(given(model, layer)).detach()
        h = given(model, layer)
        normal = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        normal = torch.cat([normal, torch.ones(TOKENS, 1, dtype=DOUBLE)], 1)
        for head in range(4):
            folded = [
                (norm.weight.detach()[:, None] * w[head], b[head] + norm.bias.detach() @ w[head])
                for w, b in ((q, qb), (k, kb))
            ]
            found = decompose(*folded[0], *folded[1])
            assert len(found.s) == 16
            made = (x @ q[head] + qb[head]) @ (x @ k[head] + kb[head]).T
            for i, j in ((9, 3), (7, 7), (5, 1)):
                assert_close(found.terms(normal[i], normal[j]).sum(), made[i, j], atol=1e-8, rtol=1e-6)


def test_a_signal_is_the_smallest_set_that_exceeds_the_whole() -> None:
    noise = torch.Generator().manual_seed(0)
    for _ in range(20):
        terms = torch.randn(6, generator=noise, dtype=DOUBLE)
        terms *= terms.sum().sign()  # heads fire on positive scores
        found = terms[signal(terms)]
        larger = [
            c
            for n in range(1, 7)
            for c in itertools.combinations(terms.tolist(), n)
            if sum(c) > float(terms.sum()) + 1e-12
        ]
        if not larger:
            assert len(found) == 6
            continue
        assert len(found) == min(map(len, larger))
        assert found.sum() > terms.sum() >= found.sum() - found.min()
    assert len(signal(torch.tensor([3.0, 2.0, 1.0]))) == 3


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_firings_are_those_of_the_models_own_weights(name: str) -> None:
    model = models()[name]
    eager = shared("gpt2", DOUBLE, "eager") if name == "gpt2" else model
    if name == "opt":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**prompt(), output_attentions=True).attentions
    found = circuit(model)
    made = set()
    for layer, w in enumerate(weights):
        norm, q, qb, k, kb = parts(model, layer)
        x = norm(given(model, layer)).detach()
        scores = torch.stack([(x @ q[h] + qb[h]) @ (x @ k[h] + kb[h]).T for h in range(4)])
        for head, i, j in ((w[0] >= 0.1) & (scores > 0)).nonzero().tolist():
            if j > 0:
                made.add((layer, head, i, j, round(float(scores[head, i, j]), 4)))
    assert (
        made
        and {(f.layer, f.head, f.destination, f.source, round(f.logit, 4)) for f in found.firings} == made
    )
    assert all(0 < len(f.signal) <= 16 for f in found.firings)


# ---- edges -------------------------------------------------------------------------------------------------


def test_contributions_of_all_that_was_written_add_up_to_the_projection() -> None:
    """With the scale of the norm frozen: embeddings, heads, biases and mlps."""
    model = shared("gpt2", DOUBLE)
    blocks, layer, at = model.transformer.h, 3, 7
    h = given(model, layer)
    written = [given(model, 0)[at]]
    for i in range(layer):
        z = heads_input(model, f"transformer.h.{i}.attn.c_proj", lambda: run(model, prompt()))[0][0, at].view(
            4, 16
        )
        w = blocks[i].attn.c_proj.weight.detach().view(4, 16, 64)
        written += [z[head] @ w[head] for head in range(4)] + [blocks[i].attn.c_proj.bias.detach()]
        into = heads_input(model, f"transformer.h.{i}.mlp.c_fc", lambda: run(model, prompt()))[0][0, at]
        written.append(blocks[i].mlp(into[None, None]).detach()[0, 0])
    ways = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    scale = (h[at].var(correction=0) + 1e-5).sqrt()
    total = sum(contributed(o - o.mean(), ways, scale) for o in written)
    normal = (h[at] - h[at].mean()) / scale
    assert total == pytest.approx(float((normal @ ways).sum()), rel=1e-8)


def test_edges_are_the_largest_contributions_that_reach_the_share() -> None:
    model = shared("gpt2", DOUBLE)
    found, whole = circuit(model), circuit(model, share=1.0)
    reader, side = next((e.reader, e.side) for e in found.edges if e.reader.layer == 3)
    norm, q, qb, k, kb = parts(model, 3)
    at = reader.source if side == "source" else reader.destination
    h, head = given(model, 3), reader.head
    folded = [
        (norm.weight.detach()[:, None] * w[head], b[head] + norm.bias.detach() @ w[head])
        for w, b in ((q, qb), (k, kb))
    ]
    u, s, v = decompose(*folded[0], *folded[1])
    scale = (h.var(-1, correction=0) + norm.eps).sqrt()
    x = torch.cat([(h - h.mean(-1, keepdim=True)) / scale[:, None], torch.ones(TOKENS, 1, dtype=DOUBLE)], 1)
    made = {}
    for i in range(3):
        z = heads_input(model, f"transformer.h.{i}.attn.c_proj", lambda: run(model, prompt()))[0][0, at].view(
            4, 16
        )
        w = model.transformer.h[i].attn.c_proj.weight.detach().view(4, 16, 64)
        for n in range(4):
            o = z[n] @ w[n]
            made[i, n] = 0.0
            for term in reader.signal:
                other, mine = (
                    (x[reader.destination] @ u, v) if side == "source" else (x[reader.source] @ v, u)
                )
                sign = torch.sign(other[term])
                made[i, n] += float(sign * s[term].sqrt() * ((o - o.mean()) @ mine[:-1, term]) / scale[at])
    mine = {e.writer: e.contribution for e in found.edges if (e.reader, e.side) == (reader, side)}
    order = sorted(made, key=lambda writer: -made[writer])
    goal, chosen, total = 0.7 * sum(made.values()), [], 0.0
    while total < goal:
        chosen.append(order[len(chosen)])
        total += made[chosen[-1]]
    assert list(mine) == chosen
    for writer in chosen:
        assert mine[writer] == pytest.approx(made[writer], rel=1e-6)
    assert len(whole.edges) >= len(found.edges)


def test_tracing_goes_on_through_the_heads_that_fire() -> None:
    found = circuit(shared("gpt2", DOUBLE))
    fires = {(f.layer, f.head, f.destination) for f in found.firings}
    read = {(e.reader.layer, e.reader.head, e.reader.destination) for e in found.edges}
    through = {(*e.writer, e.token) for e in found.edges} & fires
    last = {place for place in fires if place[2] == TOKENS - 1 and place[0] > 0}
    assert read <= last | through
    assert {place for place in through if place[0] > 0} <= read


def score(model: Any, edge: Edge, *methods: Intervention) -> float:
    """Of the edge's reader, before it is divided."""
    look = Look(lambda call: call.q @ call.k.mT, sites=f"text.{edge.reader.layer}.self")
    with sc.attach(model) as session:
        session.forward(prompt(), [*methods, look])
    return float(look.seen[0][2][0, edge.reader.head, edge.reader.destination, edge.reader.source])


def read_by(model: Any, edge: Edge) -> tuple[Tensor, Tensor]:
    """A query of the edge's reader (dim,), and what makes its key of a part of the stream: (width, dim)."""
    norm, q, qb, k, _ = parts(model, edge.reader.layer)
    h = given(model, edge.reader.layer)
    query = norm(h[edge.reader.destination]).detach() @ q[edge.reader.head] + qb[edge.reader.head]
    scale = (h[edge.reader.source].var(correction=0) + norm.eps).sqrt()
    return query, norm.weight.detach()[:, None] * k[edge.reader.head] / scale


def test_what_the_reader_loses_is_what_was_predicted() -> None:
    """Exactly where it alone loses it; nearly where all do, for the norm's scale changes too."""
    model = shared("gpt2", DOUBLE)
    edge = max((e for e in circuit(model).edges if e.side == "source"), key=lambda e: e.contribution)
    query, key = read_by(model, edge)
    predicted, before = -float(query @ (edge.part @ key)), score(model, edge)
    assert predicted < 0
    assert score(model, edge, Intervention(edge=edge)) - before == pytest.approx(predicted, rel=1e-6)
    assert score(model, edge, Intervention(edge=edge, times=2.0)) - before == pytest.approx(
        -2 * predicted, rel=1e-6
    )
    everywhere = score(model, edge, Intervention(edge=edge, only_reader=False)) - before
    assert everywhere == pytest.approx(predicted, rel=0.5)
    other = next(e for e in circuit(model).edges if e.side == "destination")
    assert score(model, other, Intervention(edge=other)) < score(model, other)


def test_as_many_other_directions_of_a_head_matter_far_less() -> None:
    model = shared("gpt2", DOUBLE)
    lost = torch.zeros(2, dtype=DOUBLE)
    few = [e for e in circuit(model).edges if e.side == "source" and len(e.reader.signal) < 8]
    for edge in sorted(few, key=lambda e: -e.contribution)[:8]:
        i, head = edge.writer
        into = heads_input(model, f"transformer.h.{i}.attn.c_proj", lambda: run(model, prompt()))[0][
            0, edge.token
        ]
        o = into.view(4, 16)[head] @ model.transformer.h[i].attn.c_proj.weight.detach().view(4, 16, 64)[head]
        norm, q, qb, k, kb = parts(model, edge.reader.layer)
        gamma, beta = norm.weight.detach(), norm.bias.detach()
        folded = [(gamma[:, None] * w[edge.reader.head], b[edge.reader.head] + beta @ w[edge.reader.head])
                  for w, b in ((q, qb), (k, kb))]  # fmt: skip
        v = decompose(*folded[0], *folded[1]).v[:-1]
        others = [n for n in range(16) if n not in edge.reader.signal][: len(edge.reader.signal)]
        basis = torch.linalg.qr(v[:, others]).Q
        change = basis @ (basis.T @ (o - o.mean())) @ read_by(model, edge)[1]
        before = score(model, edge)
        for place, intervention in enumerate((edge, replace(edge, change=change))):
            lost[place] += abs(score(model, edge, Intervention(edge=intervention)) - before)
    assert lost[0] > 3 * lost[1] > 0


# ---- what is refused ---------------------------------------------------------------------------------------


def test_rotated_heads_are_refused() -> None:
    with (
        sc.attach(shared("llama"), SparseAttentionDecomposition()),
        pytest.raises(InputError, match="RMSNorm"),
    ):
        run(shared("llama"), family("llama").inputs())
    with (
        sc.attach(shared("falcon"), SparseAttentionDecomposition()),
        pytest.raises(InputError, match="changed"),
    ):
        run(shared("falcon"), family("falcon").inputs())


def test_padding_changes_nothing() -> None:
    model = shared("gpt2", DOUBLE)
    padded = {
        "input_ids": torch.nn.functional.pad(prompt()["input_ids"], (3, 0)),
        "attention_mask": torch.tensor([[0] * 3 + [1] * TOKENS]),
        "position_ids": torch.tensor([[0] * 3 + [*range(TOKENS)]]),
    }
    with sc.attach(model, SparseAttentionDecomposition(**EXAMPLE)) as session:
        run(model, padded)
    found, alone = session.results["sparse_attention_decomposition"][0], circuit(model)
    assert [f[:4] for f in found.firings] == [f[:4] for f in alone.firings]
    assert [(e.writer, e.side) for e in found.edges] == [(e.writer, e.side) for e in alone.edges]
    assert repr(found).splitlines()[0] == repr(alone).splitlines()[0]
