"""M3ID against two prompts that are read by hand, and its formula in numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.m3id import M3ID

from .lockstep import DOUBLE, Reader, assert_says, log_softmax, model_of, reader, sample, told
from .shared import Inputs, generated, replay

EXAMPLE: dict[str, Any] = {"lam": 0.3, "alpha": 1.1}


def blind(name: str, inputs: Inputs) -> Inputs:
    """The words alone."""
    ids = inputs["input_ids"]
    words = {"input_ids": ids[ids != model_of(name).config.image_token_id][None]}
    return {**words, **{n: torch.zeros_like(words["input_ids"]) for n in inputs if n == "mm_token_type_ids"}}


def two_prompts(name: str) -> list[Reader]:
    inputs = sample(name)
    return [reader(model_of(name), inputs), reader(model_of(name), blind(name, inputs))]


def formula(lam: float, t0: float, alpha: float, beta: float = 0.0) -> Any:
    def mix(seeing: np.ndarray, without: np.ndarray, step: int) -> np.ndarray:
        l_c, l_u = log_softmax(seeing), log_softmax(without)
        gamma = np.exp(-lam * (step + 1 + t0))
        mixed = l_c + (l_c.max() < np.log(alpha)) * (1 - gamma) / gamma * (l_c - l_u) if alpha else l_c
        return np.where(l_c >= l_c.max() + np.log(beta), mixed, -np.inf) if beta else mixed

    return mix


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"lam": 0.3, "t0": 0.0, "alpha": 1.1}),
        ("llava", {"lam": 0.4, "t0": 2.0, "alpha": 0.1}),
        ("qwen2_5_vl", {"lam": 0.3, "t0": 1.0, "alpha": 1.1, "beta": 0.3}),
        ("world/vlm", {"lam": 0.5, "t0": 0.0, "alpha": 0.9}),
    ],
)
def test_the_answer_is_that_of_two_prompts_in_lockstep(name: str, options: dict[str, float]) -> None:
    assert_says(model_of(name), sample(name), M3ID(**options), two_prompts(name), formula(**options))


def test_a_model_that_is_sure_is_left_alone_and_one_that_is_not_is_not() -> None:
    """By alpha between the largest probabilities of the words that it says."""
    name = "world/vlm"
    bare = told(model_of(name), sample(name))[1]
    surest = bare.amax(-1).exp()
    alpha = float((surest.max() + surest.min()) / 2)
    written, logits = told(model_of(name), sample(name), M3ID(lam=0.5, alpha=alpha))
    read = two_prompts(name)[0]
    seeing = np.stack([read(torch.tensor(written[:t], dtype=torch.long)) for t in range(4)])
    sure = np.exp(log_softmax(seeing)).max(-1) >= alpha
    assert sure.any() and not sure.all()
    same = np.abs(logits.numpy() - log_softmax(seeing)).max(-1) < 1e-4
    assert same.tolist() == sure.tolist()


@pytest.mark.parametrize("options", [{"lam": 0.0}, {"lam": 0.5, "alpha": 0.0}])
def test_at_lam_zero_and_at_alpha_zero_it_is_the_model(options: dict[str, float]) -> None:
    inputs = sample("llava")
    assert_close(told(model_of("llava"), inputs, M3ID(**options)), told(model_of("llava"), inputs))


def test_where_the_strength_is_one_it_is_twice_one_less_the_other() -> None:
    _, logits = told(model_of("llava"), sample("llava"), M3ID(lam=np.log(2) / 3, t0=2, alpha=1.1), words=1)
    seeing, without = (read(torch.tensor([], dtype=torch.long)) for read in two_prompts("llava"))
    assert_close(logits[0].numpy(), log_softmax(2 * seeing - without), atol=2e-5, rtol=0)


def test_the_strength_grows_with_the_answer() -> None:
    strengths = [M3ID(lam=0.02, t0=10).strength(t) for t in range(1, 100)]
    assert strengths == sorted(strengths)
    assert strengths[0] == pytest.approx(1.246077 - 1, abs=1e-6)  # e^0.22


def mixed(method: M3ID, base: Tensor, other: Tensor, said: int) -> Tensor:
    """With so many words of an answer said, after a prompt of ten tokens."""
    run = SimpleNamespace(inputs={"input_ids": torch.zeros(len(base), 10)})
    return method.prediction(
        base, [other], SimpleNamespace(run=run, sequence=SimpleNamespace(length=10 + said))
    )


def test_a_picture_without_influence_changes_nothing() -> None:
    logits = torch.randn(5, 40, dtype=DOUBLE)
    for said in (0, 30, 300):
        assert_close(mixed(M3ID(lam=0.02, alpha=1.1), logits, logits, said).softmax(-1), logits.softmax(-1))


def test_a_word_of_the_language_prior_gives_way_to_the_seen_one_as_the_answer_grows() -> None:
    """The prior says `there` with 2 in both prompts, the picture adds 1 to `seen`."""
    there, seen = 0, 1
    with_it, without = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]])
    said = [int(mixed(M3ID(lam=0.02, alpha=1.1), with_it, without, t).argmax()) for t in range(60)]
    turn = said.index(seen)
    assert said == [there] * turn + [seen] * (60 - turn)
    assert turn + 1 == np.ceil(np.log(2) / 0.02)  # where 1 + s exceeds 2


def test_late_words_depend_more_on_the_picture_than_the_models_own() -> None:
    """What the embedded model writes of one scene, read with that picture and with another's."""
    model, inputs = model_of("world/vlm"), sample("world/vlm")
    written = torch.tensor(told(model, inputs, words=16)[0])
    apart = []
    for methods in ((), (M3ID(lam=0.05, alpha=1.1),)):
        with sc.attach(model, *methods):
            true, shuffled = (
                replay(model, {**inputs, "pixel_values": sample("world/vlm", i)["pixel_values"]}, written)[8:]
                for i in (0, 1)
            )
        true, shuffled = true.log_softmax(-1), shuffled.log_softmax(-1)
        apart.append(float((true.exp() * (true - shuffled)).sum(-1).mean()))
    assert apart[1] > 1.1 * apart[0]


def test_a_prompt_without_a_picture_is_refused() -> None:
    model = model_of("llava")
    with sc.attach(model, M3ID()), pytest.raises(InputError, match=r"M3ID .*picture"):
        generated(model, {"input_ids": torch.arange(150, 160)[None]})
