"""AvisC against attention from the model itself, a second prompt whose features are zeroed by hand, and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import skip_blind_chunks
from torch.testing import assert_close

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.avisc import AVISC, blind_tokens

from .lockstep import Reader, assert_says, cut, glances, log_softmax, model_of, reader, sample, told
from .shared import Inputs, generated

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("beta",)
BFLOAT16 = {"lam": -1e9, "beta": 0.0}


def blind_by_hand(a: np.ndarray, gamma: float, lam: float) -> list[int]:
    """Among attention (layers, visual tokens)."""
    shares = sorted(((row.sum() / a.sum(), i) for i, row in enumerate(a)), reverse=True)
    layers, total = [], 0.0
    while total < gamma:
        share, layer = shares.pop(0)
        layers.append(layer)
        total += share
    mean = a[layers].mean(0)
    return [i for i, value in enumerate(mean) if value >= mean.mean() + lam * mean.std(ddof=1)]


def zeroed(name: str, inputs: Inputs, keep: list[int]) -> Reader:
    """The prompt whose visual tokens are zero but for some."""
    visual = (inputs["input_ids"][0] == model_of(name).config.image_token_id).nonzero()[:, 0]
    rest = [place for i, place in enumerate(visual.tolist()) if i not in keep]

    def clear(given: dict[str, Any]) -> dict[str, Any]:
        states = given["inputs_embeds"].clone()
        states[:, rest] = 0
        return {**given, "inputs_embeds": states}

    return reader(model_of(name), inputs, clear)


def formula(alpha: float, beta: float) -> Any:
    return lambda full, blind, step: cut((1 + alpha) * full - alpha * blind, full, beta)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"alpha": 1.5, "beta": 0.1}),
        ("qwen2_5_vl", {"gamma": 0.8, "lam": 0.5}),
        ("world/vlm", {"beta": 0.2}),
    ],
)
def test_the_answer_is_that_of_two_prompts_in_lockstep(name: str, options: dict[str, float]) -> None:
    method, inputs = AVISC(**options), sample(name)
    blind = blind_by_hand(glances(name, inputs), method.gamma, method.lam)
    assert 0 < len(blind) < int((inputs["input_ids"] == model_of(name).config.image_token_id).sum()) / 2
    readers = [reader(model_of(name), inputs), zeroed(name, inputs, blind)]
    assert_says(model_of(name), inputs, method, readers, formula(method.alpha, method.beta))


@pytest.mark.parametrize("gamma", [1e-6, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lam", [-0.5, 0.99])
def test_blind_tokens_of_made_up_attention(gamma: float, lam: float) -> None:
    """Two samples, of eight and of five visual tokens."""
    a = torch.rand(6, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).square()
    a *= torch.tensor([1.0, 3, 2, 8, 1, 4])[:, None, None]
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:10], visual[1, 5:10] = True, True
    found = blind_tokens(a, visual, gamma, lam)
    for row, places in enumerate((range(2, 10), range(5, 10))):
        expected = blind_by_hand(a[:, row, list(places)].numpy(), gamma, lam)
        assert found[row].nonzero()[:, 0].tolist() == [places[i] for i in expected]


def test_one_dominant_token_is_the_only_blind_one() -> None:
    a = torch.full((3, 1, 20), 0.01)
    a[:, 0, 7] = 0.4
    assert blind_tokens(a, torch.ones(1, 20, dtype=torch.bool), 0.5, 1.0).nonzero().tolist() == [[0, 7]]


def test_the_deviation_is_that_of_a_sample() -> None:
    """Of 0, 0 and 1 it is 0.577, and 1 lies 1.1547 of these above the mean."""
    a, visual = torch.tensor([0.0, 0.0, 1.0])[None, None], torch.ones(1, 3, dtype=torch.bool)
    assert blind_tokens(a, visual, 0.5, 1.15).any() and not blind_tokens(a, visual, 0.5, 1.16).any()


def test_the_second_prompt_is_as_long_as_the_first() -> None:
    """Tokens are zeroed, none is taken out."""
    model, inputs = model_of("llava"), sample("llava")
    lengths: list[int] = []
    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    with sc.attach(model, AVISC()):
        generated(model, inputs, 2)
    hook.remove()
    assert lengths == [inputs["input_ids"].shape[1]] * 2 + [1]


def test_at_alpha_zero_it_is_the_model_with_what_is_implausible_left_out() -> None:
    written, bare = told(model_of("llava"), sample("llava"))
    again, logits = told(model_of("llava"), sample("llava"), AVISC(alpha=0.0))
    assert again == written
    expected = log_softmax(np.stack([cut(row, row, 0.1) for row in bare.numpy()]))
    assert np.isinf(expected).any()
    assert_close(logits.numpy(), expected, atol=1e-5, rtol=0)


def test_a_prompt_that_comes_in_pieces_is_judged_by_its_last_word() -> None:
    model, inputs, pieces = model_of("llava"), sample("llava"), {"prefill_chunk_size": 11}
    skip_blind_chunks(inputs, pieces)
    whole, made = told(model, inputs, AVISC(alpha=3.0)), told(model, inputs, AVISC(alpha=3.0), **pieces)
    assert made[0] == whole[0]
    assert_close(made[1], whole[1], atol=1e-5, rtol=0)


def test_a_prompt_without_a_picture_is_refused() -> None:
    model = model_of("llava")
    with sc.attach(model, AVISC()), pytest.raises(InputError, match=r"AVISC .*picture"):
        generated(model, {"input_ids": torch.arange(150, 160)[None]})
