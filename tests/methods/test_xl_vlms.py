"""Shifts against layers that are moved by hand, concepts against numpy, and matching against all permutations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run
from zoo.base import words

import saccade as sc
from saccade.core import calibration
from saccade.core.errors import InputError
from saccade.steering._parts.concepts import active, assigned, decompose, matched
from saccade.steering.xl_vlms import XLVLMs, recovery, shifts, states, top_words

from .lockstep import DOUBLE, model_of, sample
from .measured import home, keep
from .shared import Inputs, alone, generated, two

keep("xl_vlms", ("llava", "qwen2_5_vl"), lambda _, draw: {"text.3.layer": draw(64)})
EXAMPLE: dict[str, Any] = {}
NAMES = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])


def layers(model: Any) -> nn.ModuleList:
    return model.model.language_model.layers


@contextmanager
def moved(model: Any, s: Tensor, layer: int = -1, start: int = 0, generated: bool = False) -> Iterator[None]:
    """One sample's states in that layer, from a token on, or of single tokens."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        h = (out[0] if isinstance(out, tuple) else out).clone()
        if h.shape[1] == 1:
            h += s
        elif not generated:
            h[:, start:] += s
        return (h, *out[1:]) if isinstance(out, tuple) else h

    handle = layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ---- steering --------------------------------------------------------------------------------------------


@NAMES
def test_the_answer_is_that_of_a_layer_moved_by_hand(name: str) -> None:
    model, inputs = model_of(name), sample(name)
    low, last = (drawn(model.lm_head.in_features, seed=seed) for seed in (1, 2))
    depth = len(layers(model))
    with home():
        kept = {"text.1.layer": low.float(), f"text.{depth - 1}.layer": last.float()}
        calibration.save("xl_vlms-both", model, kept)
        for how in ({}, {"generated": True}, {"start": 7}):
            with sc.attach(model, XLVLMs(shift="both", alpha=0.5, sites="text.1.layer", **how)):
                got = generated(model, inputs)
            with moved(model, 0.5 * low, 1, **how):
                made = generated(model, inputs)
            assert_close(torch.cat(got.logits), torch.cat(made.logits), atol=1e-4, rtol=1e-4)
        with sc.attach(model, XLVLMs(shift="both", alpha=-2)):
            got = run(model, inputs)
    with moved(model, -2 * last):
        assert_close(got, run(model, inputs), atol=1e-4, rtol=1e-4)


def test_tokens_are_counted_without_padding_and_where_some_have_left() -> None:
    model, inputs, s = shared("llava", DOUBLE), two(family("llava"), DOUBLE), drawn(64, seed=1)
    with home():
        calibration.save("xl_vlms", model, {"text.1.layer": s.float()})

        def shift(start: int) -> XLVLMs:
            return XLVLMs(start=start, sites="text.1.layer")

        with sc.attach(model, shift(40)):
            together = torch.stack(generated(model, inputs).logits, 1)
        for row in (0, 1):
            with moved(model, s, 1, start=40):
                single = torch.stack(generated(model, alone(inputs, row)).logits, 1)
            assert_close(together[row], single[0], atol=1e-4, rtol=1e-4)
        one = alone(inputs, 0)
        with sc.attach(model, sc.FasterVLM(keep=0.25)):
            with sc.attach(model, shift(one["input_ids"].shape[1] - 2)):
                got = run(model, one)[0, -1]
            with moved(model, s, 1, start=-2):
                assert_close(got, run(model, one)[0, -1], atol=1e-4, rtol=1e-4)


def prompts(model: Any, count: int) -> list[Inputs]:
    """One picture, other words."""
    one = {n: v.float() if v.is_floating_point() else v for n, v in sample("llava").items()}
    image = one["input_ids"] == model.config.image_token_id
    return [
        {**one, "input_ids": torch.where(image, one["input_ids"], words(1, image.shape[1], seed=n))}
        for n in range(count)
    ]


