"""Test-time registers against a tower that is given a longer sequence by hand, and on a planted outlier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import heads_input, method, shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import FAMILIES, family, run

import saccade as sc
from saccade.core import calibration
from saccade.core.errors import InputError
from saccade.steering.test_time_registers import Registers, loudest, moved

from .lockstep import model_of, sample
from .measured import home, keep

DOUBLE = torch.float64
WIDTHS = {"vit": 64, "dinov2": 128, "llava": 64}
MODELS = tuple(WIDTHS)
for name, neurons in WIDTHS.items():
    keep("test_time_registers", (name,), lambda _, draw, width=neurons: {"scores": draw(3, width)})
EXAMPLE: dict[str, Any] = {"k": 5}
DISCRETE = ("k",)


# ---- the paper, by hooks ---------------------------------------------------------------------------------


@contextmanager
def by_hand(
    model: Any, chosen: list[tuple[int, int]], scale: float, joint: bool = False
) -> Iterator[list[Tensor]]:
    """A token of zeros behind the others from the first layer to the last; what it ends as is noted."""
    with sc.attach(model) as session:
        sites = {site.name: site.module for site in session.sites}
    depth = sum(name.endswith(".layer") for name in sites)
    extra: list[Tensor] = []

    def join(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = args[0]
        return (torch.cat([h, torch.zeros_like(h[:, :1])], 1), *args[1:])

    def leave(_: nn.Module, __: Any, out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        extra.append(h[:, -1])
        return (h[:, :-1], *out[1:]) if isinstance(out, tuple) else h[:, :-1]

    def edit(layer: int) -> Any:
        mine = [neuron for at, neuron in chosen if at == layer]

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            a = args[0].clone()
            for picture in range(len(a)):
                largest = {j: max(args[0][picture, :, j].tolist(), key=abs) for j in mine}
                for j in mine:
                    a[picture, 1:-1, j] = 0
                    a[picture, -1, j] = scale * (max(largest.values(), key=abs) if joint else largest[j])
            return (a,)

        return hook

    hooks = [sites[f"vision.{n}.neurons"].register_forward_pre_hook(edit(n)) for n in range(depth)]
    hooks.append(sites["vision.0.layer"].register_forward_pre_hook(join))
    hooks.append(sites[f"vision.{depth - 1}.layer"].register_forward_hook(leave))
    try:
        yield extra
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("scale", "joint"), [(1.0, False), (0.5, True)])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_the_tower_is_one_with_a_longer_sequence(name: str, scale: float, joint: bool) -> None:
    model = shared(name, DOUBLE)
    inputs = {n: v.double() for n, v in family(name).inputs().items()}  # type: ignore[union-attr]
    scores = calibration.load("test_time_registers", model)["scores"]
    flat = sorted(((float(scores[n, j]), n, j) for n in (0, 1) for j in range(scores.shape[1])), reverse=True)
    chosen = [(n, j) for _, n, j in flat[:6]]
    assert {n for n, _ in chosen} == {0, 1}
    seen: list[Tensor] = []

    def look(call: Any, h: Tensor) -> Tensor:
        seen.append(h[:, call.appended])
        return h

    with sc.attach(
        model, Registers(k=6, scale=scale, joint=joint), method(hidden=look)(sites="vision.-1.layer")
    ):
        got = run(model, inputs)
    with by_hand(model, chosen, scale, joint) as extra:
        made = run(model, inputs)
    assert_close(got, made)
    assert_close(seen[0][:, 0], extra[0])
    assert (got - run(model, inputs)).abs().max() > 1e-3


def test_with_no_neurons_and_a_token_that_nobody_sees_it_is_the_model() -> None:
    for name in ("vit", "dinov2"):
        model = shared(name, DOUBLE)
        inputs = {n: v.double() for n, v in family(name).inputs().items()}  # type: ignore[union-attr]
        bare = run(model, inputs)
        with sc.attach(model, Registers(k=0, visible=False)):
            assert_close(run(model, inputs), bare)
        with sc.attach(model, Registers(k=0)):
            assert (run(model, inputs) - bare).abs().max() > 1e-3


# ---- what is moved, and which ----------------------------------------------------------------------------


def test_activations_are_zero_at_patches_and_the_largest_with_its_sign_at_the_extra_token() -> None:
    a = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
    a[0, 3, 4] = -50.0  # a planted outlier
    patches = torch.tensor([False, *[True] * 5, False])[None, :, None].expand(2, -1, 1)
    mine = torch.tensor([4, 1])
    for joint in (False, True):
        new = moved(a, mine, patches, slice(6, 7), 2.0, joint)
        for j in range(9):
            for picture in range(2):
                if j not in (4, 1):
                    assert torch.equal(new[picture, :, j], a[picture, :, j])
                    continue
                among = a[picture, :, [4, 1] if joint else [j]].flatten().tolist()
                assert new[picture, :, j].tolist() == pytest.approx(
                    [float(a[picture, 0, j]), *[0.0] * 5, 2 * max(among, key=abs)]
                )
        assert new[0, 6, 4] == -100


def test_the_loudest_neurons_of_some_layers() -> None:
    scores = torch.tensor([[1.0, 9.0], [5.0, 2.0], [7.0, 8.0]])
    assert loudest(scores, 2, range(2)).tolist() == [[0, 1], [1, 0]]
    assert loudest(scores, 3, range(1, 3)).tolist() == [[2, 1], [2, 0], [1, 0]]
    assert loudest(scores, 0, range(3)).tolist() == []
    with pytest.raises(InputError, match="There are 2 neurons"):
        loudest(scores, 3, range(1))


def test_a_planted_outlier_is_found_first_and_goes_from_its_patch_to_the_extra_token() -> None:
    model, planted, patch = FAMILIES["vit"].build(), (1, 17), 11
    inputs = FAMILIES["vit"].inputs(batch=1)
    with sc.attach(model) as session:
        sites = {site.name: site for site in session.sites}
    down = sites["vision.1.neurons"].module
    up = next(
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.out_features == 64 and under(model, m, sites)
    )
    place = next(path for path, m in model.named_modules() if m is up)
    x = heads_input(model, place, lambda: run(model, inputs))[0][0]  # (tokens, width)
    others = (x @ x[patch]).index_fill(0, torch.tensor([patch]), -torch.inf)
    own, next_ = float(x[patch] @ x[patch]), float(others.max())
    assert own > next_
    with torch.no_grad():
        up.weight[planted[1]] = 60 * x[patch] / (own - next_)
        up.bias[planted[1]] = (
            -60 * (own + next_) / 2 / (own - next_)
        )  # 30 at the patch, below -30 at the others
        down.weight[:, planted[1]] = 10 * torch.nn.functional.normalize(torch.arange(32.0) - 15.5, dim=0)
    norms: list[Tensor] = []
    watch = method(hidden=lambda call, h: norms.append(h.norm(dim=-1)) or h)(sites="vision.-1.layer")
    with home(), sc.attach(model) as session:
        session.calibrate(Registers(threshold=150), [inputs])
        scores = calibration.load("test_time_registers", model)["scores"]
        assert [int(n) for n in divmod(int(scores.argmax()), scores.shape[1])] == list(planted)
        assert float(scores.max()) == pytest.approx(30, rel=1e-3)
        with sc.attach(model, watch):
            run(model, inputs)
        with sc.attach(model, Registers(k=1, up_to=":67%"), watch):
            run(model, inputs)
        with pytest.raises(InputError, match="no outliers"):
            session.calibrate(Registers(threshold=1e6), [inputs])
    bare, with_it = norms[0][0], norms[1][0]
    assert (bare > 150).nonzero().tolist() == [[patch]]
    assert with_it.shape[0] == bare.shape[0] + 1
    assert (with_it > 150).nonzero().tolist() == [[len(bare)]]


def under(model: nn.Module, module: nn.Module, sites: dict[str, Any]) -> bool:
    """The module is in the layer with number 1."""
    path = next(path for path, m in model.named_modules() if m is module)
    return path.startswith(sites["vision.1.layer"].path + ".")


def test_pictures_without_outliers_do_not_count() -> None:
    model = shared("vit")
    inputs = family("vit").inputs(batch=3)
    seen: dict[str, Tensor] = {}

    def note(call: Any, h: Tensor) -> Tensor:
        seen[call.site.name] = h
        return h

    with sc.attach(model, method(hidden=note)(sites=("vision.*.neurons", "vision.-1.layer"))):
        run(model, inputs)
    norm = seen["vision.2.layer"].norm(dim=-1)
    threshold = float(norm.amax(1).sort().values[0]) + 1e-3  # one picture has none
    expected = torch.zeros(3, 64)
    counted = [p for p in range(3) if bool((norm[p] > threshold).any())]
    assert len(counted) == 2
    for layer in range(3):
        means = [seen[f"vision.{layer}.neurons"][p][norm[p] > threshold].abs().mean(0) for p in counted]
        expected[layer] = sum(means) / 2  # type: ignore[arg-type]
    with sc.attach(model) as session:
        found = Registers(threshold=threshold).calibrate(session, [inputs])["scores"]
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_vision_language_model_sees_as_many_features_as_before() -> None:
    model, inputs = model_of("world/vlm"), sample("world/vlm")
    with home(), sc.attach(model) as session:
        session.calibrate(Registers(threshold=0.0), [inputs])
        with sc.attach(model, Registers(k=20)):
            got = run(model, inputs)
    bare = run(model, inputs)
    assert got.shape == bare.shape and (got - bare).abs().max() > 1e-3
