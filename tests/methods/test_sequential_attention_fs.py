"""Gates and what is chosen by them, against masks written by hand and orthogonal matching pursuit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from saccade import cli
from saccade.core.errors import InputError, OptionError
from saccade.reduction.sequential_attention_fs import Gate, SequentialAttentionFS, train
from saccade.stack import Stack

EXAMPLE: dict[str, Any] = {
    "relevant": 3,
    "copies": 1,
    "noise": 6,
    "samples": 200,
    "steps": 60,
    "batch": 32,
    "hidden": 16,
}
DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def linear(features: int) -> nn.Linear:
    made = nn.Linear(features, 1, bias=False, dtype=DOUBLE)
    nn.init.zeros_(made.weight)
    return made


# ---- the gate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [1, 2])
def test_weights_in_the_warm_up_in_every_phase_and_at_the_end(each: int) -> None:
    x, y, gate, network = drawn(50, 9), drawn(50, seed=1), Gate(9, 4, each).double(), linear(9)
    seen: list[tuple[Tensor, Tensor, list[int]]] = []

    def loss() -> Tensor:
        out = gate(torch.eye(9, dtype=DOUBLE)).diagonal().detach()
        seen.append((out, gate.logits.detach().clone(), [*gate.order]))
        return (network(gate(x))[:, 0] - y).square().mean()

    order = train(gate, network, loss, steps=100, rate=0.05)
    assert all(torch.equal(m, torch.ones(9, dtype=DOUBLE)) for m, _, _ in seen[:10])
    phases = 4 // each
    for step, (m, w, chosen) in enumerate(seen[10:]):
        phase = next(p for p in range(phases) if step < round(90 * (p + 1) / phases))
        left = [i for i in range(9) if i not in chosen]
        assert chosen == order[: each * phase] and len(chosen) == each * phase
        assert (m[chosen] == 1).all()
        assert_close(m[left], w[left].exp() / w[left].exp().sum())
        assert m[left].sum() == pytest.approx(1)
    starts = [10, *(10 + round(90 * (p + 1) / phases) for p in range(phases - 1))]
    for start in starts:  # w is anew, and Adam takes its first step, which is as long as its rate
        assert 0 < seen[start][1].abs().max() < 1e-4
        step = seen[start + 1][1] - seen[start][1]
        left = [i for i in range(9) if i not in seen[start][2]]
        assert_close(step[left].abs(), torch.full((len(left),), 0.05, dtype=DOUBLE), rtol=1e-2, atol=0)
    for end, start in zip([s - 1 for s in starts[1:]], starts[1:]):  # the largest, but for a last step
        w, before, after = seen[end][1], seen[end][2], seen[start][2]
        left = sorted((i for i in range(9) if i not in before), key=lambda i: -float(w[i]))
        assert set(after) - set(before) == set(left[:each])
    assert len(set(order)) == 4 and order == gate.order
    assert gate(torch.ones(9)).tolist() == [float(i in order) for i in range(9)]


def test_blocks_and_channels_are_features_too() -> None:
    gate = Gate(3, 2)
    gate.warm = False
    gate.order = [1]
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([1.0, 5.0, 0.0]))
    e = 2.718281828459045
    m = [e / (e + 1), 1.0, 1 / (e + 1)]
    blocks = gate(torch.ones(2, 12))
    assert_close(blocks[1], torch.tensor([m[i // 4] for i in range(12)]))
    pixels = drawn(2, 3, 4, 5).float()
    gate.axis = 1
    assert_close(gate(pixels), torch.stack([m[i] * pixels[:, i] for i in range(3)], 1))


def test_a_permutation_of_columns_permutes_what_is_chosen() -> None:
    x, order = drawn(80, 10), torch.randperm(10, generator=torch.Generator().manual_seed(3))
    y = (x[:, 2] * x[:, 5]).tanh() + x[:, 7] - 0.5 * x[:, 1]

    def chosen(columns: Tensor) -> list[int]:
        class Permuted(Gate):
            def drawn(self) -> Tensor:
                return super().drawn()[columns]

        torch.manual_seed(0)
        gate = Permuted(10, 4).double()
        network = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        with torch.no_grad():
            network[0].weight.copy_(network[0].weight[:, columns])
        part = x[:, columns]
        return train(gate, network, lambda: (network(gate(part))[:, 0] - y).square().mean(), 200, 0.02)

    plain = chosen(torch.arange(10))
    assert [int(order[one]) for one in chosen(order)] == plain
    assert plain != sorted(plain)


# ---- orthogonal matching pursuit -------------------------------------------------------------------------


def pursued(x: Tensor, y: Tensor, count: int) -> list[int]:
    order: list[int] = []
    rest = y
    for _ in range(count):
        fits = [-1.0 if i in order else abs(float(x[:, i] @ rest)) for i in range(x.shape[1])]
        order.append(fits.index(max(fits)))
        part = x[:, order]
        rest = y - part @ torch.linalg.lstsq(part, y[:, None]).solution[:, 0]
    return order


def orthonormal() -> tuple[Tensor, Tensor]:
    x = torch.linalg.qr(drawn(30, 10)).Q
    return x, x @ torch.tensor([0.2, -1.4, 0.6, 1.0, -0.4, 1.8, -2.2, 0, 0.1, 0], dtype=DOUBLE)


def overlapping() -> tuple[Tensor, Tensor]:
    x = drawn(60, 10) + 0.7 * drawn(60, 1, seed=5)
    x = x / x.norm(dim=0)
    return x, x @ torch.tensor([0, 3, 0, -2, 0, 0, 1.2, 0, 0.9, 0], dtype=DOUBLE)


@pytest.mark.parametrize("columns", [orthonormal, overlapping])
def test_the_order_of_penalised_linear_regression_is_that_of_matching_pursuit(columns: Any) -> None:
    """The loss holds w, and the weights of what is not chosen, at 0."""
    x, y = columns()
    y = y + 0.02 * drawn(len(y), seed=7)
    gate, network = Gate(10, 5).double(), linear(10)

    def loss() -> Tensor:
        left = torch.ones(10, dtype=DOUBLE)
        left[gate.order] = 0
        held = (left * (network.weight[0].square() + gate.logits.square())).sum()
        return (network(gate(x))[:, 0] - y).square().sum() + held

    assert train(gate, network, loss, 800, 0.04) == pursued(x, y, 5)
    at_once = (x.T @ y).abs().topk(5).indices.tolist()
    assert (pursued(x, y, 5) == at_once) is (columns is orthonormal)


# ---- the experiment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_what_matters_once_and_one_shot_does_not_find_more(seed: int) -> None:
    made = SequentialAttentionFS(
        relevant=5, copies=3, noise=20, samples=1000, steps=700, batch=64, hidden=32, seed=seed
    )
    given = made.data()
    named = {each: [int(given.origin[i]) for i in made.choose(given, each)] for each in (1, 5)}
    found = {each: len(set(names) - {-1}) for each, names in named.items()}
    assert len(set(named[1])) == 5  # no copy beside what it copies
    assert found[1] == 5 >= found[5]


def test_its_data_is_as_it_says() -> None:
    made = SequentialAttentionFS(relevant=4, copies=2, noise=5, samples=3000)
    x, y, origin = made.data()
    assert sorted(origin.tolist()) == [-1] * 5 + [0, 0, 1, 1, 2, 3]
    first = [origin.tolist().index(one) for one in range(4)]
    for one in range(2):
        a, b = (origin == one).nonzero()[:, 0]
        assert torch.equal(x[:, a], x[:, b])
    missed = y - sum((1 - one / 6) * (2 * x[:, first[one]]).tanh() for one in range(4))
    assert missed.std() == pytest.approx(0.1, rel=0.05)
    noise = x[:, origin == -1]
    assert_close(noise.T @ noise / len(x), torch.eye(5), atol=0.08, rtol=0)


def test_the_seed_decides_and_features_that_matter_leave_a_smaller_error() -> None:
    one, same, other = (SequentialAttentionFS(**EXAMPLE, seed=seed).run() for seed in (3, 3, 4))
    assert repr(one) == repr(same) != repr(other)
    made = SequentialAttentionFS(**{**EXAMPLE, "steps": 300, "rate": 0.01})
    given = made.data()
    noise = (given.origin == -1).nonzero()[:3, 0].tolist()
    matters = [given.origin.tolist().index(n) for n in range(3)]
    assert made.error(given, matters) < 0.2 < 0.9 < made.error(given, noise)
    one.chosen["twice"] = [i for i, origin in enumerate(one.given.origin.tolist()) if origin == 0]
    assert one.recall("twice") == pytest.approx(1 / 3) and one.recall("those that matter") == 1


def test_it_runs_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(Stack([SequentialAttentionFS(**EXAMPLE)]))]) == 0
    out = capsys.readouterr().out
    assert "sequential" in out and "one-shot" in out and "recall" in out


def test_what_cannot_be_chosen_is_refused() -> None:
    for given in ((3, 4), (6, 4, 3), (3, 0), (3, 2, 0)):
        with pytest.raises(OptionError, match="cannot be chosen"):
            Gate(*given)
    with pytest.raises(InputError, match="no blocks of 3"):
        Gate(3, 1)(torch.ones(4))
    with pytest.raises(OptionError, match="too few"):
        train(Gate(9, 9), linear(9), lambda: torch.zeros(()), 5, 0.1)
    with pytest.raises(OptionError, match="can be copied"):
        SequentialAttentionFS(relevant=1, copies=2)