def test_a_calibrated_shift_raises_the_target_the_more_the_stronger_it_is() -> None:
    model, word = shared("llava"), 200
    every = prompts(model, 12)
    chances = torch.stack([run(model, p)[0, -1].log_softmax(-1)[word] for p in every])
    order = chances.argsort(descending=True).tolist()
    samples = [{**every[n], "target": [word]} for n in order[:4]] + [
        {**every[n], "source": [201]} for n in order[-4:]
    ]
    with home(), sc.attach(model) as session:
        session.calibrate(XLVLMs(), samples)
        kept = calibration.load("xl_vlms", model)["text.3.layer"]
        found = []
        for alpha in (0.0, 0.1, 0.2, 0.4):
            with sc.attach(model, XLVLMs(alpha=alpha)):
                found.append(
                    sum(float(run(model, every[n])[0, -1].log_softmax(-1)[word]) for n in order[4:8])
                )
    assert all(later > sooner for sooner, later in itertools.pairwise(found))
    seen = [predicting(model, every[n], []) for n in order]
    assert_close(kept, torch.stack(seen[:4]).mean(0) - torch.stack(seen[-4:]).mean(0), atol=1e-4, rtol=1e-4)


def predicting(model: Any, inputs: Inputs, before: list[int]) -> Tensor:
    """The last layer's state that predicts what follows."""
    seen: list[Tensor] = []
    hook = layers(model)[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    run(
        model,
        {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], torch.tensor([before], dtype=torch.long)], 1),
        },
    )
    hook.remove()
    return seen[0][0, -1]


def test_a_samples_state_is_the_mean_of_those_that_predict_its_answer() -> None:
    model = shared("llava")
    (inputs,) = prompts(model, 1)
    with sc.attach(model) as session:
        got = states(session, [{**inputs, "source": torch.tensor([200, 201, 202])}], "text.3.layer", "source")
    made = [predicting(model, inputs, list(range(200, 200 + n))) for n in range(3)]
    assert_close(got[0].float(), torch.stack(made).mean(0), atol=1e-4, rtol=1e-4)


def test_a_shift_between_two_concepts_of_all_answers() -> None:
    model = shared("llava")
    samples = [{**p, "target": [200]} for p in prompts(model, 6)]
    method = XLVLMs(between=(2, 0), concepts=3, decomposition="kmeans")
    with home(), sc.attach(model) as session:
        session.calibrate(method, samples)
        u = decompose(states(session, samples, "text.3.layer"), 3, "kmeans").vectors
        assert_close(calibration.load("xl_vlms", model)["text.3.layer"], (u[2] - u[0]).float())
        for wrong, said in ((XLVLMs(between=(0, 3), concepts=3), "no two of 3"), (XLVLMs(), "no source")):
            with pytest.raises(InputError, match=said):
                session.calibrate(wrong, samples)
        with (
            sc.attach(model, XLVLMs(sites="text.0.layer")),
            pytest.raises(InputError, match=r"no shift of text\.0"),
        ):
            run(model, samples[0] | {"target": None})


# ---- concepts --------------------------------------------------------------------------------------------


def clustered(clusters: int = 4, each: int = 9, width: int = 16) -> tuple[Tensor, Tensor]:
    """Samples that lie around a few places, and the places."""
    places = 4 * drawn(clusters, width, seed=1)
    return places.repeat(each, 1) + 0.1 * drawn(clusters * each, width, seed=2), places


def test_where_nothing_was_tuned_nothing_shifts_and_a_constant_is_found_exactly() -> None:
    h, places = clustered()
    c = 3 * drawn(16, seed=3)
    for how in ("semi_nmf", "kmeans", "pca"):
        concepts = decompose(h, 4, how)
        assert (shifts(concepts, h, h) == 0).all()
        d = shifts(concepts, h, h + c)
        some = torch.isin(torch.arange(4), concepts.of)
        assert some.any() and (d[~some] == 0).all()
        assert_close(d[some], c.expand(int(some.sum()), -1))
    concepts, tuned = decompose(h, 4, "kmeans"), decompose(h + c, 4, "kmeans")
    u = concepts.vectors + shifts(concepts, h, h + c)
    assert_close(u, tuned.vectors[matched(u, tuned.vectors)])
    assert torch.cdist(concepts.vectors, places).amin(1).max() < 0.2


