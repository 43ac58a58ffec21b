"""LOL against models that are read by hand, layer by layer, and its formula in numpy."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from torch import nn
from torch.testing import assert_close
from zoo import FAMILIES, run
from zoo.base import enliven, words

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.lol_decoding import LOL

from .lockstep import DOUBLE, assert_says, cut, lockstep, log_softmax
from .shared import Inputs, generated, replay


@cache
def saved() -> str:
    """The folder of an amateur: another model, whose weights bfloat16 can hold."""
    folder = tempfile.mkdtemp()
    model: Any = enliven(FAMILIES["llama"].build(), seed=7).to(torch.bfloat16).float()
    model.save_pretrained(folder)
    return folder


INSTRUCTION = (101, 102, 103)
EXAMPLE: dict[str, Any] = {"amateur": saved(), "instruction": INSTRUCTION, "alpha": 0.0}
DISCRETE = ("alpha",)
BFLOAT16 = {"strength": 0.03}
NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}


@cache
def amateur() -> Any:
    return FAMILIES["llama"].build().from_pretrained(saved(), dtype=DOUBLE).eval()  # type: ignore[operator]


def sample() -> Inputs:
    return {"input_ids": torch.cat([torch.tensor([[1]]), words(1, 12)], 1)}


def both(model: Any, name: str, inputs: Inputs, layer: int = 2) -> Any:
    """Log-probabilities of the last layer and of a lower one, (2, words)."""

    def read(written: torch.Tensor) -> np.ndarray:
        ids = torch.cat([inputs["input_ids"], written[None]], 1)
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(LAYERS[name])[layer].register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        last = run(model, {"input_ids": ids})[0, -1]
        hook.remove()
        with torch.no_grad():
            lower = model.lm_head(model.get_submodule(NORM[name])(seen[0]))[0, -1]
        return log_softmax(np.stack([last.numpy(), lower.numpy()]))

    return read


def prompts(name: str, inputs: Inputs, layer: int = 2) -> list[Any]:
    ids = inputs["input_ids"]
    truthful = {"input_ids": torch.cat([ids[:, :1], torch.tensor([INSTRUCTION]), ids[:, 1:]], 1)}
    model = shared(name, DOUBLE)
    return [
        both(model, name, inputs, layer),
        both(amateur(), "llama", inputs, layer),
        both(model, name, truthful, layer),
    ]


def formula(alpha: float, omega: float, mu: float) -> Any:
    def mix(said: np.ndarray, fabled: np.ndarray, truthful: np.ndarray, step: int) -> np.ndarray:
        final, lower = said - fabled
        return cut(final + omega * lower + mu * (truthful[0] - said[0]), said[0], alpha)

    return mix


@pytest.mark.parametrize(("alpha", "omega", "mu"), [(0.1, 0.3, 0.5), (0.0, 0.0, 1.0), (0.3, 2.0, 0.0)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_answer_is_that_of_three_prompts_in_lockstep(
    name: str, alpha: float, omega: float, mu: float
) -> None:
    options = {"alpha": alpha, "omega": omega, "mu": mu, "instruction": INSTRUCTION, "amateur": amateur()}
    assert_says(
        shared(name, DOUBLE), sample(), LOL(**options), prompts(name, sample()), formula(alpha, omega, mu)
    )


def test_without_lower_layer_and_instruction_it_is_contrastive_decoding() -> None:
    """Which leaves out what the model holds for implausible."""
    method = LOL(amateur=saved(), omega=0.0)
    model, inputs = shared("llama", DOUBLE), sample()
    readers = [lambda written: run(model, joined(inputs, written))[0, -1].numpy(),
               lambda written: run(amateur(), joined(inputs, written))[0, -1].numpy()]  # fmt: skip
    assert_says(
        model, inputs, method, readers, lambda a, b, step: cut(log_softmax(a) - log_softmax(b), a, 0.1)
    )


def joined(inputs: Inputs, written: torch.Tensor) -> Inputs:
    return {"input_ids": torch.cat([inputs["input_ids"], written[None]], 1)}


def test_with_itself_as_amateur_all_that_is_plausible_is_alike() -> None:
    model = shared("llama", DOUBLE)
    with sc.attach(model, LOL(amateur=copy.deepcopy(model), omega=0.7)):
        made = generated(model, sample(), 1).logits[0][0]
    base = run(model, sample())[0, -1]
    left = base >= base.max() + np.log(0.1)
    assert torch.equal(made.isfinite(), left) and 1 < left.sum() < len(base)
    assert_close(made[left], made[left][:1].expand(int(left.sum())), atol=1e-5, rtol=0)


def test_with_the_last_layer_as_the_lower_one_the_contrast_counts_twice() -> None:
    """In what both write, token by token."""
    model, inputs = shared("gpt2", DOUBLE), sample()
    logits = []
    written, _ = lockstep(prompts("gpt2", inputs), formula(0.0, 0.0, 0.0))
    for options in ({"layer": "-1", "omega": 1.0}, {"omega": 0.0}):
        with sc.attach(model, LOL(amateur=amateur(), alpha=0.0, **options)):
            logits.append(replay(model, inputs, torch.tensor(written)))
    once, twice = logits[1].log_softmax(-1), logits[0].log_softmax(-1)
    assert_close(twice, (2 * once).log_softmax(-1), atol=1e-4, rtol=1e-5)


def test_the_amateur_is_left_as_it_was() -> None:
    model, other = shared("llama", DOUBLE), amateur()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in other.modules()]
    with sc.attach(model, LOL(amateur=other)):
        generated(model, sample(), 2)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in other.modules()]
    assert "forward" not in vars(other)


@pytest.mark.parametrize(
    ("given", "said"), [(None, "there is none"), ("itself", "the model itself"), ("wider", "has 600 words")]
)
def test_an_amateur_that_cannot_serve_is_refused(given: str | None, said: str) -> None:
    other: nn.Module | None = shared("llama") if given == "itself" else None
    if given == "wider":
        config = type(amateur().config)(**{**amateur().config.to_dict(), "vocab_size": 600})
        other = type(amateur())(config)
    model = shared("llama")
    with sc.attach(model, LOL(amateur=other)), pytest.raises(InputError, match=said):
        generated(model, sample(), 2)
