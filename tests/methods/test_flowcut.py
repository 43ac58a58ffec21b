"""FlowCut against vision towers that are run by hand, layer by layer, on fewer and fewer patches."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run
from zoo.base import enliven

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.flowcut import Flow, FlowCut, leaving, size

from .embedded import said, seen
from .shared import Inputs, generated
from .towers import DIM, DOUBLE, HEADS, best, inputs_of, kept

MODELS = ("llava", "llava_onevision")
EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)
BFLOAT16 = {"keep": 0.3}


# ---- the paper, one tile and one layer at a time -----------------------------------------------------------


def judged(layer: Any, h: Tensor, classed: bool) -> tuple[list[float], list[float]]:
    """Of the patches in a layer that is given h (tokens, width): rel, and s."""
    x = layer.layer_norm1(h)
    q, k, v = (
        getattr(layer.self_attn, f"{part}_proj")(x).unflatten(-1, (HEADS, DIM)).transpose(0, 1)
        for part in "qkv"
    )
    value = v.mean(0).abs().sum(-1)
    if not classed:
        rel = torch.stack([(k[head] @ q[head].mean(0) / DIM**0.5).softmax(0) for head in range(HEADS)]).mean(
            0
        )
        return rel.tolist(), (rel * value).tolist()
    rel = torch.stack([(k[head] @ q[head, 0] / DIM**0.5).softmax(0) for head in range(HEADS)]).mean(0)[1:]
    sem = torch.stack([(v[head] @ v[head, 0]).softmax(0) for head in range(HEADS)]).mean(0)[1:]
    rel, sem = rel / rel.sum(), sem / sem.sum()
    return rel.tolist(), ((rel + sem) * value[1:]).tolist()


@torch.no_grad()
def through(layers: Any, h: Tensor, keep: float, classed: bool) -> tuple[list[int], Tensor, list[int]]:
    """Which patches of one tile are left before the last of the layers, what it makes of them, and how many patches
    came to every layer. The last layer's output is the features."""
    ahead = 1 if classed else 0
    left = list(range(h.shape[0] - ahead))
    target = max(1, round(keep * len(left)))
    counts: list[int] = []
    c: dict[int, float] = {}
    for number, layer in enumerate(layers):
        counts.append(len(left))
        rel, s = judged(layer, h, classed)
        c = {j: (0.5 * c[j] + 0.5 * new) if c else new for j, new in zip(left, s, strict=True)}
        h = layer(h[None], attention_mask=None)
        h = (h[0] if isinstance(h, tuple) else h)[0]
        r = len(layers) - 2 - number
        if len(left) > target and r >= 0 and r % 2 == 0:
            entropy = -math.fsum(p * math.log(p) for p in rel) / math.log(len(left))
            n = round((len(left) - target) / math.sqrt(r) * (1 - entropy**2)) if r else len(left)
            stays = sorted(sorted(left, key=lambda j: -c[j])[: max(target, len(left) - n)])
            rows = [*range(ahead), *(ahead + left.index(j) for j in stays)]
            h, left = h[rows], stays
    return left, h[ahead:], counts


def tower_of(name: str, model: Any) -> tuple[list[Any], bool]:
    layers = list(model.model.vision_tower.encoder.layers)
    return (layers[:-1], True) if name == "llava" else (layers, False)


def entering(model: Any, inputs: Inputs) -> Tensor:
    """What comes to the tower's first layer: (tiles, tokens, width)."""
    came: list[Tensor] = []
    hook = model.model.vision_tower.encoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: came.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    run(model, inputs)
    hook.remove()
    return came[0]


def deep(name: str = "llava", layers: int = 8) -> Any:
    """A model whose tower has more layers."""
    shallow = shared(name).config
    config = copy.deepcopy(shallow)
    config.vision_config.num_hidden_layers = layers
    return enliven(type(shared(name))._from_config(config)).double().eval()


def left_in_tower(model: Any, inputs: Inputs, *methods: FlowCut) -> list[list[list[int]]]:
    """Which tokens of every tile come to each layer, the class token as 0."""
    look = Look(
        tell=lambda call: [
            [i for i in row if i >= 0] for row in call.qpos.expand(call.q.shape[0], -1).tolist()
        ],
        sites="vision.*.self",
    )
    with sc.attach(model, *methods, look):
        run(model, inputs)
    return [told for _, _, told in look.seen]


