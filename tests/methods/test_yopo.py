"""YOPO against a text tower that is run by hand, with a mask made pair by pair."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.reduction.yopo import YOPO, majority, operations

from .embedded import said, seen
from .measured import home
from .shared import Inputs, alone, generated, two
from .towers import inputs_of

ACTIVE = ((0, 1, 2, 3), (0, 2), (), (1, 2, 3))
ALL = ((0, 1, 2, 3),) * 4
EXAMPLE: dict[str, Any] = {"window": 3, "active": ACTIVE, "cut": 2.0, "drop": 0.75}
DISCRETE = ("window", "cut", "drop")
DOUBLE = torch.float64
LOWEST = torch.finfo(DOUBLE).min


def one(images: tuple[int, ...] = (2,)) -> Inputs:
    return {n: v for n, v in inputs_of("llava", images).items() if n != "attention_mask"}


# ---- the paper, pair by pair and head by head ------------------------------------------------------------------


def sees(image: list[int], query: int, key: int, window: int) -> bool:
    """`image` has the places of the visual tokens, 36 in 6 x 6 to a picture."""
    if query not in image or key not in image or not window:
        return key <= query
    (p, a), (q, b) = divmod(image.index(query), 36), divmod(image.index(key), 36)
    reach = (window - 1) / 2
    return p == q and abs(a // 6 - b // 6) <= reach and abs(a % 6 - b % 6) <= reach


@torch.no_grad()
def by_hand(
    model: Any,
    inputs: Inputs,
    window: int,
    active: tuple[tuple[int, ...], ...],
    cut: float,
    drop: float,
    more: Tensor | None = None,
) -> Tensor:
    """Logits of words; in layers without visual tokens only words are there. `more` was written behind the prompt."""
    tower, ids = model.model.language_model, inputs["input_ids"][0]
    came: list[Tensor] = []
    hook = tower.layers[0].register_forward_pre_hook(lambda _, args: came.append(args[0]))
    run(model, inputs)
    hook.remove()
    h = came[0][0] if more is None else torch.cat([came[0][0], tower.embed_tokens(more)])
    image = [i for i, token in enumerate(ids.tolist()) if token == model.config.image_token_id]
    left = list(range(len(h)))
    for number, layer in enumerate(tower.layers):
        if number == round(drop * 4):
            stays = [n for n, i in enumerate(left) if i not in image]
            h, left = h[stays], [left[n] for n in stays]
        attn, x = layer.self_attn, layer.input_layernorm(h)
        cos, sin = (part[0] for part in tower.rotary_emb(x[None], torch.tensor(left)[None]))
        q, k, v = (getattr(attn, f"{part}_proj")(x).unflatten(-1, (-1, 16)).transpose(0, 1) for part in "qkv")
        q, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (q, k))
        hidden = torch.tensor([[not sees(image, i, j, window) for j in left] for i in left])
        visual = torch.tensor([i in image for i in left])
        heads = []
        for head in range(4):
            w = (q[head] @ k[head // 2].T / 4).masked_fill(hidden, -torch.inf).softmax(-1)
            if head not in active[number]:
                w = w.clone()
                w[:, visual] = 0
            heads.append(w @ v[head // 2])
        h = h + attn.o_proj(torch.cat(heads, -1))
        x, mlp = layer.post_attention_layernorm(h), layer.mlp
        a = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        a[visual, int(96 / cut) :] = 0
        h = h + mlp.down_proj(a)
    words = [n for n, i in enumerate(left) if i not in image]
    return model.lm_head(tower.norm(h[words]))


def words_of(model: Any, inputs: Inputs) -> Tensor:
    return inputs["input_ids"][0] != model.config.image_token_id


@pytest.mark.parametrize(
    "options",
    [
        {"window": 11, "active": ALL, "cut": 1.0, "drop": 1.0},
        {"window": 3, "active": ALL, "cut": 1.0, "drop": 1.0},
        {"window": 0, "active": ACTIVE, "cut": 1.0, "drop": 1.0},
        {"window": 0, "active": ALL, "cut": 3.0, "drop": 1.0},
        {"window": 0, "active": ALL, "cut": 1.0, "drop": 0.5},
    ],
)
def test_each_cut_alone(options: dict[str, Any]) -> None:
    model, inputs = shared("llava", DOUBLE), one()
    with sc.attach(model, YOPO(**options)):
        got = run(model, inputs)
    assert_close(got[0, words_of(model, inputs)], by_hand(model, inputs, **options), atol=1e-5, rtol=0)


def test_all_cuts_in_prompt_and_answer() -> None:
    model, inputs = shared("llava", DOUBLE), one()
    with sc.attach(model, YOPO(**EXAMPLE)):
        got = generated(model, inputs, 4)
    written = got.sequences[0, inputs["input_ids"].shape[1] :]
    expected = by_hand(model, inputs, **EXAMPLE, more=written)[-5:-1]
    assert_close(torch.cat(got.logits), expected.float(), atol=1e-5, rtol=0)
    held = [layer.keys.shape[2] for layer in got.past_key_values.layers]
    assert held[0] - held[3] == 72  # two pictures


def kernels(model: Any, inputs: Inputs, **options: Any) -> list[tuple[Tensor, ...]]:
    """Queries, keys, values and mask of every call of the text's kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def listen(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        if q.shape[-1] == 16:
            calls.append((q, k, v, attn_mask))
        return kernel(q, k, v, attn_mask=attn_mask, **more)

    with sc.attach(model, YOPO(**options)), mock.patch.object(F, "scaled_dot_product_attention", listen):
        run(model, inputs)
    return calls


