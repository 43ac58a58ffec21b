"""Reading beside learning: measures by hand, and both done again with the models' own modules and copies."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import outputs_of, shared, unchanged
from torch import Tensor
from torch.testing import assert_close
from zoo.base import words

import saccade as sc
from saccade import cli
from saccade.core.errors import InputError, OptionError
from saccade.probes.icl_meta_optimizer import (
    Example,
    ICLMetaOptimizer,
    compare,
    dual,
    learned,
    momentum,
    momentum_attention,
    rec2ftp,
    sim_am,
    sim_aou,
    tau,
)
from saccade.stack import Stack

EXAMPLE: dict[str, Any] = {"steps": 2, "tasks": 1, "shots": 2}
DOUBLE = torch.float64
MODELS_HERE = ("llama", "gpt2")
RATE = 0.05


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ---- the dual form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS_HERE)
def test_linear_attention_to_demonstrations_is_a_change_of_weights(name: str) -> None:
    with sc.attach(shared(name, DOUBLE)) as session:
        matrices = session.matrices("text.1.self")
    w_k, w_v = matrices.k[0].T, matrices.v[0].T  # (dim, width)
    shown, own, q = noise(5, w_k.shape[1]), noise(3, w_k.shape[1], seed=1), noise(len(w_k), seed=2)
    alone, update = dual(w_k, w_v, shown, own)
    expected = sum((w_v @ x) * ((w_k @ x) @ q) for x in (*shown, *own))
    assert_close(alone @ q + update @ q, expected, atol=1e-6, rtol=0)
    assert_close(alone @ q, sum((w_v @ x) * ((w_k @ x) @ q) for x in own))


# ---- measures ----------------------------------------------------------------------------------------------


def test_the_similarity_of_updates_is_one_where_learning_is_reading() -> None:
    icl, zsl = noise(3, 8), noise(3, 8, seed=1)
    assert_close(sim_aou(icl, icl, zsl), torch.ones(3).double())


def test_the_similarity_of_updates_is_that_of_directions_whatever_the_lengths() -> None:
    icl, ft, zsl = noise(3, 8), noise(3, 8, seed=1), noise(3, 8, seed=2)
    found = sim_aou(icl, ft, zsl)
    for layer in range(3):
        a, b, c = (t[layer] / t[layer].square().sum().sqrt() for t in (icl, ft, zsl))
        x, y = a - c, b - c
        assert_close(found[layer], (x @ y) / math.sqrt((x @ x) * (y @ y)))
    scales = torch.tensor([[0.1], [3.0], [70.0]]).double()
    assert_close(sim_aou(scales * icl, scales.flip(0) * ft, 2 * scales.roll(1, 0) * zsl), found)


def test_the_similarity_of_scores_is_a_mean_over_heads() -> None:
    a, b = noise(1, 2, 3), noise(1, 2, 3, seed=1)
    each = [(x @ y) / math.sqrt((x @ x) * (y @ y)) for x, y in zip(a[0], b[0], strict=True)]
    assert_close(sim_am(a, b), (sum(each) / 2)[None])


def test_recall_of_what_learning_put_right_is_a_count_and_may_be_undefined() -> None:
    alone = torch.tensor([0, 0, 0, 1, 0, 1]).bool()
    learning = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    reading = torch.tensor([1, 0, 1, 1, 1, 1]).bool()
    assert rec2ftp(alone, learning, reading) == 2 / 3
    assert rec2ftp(alone, alone, reading) is None
    assert rec2ftp(alone, learning, ~learning) == 0


def test_the_rank_correlation_is_that_of_pairs() -> None:
    a, b = noise(2, 7), noise(2, 7, seed=1)
    for row in range(2):
        signs = [
            math.copysign(1, (a[row, i] - a[row, j]) * (b[row, i] - b[row, j]))
            for i in range(7)
            for j in range(i)
        ]
        assert float(tau(a, b)[row]) == pytest.approx(sum(signs) / len(signs))
    assert tau(a, 2 * a + 1).tolist() == [1, 1]


# ---- momentum ----------------------------------------------------------------------------------------------


def test_momentum_is_a_sum_of_the_values_before_and_learnable() -> None:
    v, eta = noise(2, 3, 6, 4), torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    found = momentum(v, eta)
    for t in range(6):
        expected = sum((0.7 ** (t - i) * v[..., i, :] for i in range(t)), torch.zeros(2, 3, 4).double())
        assert_close(found[..., t, :].detach(), expected)
    (slope,) = torch.autograd.grad(found[..., 3, :].sum(), eta)
    assert_close(slope, sum((3 - i) * 0.7 ** (2 - i) * v[..., i, :].sum() for i in range(3)))


def test_without_momentum_it_is_ordinary_attention_and_it_is_always_causal() -> None:
    q, k, v = (noise(1, 2, 6, 4, seed=seed) for seed in range(3))
    scores = (q @ k.mT / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    assert_close(momentum_attention(q, k, v, 0.0), scores.softmax(-1) @ v)
    changed = v.clone()
    changed[..., 4, :] += 1
    before, after = (momentum_attention(q, k, some, 0.5) for some in (v, changed))
    assert torch.equal(before[..., :4, :], after[..., :4, :])
    assert (before[..., 5, :] != after[..., 5, :]).all()


# ---- in models ---------------------------------------------------------------------------------------------


def examples(count: int, seed: int) -> list[Example]:
    return [Example(tuple(row[:3]), row[3]) for row in words(count, 4, seed).tolist()]


SHOTS, QUERIES, BEGIN = examples(3, 1), examples(2, 2), (7,)


def attentions(model: Any) -> list[Any]:
    if hasattr(model, "transformer"):
        return [block.attn for block in model.transformer.h]
    return [layer.self_attn for layer in model.model.layers]


def trained(name: str) -> Any:
    """A copy after a pass of descent over the demonstrations, on keys and values alone."""
    model = copy.deepcopy(shared(name, DOUBLE))
    for shot in SHOTS:
        model.zero_grad()
        ids = torch.tensor([[*BEGIN, *shot.question, shot.answer]])
        (-model(ids).logits[0, -2].log_softmax(-1)[shot.answer]).backward()
        with torch.no_grad():
            for attention in attentions(model):
                if name == "gpt2":  # queries, keys and values beside each other
                    width = attention.c_attn.weight.shape[0]
                    attention.c_attn.weight[:, width:] -= RATE * attention.c_attn.weight.grad[:, width:]
                    attention.c_attn.bias[width:] -= RATE * attention.c_attn.bias.grad[width:]
                else:
                    for linear in (attention.k_proj, attention.v_proj):
                        linear.weight -= RATE * linear.weight.grad
    return model


def told(model: Any, ids: list[int]) -> tuple[Tensor, int]:
    """What attention gives at the last token (layers, width), and the likeliest token."""
    gave: list[Tensor] = []
    hooks = [
        a.register_forward_hook(lambda _, __, out: gave.append(out[0][0, -1])) for a in attentions(model)
    ]
    with torch.no_grad():
        said = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    for hook in hooks:
        hook.remove()
    return torch.stack(gave), said


@pytest.mark.parametrize("name", MODELS_HERE)
def test_it_compares_as_the_modules_of_a_trained_copy_do(name: str) -> None:
    model, after = shared(name, DOUBLE), trained(name)
    asked = [QUERIES[0], QUERIES[1]._replace(answer=told(after, [*BEGIN, *QUERIES[1].question])[1])]
    with unchanged(model), sc.attach(model) as session:
        found = compare(session, SHOTS, asked, start=BEGIN, rate=RATE)
    shown = [token for shot in SHOTS for token in (*shot.question, shot.answer)]
    expected, right = [], []
    for query in asked:
        alone, read = [*BEGIN, *query.question], [*BEGIN, *shown, *query.question]
        zsl, ft, icl = told(model, alone), told(after, alone), told(model, read)
        expected.append(sim_aou(icl[0], ft[0], zsl[0]))
        right.append([said == query.answer for _, said in (zsl, ft, icl)])
    assert_close(found.table.values[:, 0], (expected[0] + expected[1]) / 2)
    assert found.right.tolist() == right and found.right[1, 1]
    assert found.table.values.isfinite().all() and found.table.values[:, 1:].abs().max() < 1


def test_scores_and_queries_are_those_of_the_modules() -> None:
    """Of GPT-2, which does not turn them, layer by layer, for one demonstration and one query."""
    model, shot, query = shared("gpt2", DOUBLE), SHOTS[0], QUERIES[0]

    def made(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gave = outputs_of(model, lambda: model(torch.tensor([ids])))
        made = torch.stack([out[0] for path, out in gave if path.endswith("c_attn")])
        q, k, _ = made.view(4, len(ids), 3, 4, -1).unbind(2)  # (layers, tokens, heads, dim)
        return q.transpose(1, 2), k.transpose(1, 2)

    with sc.attach(model) as session:
        found = compare(session, [shot], [query], start=BEGIN, rate=0.0).table.values
    alone = made(model, [*BEGIN, *query.question])
    read = made(model, [*BEGIN, *shot.question, shot.answer, *query.question])
    learning = made(model, [*BEGIN, *shot.question, shot.answer])
    scores = [(q[:, :, -1:] @ k.mT)[:, :, 0] for q, k in (alone, read)]
    own = sim_am(torch.cat([scores[1][..., :1], scores[1][..., -3:]], -1), scores[0])
    assert_close(found[:, 2], own)  # nothing was learned at that rate
    assert_close(found[:, 2], found[:, 3])
    similar = (learning[0][:, :, 1:] * alone[0][:, :, -1:]).sum(-1).mean(1)
    assert_close(found[:, 4], tau(scores[1][..., 1:5].mean(1), similar))


@pytest.mark.parametrize("name", MODELS_HERE)
def test_what_was_learned_is_forgotten_also_when_it_fails(name: str) -> None:
    model = copy.deepcopy(shared(name)).requires_grad_(False)
    with unchanged(model), sc.attach(model) as session, pytest.raises(ZeroDivisionError):
        before = copy.deepcopy(model.state_dict())
        with learned(session, SHOTS, BEGIN, RATE):
            changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
            parts = ("c_attn",) if name == "gpt2" else ("k_proj", "v_proj")
            assert changed and all(any(part in n for part in parts) for n in changed)
            raise ZeroDivisionError
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_compared_is_refused() -> None:
    with sc.attach(shared("llama")) as session, pytest.raises(InputError, match="nothing to compare"):
        compare(session, [], QUERIES)
    with pytest.raises(OptionError, match="4 demonstrations"):
        ICLMetaOptimizer(keys=3, shots=4)


# ---- the finding -------------------------------------------------------------------------------------------


def test_what_is_asked_again_is_what_is_known() -> None:
    made = ICLMetaOptimizer(keys=5, answers=3, shots=2)
    ids, known = made.sequences(20, torch.Generator().manual_seed(0))
    for row, where in zip(ids.tolist(), known.tolist(), strict=True):
        seen: dict[int, int] = {}
        for at in range(1, len(row), 2):
            assert where[at : at + 2] == [False, row[at] in seen]
            assert seen.setdefault(row[at], row[at + 1]) == row[at + 1]
        assert len(seen) <= 2


def test_it_runs_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(Stack([ICLMetaOptimizer(**EXAMPLE)]))]) == 0
    out = capsys.readouterr().out
    assert "Rec2FTP" in out and "SimAOU" in out


@pytest.mark.slow
def test_reading_changes_attention_as_learning_does() -> None:
    """In a small model that looks up what it has read: nearer to learning than to a random direction."""
    found = ICLMetaOptimizer(tasks=12).run()
    assert found.right[:, 2].double().mean() > 0.9
    assert found.right[:, 0].double().mean() < 0.4
    similar, random = (found.table.at(**{"": name}).values for name in ("SimAOU", "random"))
    assert (similar > random + 0.1).all()
    assert similar.mean() > 0.3
    assert found.rec2ftp is not None and found.rec2ftp > 0.9
