"""MustDrop against a vision and a text tower that are run by hand, layer by layer, window by window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.mustdrop import MustDrop, likeness, windows

from .embedded import said, seen
from .shared import Inputs, generated
from .towers import DIM, DOUBLE, HEADS, best, inputs_of, kept

MODELS = ("llava", "llava_next")
EXAMPLE = {"similarity": 0.3, "global_thr": 0.03, "individual_thr": 0.5}
DISCRETE = ("similarity", "global_thr", "individual_thr")
BFLOAT16 = {"key": 0.0, "global_thr": 1.0, "individual_thr": 2.0}
NONE = {"similarity": 1.1, "global_thr": 0.0, "individual_thr": 0.0}
STAGES = (1, 2)
SITES = {"observe": "vision.*.self|text.1.self|text.2.self", "tokens": "vision.1.layer|text.*.layer"}


def one(images: tuple[int, ...] = (1,)) -> Inputs:
    return {n: v for n, v in inputs_of("llava", images).items() if n != "attention_mask"}


# ---- the paper, one picture, one window and one layer at a time ------------------------------------------------


def cosine(h: Tensor, window: list[int]) -> float:
    """Mean over all ordered pairs of different members."""
    pairs = [(a, b) for a in window for b in window if a != b]
    return sum(float(torch.cosine_similarity(h[a], h[b], dim=0)) for a, b in pairs) / len(pairs)


def windows_by_hand(side: int) -> list[list[int]]:
    corners = [(r, c) for r in range(0, side - 2, 3) for c in range(0, side - 2, 3)]
    return [[side * (r + i) + c + j for i in range(3) for j in range(3)] for r, c in corners]


@torch.no_grad()
def seen_by_tower(
    model: Any, inputs: Inputs, similarity: float, key: float
) -> list[tuple[list[int], Tensor, list[int]]]:
    """Of every picture which patches stand for what is left, its features, and which of them are the key set."""
    first, second, last = model.model.vision_tower.encoder.layers
    came: list[Tensor] = []
    hook = first.register_forward_hook(
        lambda _, __, out: came.append(out[0] if isinstance(out, tuple) else out)
    )
    run(model, inputs)
    hook.remove()
    found = []
    for h in came[0]:
        patches, stands = h[1:], {i: [i] for i in range(36)}
        for window in windows_by_hand(6):
            if cosine(patches, window) >= similarity:
                stands = {i: own for i, own in stands.items() if i not in window} | {window[0]: window}
        left = sorted(stands)
        x = torch.stack([h[0], *(patches[stands[i]].mean(0) for i in left)])[None]
        out = second(x, attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
        normed = last.layer_norm1(out)[0]
        q, k = (
            getattr(last.self_attn, f"{part}_proj")(normed).unflatten(-1, (HEADS, DIM)).transpose(0, 1)
            for part in "qk"
        )
        w = torch.stack([(k[n] @ q[n, 0] / DIM**0.5).softmax(0) for n in range(HEADS)]).mean(0)[1:]
        chosen = best(w.tolist(), math.ceil(key * len(left)))
        found.append((left, model.model.multi_modal_projector(out[0, 1:]), [left[i] for i in chosen]))
    return found


def middle(model: Any, inputs: Inputs) -> float:
    """A similarity that some windows have and some have not."""
    found: list[Tensor] = []
    hook = model.model.vision_tower.encoder.layers[0].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    run(model, inputs)
    hook.remove()
    like = sorted(cosine(h[1:], window) for h in found[0] for window in windows_by_hand(6))
    return (like[len(like) // 2 - 1] + like[len(like) // 2]) / 2


def weights(layer: Any, tower: Any, h: Tensor) -> Tensor:
    """Mean over heads, (tokens, tokens), at positions 0, 1, .."""
    attn, x = layer.self_attn, layer.input_layernorm(h)
    cos, sin = (part[0] for part in tower.rotary_emb(x, torch.arange(h.shape[1])[None]))
    q, k = (getattr(attn, f"{part}_proj")(x)[0].unflatten(-1, (-1, 16)).transpose(0, 1) for part in "qk")
    q, k = (t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin for t in (q, k))
    s = q @ k.repeat_interleave(2, 0).mT / 4
    return s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1).mean(0)


def dropped(
    w: Tensor, words: list[int], picture: list[int], safe: set[int], low: float, most: float
) -> set[int]:
    """The double loop."""
    g = {j: sum(float(w[i, j]) for i in words) for j in picture}
    return {
        j
        for j in picture
        if j not in safe and g[j] < low * sum(g.values()) and max(float(w[i, j]) for i in words) < most
    }


@torch.no_grad()
def by_hand(
    model: Any, inputs: Inputs, method: MustDrop, more: Tensor | None = None
) -> tuple[Tensor, list[list[int]]]:
    """Logits of what is left at the end, and which places of the prompt come to every layer. `more` was written
    behind it, and sees in the stages' layers only what was left behind them all."""
    tower, ids = model.model.language_model, inputs["input_ids"][0]
    image = [i for i, token in enumerate(ids.tolist()) if token == model.config.image_token_id]
    safe, gone, embeds = set(), set(), model.get_input_embeddings()(ids)
    for number, (left, features, key) in enumerate(
        seen_by_tower(model, inputs, method.similarity, method.key)
    ):
        places = image[36 * number : 36 * (number + 1)]
        gone |= {place for i, place in enumerate(places) if i not in left}
        embeds[[places[i] for i in left]] = features
        safe |= {places[i] for i in key}
    left = [i for i in range(len(ids)) if i not in gone]
    h, prompt = embeds[left][None], len(ids)
    if more is not None:
        h = torch.cat([h, tower.embed_tokens(more)[None]], 1)
        left = [*left, *range(prompt, prompt + len(more))]
        final = set(by_hand(model, inputs, method)[1][-1])
    by_layer = []
    for number, layer in enumerate(tower.layers):
        by_layer.append([i for i in left if i < prompt])
        tokens = len(left)
        mask = torch.full((tokens, tokens), torch.finfo(DOUBLE).min, dtype=DOUBLE).triu(1)
        if more is not None and STAGES[0] <= number <= STAGES[-1]:
            for row, i in enumerate(left):
                for column, j in enumerate(left):
                    if i >= prompt > j and j not in final:
                        mask[row, column] = torch.finfo(DOUBLE).min
        places = [left.index(i) for i in by_layer[-1]]
        w = weights(layer, tower, h[:, places])
        positions = tower.rotary_emb(h, torch.arange(tokens)[None])
        h = layer(h, attention_mask=mask[None, None], position_embeddings=positions)
        if number in STAGES:
            out: set[int] = set()
            words = [n for n, i in enumerate(by_layer[-1]) if i not in image]
            for number_ in range(len(image) // 36):
                part = [
                    n for n, i in enumerate(by_layer[-1]) if i in image[36 * number_ : 36 * (number_ + 1)]
                ]
                keys = {n for n in part if by_layer[-1][n] in safe}
                out |= dropped(w, words, part, keys, method.global_thr, method.individual_thr)
            stays = [i for i in left if i >= prompt or by_layer[-1].index(i) not in out]
            h, left = h[:, [left.index(i) for i in stays]], stays
    return model.lm_head(tower.norm(h)), by_layer


def left_in(model: Any, inputs: Inputs, *methods: MustDrop) -> list[list[int]]:
    look = Look(tell=lambda call: call.qpos.expand(1, -1)[0].tolist(), sites="text.*.self")
    with sc.attach(model, *methods, look):
        run(model, inputs)
    return [told for _, _, told in look.seen]


# ---- in the vision tower ---------------------------------------------------------------------------------------


def test_windows_merge_where_they_are_alike_to_their_mean() -> None:
    """Every patch is in exactly one feature."""
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    similarity = middle(model, inputs)
    expected = seen_by_tower(model, inputs, similarity, 0.08)
    assert len({len(left) for left, _, _ in expected}) > 1  # pictures merge different numbers
    method = MustDrop(**{**NONE, "similarity": similarity})
    assert kept("llava", model, inputs, method) == [left for left, _, _ in expected]
    got: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: got.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with sc.attach(model, method):
        run(model, inputs)
    hook.remove()
    visual = got[0][inputs["input_ids"] == model.config.image_token_id].split(36)
    for features, (left, by_hand_, _) in zip(visual, expected, strict=True):
        assert_close(features[left], by_hand_, atol=1e-9, rtol=0)


def test_what_is_all_alike_is_one_token_for_each_window() -> None:
    assert [sorted(window) for window in windows(24).tolist()] == windows_by_hand(24) and len(
        windows(24)
    ) == 64
    assert len(windows(7)) == 4 and len(windows(2)) == 0
    assert_close(likeness(torch.ones(2, 9, 5)), torch.ones(2))
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")

    def flat(_: Any, __: Any, out: Any) -> Any:
        return out[:, :1].expand_as(out).clone()

    hook = model.model.vision_tower.encoder.layers[0].register_forward_hook(flat)
    found = kept("llava", model, inputs, MustDrop(**{**NONE, "similarity": 0.8}))
    hook.remove()
    assert found == [[0, 3, 18, 21]] * 3


def test_a_packed_tower_is_refused_unless_none_is_to_merge() -> None:
    model, inputs = shared("qwen2_5_vl", DOUBLE), inputs_of("qwen2_5_vl")
    with sc.attach(model, MustDrop()), pytest.raises(InputError, match="similarity"):
        run(model, inputs)
    look = Look(tell=lambda call: call.columns("visual").sum(-1).flatten().tolist(), sites="text.*.self")
    with sc.attach(model, MustDrop(similarity=1.1, key=0.25, global_thr=1.0, individual_thr=2.0), look):
        generated(model, inputs, 2)
    prefill = [told for _, phase, told in look.seen if phase == "prefill"]
    assert prefill == [[16, 24]] + [[4, 6]] * 3  # but for the key set


# ---- in the text tower -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "most"), [(0.028, 0.2), (0.027, 1.0), (1.0, 0.02)])
def test_what_is_left_in_every_layer(low: float, most: float) -> None:
    model, inputs = shared("llava", DOUBLE), one((2,))
    method = MustDrop(
        similarity=middle(model, inputs_of("llava")), global_thr=low, individual_thr=most, sites=SITES
    )
    expected = by_hand(model, inputs, method)[1]
    assert left_in(model, inputs, method) == expected
    counts = [len(left) for left in expected]
    assert counts == sorted(counts, reverse=True) and counts[3] < counts[1]


def test_the_key_set_survives_any_thresholds() -> None:
    model, inputs = shared("llava", DOUBLE), one()
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    ((_, _, key),) = seen_by_tower(model, inputs, 1.1, 0.2)
    method = MustDrop(similarity=1.1, key=0.2, global_thr=1.0, individual_thr=2.0, sites=SITES)
    assert [image.index(i) for i in left_in(model, inputs, method)[3] if i in image] == key
    assert len(key) == math.ceil(0.2 * 36)


# ---- the answer ------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_shorter_prompts_of_which_the_cache_keeps_the_last() -> None:
    model, inputs = shared("llava", DOUBLE), one((2,))
    similarity = middle(model, inputs_of("llava"))
    method = MustDrop(similarity=similarity, global_thr=0.03, individual_thr=0.5, sites=SITES)
    with sc.attach(model, method):
        got = generated(model, inputs, 4)
    written = got.sequences[0, inputs["input_ids"].shape[1] :]
    expected, by_layer = by_hand(model, inputs, method, more=written)
    assert_close(torch.cat(got.logits), expected[0, -5:-1].float(), atol=1e-5, rtol=0)
    held = [layer.keys.shape[2] - 3 for layer in got.past_key_values.layers]
    assert held == [len(by_layer[0])] + [len(by_layer[3])] * 3 and held[0] > held[1]


def test_with_nothing_merged_or_dropped_it_is_the_model() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    bare = run(model, inputs)
    with sc.attach(model, MustDrop(**NONE)):
        assert_close(run(model, inputs), bare)


def test_a_prompt_in_pieces_is_refused() -> None:
    with (
        sc.attach(shared("llava", DOUBLE), MustDrop(**NONE)),
        pytest.raises(InputError, match="prefill_chunk_size"),
    ):
        generated(shared("llava", DOUBLE), one(), prefill_chunk_size=10)


def test_of_the_world_it_sees_ever_less_and_with_all_it_answers_as_ever() -> None:
    assert said(MustDrop(**NONE)) == said()
    counts = seen(MustDrop(similarity=1.1, key=0.25, global_thr=1.0, individual_thr=2.0))
    assert counts == [[144] * 4] + [[36] * 4] * 7
