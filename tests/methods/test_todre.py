"""ToDRE against a greedy search by brute force, and the two shares against explicit softmaxes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import Look, method, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.todre import ToDRE, diverse, meeting

from .embedded import said, seen
from .shared import Inputs, generated
from .towers import DIM, DOUBLE, HEADS, PICTURES, inputs_of, kept, tiles

EXAMPLE = {"keep": 0.3}
DISCRETE = ("keep", "tau")
NAMES = tuple(PICTURES)
CHECK = {"observe": "vision.-1.self|text.1.self", "tokens": "text.*.layer"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def greedy(x: Tensor, first: int, count: int, over: Any) -> list[int]:
    """By brute force, all cosines anew at every step."""
    cosine = torch.cosine_similarity(x[:, None], x[None], dim=-1).tolist()
    chosen = [first]
    while len(chosen) < count:
        rest = [j for j in range(len(x)) if j not in chosen]
        chosen.append(min(rest, key=lambda j: over(cosine[j][i] for i in chosen)))
    return chosen


# ---- a diverse few ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("diversity", "over"), [("sum", sum), ("center", max)])
def test_the_next_is_the_least_alike(diversity: str, over: Any) -> None:
    x = noise(40, 6)
    for first, count in ((3, 12), (39, 40), (0, 1)):
        chosen = diverse(x, first, count, diversity).tolist()
        assert chosen == greedy(x, first, count, over)
        assert chosen[0] == first and len(set(chosen)) == count


def test_centers_cover_within_twice_the_optimum() -> None:
    for seed in range(5):
        x = torch.nn.functional.normalize(noise(9, 3, seed=seed), dim=-1)
        apart = torch.cdist(x, x)
        chosen = diverse(x, 0, 3, "center")
        optimum = min(float(apart[list(c)].min(0).values.max()) for c in itertools.combinations(range(9), 3))
        assert float(apart[chosen].min(0).values.max()) <= 2 * optimum + 1e-9


@pytest.mark.parametrize("diversity", ["sum", "center"])
def test_a_duplicate_comes_after_what_is_orthogonal(diversity: str) -> None:
    x = torch.eye(4, dtype=DOUBLE)[[0, 0, 1, 2, 3]]
    assert diverse(x, 0, 4, diversity).tolist() == [0, 2, 3, 4]


# ---- in a model -------------------------------------------------------------------------------------------


def features(model: Any, inputs: Inputs) -> Tensor:
    """All visual rows, in the prompt's order."""
    got: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: got.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    run(model, inputs)
    hook.remove()
    return got[0][inputs["input_ids"] == model.config.image_token_id]


def looked_at(model: Any, inputs: Inputs) -> list[Tensor]:
    """By hand, of every tile the class token's attention on patches in the tower's last layer."""
    attn, outs = model.model.vision_tower.encoder.layers[-1].self_attn, {}
    hooks = [
        getattr(attn, f"{part}_proj").register_forward_hook(
            lambda _, __, out, part=part: outs.update({part: out.unflatten(-1, (HEADS, DIM)).transpose(1, 2)})
        )
        for part in "qk"
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return list((outs["q"][:, :, :1] @ outs["k"].mT / DIM**0.5).softmax(-1).mean(1)[:, 0, 1:])


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_the_first_is_the_class_tokens_in_the_last_layer_and_order_is_restored(name: str) -> None:
    """Of tiles the first view's."""
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    looks, x, expected = looked_at(model, inputs), features(model, inputs), []
    for tile, part in zip(tiles(name), x.split(PICTURES[name]), strict=True):
        patches = [i for i, t in enumerate(tile) if t >= 0]
        pivot = int(looks[tile[0]].argmax())
        chosen = greedy(part[patches], pivot, max(1, round(0.2 * len(patches))), sum)
        expected.append(sorted([*(patches[i] for i in chosen), *(i for i, t in enumerate(tile) if t < 0)]))
    assert kept(name, model, inputs, ToDRE(keep=0.2, tau=0.0)) == expected


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_without_a_class_token_the_first_is_drawn(name: str) -> None:
    model, inputs = shared(name, DOUBLE), inputs_of(name)
    parts = features(model, inputs).split(PICTURES[name])
    found = kept(name, model, inputs, ToDRE(keep=0.25, tau=0.0, seed=3))
    for picture, part in zip(found, parts, strict=True):
        count = round(0.25 * len(part))
        assert picture in [sorted(greedy(part, first, count, sum)) for first in range(len(part))]
    others = (kept(name, model, inputs, ToDRE(keep=0.25, tau=0.0, seed=seed)) for seed in range(4, 8))
    assert any(other != found for other in others)


# ---- words and picture ------------------------------------------------------------------------------------


def one() -> Inputs:
    return {n: v for n, v in inputs_of("llava", (1,)).items() if n != "attention_mask"}


@torch.no_grad()
def shares(model: Any, inputs: Inputs) -> tuple[float, float]:
    """Of one sample in the text tower's layer 1, by its own q and k."""
    attn, given = model.model.language_model.layers[1].self_attn, {}
    hook = attn.register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    run(model, inputs)
    hook.remove()
    x, (cos, sin) = given["hidden_states"], (part[0] for part in given["position_embeddings"])
    q, k = (getattr(attn, f"{part}_proj")(x)[0].unflatten(-1, (-1, 16)).transpose(0, 1) for part in "qk")
    q, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (q, k))
    s = q @ k.repeat_interleave(2, 0).mT / 4
    w = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1).mean(0)
    image = inputs["input_ids"][0] == model.config.image_token_id
    return float(w[~image][:, image].sum() / w[~image].sum()), float(
        w[image][:, ~image].sum() / w[image].sum()
    )