# ---- in the tower ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keep"), [("llava", 0.25), ("llava", 0.02), ("llava_onevision", 0.4)])
def test_c_ranks_and_entropy_says_how_many_leave(name: str, keep: float) -> None:
    model, inputs = deep(name), inputs_of(name, (1,) if name == "llava_onevision" else (1, 2))
    layers, classed = tower_of(name, model)
    expected = [through(layers, tile, keep, classed) for tile in entering(model, inputs)]
    found = left_in_tower(model, inputs, FlowCut(keep=keep))[: len(layers)]
    tiles = range(len(expected))
    assert [[i - classed for i in found[-1][t] if i >= classed] for t in tiles] == [e[0] for e in expected]
    counts = [[len(tile) - classed for tile in layer] for layer in found]
    assert counts == [list(at) for at in zip(*(e[2] for e in expected), strict=True)]
    patches = counts[0][0]
    target = max(1, round(patches * keep))
    assert counts[-1] == [target] * len(expected) and min(map(min, counts)) == target
    for number, layer in enumerate(counts[1:], 1):
        assert layer == counts[number - 1] or (len(layers) - 1 - number) % 2 == 0
    assert any(len(set(layer)) > 1 for layer in counts) or (name, keep) != (
        "llava",
        0.25,
    )  # each tile its own number


def test_features_are_those_of_the_patches_that_are_left_to_the_end() -> None:
    model, inputs = deep(), inputs_of("llava")
    layers, classed = tower_of("llava", model)
    expected = [through(layers, tile, 0.25, classed) for tile in entering(model, inputs)]
    assert kept("llava", model, inputs, FlowCut(keep=0.25)) == [left for left, _, _ in expected]
    got: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: got.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with sc.attach(model, FlowCut(keep=0.25)):
        run(model, inputs)
    hook.remove()
    visual = got[0][inputs["input_ids"] == model.config.image_token_id].split(36)
    for features, (left, h, _) in zip(visual, expected, strict=True):
        assert_close(features[left], model.model.multi_modal_projector(h), atol=1e-9, rtol=0)


@pytest.mark.parametrize("remaining", [2, 4, 8])
def test_flat_attention_lets_none_leave_and_a_peak_the_most(remaining: int) -> None:
    ones = torch.ones(1, 36, dtype=DOUBLE)
    flat, peak = ones / 36, torch.eye(36, dtype=DOUBLE)[:1]
    counts, target = torch.tensor([[36]]), torch.tensor([[9]])

    def n(rel: Tensor, r: int) -> int:
        return int(leaving(Flow(rel, rel, ones.bool(), ~ones.bool(), target), counts, target, r))

    assert n(flat, remaining) == 0 and n(peak, remaining) == round(27 / math.sqrt(remaining))
    assert n(flat, 0) >= 27


def test_larger_values_rank_as_before() -> None:
    v = torch.randn(1, HEADS, 36, DIM, generator=torch.Generator().manual_seed(0))
    assert_close(size(3 * v), 3 * size(v))
    assert_close(size(v)[0, 5], v[0, :, 5].mean(0).abs().sum())
    relation = torch.rand(36, generator=torch.Generator().manual_seed(1))
    assert (relation * size(3 * v)[0]).argsort().tolist() == (relation * size(v)[0]).argsort().tolist()


def test_a_patch_that_all_flows_through_survives() -> None:
    """In every layer it is looked at, is like the class token, and is large."""
    model = deep()
    inputs = inputs_of("llava", (1,))
    q: list[Tensor] = []

    def plant(like: Any, factor: float) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, 1] = factor * (like[-1][:, 0] if like else out[:, 0])
            return out

        return hook

    hooks = []
    for layer in model.model.vision_tower.encoder.layers:
        hooks.append(layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: q.append(out)))
        hooks.append(layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: plant(q, 5.0)(m, a, out)))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(plant([], 3.0)))
    found = left_in_tower(model, inputs, FlowCut(keep=1 / 36))[6]
    for hook in hooks:
        hook.remove()
    assert found == [[0, 1]]


