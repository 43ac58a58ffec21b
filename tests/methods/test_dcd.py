"""DCD against a model whose projector is exchanged by hand, and its formula in numpy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core import calibration
from saccade.core.errors import InputError
from saccade.steering.dcd import DCD, slopes, with_weights

from .lockstep import assert_says, cut, log_softmax, model_of, reader, sample, told
from .measured import home, keep
from .shared import Inputs, alone, generated, two

PATHS = {
    "llava": "model.multi_modal_projector",
    "qwen2_5_vl": "model.visual.merger",
    "world/vlm": "model.multi_modal_projector",
}


def path_of(model: nn.Module) -> str:
    return PATHS["qwen2_5_vl" if hasattr(model.model, "visual") else "llava"]  # type: ignore[arg-type]


def noisy(model: nn.Module, draw: Any) -> dict[str, Tensor]:
    weights = dict(model.get_submodule(path_of(model)).named_parameters())
    return {
        f"{side}.{name}": weight.detach() + 0.1 * draw(*weight.shape).to(weight.dtype)
        for side in ("negative", "positive")
        for name, weight in weights.items()
    }


keep("dcd", ("llava", "qwen2_5_vl"), noisy)
EXAMPLE: dict[str, Any] = {}
DISCRETE = ("beta",)
BFLOAT16 = {"alpha": 0.2, "beta": 0.0}


def other(name: str, side: str) -> nn.Module:
    """The model with another projector in it, of which DCD is told."""
    model: Any = copy.deepcopy(model_of(name))
    weights = model.get_submodule(PATHS[name]).state_dict()
    noise = torch.Generator().manual_seed(len(side))
    if side != "own":
        weights = {
            n: w + 0.3 * w.std() * torch.randn(w.shape, generator=noise, dtype=w.dtype)
            for n, w in weights.items()
        }
        model.get_submodule(PATHS[name]).load_state_dict(weights)
    return model


def projected(model: Any, name: str, side: str) -> dict[str, Tensor]:
    return {f"{side}.{n}": w for n, w in model.get_submodule(PATHS[name]).state_dict().items()}


def mix(alpha: float, beta: float) -> Any:
    def formula(right: np.ndarray, wrong: np.ndarray, step: int) -> np.ndarray:
        return cut((1 + alpha) * right - alpha * wrong, right, beta)

    return formula


# ---- the logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "positive"), [("llava", True), ("qwen2_5_vl", False), ("world/vlm", False)])
def test_the_answer_is_that_of_models_with_these_projectors_in_lockstep(name: str, positive: bool) -> None:
    model, inputs = model_of(name), sample(name)
    wrong, right = other(name, "negative"), other(name, "positive" if positive else "own")
    with home():
        kept = projected(wrong, name, "negative") | (projected(right, name, "positive") if positive else {})
        calibration.save("dcd", model, kept)
        readers = [reader(right, inputs), reader(wrong, inputs)]
        assert_says(model, inputs, DCD(alpha=0.7, beta=0.01, positive=positive), readers, mix(0.7, 0.01))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_the_models_own_projector_nothing_changes(name: str) -> None:
    model, inputs = model_of(name), sample(name)
    said, bare = told(model, inputs)
    with home():
        calibration.save("dcd", model, projected(model, name, "negative"))
        again, logits = told(model, inputs, DCD(alpha=3.0, beta=0.0))
    assert again == said
    assert_close(logits, bare, atol=5e-4, rtol=0)


def test_at_alpha_zero_it_is_the_model_with_what_is_implausible_left_out() -> None:
    model, inputs = model_of("llava"), sample("llava")
    said, bare = told(model, inputs)
    again, logits = told(model, inputs, DCD(alpha=0.0, beta=0.2))
    p = bare.exp()
    left = logits.isfinite()
    assert again == said and left.any(-1).all() and not left.all()
    assert torch.equal(left, p >= 0.2 * p.amax(-1, keepdim=True))


def test_a_later_turn_and_a_prompt_without_a_picture() -> None:
    model, inputs = model_of("llava"), sample("llava")
    words = {"input_ids": torch.arange(150, 160)[None]}
    bare = torch.cat(generated(model, words).logits)
    with sc.attach(model, DCD(beta=0.0)):
        assert_close(torch.cat(generated(model, words).logits), bare)
        first = generated(model, inputs, 2)
        ids = torch.cat([first.sequences, torch.arange(150, 155)[None]], 1)
        got = generated(model, {"input_ids": ids}, 2, past_key_values=first.past_key_values)
    wrong = other("llava", "own")
    kept = calibration.load("dcd", model)
    wrong.model.multi_modal_projector.load_state_dict(
        {n.removeprefix("negative."): w for n, w in kept.items() if n.startswith("negative.")}
    )
    written = got.sequences[0, ids.shape[1] :]
    rows = [reader(m, {**inputs, "input_ids": ids}) for m in (model, wrong)]
    expected = log_softmax(
        np.stack([mix(1.0, 0.0)(*(r(written[:n]) for r in rows), step=n) for n in range(2)])
    )
    assert_close(torch.cat(got.logits).double().log_softmax(-1).numpy(), expected, atol=2e-5, rtol=0)


# ---- training --------------------------------------------------------------------------------------------


def preferred(name: str, answer: list[int]) -> Inputs:
    inputs = {n: v.float() if v.is_floating_point() else v for n, v in sample(name).items()}
    return {**inputs, "rejected": answer, "chosen": answer[::-1]}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_its_gradient_is_that_of_the_likelihood_of_the_answer_alone(name: str) -> None:
    model, answer = shared(name), [201, 202, 203]
    given = preferred(name, answer)
    projector = model.get_submodule(PATHS[name])
    mine = with_weights(projector, dict(projector.named_parameters()))
    run(model, {n: v for n, v in given.items() if n not in ("rejected", "chosen")})
    with unchanged(model), sc.attach(model) as session:
        got = slopes(session, mine, given, "rejected")
        assert session.projector(given) is projector
    assert all(p.grad is None for p in model.parameters())
    whole = copy.deepcopy(model)
    inputs = {n: v for n, v in given.items() if n not in ("rejected", "chosen")}
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    p = whole(**{**inputs, "input_ids": ids}).logits[0].log_softmax(-1)
    (-sum(p[n - 4, word] for n, word in enumerate(answer)) / 3).backward()
    made = [p.grad for p in whole.get_submodule(PATHS[name]).parameters()]
    assert len(made) == len(got) > 1
    for one, two_ in zip(got, made, strict=True):
        assert_close(one, two_, atol=1e-5, rtol=1e-3)


def test_training_leaves_the_model_and_makes_a_planted_word_fall() -> None:
    model, planted = shared("llava"), 222
    given = preferred("llava", [planted, 223])
    inputs = {n: v for n, v in given.items() if n not in ("rejected", "chosen")}

    def chance(*methods: Any) -> float:
        with sc.attach(model, *methods):
            return float(generated(model, inputs, 1).logits[0].double().softmax(-1)[0, planted])

    bare = chance()
    with home(), unchanged(model), sc.attach(model) as session:
        session.calibrate(DCD(steps=6, lr=3e-3), [given])
        kept = calibration.load("dcd", model)
        own = dict(model.model.multi_modal_projector.named_parameters())
        assert kept.keys() == {f"negative.{name}" for name in own}
        assert all((kept[f"negative.{name}"] != own[name]).any() for name in own)
        alone_, stronger = (chance(DCD(alpha=alpha, beta=0.0)) for alpha in (1.0, 2.0))
        with sc.attach(model, DCD(positive=True)), pytest.raises(InputError, match="no positive projector"):
            generated(model, inputs, 1)
        session.calibrate(DCD(steps=6, lr=3e-3, positive=True), [given])
        both = calibration.load("dcd", model)
    assert stronger < alone_ < bare
    assert all(torch.equal(both[name], value) for name, value in kept.items())
    assert any((both[n.replace("negative", "positive")] != w).any() for n, w in kept.items())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [30])
def test_the_embedded_model_learns_a_wrong_view(steps: int) -> None:
    """What it says of a scene is planted a wrong word for; through the learned projector that is likelier."""
    model, processor = sc.world.load("vlm")
    samples = []
    for seed in range(4):
        asked = sc.Question(
            processor, [sc.world.scene(seed, "calibration").picture()], "describe the image ."
        )
        wrong = processor.tokenizer("this is a kitchen", add_special_tokens=False)["input_ids"]
        samples.append({**asked.inputs(model), "rejected": wrong})
    with home(), sc.attach(model) as session:
        session.calibrate(DCD(steps=steps, lr=1e-3), samples)
        asked = sc.Question(processor, [sc.world.scene(9, "test").picture()], "describe the image .")
        inputs, kitchen = (
            asked.inputs(model),
            processor.tokenizer("kitchen", add_special_tokens=False)["input_ids"][0],
        )
        chances = []
        for methods in ((), (DCD(beta=0.0),)):
            with sc.attach(model, *methods):
                made = generated(model, dict(inputs), 4)
            chances.append(float(made.logits[3].softmax(-1)[0, kitchen]))
    assert chances[1] < chances[0]


def test_what_cannot_be_learned_from_or_used_is_refused() -> None:
    model = shared("llava")
    given = preferred("llava", [201])
    with home(), sc.attach(model) as session:
        for samples in ([], [{n: v for n, v in given.items() if n != "rejected"}]):
            with pytest.raises(InputError, match="rejected"):
                session.calibrate(DCD(), samples)
        with sc.attach(model, DCD()), pytest.raises(InputError, match="has not been calibrated"):
            generated(model, alone(two(family("llava")), 0))
    with sc.attach(shared("llama")) as session, pytest.raises(InputError, match="no features of images"):
        session.projector({})
