"""PyramidDrop against a text tower that is run by hand, layer by layer, on shorter and shorter prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.site import layers
from saccade.reduction.pyramiddrop import PyramidDrop

from .shared import Inputs, alone, generated, two

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("keep",)
DOUBLE = torch.float64
DROPS = (1, 2, 3)
"""Of four layers, those before which tokens leave: 8, 16 and 24 of 32."""


# ---- the paper, one sample and one layer at a time -------------------------------------------------------


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attention_of(layer: Any, tower: Any, h: Tensor, rows: list[int]) -> Tensor:
    """Weights of some rows in a layer that is given h, mean over heads: (rows, tokens)."""
    tokens, attention = h.shape[1], layer.self_attn
    x = layer.input_layernorm(h)
    cos, sin = tower.rotary_emb(x, torch.arange(tokens)[None])
    q = rotated(attention.q_proj(x).unflatten(-1, (4, 16))[0].transpose(0, 1), cos, sin)
    k = rotated(attention.k_proj(x).unflatten(-1, (2, 16))[0].transpose(0, 1), cos, sin)
    w = []
    for row in rows:
        scores = torch.stack([k[head // 2, : row + 1] @ q[head, row] for head in range(4)]) / 4
        w.append(F.pad(scores.softmax(-1).mean(0), (0, tokens - row - 1)))
    return torch.stack(w)


@torch.no_grad()
def by_hand(
    model: Any, inputs: Inputs, keep: float = 0.5, more: Tensor | None = None, asks: list[int] | None = None
) -> tuple[Tensor, list[list[int]]]:
    """Logits of the tokens that are left at the end, and which are left in every layer. `more` was written
    behind the prompt; `asks` are the words that rank, the last of the prompt unless given."""
    tower, ids = model.model.language_model, inputs["input_ids"]
    seen: list[Tensor] = []
    hook = tower.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, {name: v for name, v in inputs.items() if name != "labels"})
    hook.remove()
    h = seen[0] if more is None else torch.cat([seen[0], tower.embed_tokens(more)], 1)
    image = (ids[0] == model.config.image_token_id).tolist()
    starts = [i for i, here in enumerate(image) if here and not (i and image[i - 1])]
    pictures = [[j for j in range(s, len(image)) if all(image[s : j + 1])] for s in starts]
    left, by_layer = list(range(h.shape[1])), []
    asks = [ids.shape[1] - 1] if asks is None else asks
    for number, layer in enumerate(tower.layers):
        if number in DROPS:
            w = attention_of(layer, tower, h, [left.index(i) for i in asks]).mean(0)
            stays = [i for i in left if i >= len(image) or not image[i]]
            for picture in pictures:
                size = int(len(picture) * keep ** (1 + DROPS.index(number)))
                there = [i for i in picture if i in left]
                stays += sorted(there, key=lambda i: -float(w[left.index(i)]))[:size]
            h, left = h[:, [left.index(i) for i in sorted(stays)]], sorted(stays)
        by_layer.append(left)
        tokens = h.shape[1]
        mask = torch.full((tokens, tokens), torch.finfo(DOUBLE).min, dtype=DOUBLE).triu(1)[None, None]
        positions = torch.arange(tokens)[None]
        h = layer(h, attention_mask=mask, position_embeddings=tower.rotary_emb(h, positions))
    return model.lm_head(tower.norm(h)), by_layer


def sample(images: tuple[int, ...] = (1,)) -> Inputs:
    inputs = family("llava").inputs(images=images)
    return {n: v.double() if v.is_floating_point() else v for n, v in inputs.items() if n != "attention_mask"}


def kept(model: Any, inputs: Inputs, *methods: Any) -> dict[int, list[int]]:
    """The places of the prompt that come to every layer, seen from its attention."""
    look = Look(tell=lambda call: (call.qpos.expand(1, -1))[0].tolist(), sites="text.*.self")
    with sc.attach(model, *methods, look):
        run(model, inputs)
    return {number: look.at(f"text.{number}.self")[0] for number in range(4)}


# ---- the statements --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.5, 0.7, 0.1, 0.0])
@pytest.mark.parametrize("images", [(1,), (2,)])
def test_what_is_left_in_every_layer(images: tuple[int, ...], keep: float) -> None:
    model, inputs = shared("llava", DOUBLE), sample(images)
    expected = by_hand(model, inputs, keep)[1]
    found = kept(model, inputs, PyramidDrop(keep=keep))
    assert list(found.values()) == expected
    text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    assert [len(found[n]) for n in range(4)] == [text + images[0] * int(keep**n * 36) for n in range(4)]


def test_the_answer_is_that_of_the_shorter_prompts() -> None:
    """Positions are 0 .. n-1 behind every drop, in the prompt and for what is written."""
    model, inputs = shared("llava", DOUBLE), sample((2,))
    with sc.attach(model, PyramidDrop()):
        got = generated(model, inputs, 6)
    written = got.sequences[:, inputs["input_ids"].shape[1] :]
    expected = by_hand(model, inputs, more=written)[0]
    assert_close(torch.stack(got.logits, 1), expected[:, -7:-1].float(), atol=1e-5, rtol=0)


def test_before_the_first_drop_nothing_has_changed() -> None:
    model, inputs = shared("llava", DOUBLE), sample()
    seen: list[Tensor] = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda _, args, out: seen.append(out))
    bare = run(model, inputs)
    with sc.attach(model, PyramidDrop()):
        assert not torch.equal(run(model, inputs), bare)
    hook.remove()
    assert torch.equal(seen[0], seen[1])


def test_words_stay_and_unequal_samples_do_not_disturb_each_other() -> None:
    model = shared("llava", DOUBLE)
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in two(family("llava")).items()}
    look = Look(tell=lambda call: call.klayout.where("visual"), sites="text.0.self")
    ends = Look(tell=lambda call: call.qpos, sites="text.3.self")
    with sc.attach(model, PyramidDrop(), look, ends):
        run(model, inputs)
    visual, left = look.seen[0][2], ends.seen[0][2]
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
        stays = [i for i in left[row].tolist() if i >= 0]
        words = [i for i in range(len(ids)) if not visual[row, i] and mask[i]]
        assert set(words) <= set(stays)
        gap = int((mask == 0).sum())
        single = by_hand(model, {n: v for n, v in alone(inputs, row).items() if n != "attention_mask"})[1][3]
        assert [i - gap for i in stays if mask[i]] == single


def test_the_papers_layers_of_32() -> None:
    assert [layers(span, 32)[0] for span in ("25%", "50%", "75%")] == [8, 16, 24]
    with sc.attach(shared("llava"), PyramidDrop()) as session:
        assert tuple(s.layer for s, plan in session.plans.items() if plan.tokens) == DROPS


# ---- training --------------------------------------------------------------------------------------------


def labelled(inputs: Inputs, answers: list[range]) -> Inputs:
    labels = torch.full_like(inputs["input_ids"], -100)
    for answer in answers:
        labels[0, list(answer)] = inputs["input_ids"][0, list(answer)]
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("starts", [(42,), (42, 45)])
def test_with_labels_the_words_before_answers_rank(starts: tuple[int, ...]) -> None:
    model, inputs = family("llava").build().double(), sample()
    inputs = labelled(inputs, [range(s, s + 2) for s in starts])
    logits, by_layer = by_hand(model, inputs, asks=[s - 1 for s in starts])
    left = by_layer[-1]
    targets = inputs["labels"][0, [i for i in left if i > 0]]
    expected = F.cross_entropy(logits[0, :-1], targets, ignore_index=-100)
    with sc.attach(model, PyramidDrop()):
        loss = model(**inputs).loss
    assert_close(loss, expected.float(), atol=1e-5, rtol=0)
    loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_sample_without_an_answer_keeps_everything() -> None:
    model, inputs = shared("llava", DOUBLE), labelled(sample(), [])
    assert {len(places) for places in kept(model, inputs, PyramidDrop()).values()} == {
        inputs["input_ids"].shape[1]
    }


# ---- refusals --------------------------------------------------------------------------------------------


def test_a_prompt_in_pieces_is_refused() -> None:
    model, inputs = shared("llava", DOUBLE), sample()
    with sc.attach(model, PyramidDrop()), pytest.raises(InputError, match="prefill_chunk_size"):
        generated(model, inputs, prefill_chunk_size=10)


def test_a_prompt_of_words_alone_is_left_as_it_is() -> None:
    model, inputs = shared("llava", DOUBLE), {"input_ids": torch.arange(100, 120)[None]}
    bare = run(model, inputs)
    with sc.attach(model, PyramidDrop()):
        assert torch.equal(run(model, inputs), bare)