@pytest.mark.parametrize("window", [3, 5])
def test_visual_keys_of_a_query(window: int) -> None:
    model, inputs = shared("llava", DOUBLE), one((1,))
    mask = kernels(model, inputs, window=window, active="all", cut=1.0, drop=1.0)[0][3]
    visual = ~words_of(model, inputs)
    counts = (mask[0, 0][visual][:, visual] > LOWEST / 2).sum(1).view(6, 6)
    reach = window // 2
    inside = [min(i, reach) + min(5 - i, reach) + 1 for i in range(6)]
    assert counts.tolist() == [[a * b for b in inside] for a in inside]
    assert counts[2, 3] == window**2


def test_tiles_have_neighbours_of_their_own_and_separators_the_models_mask() -> None:
    model, inputs = shared("llava_next", DOUBLE), inputs_of("llava_next", (1,))
    inputs.pop("attention_mask")
    mask = kernels(model, inputs, window=3, active="all", cut=1.0, drop=1.0)[0][3][0, 0] > LOWEST / 2
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    base, rows = image[:16], image[16:].view(6, 9)  # 4 x 4, then six rows of 8 and a newline
    assert not mask[base][:, rows[:, :8].flatten()].any() and not mask[rows[:, :8].flatten()][:, base].any()
    assert int(mask[base[5], base].sum()) == 9
    for newline in rows[:, 8].tolist():
        assert torch.equal(mask[newline], torch.arange(mask.shape[1]) <= newline)


def test_pictures_are_no_neighbours_where_both_have_one_tile() -> None:
    model, inputs = shared("qwen2_5_vl", DOUBLE), inputs_of("qwen2_5_vl", (2,))
    inputs.pop("attention_mask")
    mask = kernels(model, inputs, window=3, active="all", cut=1.0, drop=1.0)[0][3][0, 0] > LOWEST / 2
    first, second = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].view(2, 16)
    assert not mask[first][:, second].any() and not mask[second][:, first].any()
    counts = [min(i, 1) + min(3 - i, 1) + 1 for i in range(4)]
    expected = [[a * b for b in counts] for a in counts]
    assert all(mask[own][:, own].sum(1).view(4, 4).tolist() == expected for own in (first, second))


