"""AHM against slices of the output projection, sorted scores, and a head that speaks of nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run
from zoo.base import noise

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.ahm import AHM, auroc, fpr95, greedy, mahalanobis, nearest, separability

from .shared import Inputs, two

EXAMPLE = {"heads": (1,)}

HEADS = 4
NOISY = 2
"""The head of the last layer that is given noise."""


# ---- the mask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llava", "gpt2"])
def test_masking_a_head_is_zeroing_its_slice_of_the_output_projection(name: str) -> None:
    model, inputs = shared(name), two(family(name))
    with sc.attach(model) as session:
        *_, last = [s for s in session.sites if s.kind == "self"]
    with sc.attach(model, AHM(heads={last.name: (1, 3)})):
        got = run(model, inputs)
    cut = family(name).build()
    module = cut.get_submodule(last.path)
    projection = next(
        m for n, m in module.named_modules() if n in ("o_proj", "c_proj", "out_proj", "output.dense", "o")
    )
    width = projection.weight.shape[0 if name == "gpt2" else 1] // HEADS
    with torch.no_grad():
        for head in (1, 3):
            columns = slice(head * width, (head + 1) * width)
            (projection.weight[columns] if name == "gpt2" else projection.weight[:, columns]).zero_()
    assert_close(got, run(cut, inputs), atol=1e-5, rtol=1e-5)
    assert (got - run(model, inputs)).abs().max() > 1e-2


def test_without_masked_heads_features_and_scores_are_the_models() -> None:
    model, batch = shared("vit"), pictures(6, 0)
    bare = run(model, batch)
    with sc.attach(model, AHM(heads=())) as session:
        assert torch.equal(run(model, batch), bare)
        features = AHM(heads=()).states(session, [batch])
        plain = AHM().states(session, [batch], [])
    assert torch.equal(features, plain)
    assert torch.equal(nearest(features, features, 2), nearest(plain, plain, 2))


def test_features_are_the_states_of_a_token_behind_the_last_layer() -> None:
    model, inputs = shared("llama"), two(family("llama"))
    with torch.no_grad():
        states: list[Tensor] = []
        hook = model.model.layers[-1].register_forward_hook(lambda _, __, out: states.append(out))
        model(**inputs)
        hook.remove()
    real = inputs["attention_mask"].bool()
    with sc.attach(model) as session:
        for token in ("first", "last", "all"):
            got = AHM(token=token).states(session, [{**inputs, "label": torch.zeros(2)}])
            for sample in (0, 1):
                mine = states[0][sample][real[sample]]
                wanted = {"first": mine[0], "last": mine[-1], "all": mine.mean(0)}[token]
                assert_close(got[sample], wanted, atol=1e-5, rtol=1e-5)


# ---- the numbers --------------------------------------------------------------------------------------


def scores() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    known = (torch.randn(43, generator=drawn) * 4).round()  # with draws
    return known, (torch.randn(37, generator=drawn) * 4 + 2).round()


def test_auroc_and_fpr95_are_those_of_sorted_scores() -> None:
    known, strange = scores()
    area = sum((s > i) + 0.5 * (s == i) for s in strange.tolist() for i in known.tolist()) / (43 * 37)
    assert auroc(known, strange) == pytest.approx(area)
    for passing in sorted(known.tolist()):  # the first threshold that lets 95% of the known ones in
        if sum(k <= passing for k in known.tolist()) >= 0.95 * 43:
            break
    assert fpr95(known, strange) == pytest.approx(sum(s <= passing for s in strange.tolist()) / 37)
    assert auroc(known, known) == 0.5 and fpr95(known, known + 100) == 0


def test_distances_are_those_by_hand() -> None:
    known, features = noise(12, 3, seed=1), noise(5, 3, seed=2)
    labels = torch.arange(12) % 2
    got = nearest(known, features, 3)
    for sample, x in enumerate(features):
        far = sorted(float((x / x.norm() - y / y.norm()).norm()) for y in known)
        assert float(got[sample]) == pytest.approx(far[2], abs=1e-5)
    means = [known[labels == c].mean(0) for c in (0, 1)]
    spread = (
        sum(torch.outer(y - means[c], y - means[c]) for y, c in zip(known, labels.tolist(), strict=True)) / 12
    )
    wanted = [min(float((x - m) @ torch.linalg.inv(spread) @ (x - m)) for m in means) for x in features]
    assert_close(mahalanobis(known, labels, features), torch.tensor(wanted), atol=1e-3, rtol=1e-3)


def test_separability_is_the_mean_cosine_within_less_that_across() -> None:
    features, labels = noise(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
    within, across = [], []
    for i in range(6):
        for j in range(i):
            cosine = float(features[i] @ features[j] / features[i].norm() / features[j].norm())
            (within if labels[i] == labels[j] else across).append(cosine)
    wanted = sum(within) / len(within) - sum(across) / len(across)
    assert separability(features, labels) == pytest.approx(wanted, abs=1e-5)


def test_greedy_scores_never_fall_and_it_stops_where_none_rises() -> None:
    worth = {("a", 0): 3.0, ("a", 1): -1.0, ("b", 0): 1.0, ("b", 1): 2.0}

    def score(chosen: dict[str, tuple[int, ...]]) -> float:
        return sum(worth[s, h] for s, heads in chosen.items() for h in heads)

    assert greedy(list(worth), score, 9) == ({"a": (0,), "b": (1, 0)}, [0, 3, 5, 6])
    assert greedy(list(worth), score, 2) == ({"a": (0,), "b": (1,)}, [0, 3, 5])


# ---- a head that speaks of nothing --------------------------------------------------------------------


def pictures(count: int, seed: int, classes: tuple[int, ...] = (0, 1, 2)) -> Inputs:
    """Pictures that are nearly their class', one of each in turn."""
    label = torch.tensor([classes[i % len(classes)] for i in range(count)])
    means = torch.stack([noise(3, 48, 48, seed=100 + c) for c in range(6)])
    return {"pixel_values": means[label] + 0.7 * noise(count, 3, 48, 48, seed=seed), "label": label}