def test_the_matching_has_the_largest_cosine_of_all_permutations() -> None:
    for seed in range(20):
        a, b = drawn(4, 6, seed=seed).numpy(), drawn(4, 6, seed=100 + seed).numpy()
        cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
            b / np.linalg.norm(b, axis=1, keepdims=True)
        ).T
        best = max(itertools.permutations(range(4)), key=lambda p: sum(cosine[i, j] for i, j in enumerate(p)))
        assert matched(torch.tensor(a), torch.tensor(b)) == list(best)
    assert assigned([[1.0]]) == [0]


def test_concepts_are_clusters_main_directions_or_parts() -> None:
    h, _ = clustered()
    clusters = decompose(h, 4, "kmeans")
    assert_close(clusters.activations, 1 / (1 + torch.cdist(h, clusters.vectors)))
    assert torch.equal(clusters.of, clusters.of[:4].repeat(9)) and len(set(clusters.of[:4].tolist())) == 4
    near = clusters.samples(9)
    assert all(
        set((row % 4).tolist()) == {int((clusters.of[:4] == k).nonzero())} for k, row in enumerate(near)
    )
    main = decompose(h, 2, "pca")
    values, vectors = np.linalg.eigh(np.cov(h.numpy().T))
    for k, one in enumerate(main.vectors.numpy()):
        assert abs(one @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-8)
        assert main.activations[:, k].var() == pytest.approx(values[-1 - k], rel=1e-8)
    truth = drawn(60, 3, seed=4).relu() @ drawn(3, 16, seed=5)
    parts = decompose(truth, 3)
    assert (parts.activations >= 0).all()
    assert (truth - parts.activations @ parts.vectors).norm() < 0.05 * truth.norm()
    assert (
        truth - decompose(truth, 3, "kmeans").vectors[decompose(truth, 3, "kmeans").of]
    ).norm() > 0.2 * truth.norm()
    with pytest.raises(InputError, match="cannot make"):
        decompose(h[:3], 4)


def test_recovery_is_how_near_shifted_concepts_come() -> None:
    model = shared("llava")
    h, _ = clustered(3, 7, 64)
    c = drawn(64, seed=7)
    own, tuned = decompose(h, 3, "kmeans"), decompose(h + c, 3, "kmeans", seed=3)
    with sc.attach(model) as session:
        before, after = recovery(session, own, shifts(own, h, h + c), tuned, h + c, "kmeans", 5, 4)
        found = top_words(session, own.vectors, 5)
    order = matched(own.vectors, tuned.vectors)
    assert before.partner.tolist() == after.partner.tolist() == order and order != [0, 1, 2]
    assert_close(after.cosine, torch.ones(3, dtype=DOUBLE))
    assert (after.distance < 1e-10).all() and (after.words == 1).all() and (after.samples == 1).all()
    assert_close(before.distance, c.norm().expand(3))
    assert (before.cosine < 1).all() and (before.words < 1).all()
    best = [
        {*one.activations[:, k].argsort()[-4:].tolist()}
        for one, ks in ((own, range(3)), (tuned, order))
        for k in ks
    ]
    assert before.samples.tolist() == [len(best[k] & best[3 + k]) / 4 for k in range(3)]
    with torch.no_grad():
        logits = model.lm_head(model.model.language_model.norm(own.vectors.float()))
    assert found.tolist() == logits.argsort(descending=True)[:, :5].tolist()


def test_activations_of_given_concepts() -> None:
    amounts, vectors = drawn(30, 3, seed=8).relu(), drawn(3, 16, seed=9)
    found = active(amounts @ vectors, vectors)
    assert (found >= 0).all() and (found - amounts).norm() < 0.05 * amounts.norm()
    h, _ = clustered()
    for how in ("pca", "kmeans"):
        concepts = decompose(h, 3, how)
        assert_close(active(h, concepts.vectors, how), concepts.activations)
    assert_close(active(h, vectors, "pca"), (h - h.mean(0)) @ vectors.T)
