"""VMTC's means by hand, and CMAI against attention that is edited row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Look, heads_input, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import run
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.vmtc_cmai import VMTCCMAI

from .embedded import said, seen
from .shared import followed, generated
from .towers import DOUBLE, best, inputs_of, kept, scores

MODELS = ("llava", "paligemma")
EXAMPLE = {"keep": 0.25, "merge": 0.1}
DISCRETE = ("keep", "rho")
BFLOAT16 = {"keep": 1.0, "rho": 1.0}


# ---- VMTC -------------------------------------------------------------------------------------------------


def projected(model: Any, inputs: Any, *methods: VMTCCMAI) -> Tensor:
    """What the projector reads of the first picture: (36, width)."""
    with sc.attach(model, *methods):
        given = heads_input(model, "model.multi_modal_projector", lambda: run(model, inputs))
    return given[-1].flatten(0, -2)[:36]


def test_primary_tokens_go_as_they_are_and_the_means_keep_the_mean_of_the_others() -> None:
    """k + m tokens. Each mean is of some of the others, each of them in one."""
    model, inputs = shared("llava", DOUBLE), inputs_of("llava", (1,))
    method = VMTCCMAI(keep=0.25, merge=4 / 36, rho=0.0)
    primary = best(scores("llava", model, inputs_of("llava"))[0], 9)
    (mine, *_) = kept("llava", shared("llava", DOUBLE), inputs_of("llava"), method)
    assert set(primary) < set(mine) and len(mine) == 9 + 4
    bare, got = projected(model, inputs), projected(model, inputs, method)
    assert torch.equal(got[primary], bare[primary])
    means = got[[i for i in mine if i not in primary]]
    others = bare[[i for i in range(36) if i not in primary]]
    cluster = torch.stack([(others - mean).norm(dim=1) for mean in means]).argmin(0).tolist()
    sizes = [cluster.count(c) for c in range(4)]
    for c, mean in enumerate(means):
        assert_close(mean, torch.stack([x for x, at in zip(others, cluster) if at == c]).mean(0))
    assert_close(sum(n * mean for n, mean in zip(sizes, means, strict=True)) / 27, others.mean(0))


def test_behind_the_projector_too_and_there_with_merged_patches() -> None:
    found = kept("qwen2_5_vl", shared("qwen2_5_vl", DOUBLE), inputs_of("qwen2_5_vl"), VMTCCMAI(stage="after"))
    assert [len(picture) for picture in found] == [3 + 1, 3 + 1, 2 + 0]
    with (
        sc.attach(shared("qwen2_5_vl", DOUBLE), VMTCCMAI()),
        pytest.raises(InputError, match="stage='after'"),
    ):
        run(shared("qwen2_5_vl", DOUBLE), inputs_of("qwen2_5_vl"))


# ---- CMAI -------------------------------------------------------------------------------------------------


def softmax_of(call: Any) -> tuple[Tensor, Tensor]:
    """The layer's weights without and with the method: (heads, rows, keys) each, of one sample."""
    return call.weights(native=True)[0], call.weights()[0]


def inhibited(bare: Tensor, image: list[int], rho: float) -> Tensor:
    """The weights (heads, tokens, tokens), edited row by row."""
    tokens = bare.shape[1]
    asking = [i for i in range(tokens) if i not in image]
    mean = bare.mean(0)
    focus = torch.einsum("ij,jt->it", mean[asking][:, asking], mean[asking][:, image])
    new = bare.clone()
    for i, row in zip(asking, focus.tolist(), strict=True):
        there = [(value, t) for value, t in zip(row, image, strict=True) if t <= i]
        for _, t in sorted(there)[: math.floor(rho * len(there))]:
            new[:, i, t] = 0
    return new / new.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_each_word_is_kept_from_what_the_words_before_it_looked_at_least(name: str) -> None:
    model = shared(name, DOUBLE)
    inputs = {n: v for n, v in inputs_of(name, (2,)).items() if n != "attention_mask"}
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    look = Look(tell=softmax_of, sites="text.*.self")
    with sc.attach(model, VMTCCMAI(keep=1.0, rho=0.5, stage="after"), look):
        run(model, inputs)
    for _, _, (bare, got) in look.seen:
        assert_close(got, inhibited(bare, image, 0.5), atol=1e-10, rtol=0)
        assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
    assert ((got == 0) & (bare > 0)).sum() > 0


def test_written_words_are_inhibited_as_if_the_prompt_had_held_them() -> None:
    model = shared("llava", DOUBLE)
    inputs = {n: v for n, v in inputs_of("llava", (1,)).items() if n != "attention_mask"}
    with sc.attach(model, VMTCCMAI(keep=0.25, merge=0.1)):
        got = generated(model, inputs, 4)
        whole = run(model, {**inputs, "input_ids": got.sequences})
    assert_close(torch.cat(got.logits), whole[0, -5:-1].float(), atol=1e-5, rtol=0)


def test_with_all_kept_and_none_inhibited_it_is_the_model() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava")
    bare = run(model, inputs)
    with sc.attach(model, VMTCCMAI(keep=1.0, rho=0.0)):
        assert torch.equal(run(model, inputs), bare)
    with sc.attach(model, VMTCCMAI(keep=1.0, rho=0.5)):
        assert not torch.allclose(run(model, inputs), bare)


def test_a_cache_that_it_did_not_see_grow_is_refused() -> None:
    model, inputs = shared("llava", DOUBLE), inputs_of("llava", (1,))
    first = generated(model, inputs)
    more = followed(inputs, first, words(1, 4))
    with sc.attach(model, VMTCCMAI(keep=1.0)), pytest.raises(InputError, match="before the conversation"):
        generated(model, more, past_key_values=first.past_key_values)


def test_of_the_world_it_sees_a_quarter_and_with_all_it_answers_as_ever() -> None:
    assert said(VMTCCMAI(keep=1.0, rho=0.0)) == said()
    assert seen(VMTCCMAI(keep=0.2, merge=0.05)) == [[29 + 7] * 4] * 8