@contextmanager
def noisy(model: nn.Module) -> Iterator[None]:
    """What a head of the last layer reads is drawn anew for every picture."""
    value = [m for n, m in model.named_modules() if n.endswith(("value", "v_proj"))][-1]

    def draw(_: nn.Module, args: tuple[Tensor], v: Tensor) -> Tensor:
        v = v.clone().unflatten(-1, (HEADS, -1))
        v[:, :, NOISY] += 8 * noise(len(v), 1, v.shape[-1], seed=len(v))
        return v.flatten(-2)

    hook = value.register_forward_hook(draw)
    try:
        yield
    finally:
        hook.remove()


def unlabelled(batch: Inputs) -> Inputs:
    return {"pixel_values": batch["pixel_values"]}


def test_a_noisy_head_is_switched_off_and_strange_pictures_stand_out() -> None:
    model, last = shared("vit"), "vision.2.self"
    known, more, strange = pictures(30, 1), pictures(33, 2), pictures(36, 3, (3, 4, 5))
    with noisy(model), sc.attach(model) as session:
        off = AHM(most=1, sites=last).calibrate(session, [known])[last]
        assert off.nonzero()[:, 0].tolist() == [NOISY]
        masked, rates = AHM(heads={last: (NOISY,)}), {}
        said = run(model, unlabelled(more))
        for name, methods in (("bare", []), ("masked", [masked])):
            train, inside, outside = (masked.states(session, [b], methods) for b in (known, more, strange))
            rates[name] = fpr95(nearest(train, inside, 3), nearest(train, outside, 3))
        assert torch.equal(run(model, unlabelled(more)), said)  # classes are told without it
    assert rates["masked"] < rates["bare"] - 0.2


def test_a_calibration_is_found_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_HOME", str(tmp_path))
    model, last, more = shared("vit"), "vision.2.self", unlabelled(pictures(33, 2))
    with noisy(model), sc.attach(model) as session:
        session.calibrate(AHM(most=1, sites=last), [pictures(30, 1)])
        answers = []
        for method in (AHM(calibrated=True, sites=last), AHM(heads={last: (NOISY,)})):
            with sc.attach(model, method):
                answers.append(run(model, more))
    assert torch.equal(*answers)


def test_samples_without_labels_are_refused() -> None:
    with sc.attach(shared("vit")) as session, pytest.raises(InputError, match="label"):
        AHM().calibrate(session, [unlabelled(pictures(3, 0))])
