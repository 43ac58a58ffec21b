"""IMA against states that models return, masks that are sorted by hand, and models that are cut by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run
from zoo.base import noise

import saccade as sc
from saccade.core.method import Method
from saccade.core.tokens import Tokens, TokensCall
from saccade.probes.ima import IMA, REDUCED, Alignment, largest, overlap, similarities, subnetworks, using

from .embedded import asked, trained
from .shared import alone, two

EXAMPLE: dict[str, Any] = {"entropy": True}
NAMES = ("llava", "qwen2_5_vl")
LAYERS = 4


def kinds(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the tokens (samples, tokens), by the ids alone."""
    ids = inputs["input_ids"]
    special = torch.tensor([i for i in range(20) if i != model.config.image_token_id])
    visual = ids == model.config.image_token_id
    real = inputs["attention_mask"].bool()
    return {"visual": visual, "text": real & ~visual & ~torch.isin(ids, special)}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


# ---- states ----------------------------------------------------------------------------------------------


def test_equal_sets_are_aligned_and_orthogonal_ones_are_not() -> None:
    p = noise(5, 8).abs()
    p[:, 4:] = 0
    measured = dict(zip(REDUCED, similarities(p, p.clone()).tolist(), strict=True))
    assert measured["pooled"] == pytest.approx(1) and measured["max"] == pytest.approx(1)
    assert measured["mean of row maxima"] == pytest.approx(1) and measured["min"] < 0.99
    assert similarities(p, p.flip(1)).tolist() == pytest.approx([0] * len(REDUCED), abs=1e-6)


def test_pairs_are_reduced_as_by_hand() -> None:
    a, b = noise(4, 6, seed=1), noise(3, 6, seed=2)
    for x, y, same in ((a, b, False), (a, a, True)):
        table = [
            [cosine(p.numpy(), q.numpy()) for j, q in enumerate(y) if not (same and i == j)]
            for i, p in enumerate(x)
        ]
        flat = [value for row in table for value in row]
        pooled = cosine(x.mean(0).numpy(), y.mean(0).numpy())
        expected = [
            max(flat),
            min(flat),
            np.mean(flat),
            np.median(flat),
            np.mean([max(r) for r in table]),
            pooled,
        ]
        assert similarities(x, y, same).tolist() == pytest.approx(expected, abs=1e-6)
    assert similarities(a[:1], a[:1], True).isnan().all() and similarities(a[:0], b).isnan().all()


