"""LQCD against two questions that are read by hand, and its formula in numpy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.lqcd import CUES, LQCD, flip_rate, without_cues

from .lockstep import Reader, assert_answers, cut, driven, model_of, question, reader

EXAMPLE: dict[str, Any] = {"alpha": 30.0, "beta": 0.0, "cue": "I think the answer is no."}
PLAIN = "Is there a dog?"


def asked(name: str, text: str) -> Reader:
    """As the driver should ask it."""
    return reader(model_of(name), dict(question(name).inputs(model_of(name), text=text)))


def formula(alpha: float, beta: float) -> Any:
    return lambda neutral, leading, step: cut((1 + alpha) * neutral - alpha * leading, neutral, beta)


@pytest.mark.parametrize(
    ("name", "text", "neutral", "leading"),
    [
        ("llava", f"{PLAIN} I think the answer is no.", PLAIN, f"{PLAIN} I think the answer is no."),
        ("llava", PLAIN, PLAIN, f"{PLAIN} Are you sure?"),
        ("qwen2_5_vl", f"{PLAIN} Are you sure?", PLAIN, f"{PLAIN} Are you sure?"),
        (
            "world/vlm",
            "describe the image .",
            "describe the image .",
            "describe the image . Are you sure?",
        ),
    ],
)
def test_the_answer_is_that_of_two_questions_in_lockstep(
    name: str, text: str, neutral: str, leading: str
) -> None:
    driver = LQCD(alpha=1.5, beta=0.05)
    readers = [asked(name, neutral), asked(name, leading)]
    answer = assert_answers(name, driver, question(name, text), readers, formula(1.5, 0.05))
    assert answer.found == {"neutral": neutral, "leading": leading}


@pytest.mark.parametrize(
    ("text", "options"),
    [(f"{PLAIN} Are you sure?", {"alpha": 0.0}), (PLAIN, {"alpha": 3.0, "cue": ""})],
)
def test_at_alpha_zero_and_with_one_question_it_is_the_neutral_one(
    text: str, options: dict[str, Any]
) -> None:
    """The same words, among what is plausible."""

    def mix(base: np.ndarray, step: int) -> np.ndarray:
        return cut(base, base, 0.2)

    driver = LQCD(beta=0.2, **options)
    assert_answers("llava", driver, question("llava", text), [asked("llava", PLAIN)], mix)


def test_a_word_that_the_hint_makes_louder_falls() -> None:
    neutral, leading = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0)).unbind()
    chances = []
    for louder in (0.0, 0.5, 1.0, 3.0):
        boosted = leading.clone()
        boosted[0, 7] += louder
        chances.append(float(LQCD(beta=0.0)._mix(neutral, boosted).softmax(-1)[0, 7]))
    assert all(later < sooner for sooner, later in itertools.pairwise(chances))


@pytest.mark.parametrize("cue", CUES)
def test_every_known_cue_is_taken_out(cue: str) -> None:
    said = cue.format("a red box")
    for text in (f"{PLAIN} {said}", f"{said} {PLAIN}", f"{PLAIN} {said.upper()}"):
        assert without_cues(text) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        " What  is it ? ",
        "I think of a number. Which is it?",
        "Is the answer no?",
        "the answer is {}",
        "",
    ],
)
def test_other_questions_stay_as_they_are(text: str) -> None:
    assert without_cues(text) == text


def test_a_neutraliser_of_ones_own() -> None:
    answer, _, _ = driven("llava", LQCD(neutraliser=str.upper), question("llava", PLAIN))
    assert answer.found == {"neutral": PLAIN.upper(), "leading": PLAIN}


def test_flips_are_counted_among_what_was_right() -> None:
    plain = ["yes", "no", "yes", "two", "red"]
    led = ["no", "yes", "yes", "two", "blue"]
    right = ["yes", "yes", "yes", "two", "green"]
    assert flip_rate(plain, led, right) == pytest.approx(1 / 3)
    with pytest.raises(InputError):
        flip_rate(["no"], ["no"], ["yes"])


def test_every_word_is_read_once_by_either_question() -> None:
    model, shapes = model_of("llava"), []
    tower: nn.Module = model.model.language_model
    hook = tower.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    asking = question("llava", f"{PLAIN} Are you sure?")
    driven("llava", LQCD(), asking)
    hook.remove()
    lengths = [asking.inputs(model, text=t)["input_ids"].shape[1] for t in (PLAIN, asking.text)]
    assert shapes == [(1, lengths[0]), (1, lengths[1]), (2, 1), (2, 1), (2, 1)]


def test_a_cue_alone_is_refused() -> None:
    with sc.attach(model_of("llava")) as session, pytest.raises(InputError, match="nothing is left"):
        session.run(LQCD(), question("llava", "Are you sure?"))