def lengths(model: Any, inputs: Inputs, *methods: ToDRE) -> list[int]:
    with sc.attach(model, *methods):
        cache = generated(model, inputs, 1).past_key_values
    return [layer.keys.shape[2] for layer in cache.layers]


def test_the_shares_are_those_of_the_softmax() -> None:
    model, look = shared("llava", DOUBLE), Look(tell=meeting, sites="text.1.self")
    with sc.attach(model, look):
        run(model, one())
    assert [float(share) for share in look.seen[0][2]] == pytest.approx(shares(model, one()), abs=1e-6)


def test_visual_tokens_leave_where_both_shares_are_below_tau() -> None:
    model, inputs = shared("llava", DOUBLE), one()
    low, high = sorted(shares(model, inputs))
    tokens = inputs["input_ids"].shape[1]
    assert high - low > 1e-3
    for tau, left in ((low - 1e-4, tokens), ((low + high) / 2, tokens), (high + 1e-4, tokens - 36)):
        assert lengths(model, inputs, ToDRE(keep=1.0, tau=tau, sites=CHECK)) == [tokens, tokens, left, left]


def test_in_a_batch_each_sample_leaves_for_itself() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    look, ends = (
        Look(tell=tell, sites=f"text.{layer}.self")
        for layer, tell in ((1, meeting), (3, lambda call: call.columns("visual").sum(-1).flatten().tolist()))
    )
    with sc.attach(model, look):
        run(model, inputs)
    highest = torch.stack(look.seen[0][2]).amax(0).tolist()
    with sc.attach(model, ToDRE(keep=1.0, tau=sum(highest) / 2, sites=CHECK), ends):
        run(model, inputs)
    stays = [36 if highest[0] > highest[1] else 0, 72 if highest[1] > highest[0] else 0]
    assert ends.seen[0][2] == stays


def test_where_no_word_looks_at_the_picture_any_more_nothing_is_lost() -> None:
    model, inputs = shared("llava", DOUBLE), one()
    blind = method(bias=lambda call: -1e9 * call.columns("visual"))(sites="text.2:.self")
    words = inputs["input_ids"][0] != model.config.image_token_id
    with sc.attach(model, blind):
        expected = run(model, inputs)
    with sc.attach(model, ToDRE(keep=1.0, tau=1.0, sites=CHECK)):
        assert_close(run(model, inputs)[:, words], expected[:, words], atol=1e-5, rtol=0)


def test_all_kept_and_never_left_is_the_model() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    bare = run(model, inputs)
    with sc.attach(model, ToDRE(keep=1.0, tau=0.0)):
        assert_close(run(model, inputs), bare)


def test_a_prompt_in_pieces_is_refused_where_attention_is_checked() -> None:
    with (
        sc.attach(shared("llava", DOUBLE), ToDRE(sites=CHECK)),
        pytest.raises(InputError, match="prefill_chunk_size"),
    ):
        generated(shared("llava", DOUBLE), one(), prefill_chunk_size=10)


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    assert said(ToDRE(keep=1.0, tau=0.0)) == said()
    assert seen(ToDRE(keep=0.25, tau=0.0)) == [[36] * 4] * 8
    early = {**CHECK, "observe": "vision.-1.self|text.50%.self"}
    assert seen(ToDRE(keep=0.25, tau=1.0, sites=early)) == [[36] * 4] * 5 + [[0] * 4] * 3
