"""INTER against four prompts that are read by hand, and its formula in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.inter import INTER

from .lockstep import Reader, assert_says, cut, log_softmax, model_of, reader, sample, told
from .shared import Inputs, generated

EXAMPLE: dict[str, Any] = {"k": 0.0}
DISCRETE = ("k", "beta")
BFLOAT16 = {"k": 1e30, "beta": 0.0}
WORD = {"llava": 100, "qwen2_5_vl": 100, "world/vlm": 5}
"""The first id that is no placeholder and no special token."""


def noise(inputs: Inputs) -> Inputs:
    pixels = inputs["pixel_values"]
    drawn = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    return {**inputs, "pixel_values": drawn.double()}


def wordless(name: str, inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    keep = (ids < WORD[name])[0]
    return {n: v[:, keep] if v.shape == ids.shape else v for n, v in inputs.items()}


def four_prompts(name: str) -> list[Reader]:
    full = sample(name)
    short = wordless(name, full)
    assert 0 < short["input_ids"].shape[1] < full["input_ids"].shape[1]
    return [reader(model_of(name), inputs) for inputs in (full, noise(full), short, noise(short))]


def formula(k: float, beta: float) -> Any:
    def mix(
        full: np.ndarray, no_picture: np.ndarray, no_words: np.ndarray, neither: np.ndarray, step: int
    ) -> Any:
        together = full - no_picture - no_words + neither
        return cut(full + together if together.var(ddof=1) >= k else full, full, beta)

    return mix


@pytest.mark.parametrize(
    ("name", "k", "beta"),
    [("llava", 0.0, 0.0), ("llava", 1.0, 0.1), ("qwen2_5_vl", 0.0, 0.2), ("world/vlm", 1.0, 0.1)],
)
def test_the_answer_is_that_of_four_prompts_in_lockstep(name: str, k: float, beta: float) -> None:
    assert_says(model_of(name), sample(name), INTER(k=k, beta=beta), four_prompts(name), formula(k, beta))


def mixed(method: INTER, logits: Tensor) -> Tensor:
    """From logits (prompts, batch, vocabulary)."""
    return method.prediction(logits[0], [*logits[1:]], None)  # type: ignore[arg-type]


def test_it_acts_exactly_where_the_variance_is_large_enough() -> None:
    """Interactions of 30 words of +s and 30 of -s have an unbiased variance of 60/59 s^2."""
    signs = torch.tensor([1.0, -1.0]).repeat(30)
    sizes = [0.5, 0.98, 0.99, 0.995, 2.0]
    logits = torch.zeros(4, len(sizes), 60, dtype=torch.float64)
    logits[0] = torch.tensor(sizes)[:, None] * signs
    moved = mixed(INTER(k=1.0, beta=0.0), logits) - logits[0]
    fired = [60 / 59 * s * s >= 1 for s in sizes]
    assert fired == [False, False, False, True, True]
    assert (moved.abs() > 0).all(-1).tolist() == fired and (moved.abs() > 0).any(-1).tolist() == fired


def test_where_picture_and_words_add_up_there_is_no_interaction() -> None:
    """f = a(picture) + b(words), in numbers that are added without rounding."""
    a, b = torch.randint(-9, 9, (2, 2, 5, 40)).double().unbind()  # with and without
    logits = torch.stack([a[0] + b[0], a[1] + b[0], a[0] + b[1], a[1] + b[1]])
    assert torch.equal(mixed(INTER(k=0.0, beta=0.0), logits), logits[0])


def test_implausible_words_cannot_be_said() -> None:
    logits = 2 * torch.randn(4, 9, 40)
    p = logits[0].softmax(-1)
    assert torch.equal(mixed(INTER(beta=0.1), logits).isfinite(), p >= 0.1 * p.amax(-1, keepdim=True))


def test_at_an_endless_k_it_is_the_model_with_what_is_implausible_left_out() -> None:
    written, bare = told(model_of("llava"), sample("llava"))
    again, logits = told(model_of("llava"), sample("llava"), INTER(k=float("inf")))
    assert again == written
    expected = log_softmax(np.stack([cut(row, row, 0.1) for row in bare.numpy()]))
    assert np.isinf(expected).any()
    assert_close(logits.numpy(), expected, atol=1e-5, rtol=0)


def test_a_prompt_without_a_picture_is_refused() -> None:
    model = model_of("llava")
    with sc.attach(model, INTER()), pytest.raises(InputError, match=r"INTER .*picture"):
        generated(model, {"input_ids": torch.arange(150, 160)[None]})
