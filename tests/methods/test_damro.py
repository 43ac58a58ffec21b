"""DAMRO against two prompts that are run by hand, and its formula in numpy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close

import saccade as sc
from saccade.steering.damro import DAMRO, Outliers

from .shared import Inputs, generated
from .towers import DOUBLE, PICTURES, best, inputs_of, kept, layer_of, scores, shortened

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("beta",)
BFLOAT16 = {"k": 10**6, "beta": 0.0}
NAMES = tuple(PICTURES)
"""Two with a class token, one of them with tiles; two without, in windows and with pooling."""


def sample(name: str) -> Inputs:
    return {n: v for n, v in inputs_of(name, (1,)).items() if n != "attention_mask"}


def outliers(name: str, model: Any, k: int) -> list[list[int]]:
    return [best(values, k) for values in scores(name, model, inputs_of(name))]


def two_prompts(
    name: str, model: Any, inputs: Inputs, k: int, written: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Logits with which the whole picture, and its outliers alone, say what was written: (tokens, words)."""
    image = inputs["input_ids"][0] == model.config.image_token_id
    some = ~image
    some[image.nonzero()[outliers(name, model, k)[0], 0]] = True
    both = [shortened(model, inputs, keep, written) for keep in (torch.ones_like(image), some)]
    full, alone = (logits[-len(written) - 1 : -1].numpy() for logits in both)
    return full, alone


def combined(full: np.ndarray, alone: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Log-probabilities, -inf of what is implausible."""
    p = np.exp(full - full.max(-1, keepdims=True))
    mixed = np.where(p >= beta, (1 + alpha) * full - alpha * alone, -np.inf)
    top = mixed.max(-1, keepdims=True)
    return mixed - top - np.log(np.exp(mixed - top).sum(-1, keepdims=True))


def said(name: str, *methods: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What is written by one sample, and its logits."""
    model, inputs = shared(name, DOUBLE), sample(name)
    with sc.attach(model, *methods):
        got = generated(model, inputs, 4, **options)
    return got.sequences[0, inputs["input_ids"].shape[1] :], torch.cat(got.logits)


# ---- the outliers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("name", NAMES)
def test_outliers_are_the_k_patches_with_the_largest_scores_in_their_order(name: str, k: int) -> None:
    model = shared(name, DOUBLE)
    method = Outliers(k=k, sites={"observe": "vision.*.self"})
    expected = [found[: min(k, len(found))] for found in outliers(name, model, k)]
    assert kept(name, model, inputs_of(name), method) == expected


def test_k_as_a_share_is_of_the_patches() -> None:
    """10 of 576; a tile's newlines are no patches."""
    for name, share, count in (("llava", 10 / 576, 1), ("llava", 0.25, 9), ("llava_next", 0.25, 16)):
        method = Outliers(k=share, sites={"observe": "vision.*.self"})
        model = shared(name, DOUBLE)
        assert len(kept(name, model, inputs_of(name), method)[0]) == count


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_second_prompt_has_exactly_k_visual_tokens(name: str) -> None:
    model, inputs = shared(name, DOUBLE), sample(name)
    lengths: list[int] = []

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["hidden_states"].shape[1])

    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with sc.attach(model, DAMRO(k=3)):
        generated(model, inputs, 2)
    hook.remove()
    image = int((inputs["input_ids"] == model.config.image_token_id).sum())
    whole = inputs["input_ids"].shape[1]
    assert lengths == [whole, whole - image + 3, 1]


