"""Layers trained on linear regression, and formulas against loops and sequences drawn by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from saccade import cli
from saccade.core.errors import OptionError
from saccade.probes.icl_linear_multihead import (
    Findings,
    ICLLinearMultihead,
    Layer,
    Sequences,
    attended,
    best_mu,
    closed_form,
    descent,
    ridge,
)
from saccade.stack import Stack

EXAMPLE: dict[str, Any] = {"heads": (1, 2), "steps": 20, "tests": 256, "batch": 32}
D, NOISE = 5, 0.1


def drawn(count: int, length: int, dtype: torch.dtype = torch.double, seed: int = 0) -> Sequences:
    """By the definition, without the experiment."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, length + 1, D, generator=random, dtype=dtype)
    beta = torch.randn(count, D, 1, generator=random, dtype=dtype) / math.sqrt(D)
    y = x @ beta + math.sqrt(NOISE) * torch.randn(count, length + 1, 1, generator=random, dtype=dtype)
    return Sequences(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])


def built(omega: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """KQ and OV of heads that look by x alone, and say labels alone."""
    kq, ov = torch.zeros(len(omega), D + 1, D + 1).to(omega), torch.zeros(len(mu), D + 1, 1).to(mu)
    for head in range(len(omega)):
        for coordinate in range(D):
            kq[head, coordinate, coordinate] = omega[head]
        ov[head, D, 0] = mu[head]
    return kq, ov


# ---- formulas --------------------------------------------------------------------------------------------


def test_a_layer_attends_as_a_loop_over_its_matrices_does_and_not_to_its_query() -> None:
    layer = Layer(2, D, 1, torch.Generator().manual_seed(0)).double()
    some = drawn(3, 7)
    expected = torch.zeros(3, 1, dtype=torch.double)
    for row in range(3):
        query = torch.cat([some.query[row], torch.zeros(1).double()])
        for head in range(2):
            z = torch.cat([some.x[row], some.y[row]], -1)
            logits = torch.stack([(query @ layer.q[head]) @ (one @ layer.k[head]) for one in z]) / math.sqrt(
                6
            )
            values = torch.stack([one @ layer.v[head] for one in z])
            expected[row] += (logits.exp() / logits.exp().sum()) @ values @ layer.o[head]
    assert_close(layer(some), expected)


def test_a_small_pair_of_heads_is_a_step_of_descent_on_centred_labels() -> None:
    """To O(omega^2) of the step: half of omega, a quarter of the difference."""
    some, mu = drawn(500, 40), torch.tensor([1.0, -1.0]).double()
    missed = []
    for omega in (0.02, 0.01, 0.005):
        said = attended(some, *built(omega * torch.tensor([1.0, -1.0]).double(), mu))
        x, y = some.x, some.y[..., 0]
        centred = (y - y.mean(1, keepdim=True))[..., None] * x
        step = 2 * omega / 40 * (centred.sum(1) * some.query).sum(-1)
        missed.append(float((said[:, 0] - step).norm() / step.norm()))
    assert missed[0] < 0.05
    assert missed[1] / missed[0] == pytest.approx(0.25, rel=0.05)
    assert missed[2] / missed[1] == pytest.approx(0.25, rel=0.05)


def test_descent_and_ridge_are_those_of_loops() -> None:
    some = drawn(4, 12)
    for row in range(4):
        x, y, query = some.x[row], some.y[row, :, 0], some.query[row]
        assert_close(descent(some)[row, 0], sum(y[i] * (x[i] @ query) for i in range(12)) / 12)
        mean = y.sum() / 12
        expected = sum((y[i] - mean) * (x[i] @ query) for i in range(12)) / 12
        assert_close(descent(some, centred=True)[row, 0], expected)
        beta = torch.linalg.inv(x.T @ x + NOISE * D * torch.eye(D).double()) @ x.T @ y
        said = ridge(some, NOISE, (tuple(range(D)),))
        assert_close(said[row, 0], (query @ beta).float())


@pytest.mark.parametrize("length", [40, 400])
@pytest.mark.parametrize("omega", [(0.2, -0.2), (0.1, -0.1), (0.2, -0.1)])
def test_the_closed_form_is_the_loss_of_such_heads(omega: tuple[float, ...], length: int) -> None:
    heads = torch.tensor(omega)
    mu = best_mu(heads, D, length, NOISE)
    some = drawn(6000, length, torch.float32)
    squares = (attended(some, *built(heads, mu)) - some.label).square()
    loss = float(closed_form(heads, mu, D, length, NOISE))
    assert abs(float(squares.mean()) - loss) < 0.1 * loss + 3 * float(squares.std()) / math.sqrt(6000)


def test_no_other_mu_has_a_smaller_loss() -> None:
    omega = torch.tensor([0.2, -0.2, 0.1]).double()
    mu = best_mu(omega, D, 40, NOISE)
    least = closed_form(omega, mu, D, 40, NOISE)
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = mu + 0.1 * torch.randn(3, generator=random, dtype=torch.double)
        assert closed_form(omega, other, D, 40, NOISE) > least


# ---- what is drawn ---------------------------------------------------------------------------------------


def test_coordinates_are_correlated_and_labels_depend_on_their_own() -> None:
    made = ICLLinearMultihead(d=3, rho=0.5, supports=((0, 1), (2,)), noise=0.0)
    some = made.drawn(4000, 10, torch.Generator().manual_seed(0))
    x = some.x.flatten(0, 1)
    expected = torch.tensor([[1, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 1]])
    assert_close(x.T @ x / len(x), expected, atol=0.03, rtol=0)
    assert some.y.shape == (4000, 10, 2) and some.label.shape == (4000, 2)
    beta = torch.linalg.lstsq(some.x, some.y).solution  # without noise it is found exactly
    assert_close(beta[:, 2, 0], torch.zeros(4000), atol=1e-3, rtol=0)
    assert_close(beta[:, :2, 1], torch.zeros(4000, 2), atol=1e-3, rtol=0)
    assert_close(beta.square().sum(1).mean(0), torch.ones(2), atol=0.1, rtol=0)


def test_what_cannot_be_drawn_is_refused() -> None:
    for wrong in ({"heads": ()}, {"heads": (0,)}, {"supports": ((0, 5),)}, {"supports": ((),)}):
        with pytest.raises(OptionError, match="ICLLinearMultihead"):
            ICLLinearMultihead(**wrong)


# ---- training --------------------------------------------------------------------------------------------


def test_the_seed_decides_everything() -> None:
    one, same, other = (ICLLinearMultihead(**EXAMPLE, seed=seed).run() for seed in (3, 3, 4))
    assert repr(one) == repr(same) != repr(other)


def test_labels_of_their_own_coordinates_are_learned_too() -> None:
    options = {"heads": (2,), "d": 3, "supports": ((0, 1), (1, 2)), "rho": 0.3, "batch": 64, "tests": 2000}
    before, after = (ICLLinearMultihead(**options, steps=steps).run().near for steps in (1, 150))
    assert after["ridge"].mean < after["2 heads"].mean < 0.8 * before["2 heads"].mean


def worse(found: Findings, one: str, other: str) -> float:
    """In standard errors of the difference, as if the errors were drawn apart."""
    a, b = found.near[one], found.near[other]
    return (a.mean - b.mean) / math.hypot(a.deviation, b.deviation)


def beside(said: Tensor, step: Tensor) -> float:
    """The share of what is said that no size of this step explains."""
    size = (said * step).sum() / step.square().sum()
    return float((said - size * step).square().mean() / said.square().mean())


def test_it_runs_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(Stack([ICLLinearMultihead(**EXAMPLE)]))]) == 0
    out = capsys.readouterr().out
    assert "ridge" in out and "2 heads: omega" in out