# ---- in the text tower -------------------------------------------------------------------------------------


@torch.no_grad()
def best_of_text(model: Any, inputs: Inputs, count: int) -> list[int]:
    """Of one picture's tokens those with the largest score behind the text tower's layer 1."""
    attn, given = model.model.language_model.layers[1].self_attn, {}
    hook = attn.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    run(model, inputs)
    hook.remove()
    x, (cos, sin) = given["hidden_states"], (part[0] for part in given["position_embeddings"])
    q, k, v = (getattr(attn, f"{part}_proj")(x)[0].unflatten(-1, (-1, 16)).transpose(0, 1) for part in "qkv")
    q, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (q, k))
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    score = torch.zeros(len(image), dtype=DOUBLE)
    for head in range(4):
        score += (k[head // 2, image] @ q[head, -1] / 4).softmax(0) / 4
        score += (v[head // 2, image] @ v[head // 2, -1] / 4).softmax(0) / 4
    score *= v[:, image].mean(0).abs().sum(-1)
    return best(score.tolist(), count)


def of_text(model: Any, inputs: Inputs, layer: int, *methods: FlowCut) -> list[int]:
    look = Look(tell=lambda call: call.qpos.expand(1, -1)[0].tolist(), sites=f"text.{layer}.self")
    with sc.attach(model, *methods, look):
        run(model, inputs)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    return [image.index(i) for i in look.seen[0][2] if i in image]


def test_what_is_too_much_leaves_behind_the_text_towers_layer_1() -> None:
    model = shared("llava", DOUBLE)
    inputs = {n: v for n, v in inputs_of("llava", (1,)).items() if n != "attention_mask"}
    method = FlowCut(keep=0.25, slack=4.0)
    assert of_text(model, inputs, 1, method) == list(range(36))
    assert of_text(model, inputs, 2, method) == best_of_text(model, inputs, 9)
    both = FlowCut(keep=0.25, slack=2.0)
    first = of_text(model, inputs, 1, both)
    assert first == kept("llava", model, inputs_of("llava"), FlowCut(keep=0.5))[0]
    assert len(first) == 18 and len(of_text(model, inputs, 2, both)) == 9


def test_in_a_packed_tower_none_leaves_and_the_text_tower_drops() -> None:
    model, inputs = shared("qwen2_5_vl", DOUBLE), inputs_of("qwen2_5_vl")
    look = Look(tell=lambda call: call.columns("visual").sum(-1).flatten().tolist(), sites="text.*.self")
    with sc.attach(model, FlowCut(keep=0.25, slack=4.0), look):
        generated(model, inputs, 2)
    assert [told for _, phase, told in look.seen if phase == "prefill"] == [[16, 24]] * 2 + [[4, 6]] * 2
    with sc.attach(model, FlowCut(keep=0.25)), pytest.raises(InputError, match="in one row"):
        run(model, inputs)


# ---- the answer, and refusals ------------------------------------------------------------------------------


def test_all_kept_is_the_model() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    bare = run(model, inputs)
    with sc.attach(model, FlowCut(keep=1.0, slack=2.0)):
        assert_close(run(model, inputs), bare)


def test_where_a_feature_is_made_of_several_patches_it_is_said() -> None:
    with (
        sc.attach(shared("gemma3", DOUBLE), FlowCut(keep=0.3)),
        pytest.raises(InputError, match="one by one"),
    ):
        run(shared("gemma3", DOUBLE), inputs_of("gemma3"))


def test_a_prompt_in_pieces_is_refused_where_its_last_word_ranks() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava", (1,))
    with sc.attach(model, FlowCut(slack=4.0)), pytest.raises(InputError, match="prefill_chunk_size"):
        generated(model, inputs, prefill_chunk_size=10)


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    assert said(FlowCut(keep=1.0)) == said()
    assert seen(FlowCut(keep=0.25)) == [[36] * 4] * 8
    assert seen(FlowCut(keep=0.25, slack=2.0)) == [[72] * 4] * 2 + [[36] * 4] * 6
