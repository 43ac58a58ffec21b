"""RBD against attention from the model itself, two other prompts that are read by hand, and numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Look, shared
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering._parts.prompts import repainted
from saccade.steering.rbd import RBD, diffused

from .lockstep import DOUBLE, Reader, assert_says, cut, glances, log_softmax, model_of, reader, sample, told
from .shared import Inputs, generated, two

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("beta",)
BFLOAT16 = {"alpha": 0.5, "share": 1.0, "beta": 0.0}
MIDDLE = {"llava": 2, "qwen2_5_vl": 2, "world/vlm": 4}


def main_tokens(name: str, inputs: Inputs, share: float) -> list[int]:
    """Of one picture."""
    a = glances(name, inputs)[MIDDLE[name]].tolist()
    return sorted(sorted(range(len(a)), key=lambda i: -a[i])[: math.ceil(share * len(a))])


def shorter(name: str, inputs: Inputs, keep: list[int]) -> Reader:
    """The prompt without all other visual tokens, positions as they were."""
    ids = inputs["input_ids"][0]
    visual = (ids == model_of(name).config.image_token_id).nonzero()[:, 0].tolist()
    gone = [place for i, place in enumerate(visual) if i not in keep]

    def leave(given: dict[str, Any]) -> dict[str, Any]:
        states = given["inputs_embeds"]
        stay = [i for i in range(states.shape[1]) if i not in gone]
        places = given.get("position_ids")
        places = torch.arange(states.shape[1])[None] if places is None else places
        ones = torch.ones(1, len(stay), dtype=torch.long)
        return {
            **given,
            "inputs_embeds": states[:, stay],
            "position_ids": places[..., stay],
            "attention_mask": ones,
        }

    return reader(model_of(name), inputs, leave)


def noisy(inputs: Inputs, steps: int) -> Inputs:
    """One picture after that many steps, one after another."""
    pixels = inputs["pixel_values"]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).double().numpy()
    left = 1.0
    for step in range(steps):
        left *= 1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)))
    changed = math.sqrt(left) * pixels.numpy() + math.sqrt(1 - left) * noise
    return {**inputs, "pixel_values": torch.from_numpy(changed)}


def formula(alpha: float, beta: float) -> Any:
    return lambda base, visual, textual, step: cut(base + alpha * (visual - textual), base, beta)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"alpha": 1.5, "beta": 0.1, "share": 0.3}),
        ("qwen2_5_vl", {"alpha": 0.7, "noise": 200}),
        ("world/vlm", {"beta": 0.02}),
    ],
)
def test_the_answer_is_that_of_three_prompts_in_lockstep(name: str, options: dict[str, Any]) -> None:
    method, inputs = RBD(**options), sample(name)
    readers = [
        reader(model_of(name), inputs),
        shorter(name, inputs, main_tokens(name, inputs, method.share)),
        reader(model_of(name), noisy(inputs, method.noise)),
    ]
    assert_says(model_of(name), inputs, method, readers, formula(method.alpha, method.beta))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.51])
def test_of_every_picture_the_share_is_kept_rounded_up_and_attention_sums_to_one(share: float) -> None:
    """Two pictures of 36 tokens."""
    model, inputs = model_of("llava"), sample("llava", 1)
    look = Look(tell=lambda call: (call.k.shape[2], call.weights("all").sum(-1)))
    opened: list[Any] = []
    branches = RBD.branches
    with pytest.MonkeyPatch.context() as patch:

        def spied(self: RBD, run: Any) -> Any:
            opened.extend(branches(self, run))
            opened[0].methods += (look,)
            return opened

        patch.setattr(RBD, "branches", spied)
        with sc.attach(model, RBD(share=share)):
            generated(model, inputs, 1)
    words = inputs["input_ids"].shape[1] - 72
    for keys, sums in look.at("text.0.self"):
        assert keys == words + 2 * math.ceil(share * 36)
        assert_close(sums, torch.ones_like(sums))
    assert look.seen


@pytest.mark.parametrize("alpha", [0.5, 30.0])
def test_without_noise_and_with_all_tokens_it_is_the_model(alpha: float) -> None:
    written, bare = told(model_of("llava"), sample("llava"))
    again, logits = told(model_of("llava"), sample("llava"), RBD(alpha=alpha, beta=0.0, share=1.0, noise=0))
    assert again == written
    assert_close(logits, bare, atol=1e-4, rtol=0)


def test_at_alpha_zero_it_is_the_model_with_what_is_implausible_left_out() -> None:
    written, bare = told(model_of("llava"), sample("llava"))
    again, logits = told(model_of("llava"), sample("llava"), RBD(alpha=0.0))
    assert again == written
    expected = log_softmax(np.stack([cut(row, row, 0.1) for row in bare.numpy()]))
    assert np.isinf(expected).any()
    assert_close(logits.numpy(), expected, atol=1e-5, rtol=0)


def test_implausible_words_cannot_be_said_and_the_likeliest_can() -> None:
    base, visual, textual = torch.randn(3, 50, 30, generator=torch.Generator().manual_seed(1)).mul(4).unbind()
    mixed = RBD(alpha=9.0, beta=0.2).prediction(base, [visual, textual], None)  # type: ignore[arg-type]
    probable = base.softmax(-1)
    assert torch.equal(mixed.isfinite(), probable >= 0.2 * probable.amax(-1, keepdim=True))
    assert mixed.gather(1, base.argmax(-1, keepdim=True)).isfinite().all()


def test_a_word_of_the_language_prior_gives_way_to_the_seen_one() -> None:
    """The prior's word is as likely without the picture, the seen one is likelier still by the main tokens."""
    base, visual, textual = torch.tensor([[[3.0, 2.0, -2.0]], [[3.0, 3.0, -2.0]], [[3.2, 0.5, -2.0]]])
    assert int(base.argmax()) == 0
    assert int(RBD().prediction(base, [visual, textual], None).argmax()) == 1  # type: ignore[arg-type]


def test_noise_is_the_same_for_every_picture_and_another_by_another_seed() -> None:
    pixels = torch.zeros(1, 3, 8, 8)
    assert torch.equal(diffused(pixels, 500, 1), diffused(pixels, 500, 1))
    assert not torch.allclose(diffused(pixels, 500, 1), diffused(pixels, 500, 2))


def test_what_fills_up_a_batch_of_pictures_stays_empty() -> None:
    """The first sample has one picture, the second two, and no model may see a third."""
    model, inputs = shared("idefics3", DOUBLE), two(family("idefics3"), DOUBLE)
    pixels = inputs["pixel_values"]
    filler = (pixels == 0).flatten(2).all(-1)
    assert filler.any() and not filler.all()
    painted = repainted(inputs, lambda picture: picture + 1)["pixel_values"]
    assert torch.equal(painted, torch.where(filler[..., None, None, None], 0, pixels + 1))
    with sc.attach(model, RBD()):
        assert torch.stack(generated(model, inputs, 2).logits).isfinite().any(-1).all()


def test_a_prompt_without_a_picture_is_refused() -> None:
    model = model_of("llava")
    with sc.attach(model, RBD()), pytest.raises(InputError, match=r"RBD .*picture"):
        generated(model, {"input_ids": torch.arange(150, 160)[None]})
