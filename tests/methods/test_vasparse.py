"""VASparse against a model whose keys are masked by hand, and its formulas in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dense import recompute
from helpers import Look
from torch import Tensor
from torch.testing import assert_close

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.vasparse import VASparse, delta, kept

from .lockstep import DOUBLE, Reader, assert_says, attention, eager, model_of, sample, told
from .shared import Inputs, generated

EXAMPLE: dict[str, Any] = {"sink": 1.0}
DISCRETE = ("keep",)
BFLOAT16 = {"keep": 1.0, "sink": 0.0}
FIRST = 1
SITES = {"tokens": "text.1.layer", "bias": "text.1:.self", "hidden": "text.embed"}


def weights(name: str, inputs: Inputs) -> np.ndarray:
    """Of the layer where tokens leave: (tokens, tokens)."""
    return attention(name, inputs)[FIRST]


def scored(w: np.ndarray, visual: np.ndarray, lam: float) -> np.ndarray:
    """Of the picture's tokens."""
    looks = np.exp(w[:, visual].sum(1))[visual]
    return w.mean(0)[visual] ** 2 + lam * looks / looks.sum()


def chosen(score: np.ndarray, share: float) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: -score[i])[: math.ceil(share * len(score))])


def thinned(name: str, inputs: Inputs, share: float, lam: float, weight: float) -> Reader:
    """Keys of tokens that leave are seen by nobody, from that layer on."""
    model, ids = model_of(name), inputs["input_ids"][0]
    visual = (ids == model.config.image_token_id).numpy()
    stay = visual.nonzero()[0][chosen(scored(weights(name, inputs), visual, lam), share)]
    gone = torch.from_numpy(visual)[None, None, None].clone()
    gone[..., stay] = False
    layers = range(FIRST, model.config.text_config.num_hidden_layers)

    def read(written: Tensor) -> np.ndarray:
        with eager(name):
            logits = recompute(model, inputs, written[None], dict.fromkeys(layers, gone))[0, -1]
        last = int(torch.cat([ids, written])[-1])
        with torch.no_grad():
            alone = model.lm_head(model.get_input_embeddings().weight[last])
        return (logits - weight * alone).numpy()

    return read


@pytest.mark.parametrize(
    ("name", "share", "lam", "weight"),
    [("llava", 0.4, 0.1, 0.2), ("qwen2_5_vl", 0.5, 1.0, 0.1), ("world/vlm", 0.3, 0.1, 0.1)],
)
def test_the_answer_is_that_of_the_loop(name: str, share: float, lam: float, weight: float) -> None:
    method = VASparse(keep=share, lam=lam, weight=weight, penalty=0.0, sites=SITES)
    reader = thinned(name, sample(name), share, lam, weight)
    assert_says(model_of(name), sample(name), method, [reader], lambda row, step: row)


def test_with_all_tokens_no_penalty_and_no_contrast_it_is_the_model() -> None:
    method = VASparse(keep=1.0, penalty=0.0, weight=0.0, sites=SITES)
    assert_close(told(model_of("llava"), sample("llava"), method), told(model_of("llava"), sample("llava")))


def test_what_the_last_word_alone_says_is_subtracted() -> None:
    """By the head, without the norm before it."""
    model, inputs = model_of("llava"), sample("llava")
    with torch.no_grad():
        alone = model.lm_head(model.get_input_embeddings()(inputs["input_ids"][0, -1]))
    method = VASparse(keep=1.0, penalty=0.0, weight=0.3, sites=SITES)
    full, made = told(model, inputs, words=1)[1][0], told(model, inputs, method, words=1)[1][0]
    assert_close(made, (full - 0.3 * alone).log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.61, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.1, 5.0])
def test_the_tokens_of_the_largest_delta_are_kept(share: float, lam: float) -> None:
    """Of two samples, whose pictures have seven and five tokens."""
    w = torch.rand(2, 20, 20, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).tril()
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[0, 6:13], visual[1, 9:14] = True, True
    looking = (w * visual[:, None]).sum(-1)
    found = kept(delta(w.mean(1), looking, visual, lam), visual, share)
    for row, first in enumerate((6, 9)):
        expected = chosen(scored(w[row].numpy(), visual[row].numpy(), lam), share)
        assert found[row].nonzero()[:, 0].tolist() == [first + i for i in expected]


def test_lam_orders_by_looking_when_it_is_large_and_by_strength_when_it_is_none() -> None:
    strength, looking = torch.rand(2, 1, 30, dtype=DOUBLE).unbind()
    real = torch.ones(1, 30, dtype=torch.bool)
    assert torch.equal(delta(strength, looking, real, 1e12).argsort(-1), looking.argsort(-1))
    assert torch.equal(delta(strength, looking, real, 0.0).argsort(-1), strength.square().argsort(-1))


def test_tokens_that_look_at_the_picture_are_found_that_are_read_little() -> None:
    """Four of forty look at it; others are read a little more."""
    noise = torch.Generator().manual_seed(1)
    strength = 0.02 + 0.02 * torch.rand(1, 40, generator=noise)
    looking = 0.1 * torch.rand(1, 40, generator=noise)
    planted = [3, 11, 20, 34]
    strength[0, planted], looking[0, planted] = 0.02, 0.9
    real = torch.ones(1, 40, dtype=torch.bool)
    recall = {
        lam: float(kept(delta(strength, looking, real, lam), real, 0.25)[0, planted].double().mean())
        for lam in (0.0, 0.1)
    }
    assert recall[0.0] < 0.5 and recall[0.1] == 1


def test_sinks_lose_weight_and_rows_still_sum_to_one() -> None:
    """w_j e^-penalty for them, normalised again; sinks are words that are read as much as the mean or more."""
    model, inputs = model_of("llava"), sample("llava")
    seen = []
    for penalty in (0.0, 0.7):
        look = Look(tell=lambda call: call.weights("all"), sites="text.1.self")
        method = VASparse(keep=1.0, penalty=penalty, weight=0.0, sink=1.0, sites=SITES)
        with sc.attach(model, method, look):
            generated(model, inputs, 2)
        seen.append(look.at("text.1.self"))
    plain, penalised = seen
    received = weights("llava", inputs).mean(0)
    image = (inputs["input_ids"][0] == model.config.image_token_id).numpy()
    sinks = torch.from_numpy((received >= received.mean()) & ~image)
    assert 0 < sinks.sum() < (~image).sum()
    for before, after in zip(plain[:1], penalised[:1], strict=True):
        lowered = torch.where(sinks, before * math.exp(-0.7), before)
        assert_close(after, lowered / lowered.sum(-1, keepdim=True), atol=1e-7, rtol=0)
        assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
        assert (after < before)[0, :, -1, sinks].all()
    ratio = (penalised[1] / plain[1])[0, :, -1, :-1]  # what the answer's first word sees, of the prompt
    assert (ratio[:, sinks].amax(-1) < ratio[:, ~sinks].amin(-1)).all()


def test_a_prompt_that_comes_in_pieces_is_refused() -> None:
    model = model_of("llava")
    with sc.attach(model, VASparse()), pytest.raises(InputError, match="prefill_chunk_size"):
        generated(model, sample("llava"), 2, prefill_chunk_size=11)