@pytest.mark.slow
def test_trained_heads_pair_up_into_descent_on_centred_labels() -> None:
    found = ICLLinearMultihead(heads=(1, 2, 4), steps=2500).run()
    pair = found.layers[2]
    assert pair.beside().max() < 0.1
    assert abs(pair.omega.sum()) < 0.1 * pair.omega.max() and pair.omega.prod() < 0
    assert pair.ov[:, :D].abs().max() < 0.1 * pair.mu.abs().max()
    for heads in (2, 4):
        assert found.layers[heads].unbalanced() < 0.1
    four = found.layers[4]  # of which two say nearly all
    loud = four.mu[:, 0].abs() > 0.5 * four.mu.abs().max()
    assert four.beside()[loud].max() < 0.1
    assert worse(found, "1 head", "2 heads") > 10
    assert worse(found, "2 heads", "4 heads") < 3
    assert worse(found, "2 heads", "ridge") > 10
    some = drawn(4000, 40, torch.float32)
    plain, centred = (beside(pair(some), descent(some, kind)) for kind in (False, True))
    assert centred < 0.05
    assert centred < 0.5 * plain
    for heads in ("1 head", "2 heads", "4 heads"):
        near, far = found.near[heads], found.far[heads]
        assert far.mean < near.mean + 3 * math.hypot(near.deviation, far.deviation)