def states(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What goes into the first layer, and what every layer gives."""
    seen: list[Tensor] = []
    text = model.model.language_model.layers
    hooks = [
        text[0].register_forward_pre_hook(
            lambda _, a, kw: seen.append(a[0] if a else kw["hidden_states"]), with_kwargs=True
        )
    ]
    hooks += [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in text]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_models_are_measured_by_the_states_of_their_layers() -> None:
    for name in NAMES:
        model, inputs = shared(name), two(family(name))
        with sc.attach(model, IMA(entropy=True)) as session:
            run(model, inputs)
        found: Alignment = session.results["ima"]
        masks, hidden = kinds(model, inputs), states(model, inputs)
        assert found.similarity.axes["layer"] == ("embed", "0", "1", "2", "3")
        for at, h in enumerate(hidden):
            sets = [
                {kind: h[row, mask[row]].double().numpy() for kind, mask in masks.items()} for row in (0, 1)
            ]
            for row, of in enumerate(sets):
                pooled = cosine(of["visual"].mean(0), of["text"].mean(0))
                assert float(found.implicit[row, at]) == pytest.approx(pooled, abs=1e-5)
            pairs = [[cosine(p, t) for p in of["visual"] for t in of["text"]] for of in sets]
            mean = float(np.mean([np.mean(of) for of in pairs]))
            place: dict[str, str | int] = {"pair": "visual text", "layer": found.similarity.axes["layer"][at]}
            assert float(found.similarity.at(reduced="mean", **place)) == pytest.approx(mean, abs=1e-5)
            for kind, mask in masks.items():
                long = np.mean([np.linalg.norm(of[kind], axis=1).mean() for of in sets])
                assert float(found.norms.at(kind=kind).values[at]) == pytest.approx(long, rel=1e-4)
                with torch.no_grad():
                    p = model.lm_head(model.model.language_model.norm(h)).double().softmax(-1)
                h_of = [-(p[row, mask[row]] * p[row, mask[row]].log()).sum(-1).mean() for row in (0, 1)]
                assert found.entropy is not None
                assert float(found.entropy.at(kind=kind).values[at]) == pytest.approx(
                    float(sum(h_of)) / 2, rel=1e-4
                )
                if at:
                    moved = torch.cosine_similarity(hidden[at - 1].double(), h.double(), -1)
                    kept = float(sum(moved[row, mask[row]].mean() for row in (0, 1)) / 2)
                    assert float(found.drift.at(kind=kind).values[at - 1]) == pytest.approx(kept, abs=1e-5)
        assert found.score == pytest.approx(float(found.implicit.mean()))


@dataclass(eq=False)
class EveryOther(Method):
    sites: str = "text.2.layer"

    def tokens(self, call: TokensCall) -> Tokens:
        keep = ~call.tokens("visual")
        keep[:, ::2] = True
        return Tokens(keep)


def test_tokens_that_left_are_followed_as_far_as_they_are_there() -> None:
    model, inputs = shared("llava"), alone(two(family("llava")), 0)
    with sc.attach(model, EveryOther(), IMA()) as session:
        hidden = states(model, inputs)
    visual = kinds(model, inputs)["visual"][0]
    keep = ~visual
    keep[::2] = True
    assert hidden[3].shape[1] == keep.sum() < len(keep)
    before, after = hidden[2][0, keep & visual], hidden[3][0, visual[keep]]
    expected = torch.cosine_similarity(before, after, -1).mean()
    found = session.results["ima"].drift.at(kind="visual", layer="2")
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


# ---- skipping --------------------------------------------------------------------------------------------


@contextmanager
def dropped(model: Any, layers: list[int], parts: tuple[str, ...], visual: Tensor) -> Iterator[None]:
    """What these parts give visual tokens is thrown away, by the test's own hooks."""

    def drop(_: nn.Module, __: Any, out: Any) -> Any:
        h = (out[0] if isinstance(out, tuple) else out).clone()
        h[visual] = 0
        return (h, *out[1:]) if isinstance(out, tuple) else h

    text = model.model.language_model.layers
    hooks = [getattr(text[i], part).register_forward_hook(drop) for i in layers for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("skip", "every", "parts", "layers"),
    [
        ("mlp", 1, ("mlp",), [0, 1, 2, 3]),
        ("mlp", 2, ("mlp",), [1, 3]),
        ("self", 3, ("self_attn",), [2]),
        ("layer", 4, ("mlp", "self_attn"), [3]),
    ],
)
def test_skipping_is_dropping_what_the_part_gives_visual_tokens(
    skip: str, every: int, parts: tuple[str, ...], layers: list[int]
) -> None:
    for name in NAMES:
        model, inputs = shared(name), two(family(name))
        with dropped(model, layers, parts, kinds(model, inputs)["visual"]):
            expected = run(model, inputs)
        with sc.attach(model, IMA(skipped=skip, every=every)):
            got = run(model, inputs)
        assert_close(got, expected, atol=1e-6, rtol=1e-6)
        assert (got - run(model, inputs)).abs().max() > 1e-3


def test_beyond_the_depth_nothing_is_skipped() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    with sc.attach(model, IMA(skipped="layer", every=LAYERS + 1)):
        assert torch.equal(run(model, inputs), run(model, inputs))
        got = run(model, inputs)
    assert torch.equal(got, run(model, inputs))


def test_skipping_an_mlp_that_gives_nothing_changes_nothing() -> None:
    model, inputs = family("llava").build(), two(family("llava"))
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight.zero_()
    bare = run(model, inputs)
    with sc.attach(model, IMA(skipped="mlp", every=2, sites="text.1.mlp")):
        assert torch.equal(run(model, inputs), bare)


# ---- weights ---------------------------------------------------------------------------------------------


def test_a_mask_keeps_its_share_and_random_ones_overlap_by_chance() -> None:
    for share in (0.25, 0.5, 0.8):
        a, b = (largest(noise(400, 90, seed=seed), share) for seed in (1, 2))
        assert a.double().mean() == share and (a.sum(0) == round(share * 400)).all()
        found = float(overlap({(0, "fc"): a}, {(0, "fc"): b}).values)
        assert found == pytest.approx(share / (2 - share), abs=0.02)
    assert float(overlap({(0, "fc"): a}, {(0, "fc"): a}).values) == 1
    assert float(overlap({(0, "fc"): a}, {(0, "fc"): ~a}).values) == 0


def wanda(
    model: Any, inputs: dict[str, Tensor], share: float
) -> dict[str, dict[tuple[int, str], np.ndarray]]:
    """By sorting every output's weights, with the norms of what the test's own hooks heard."""
    heard: dict[tuple[int, str], np.ndarray] = {}
    weights: dict[tuple[int, str], np.ndarray] = {}
    hooks = []
    for layer, block in enumerate(model.model.language_model.layers):
        for name, part in block.named_modules():
            if isinstance(part, nn.Linear):
                weights[layer, name] = part.weight.detach().numpy()
                hooks.append(
                    part.register_forward_pre_hook(
                        lambda _, args, key=(layer, name): heard.__setitem__(key, args[0].detach().numpy())
                    )
                )
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    made: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for kind, mask in kinds(model, inputs).items():
        made[kind] = {}
        for key, w in weights.items():
            scores = np.abs(w) * np.linalg.norm(heard[key][mask.numpy()], axis=0)
            kept = np.zeros(w.shape, dtype=bool)
            for row, order in zip(kept, np.argsort(-scores, axis=1)):
                row[order[: round(share * len(row))]] = True
            made[kind][key] = kept
    return made


def test_subnetworks_are_those_of_wanda_and_the_model_can_run_on_one() -> None:
    model, inputs = family("llava").build(), two(family("llava"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bare, expected = run(model, inputs), wanda(model, inputs, 0.5)
    with sc.attach(model) as session:
        found = subnetworks(session, [inputs], share=0.5)
        with using(session, found["text"]):
            thin = run(model, inputs)
        assert torch.equal(run(model, inputs), bare)
    for kind, masks in expected.items():
        assert masks.keys() == found[kind].keys()
        for key, mask in masks.items():
            assert (found[kind][key].T.numpy() == mask).all(), (kind, key)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        for (layer, name), mask in expected["text"].items():
            model.model.language_model.layers[layer].get_submodule(name).weight *= torch.from_numpy(mask)
    assert_close(thin, run(model, inputs), atol=1e-6, rtol=1e-6)
    table = overlap(found["visual"], found["text"])
    a, b = expected["visual"][2, "mlp.down_proj"], expected["text"][2, "mlp.down_proj"]
    assert float(table.at(matrix="mlp.down_proj").values[2]) == pytest.approx((a & b).sum() / (a | b).sum())


def test_in_the_trained_model_pictures_and_words_share_weights_more_than_by_chance() -> None:
    (model, _), inputs = trained(), asked()
    with sc.attach(model, IMA()) as session:
        run(model, dict(inputs))
        found = subnetworks(session, [inputs])
    shared_ = overlap(found["visual"], found["text"]).values
    assert shared_.nanmean() > 0.5  # 1/3 by chance
    similarity = session.results["ima"].similarity.at(reduced="mean")
    assert (similarity.at(pair="visual visual").values > similarity.at(pair="visual text").values).all()
