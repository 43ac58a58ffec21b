"""Weight and concentration against sums over the weights that models return, and on a wired model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.heads import Heads
from saccade.probes.visual_head_analysis import VisualHeadAnalysis, concentration, correlations

from .planted import ANSWER, IMAGE, LAST, OTHERWISE, OUT, QUESTION, SIGNAL, Route, planted
from .shared import generated, two

EXAMPLE: dict[str, Any] = {}


def tables(model: Any, inputs: Any, tokens: int = 3, **options: Any) -> dict[str, Heads]:
    with sc.attach(model, VisualHeadAnalysis(**options)) as session:
        generated(model, inputs, tokens)
    return session.results["visual_head_analysis"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("word", [0, 2])
def test_it_follows_the_weights_that_the_model_returns(name: str, word: int) -> None:
    """Of two samples, the second with more pictures and padding; what is not on the picture is on the text."""
    model, inputs = shared(name, implementation="eager"), two(family(name))
    out = generated(model, inputs, output_attentions=True)
    found = tables(shared(name), inputs, word=word)
    image = inputs["input_ids"] == model.config.image_token_id
    for layer, w in enumerate(out.attentions[word]):
        for sample in range(2):
            row, on = w[sample, :, -1], torch.nn.functional.pad(image[sample], (0, word))
            assert_close(found["weight"].events[sample, layer], 1 - row[:, ~on].sum(-1))
            p = row[:, on] / row[:, on].sum(-1, keepdim=True)
            sharp = 1 + (p * p.log()).sum(-1) / math.log(int(on.sum()))
            assert_close(found["concentration"].events[sample, layer], sharp, atol=1e-5, rtol=1e-4)
    assert torch.equal(found["score"].events, found["weight"].events * found["concentration"].events)


def test_even_weights_have_no_concentration_and_a_single_peak_has_all() -> None:
    even, peak = torch.full((12,), 0.05), torch.eye(12)[3] * 0.2
    assert_close(concentration(torch.stack([even, peak])), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_concentration_does_not_depend_on_what_the_text_gets() -> None:
    w = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    assert_close(concentration(w), concentration(0.01 * w))


def asked(size: int = 90) -> sc.Question:
    noise = np.random.default_rng(0).integers(0, 255, (size, 130, 3), dtype=np.uint8)
    return sc.Question(family("llava").processor(), [Image.fromarray(noise)], QUESTION)  # type: ignore[misc]


def test_a_flat_head_gives_the_picture_its_share_of_the_tokens() -> None:
    """All heads of the wired model are flat but one, whose last row gives all to the picture."""
    model = planted(Route(1, 2, LAST, IMAGE, SIGNAL, OUT))
    inputs = {**asked().inputs(model)}
    image = (inputs["input_ids"] == model.config.image_token_id)[0]
    found = tables(model, inputs)
    flat = torch.ones(4, 4, dtype=torch.bool)
    flat[1, 2] = False
    assert_close(found["weight"].scores[flat], image.float().mean().expand(15))
    assert found["weight"].scores[1, 2] > 0.99
    assert_close(found["concentration"].scores[flat], torch.zeros(15), atol=1e-5, rtol=0)


def test_muting_the_best_head_ends_the_right_answer_and_others_do_not() -> None:
    model = planted(Route(1, 2, LAST, IMAGE, SIGNAL, OUT))
    inputs = {**asked().inputs(model)}
    weight = tables(model, inputs)["weight"]

    def said(chosen: dict[str, tuple[int, ...]], to: str) -> int:
        with sc.attach(model, sc.MuteHeads(heads=chosen, to=to)):
            return int(generated(model, inputs, 1).sequences[0, -1])

    best = weight.top(1)
    assert best == {"text.1.self": (2,)}
    assert said(best, "zero") == OTHERWISE
    for seed in range(4):
        assert said(weight.random(2, seed, without=best), "all") == ANSWER
        assert said(weight.random(2, seed, without=best), "zero") == ANSWER


def test_of_a_region_the_weight_is_that_on_its_tokens() -> None:
    """In the trained model: of the picture's two halves together that of the whole."""
    model, processor = sc.world.load("vlm")
    picture = sc.world.scene(9, "test").picture()
    width, height = picture.size
    inputs = sc.Question(processor, [picture], "what colour is the car ?").inputs(model)

    def weight(box: tuple[float, ...] | None) -> Tensor:
        with sc.attach(model, VisualHeadAnalysis(box=box)) as session:
            session.locate(processor, [picture])
            generated(model, inputs, 1)
        return session.results["visual_head_analysis"]["weight"].scores

    left, right = weight((0, 0, width / 2, height)), weight((width / 2, 0, width, height))
    assert_close(left + right, weight(None))
    assert (left > 0).all()


def test_right_and_wrong_answers_are_told_apart_by_their_samples() -> None:
    found = tables(shared("llava"), two(family("llava")))["score"]
    assert torch.equal(found.where(torch.tensor([False, True])).scores, found.events[1])


def test_correlations_are_those_of_the_formulas() -> None:
    """Pearson's as numpy has it, Spearman's by 1 - 6 sum d^2 / n (n^2 - 1)."""
    noise = torch.Generator().manual_seed(0)
    a, b = (Heads("", ("x", "y", "z"), torch.rand(2, 3, 4, generator=noise)) for _ in range(2))
    x, y = (t.scores.flatten().numpy() for t in (a, b))
    d = np.argsort(np.argsort(x)) - np.argsort(np.argsort(y))
    pearson, spearman = correlations(a, b)
    assert pearson == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert spearman == pytest.approx(1 - 6 * (d**2).sum() / (12 * 143))


def test_a_word_that_was_not_written_is_refused() -> None:
    with pytest.raises(InputError, match="Word 5 was not written"):
        tables(shared("llava"), two(family("llava")), word=5)
