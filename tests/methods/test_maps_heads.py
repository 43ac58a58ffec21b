"""MAPS against the whole map of a head, multiplied out from the models' own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.heads import Heads
from saccade.core.seams.projections import Matrices
from saccade.probes.maps_heads import MAPSHeads, hit, mapped, salient

from .copier import WORDS, copier

EXAMPLE: dict[str, Any] = {"pairs": ((100, 101), (102, 103)), "k": 3}
IDS = {"input_ids": torch.tensor([[3, 5, 7]])}


def table(model: Any, **options: Any) -> Heads:
    with sc.attach(model, MAPSHeads(**options)) as session:
        run(model, IDS)
    return session.results["maps_heads"]


def whole_maps(name: str) -> list[list[Tensor]]:
    """M of every head of every layer: (vocabulary, vocabulary), in float64."""
    model = shared(name, torch.float64)
    embedded, u = model.get_input_embeddings().weight, model.lm_head.weight.T
    maps = []
    for layer in range(4):
        if name == "llama":
            block = model.model.layers[0]
            made = block.mlp(block.post_attention_layernorm(embedded))
            a = model.model.layers[layer].self_attn
            v, o = a.v_proj.weight.view(2, 16, 64).repeat_interleave(2, 0), a.o_proj.weight.view(64, 4, 16)
        else:
            block = model.transformer.h[0]
            made = block.mlp(block.ln_2(embedded))
            a = model.transformer.h[layer].attn
            v, o = a.c_attn.weight[:, 128:].T.view(4, 16, 64), a.c_proj.weight.T.view(64, 4, 16)
        e = made if layer else embedded
        maps.append([(e @ v[h].T @ o[:, h].T @ u).detach() for h in range(4)])
    return maps


@pytest.mark.parametrize("suppress", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_share_of_pairs_in_the_largest_entries_of_the_whole_map(name: str, suppress: bool) -> None:
    """Two heads of llama share their values. No forward of the model is made for it, when it is known where
    the matrices are."""
    noise = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 512, (40, 2), generator=noise)
    model = shared(name, torch.float64)
    probe = MAPSHeads(pairs=tuple(map(tuple, pairs.tolist())), k=60, suppress=suppress)
    with sc.attach(model, probe) as session:
        run(model, IDS)
        passes = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
        run(model, IDS)
        hook.remove()
    assert len(passes) == 1
    for layer, maps in enumerate(whole_maps(name)):
        for head, m in enumerate(maps):
            order = (-m if suppress else m)[pairs[:, 0]].argsort(1, descending=True)
            expected = (order[:, :60] == pairs[:, 1:]).any(1)
            assert torch.equal(session.results["maps_heads"].events[:, layer, head], expected.float())
    assert 0 < session.results["maps_heads"].scores.max() < 1


def test_rows_are_those_of_the_whole_map() -> None:
    model, words = shared("gpt2", torch.float64), torch.tensor([7, 300, 41])
    embedded = model.get_input_embeddings().weight
    with sc.attach(model) as session:
        x = session.mlp("text.0.mlp", embedded)[words]
        found = [*mapped(x, session.matrices("text.2.self"), session.unembed)]
    for row, m in zip(found, whole_maps("gpt2")[2], strict=True):
        assert_close(row, m[words])


def test_a_head_whose_values_go_out_as_they_came_copies_with_tied_embeddings() -> None:
    words = tuple((word, word) for word in range(1, WORDS))
    found = table(copier(), pairs=words, k=1, first_mlp=False)
    assert found.scores.tolist() == [[0, 0], [1, 0]]
    assert found.reaching(0.15) == {"text.1.self": (0,)}


@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])
def test_a_planted_map_scores_on_its_pair_and_its_negative_on_suppression(scale: float) -> None:
    """W_v W_o of head 1 becomes scale * e_s^T e_t: whatever the scale. Its negative puts t last."""
    model, s, t = copier(), 4, 17
    attention = model.transformer.h[1].attn
    with torch.no_grad():
        value, out = attention.c_attn.weight[:, 96 + 24 :], attention.c_proj.weight[24:]
        value[s, 0], out[0, t] = scale, 1
    for sign, suppress in ((1, False), (-1, True)):
        with torch.no_grad():
            out[0, t] = sign
        scores = [
            table(model, pairs=((s, t),), k=1, first_mlp=False, suppress=way).scores[1, 1]
            for way in (suppress, not suppress)
        ]
        assert scores == [1, 0]


def test_without_pairs_it_asks_for_copying() -> None:
    found = table(copier(), k=1, first_mlp=False)
    assert found.events.shape == (WORDS, 2, 2)
    assert found.scores[1, 0] == 1


def test_salient_words_are_those_that_grow_most() -> None:
    noise = torch.Generator().manual_seed(0)
    x, v, o, u = (
        torch.randn(*size, generator=noise) for size in ((50, 12), (2, 12, 3), (2, 3, 12), (12, 50))
    )
    matrices = Matrices(v, v, v, o)
    ids, targets = salient(x, matrices, 1, lambda h, norm: h @ u, words=6, k=3)
    moved = x @ v[1] @ o[1]
    growth = [float(moved[i].norm() / x[i].norm()) for i in range(50)]
    assert ids.tolist() == sorted(range(50), key=lambda i: -growth[i])[:6]
    assert targets.tolist() == [(moved[i] @ u).argsort(descending=True)[:3].tolist() for i in ids]


def test_a_target_counts_among_the_k_largest() -> None:
    rows = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.1], [0.0, 0.0, 0.0]])
    assert hit(rows, torch.tensor([2, 2, 2]), 2).tolist() == [True, False, False]


def test_it_runs_on_a_vision_language_models_words() -> None:
    model = shared("llava")
    with sc.attach(model, MAPSHeads(k=3)) as session:
        run(model, family("llava").inputs())
    assert session.results["maps_heads"].events.shape == (512, 4, 4)
