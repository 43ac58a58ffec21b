"""FEATHER against a text tower that is run by hand, layer by layer, and queries and keys that are not rotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look, method, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction._parts.importance import by_last_word
from saccade.reduction.feather import Feather

from .embedded import said, seen
from .shared import Inputs, generated
from .towers import DOUBLE, best, inputs_of, tiles

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)
STAGES = (1, 2)
"""Of four layers: 8 and 16 of 32."""


def one(images: tuple[int, ...] = (1,)) -> Inputs:
    return {n: v for n, v in inputs_of("llava", images).items() if n != "attention_mask"}


# ---- the paper, one sample and one layer at a time -----------------------------------------------------------


def ranks(layer: Any, h: Tensor, picture: list[int]) -> list[float]:
    """Of a picture's tokens in a layer that is given h (1, tokens, width)."""
    attn, x = layer.self_attn, layer.input_layernorm(h)[0]
    q, k = (getattr(attn, f"{part}_proj")(x).unflatten(-1, (-1, 16)).transpose(0, 1) for part in "qk")
    return torch.stack([(k[n // 2, picture] @ q[n, -1] / 4).softmax(0) for n in range(4)]).mean(0).tolist()


@torch.no_grad()
def by_hand(
    model: Any, inputs: Inputs, keep: float, stride: int, more: Tensor | None = None
) -> tuple[Tensor, list[list[int]]]:
    """Logits of what is left at the end, and which places are left in every layer. `more` was written behind."""
    tower, ids = model.model.language_model, inputs["input_ids"]
    came: list[Tensor] = []
    hook = tower.layers[0].register_forward_pre_hook(lambda _, args: came.append(args[0]))
    run(model, inputs)
    hook.remove()
    h = came[0] if more is None else torch.cat([came[0], tower.embed_tokens(more)], 1)
    image = (ids[0] == model.config.image_token_id).tolist()
    starts = [i for i, here in enumerate(image) if here and not (i and image[i - 1])]
    pictures = [list(range(start, start + 36)) for start in starts]
    left, by_layer, judged = list(range(h.shape[1])), [], {}
    prompt = ids.shape[1]
    for number, layer in enumerate(tower.layers):
        if number in STAGES:
            stays = [i for i in left if not any(i in picture for picture in pictures)]
            for start, picture in zip(starts, pictures, strict=True):
                there = [i for i in picture if i in left]
                share = keep if number == STAGES[0] else keep**2
                chosen = {there[i] for i in best(judged[start], int(share * len(there)))}
                if number == STAGES[0]:
                    chosen |= {start + 6 * r + c for r in range(0, 6, stride) for c in range(0, 6, stride)}
                stays += chosen
            h, left = h[:, [left.index(i) for i in sorted(stays)]], sorted(stays)
        if number + 1 in STAGES:
            words = [left.index(i) for i in left if i < prompt]
            for start, picture in zip(starts, pictures, strict=True):
                judged[start] = ranks(layer, h[:, words], [left.index(i) for i in picture if i in left])
        by_layer.append(left)
        mask = torch.full((len(left), len(left)), torch.finfo(DOUBLE).min, dtype=DOUBLE).triu(1)[None, None]
        h = layer(h, attention_mask=mask, position_embeddings=tower.rotary_emb(h, torch.tensor(left)[None]))
    return model.lm_head(tower.norm(h)), by_layer


def left_in(model: Any, inputs: Inputs, *methods: Feather) -> list[list[int]]:
    look = Look(tell=lambda call: call.qpos.expand(1, -1)[0].tolist(), sites="text.*.self")
    with sc.attach(model, *methods, look):
        run(model, inputs)
    return [told for _, _, told in look.seen]


# ---- what stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "stride"), [(0.3, 3), (0.5, 2), (0.9, 5), (0.05, 3)])
def test_what_is_left_in_every_layer(keep: float, stride: int) -> None:
    """Both pictures of a prompt; positions are those of the whole prompt."""
    model, inputs = shared("llava", DOUBLE), one((2,))
    expected = by_hand(model, inputs, keep, stride)[1]
    assert left_in(model, inputs, Feather(keep=keep, stride=stride)) == expected
    first, second = len(expected[1]), len(expected[2])
    text = inputs["input_ids"].shape[1] - 72
    assert (first - text) >= 2 * int(keep * 36) and second >= text


def test_every_cell_of_the_grid_keeps_a_token_and_the_second_stage_counts_those_that_are_left() -> None:
    model, inputs = shared("llava", DOUBLE), one()
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    _, first, second, _ = (
        [image.index(i) for i in left if i in image] for left in left_in(model, inputs, Feather())
    )
    cells = {(i // 6 // 3, i % 6 // 3) for i in first}
    assert cells == {(r, c) for r in range(2) for c in range(2)}
    assert len(second) == int(0.3**2 * len(first)) and set(second) <= set(first)


def test_of_tiles_each_keeps_its_own_grid() -> None:
    """And with no share for attention nothing else stays."""
    model, inputs = shared("llava_next", DOUBLE), inputs_of("llava_next", (1,))
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    left = [image.index(i) for i in left_in(model, inputs, Feather(keep=0.0))[1] if i in image]
    tile, expected = tiles("llava_next")[0], []
    for number in set(tile) - {-1}:
        mine = [i for i, t in enumerate(tile) if t == number]  # rows of 4
        expected += [mine[at] for at in range(len(mine)) if at // 4 % 3 == 0 and at % 4 % 3 == 0]
    assert left == sorted(expected)


def test_in_a_batch_it_is_as_for_each_sample() -> None:
    model, inputs = shared("qwen2_5_vl", DOUBLE), inputs_of("qwen2_5_vl")
    look = Look(tell=lambda call: call.columns("visual").sum(-1).flatten().tolist(), sites="text.*.self")
    with sc.attach(model, Feather(), look):
        run(model, inputs)
    # 4 x 4, 4 x 4 and 2 x 4 tokens: 4 of the attention's and four or two of the grid's, at most
    first, second = look.seen[1][2], look.seen[2][2]
    assert look.seen[0][2] == [16, 24]
    assert 4 <= first[0] <= 8 and 4 + 2 <= first[1] <= 8 + 4
    assert second[0] == int(0.09 * first[0]) and second[1] <= int(0.09 * first[1])


# ---- the criterion -------------------------------------------------------------------------------------------


def scored(model: Any, inputs: Inputs, rotated: bool) -> Tensor:
    """Over the picture, before the layer below the first stage: (tokens,)."""
    found: list[Tensor] = []

    def tell(call: Any) -> None:
        (picture,) = call.items("visual")
        found.append(by_last_word(call.peek(rotated=rotated), picture)[picture])

    with sc.attach(model, method(tokens=tell)(sites="text.0.layer")):
        run(model, inputs)
    return found[0]


def test_without_positions_equal_keys_are_equal_and_with_them_they_are_not() -> None:
    """Where the query is like the keys its rotation makes those near it the larger."""
    model, inputs = shared("llava", DOUBLE), one()
    attn = model.model.language_model.layers[0].self_attn
    image = inputs["input_ids"][0] == model.config.image_token_id
    slow = torch.arange(16) % 8 >= 3  # less than half a circle from end to end of the picture
    key = 3 * slow.double().repeat(4)

    def alike(_: Any, __: Any, k: Tensor) -> Tensor:
        k = k.clone()
        k[:, image] = key[:32]
        return k

    hooks = [
        attn.k_proj.register_forward_hook(alike),
        attn.q_proj.register_forward_hook(lambda _, __, q: key.expand_as(q)),
    ]
    flat, sloped = scored(model, inputs, rotated=False), scored(model, inputs, rotated=True)
    for hook in hooks:
        hook.remove()
    assert_close(flat, torch.full_like(flat, 1 / 36), atol=1e-6, rtol=0)
    order = sloped.argsort().argsort().double()
    spearman = torch.corrcoef(torch.stack([order, torch.arange(36).double()]))[0, 1]
    assert abs(float(spearman)) > 0.5


def test_words_keys_do_not_count() -> None:
    model, inputs = shared("llava", DOUBLE), one()
    attn = model.model.language_model.layers[0].self_attn
    words = (inputs["input_ids"][0] != model.config.image_token_id)[None, :, None]
    before = scored(model, inputs, rotated=False)
    hook = attn.k_proj.register_forward_hook(lambda _, __, k: torch.where(words, 7 * k, k))
    after = scored(model, inputs, rotated=False)
    hook.remove()
    assert torch.equal(before, after)


# ---- the answer, and refusals --------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_shorter_prompts_at_their_old_positions() -> None:
    model, inputs = shared("llava", DOUBLE), one((2,))
    with sc.attach(model, Feather()):
        got = generated(model, inputs, 4)
    written = got.sequences[:, inputs["input_ids"].shape[1] :]
    expected, by_layer = by_hand(model, inputs, 0.3, 3, more=written)
    assert_close(torch.stack(got.logits, 1), expected[:, -5:-1].float(), atol=1e-5, rtol=0)
    held = [layer.keys.shape[2] for layer in got.past_key_values.layers]
    assert held == [len(left) - 1 for left in by_layer]  # the last word was not read


def test_all_kept_is_the_model() -> None:
    model, inputs = shared("llava"), family("llava").inputs(images=(1, 2))
    bare = run(model, inputs)
    with sc.attach(model, Feather(keep=1.0)):
        assert torch.equal(run(model, inputs), bare)


def test_stages_that_are_none_are_refused() -> None:
    for stages in (("0", "2"), ("2", "2")):
        with sc.attach(shared("llava"), Feather(stages=stages)), pytest.raises(InputError, match="layers"):
            run(shared("llava"), family("llava").inputs())


def test_a_prompt_in_pieces_is_refused() -> None:
    with sc.attach(shared("llava", DOUBLE), Feather()), pytest.raises(InputError, match="prefill_chunk_size"):
        generated(shared("llava", DOUBLE), one(), prefill_chunk_size=10)


def test_of_the_world_it_sees_ever_less_and_with_all_it_answers_as_ever() -> None:
    """Of 12 x 12 tokens the grid has 16, some of which attention keeps too."""
    assert said(Feather(keep=1.0)) == said()
    counts = seen(Feather(keep=0.3))
    assert counts[:2] == [[144] * 4] * 2 and counts[2] == counts[3] and counts[4] == counts[7]
    assert all(43 < count <= 43 + 16 for count in counts[2])
    assert counts[4] == [int(0.3**2 * count) for count in counts[2]]
