"""CoreMatching against a text tower that is run by hand, with sets of neurons."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import Look, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.corematching import CoreMatching, elbow, sentence_core, token_core

from .embedded import said, seen
from .shared import Inputs, generated, two
from .towers import inputs_of

EXAMPLE: dict[str, Any] = {"rho": 0.4, "beta": 0.4}
MODELS = ("llava", "qwen2_5_vl")
DISCRETE = ("rho", "beta")
BFLOAT16 = {"score": "none"}
DOUBLE = torch.float64
NEURONS = 96


def one(images: tuple[int, ...] = (2,)) -> Inputs:
    return {n: v for n, v in inputs_of("llava", images).items() if n != "attention_mask"}


# ---- the paper, set by set ---------------------------------------------------------------------------------


def gammas(a: Tensor, rho: float) -> list[set[int]]:
    found = []
    for row in a.tolist():
        positive = sorted((n for n in range(len(row)) if row[n] > 0), key=lambda n: -row[n])
        found.append(set(positive[: math.ceil(rho * len(positive))]))
    return found


def common(sets: list[set[int]], beta: float) -> set[int]:
    often = [sum(n in one for one in sets) for n in range(NEURONS)]
    return set(sorted(range(NEURONS), key=lambda n: -often[n])[: round(beta * NEURONS)])


def bend(values: list[float]) -> int:
    """By distance at right angles."""
    n = len(values) - 1
    drop = values[-1] - values[0]
    apart = [abs(drop * i - n * (value - values[0])) / math.hypot(n, drop) for i, value in enumerate(values)]
    return apart.index(max(apart))


@torch.no_grad()
def by_hand(
    model: Any, inputs: Inputs, rho: float, beta: float, score: str, more: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """Logits of what is left, and which visual tokens are. `more` was written behind the prompt."""
    tower, ids = model.model.language_model, inputs["input_ids"][0]
    came: list[Tensor] = []
    hook = tower.layers[0].register_forward_pre_hook(lambda _, args: came.append(args[0]))
    run(model, inputs)
    hook.remove()
    prompt = len(ids)
    h = came[0][0] if more is None else torch.cat([came[0][0], tower.embed_tokens(more)])
    image = [i for i, token in enumerate(ids.tolist()) if token == model.config.image_token_id]
    left = list(range(len(h)))
    for number, layer in enumerate(tower.layers):
        attn, x = layer.self_attn, layer.input_layernorm(h)
        cos, sin = (part[0] for part in tower.rotary_emb(x[None], torch.tensor(left)[None]))
        q, k, v = (getattr(attn, f"{part}_proj")(x).unflatten(-1, (-1, 16)).transpose(0, 1) for part in "qkv")
        q, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (q, k))
        later = torch.ones(len(left), len(left)).triu(1).bool()
        w = [(q[n] @ k[n // 2].T / 4).masked_fill(later, -torch.inf).softmax(-1) for n in range(4)]
        h = h + attn.o_proj(torch.cat([w[n] @ v[n // 2] for n in range(4)], -1))
        x, mlp = layer.post_attention_layernorm(h), layer.mlp
        a = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        read = [n for n, i in enumerate(left) if i < prompt]
        sets = gammas(a[read], rho)
        core = common(sets, beta)
        out = mlp.down_proj(a)
        for n, i in enumerate(left):
            if i >= prompt:  # rows and columns of the core alone
                some = sorted(core)
                g, u = mlp.gate_proj.weight[some] @ x[n], mlp.up_proj.weight[some] @ x[n]
                out[n] = mlp.down_proj.weight[:, some] @ (F.silu(g) * u)
        h = h + out
        if number == 0 and score != "none":
            if score == "released":
                sets = [{n for n in range(NEURONS) if row[n] > 0} for row in a[read].tolist()]
                core = sets[prompt - 5]
            stays = set(left) - set(image)
            for first in range(0, len(image), 36):
                picture = image[first : first + 36]
                scores = {i: len(sets[i] & core) for i in picture}
                ordered = sorted(map(float, scores.values()), reverse=True)
                stays |= {i for i in picture if scores[i] > ordered[bend(ordered)]}
            h, left = h[[i for i in left if i in stays]], sorted(stays)
    return model.lm_head(tower.norm(h)), [i for i in left if i in image]


@pytest.mark.parametrize("score", ["core", "released"])
def test_what_is_left_and_what_is_written(score: str) -> None:
    model, inputs = shared("llava", DOUBLE), one()
    look = Look(tell=lambda call: call.kpos.flatten().tolist(), sites="text.*.self")
    with sc.attach(model, CoreMatching(rho=0.3, beta=0.5, score=score), look):
        got = generated(model, inputs, 4)
    written = got.sequences[0, inputs["input_ids"].shape[1] :]
    expected, left = by_hand(model, inputs, 0.3, 0.5, score, written)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    assert 0 < len(left) < 72
    assert [i for i in look.at("text.0.self")[0] if i in image] == image
    for layer in (1, 2, 3):
        assert [i for i in look.at(f"text.{layer}.self")[0] if i in image] == left
        assert [
            i for i in look.at(f"text.{layer}.self")[-1] if i in image
        ] == left  # removed: no weight at all
    assert_close(torch.cat(got.logits), expected[-5:-1].float(), atol=1e-5, rtol=0)


def test_zeroed_keys_would_keep_weight_and_removed_ones_have_none() -> None:
    """What the released code does to the tokens that are dropped here."""
    model, inputs = shared("llava", DOUBLE), one((1,))
    look = Look(tell=lambda call: (call.q, call.k, call.weights("last"), call.kpos), sites="text.1.self")
    bare = Look(tell=lambda call: (call.q, call.k), sites="text.1.self")
    with sc.attach(model, bare):
        run(model, inputs)
    with sc.attach(model, CoreMatching(**EXAMPLE), look):
        run(model, inputs)
    (q, whole), (_, k, w, kpos) = bare.seen[0][2], look.seen[0][2]
    gone = [i for i in range(whole.shape[2]) if i not in kpos.flatten().tolist()]
    scores = whole[0, 0] @ q[0, 0, -1] / 4
    kept = scores.clone()
    kept[gone] = -torch.inf
    assert_close(w[0, 0, 0], kept.softmax(-1)[kpos.flatten()])
    scores[gone] = 0  # of a key that is zero
    share = len(gone) / (len(gone) + kept.exp().sum())
    assert_close(scores.softmax(-1)[gone].sum(), share)
    assert k.shape[2] == whole.shape[2] - len(gone) and share > 0.01


# ---- the parts -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=3, max_size=60, unique=True))
def test_elbow_is_the_farthest_at_right_angles(values: list[float]) -> None:
    ordered = sorted(values, reverse=True)
    got, n, drop = elbow(torch.tensor(ordered, dtype=DOUBLE)), len(ordered) - 1, ordered[-1] - ordered[0]
    apart = [
        abs(drop * i - n * (value - ordered[0])) / math.hypot(n, drop) for i, value in enumerate(ordered)
    ]
    assert apart[got] >= max(apart) - 1e-6


def test_elbow_of_a_step_is_the_step() -> None:
    for high in range(1, 10):
        step = torch.tensor([7.0] * high + [2.0] * (10 - high), dtype=DOUBLE)
        assert elbow(step) in (high - 1, high)
    assert elbow(torch.tensor([7.0, 7, 7, 2, 2, 2, 2, 2], dtype=DOUBLE)) == 3


def test_cores_by_hand() -> None:
    a = torch.tensor([[[3.0, -1, 2, 1, 0, 5], [-1, -2, 4, 0, 0, 0.5], [1, 2, 3, -1, -4, -1]]])
    gamma = token_core(a, 0.5)[0]
    assert [row.nonzero()[:, 0].tolist() for row in gamma] == [[0, 5], [2], [1, 2]]
    assert sentence_core(gamma[None], 1 / 6)[0].nonzero()[:, 0].tolist() == [2]
    assert sentence_core(gamma[None], 1.0).all()


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
def test_written_words_have_the_core_alone(beta: float) -> None:
    """Of the products of the last linear layer |C| / D are with anything but 0."""
    model, inputs, linear = shared("llava", DOUBLE), one((1,)), F.linear
    down, counts = model.model.language_model.layers[2].mlp.down_proj, []

    def listen(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight is down.weight:
            counts.append(int((x[0, -1] != 0).sum()))
        return linear(x, weight, *rest)

    with sc.attach(model, CoreMatching(beta=beta)), mock.patch.object(F, "linear", listen):
        generated(model, inputs, 3)
    assert counts == [NEURONS, *[round(beta * NEURONS)] * 2]


def test_everything_kept_is_the_model_itself() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    bare = generated(model, inputs).logits
    for beta, same in ((1.0, True), (0.9, False)):
        with sc.attach(model, CoreMatching(rho=1.0, beta=beta, score="none")):
            got = generated(model, inputs).logits
        assert all(torch.equal(a, b) for a, b in zip(got, bare)) == same


def test_patches_that_resemble_the_words_are_found() -> None:
    """Twelve patches have the word's direction in them, the others noise. Chance finds the share that stays."""
    model: Any = family("llava").build()
    inputs = one((1,)) | {"pixel_values": one((1,))["pixel_values"].float()}
    image = inputs["input_ids"][0] == model.config.image_token_id
    inputs["input_ids"][0, ~image] = 150
    word, places = model.get_input_embeddings().weight[150].detach(), image.nonzero()[:, 0].tolist()
    gains = []
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        planted = torch.randperm(36, generator=rng)[:12]
        features = torch.randn(1, 36, len(word), generator=rng) * word.std()
        features[:, planted] = word + 0.3 * features[:, planted]
        hook = model.model.multi_modal_projector.register_forward_hook(lambda *_, given=features: given)
        look = Look(tell=lambda call: call.kpos.flatten().tolist(), sites="text.1.self")
        with sc.attach(model, CoreMatching(**EXAMPLE), look):
            run(model, inputs)
        hook.remove()
        left = {places.index(i) for i in look.seen[0][2] if i in places}
        gains.append(len(left & set(planted.tolist())) / 12 - len(left) / 36)
    assert sum(gains) / 4 > 0.12, gains


# ---- on the small trained model, and refusals -----------------------------------------------------------------


def test_on_the_trained_model() -> None:
    layers = seen(CoreMatching())
    assert all(count < layers[0][row] for row, count in enumerate(layers[-1]))
    assert said(CoreMatching(rho=1.0, beta=1.0, score="none")) == said()


def test_before_the_first_layer_nobody_can_judge() -> None:
    sites = {"hidden": "text.*.neurons", "tokens": "text.0.layer"}
    with (
        sc.attach(shared("llava", DOUBLE), CoreMatching(sites=sites)),
        pytest.raises(InputError, match="below"),
    ):
        run(shared("llava", DOUBLE), one())