# ---- the logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (2.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_answer_is_that_of_two_prompts_in_lockstep(name: str, alpha: float, beta: float) -> None:
    written, logits = said(name, DAMRO(alpha=alpha, beta=beta, k=4))
    full, alone = two_prompts(name, shared(name, DOUBLE), sample(name), 4, written)
    expected = combined(full, alone, alpha, beta)
    assert written.tolist() == expected.argmax(-1).tolist()
    assert_close(logits.double().log_softmax(-1).numpy(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beside_a_reduction_both_prompts_are_reduced(name: str) -> None:
    """The outliers are among the patches that stay, for both are those with the largest scores."""
    model, inputs = shared(name, DOUBLE), sample(name)
    written, logits = said(name, sc.FasterVLM(keep=0.5), DAMRO(k=3, beta=0.0))
    image = inputs["input_ids"][0] == model.config.image_token_id
    both = []
    for count in (int(image.sum()) // 2, 3):
        keep = ~image
        keep[image.nonzero()[outliers(name, model, count)[0], 0]] = True
        both.append(shortened(model, inputs, keep, written)[-len(written) - 1 : -1].numpy())
    expected = combined(both[0], both[1], 1.0, 0.0)
    assert_close(logits.double().log_softmax(-1).numpy(), expected, atol=2e-5, rtol=0)


def test_an_answer_by_beams_is_that_of_both_prompts() -> None:
    written, _ = said("llava", DAMRO(k=4), num_beams=3, length_penalty=0.0)
    full, alone = two_prompts("llava", shared("llava", DOUBLE), sample("llava"), 4, written)
    expected = combined(full, alone, 1.0, 0.1)
    steps = np.arange(len(written))
    model, inputs = shared("llava", DOUBLE), sample("llava")
    with sc.attach(model, DAMRO(k=4)):
        made = generated(model, inputs, 4, num_beams=3, length_penalty=0.0, output_scores=True)
    assert float(made.sequences_scores[0]) == pytest.approx(expected[steps, written].sum(), abs=1e-4)


def test_at_alpha_zero_it_is_the_model_with_what_is_implausible_left_out() -> None:
    written, bare = said("llava")
    again, logits = said("llava", DAMRO(alpha=0.0, beta=0.1))
    assert again.tolist() == written.tolist()
    left = logits.isfinite()
    p = bare.double().softmax(-1)
    assert torch.equal(left, p >= 0.1 * p.amax(-1, keepdim=True)) and not left.all()
    assert_close(logits[left], bare[left], atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 100.0])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_with_all_patches_as_outliers_it_is_the_model(name: str, alpha: float) -> None:
    written, bare = said(name)
    again, logits = said(name, DAMRO(alpha=alpha, beta=0.0, k=10**6))
    assert again.tolist() == written.tolist()
    assert_close(logits, bare, atol=1e-4 * (1 + alpha), rtol=0)


def test_a_word_that_planted_outliers_push_falls_with_alpha() -> None:
    """A class token that looks at two patches, and features of theirs that say a wrong word loudly."""
    model, planted = shared("llava", DOUBLE), [4, 31]
    module: Any = layer_of("llava", model)
    seen: list[Tensor] = []

    def look_there(_: nn.Module, __: Any, k: Tensor) -> Tensor:
        k = k.clone()
        k[:, [1 + patch for patch in planted]] = 5 * seen[-1][:, :1]
        return k

    def loud(_: nn.Module, __: Any, features: Tensor) -> Tensor:
        features = features.clone()
        features[:, planted] *= 4
        return features

    hooks = [
        module.q_proj.register_forward_hook(lambda _, __, q: seen.append(q)),
        module.k_proj.register_forward_hook(look_there),
        model.model.multi_modal_projector.register_forward_hook(loud),
    ]
    try:
        assert outliers("llava", model, 2)[0] == planted
        full, alone = two_prompts("llava", model, sample("llava"), 2, torch.tensor([150]))
        wrong = int((alone - full)[0].argmax())
        chances = []
        for alpha in (0.0, 0.25, 0.5, 1.0, 2.0):
            _, logits = said("llava", DAMRO(alpha=alpha, beta=0.0, k=2))
            chances.append(float(logits[0].double().softmax(-1)[wrong]))
    finally:
        for hook in hooks:
            hook.remove()
    assert all(later < sooner for sooner, later in itertools.pairwise(chances))
    assert chances[-1] < 0.01 * chances[0]


def test_without_a_picture_it_is_the_model() -> None:
    model = shared("llava", DOUBLE)
    words = {"input_ids": torch.arange(150, 160)[None]}
    bare = torch.cat(generated(model, words).logits)
    with sc.attach(model, DAMRO()):
        assert_close(torch.cat(generated(model, words).logits), bare)


def test_in_a_later_turn_the_picture_is_that_of_the_first() -> None:
    model, inputs = shared("llava", DOUBLE), sample("llava")
    with sc.attach(model, DAMRO(k=4, beta=0.0)):
        first = generated(model, inputs, 2)
        ids = torch.cat([first.sequences, torch.arange(150, 155)[None]], 1)
        again = generated(model, {"input_ids": ids}, 3, past_key_values=first.past_key_values)
    written = again.sequences[0, ids.shape[1] :]
    full, alone = two_prompts("llava", model, {**inputs, "input_ids": ids}, 4, written)
    expected = combined(full, alone, 1.0, 0.0)
    assert_close(torch.cat(again.logits).double().log_softmax(-1).numpy(), expected, atol=2e-5, rtol=0)


def test_the_mix_is_the_papers_of_10_and_4_patches() -> None:
    assert round(DAMRO().k * 576) == 10 and round(DAMRO().k * 256) == 4
    assert (DAMRO().alpha, DAMRO().beta) == (1.0, 0.1)