def test_inactive_heads_sum_over_words_with_the_weights_as_they_were() -> None:
    model, inputs = shared("qwen2_5_vl", DOUBLE), alone(two(family("qwen2_5_vl"), DOUBLE), 0)
    watch = Look(tell=lambda call: (call.weights(), call.v, call.out), sites="text.1.self")
    with sc.attach(model, YOPO(**{**EXAMPLE, "window": 0}), watch):
        run(model, inputs)
    w, v, out = watch.at("text.1.self")[0]
    visual = inputs["input_ids"][0] == model.config.image_token_id
    for head in range(4):
        used = w[0, head] if head in ACTIVE[1] else w[0, head] * ~visual
        assert_close(out[0, head], used @ v[0, head // 2])
        assert (used[-1].sum() < 0.999) == (head not in ACTIVE[1])


def test_operations_fall_with_every_knob() -> None:
    def count(**options: Any) -> float:
        given: dict[str, Any] = {"active": (32,) * 32, "window": 0, "cut": 1.0, "drop": 1.0, **options}
        return operations(60, 576, 4096, 11008, 32, **given)

    dense = 32 * (4 * 4096**2 * 636 + 2 * 4096 * 636**2 + 3 * 4096 * 11008 * 636)
    assert count() == dense
    for name, values in {
        "window": (0, 23, 9, 5, 1),
        "cut": (1.0, 2.0, 4.0),
        "drop": (1.0, 0.8, 0.5, 0.0),
        "active": ((32,) * 32, (32,) * 16 + (8,) * 16, (4,) * 32, (0,) * 32),
    }.items():
        counts = [count(**{name: value}) for value in values]
        assert counts == sorted(counts, reverse=True) and len(set(counts)) == len(counts), name
    assert count(drop=0.0) == 32 * (4 * 4096**2 * 60 + 2 * 4096 * 60**2 + 3 * 4096 * 11008 * 60)


# ---- calibration -----------------------------------------------------------------------------------------


def test_most_samples_decide_but_for_the_first_layers() -> None:
    ratios = torch.zeros(3, 4, 2)
    ratios[:2, 2, 0] = ratios[:1, 2, 1] = ratios[:, 3, 1] = 0.05
    assert majority(ratios, 0.035).tolist() == [[True, True], [True, True], [True, False], [False, True]]
    assert majority(ratios[:2], 0.035)[2].tolist() == [True, False]  # half is not most


def test_calibration_reads_eager_attention() -> None:
    model, eager = shared("llava"), shared("llava", torch.float32, "eager")
    inputs = two(family("llava"))
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    visual = (inputs["input_ids"] == model.config.image_token_id)[:, None, None, :]
    real = inputs["attention_mask"].bool()[:, None, :, None]
    made = torch.stack(
        [(w * real * visual).sum((2, 3)) / (w * real * ~visual).sum((2, 3)) for w in attentions], 1
    )
    threshold = float(made[:, 2:].median())
    with home(), sc.attach(model) as session:
        assert_close(YOPO().calibrate(session, [inputs])["ratios"], made)
        session.calibrate(YOPO(), [inputs])
        numbers = tuple(
            tuple(h for h in range(4) if layer < 2 or bool((made[:, layer, h] > threshold).all()))
            for layer in range(4)
        )
        assert sum(map(len, numbers)) < 16
        with sc.attach(model, YOPO(**{**EXAMPLE, "active": numbers})):
            expected = run(model, inputs)
        with sc.attach(model, YOPO(**{**EXAMPLE, "active": "calibrated", "threshold": threshold})):
            assert torch.equal(run(model, inputs), expected)


# ---- on the small trained model, and refusals -----------------------------------------------------------------


def test_on_the_trained_model() -> None:
    options = {"active": "all", "window": 3}
    layers = seen(YOPO(**options, drop=0.5))
    half = round(0.5 * len(layers))
    assert all(count > 0 for layer in layers[:half] for count in layer)
    assert not any(count for layer in layers[half:] for count in layer)
    assert said(YOPO(window=0, active="all", cut=1.0, drop=1.0)) == said()
    assert len(said(YOPO(**options))) == len(said())


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(OptionError, match="middle"):
        YOPO(window=4)
    with pytest.raises(OptionError, match="calibrated"):
        YOPO(active="some")
    model, inputs = shared("llava", DOUBLE), one()
    for active in (((0,),), ((0,), (1,), (2,), (4,))):
        with sc.attach(model, YOPO(active=active)), pytest.raises(InputError, match="4 of 4 layers"):
            run(model, inputs)
    with home(), sc.attach(model, YOPO()), pytest.raises(InputError, match="calibrate"):
        run(model, inputs)
    with sc.attach(model) as session, pytest.raises(InputError, match="No head"):
        YOPO().calibrate(session, [{"input_ids": torch.arange(100, 120)[None]}])
