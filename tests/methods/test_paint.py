"""PAINT against sets that numpy chooses and rows that are raised by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Look, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.paint import PAINT, choose, raised

from .shared import Inputs, alone, followed, generated, numbers, two

EXAMPLE = {"outlier": 0.2}
"""One of the tiny models has few tokens of a picture, of which none is an outlier."""

LAYER = 2  # the first that is changed, of four


# ---- the paper ----------------------------------------------------------------------------------------


def by_hand(first: Tensor, late: Tensor, share: float = 0.25) -> tuple[set[int], set[int]]:
    """Local and summary patches by attention (patches,) of the class token."""
    q1, q3 = np.percentile(late.numpy(), [25, 75])
    summary = {i for i, a in enumerate(late.tolist()) if a > q3 + 1.5 * (q3 - q1)}
    order = sorted(range(len(first)), key=lambda i: -float(first[i]))
    return set(order[: int(share * len(first))]) - summary, summary


def sets_of(model: Any, inputs: Inputs, picture: int) -> tuple[set[int], set[int]]:
    """Of a picture whose patches are all tokens, behind one class token."""
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    return by_hand(*(tower[layer][picture, :, 0, 1:].sum(0) for layer in (0, -2)))


def gains(model: Any, inputs: Inputs, alpha: float = 0.7, beta: float = 0.4) -> Tensor:
    """By sample and column."""
    gain = torch.zeros(inputs["input_ids"].shape)
    picture = 0
    for sample, ids in enumerate(inputs["input_ids"]):
        places = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
        for start in range(0, len(places), 36):
            local, summary = sets_of(model, inputs, picture)
            gain[sample, [places[start + i] for i in local]] = alpha
            gain[sample, [places[start + i] for i in summary]] = beta
            picture += 1
    return gain


def eager(name: str = "llava") -> Any:
    return shared(name, torch.float32, "eager")


@cache
def seen(**options: Any) -> tuple[Any, Any]:
    """Weights of every layer without and with it."""
    model, inputs = eager(), two(family("llava"))
    with torch.no_grad():
        before = model(**inputs, output_attentions=True).attentions
        with sc.attach(model, PAINT(**options)):
            after = model(**inputs, output_attentions=True).attentions
    return before, after


def test_the_last_rows_weights_are_those_of_raised_scores() -> None:
    """Two samples of one and two pictures, padded on the left."""
    model, inputs, look = eager(), two(family("llava")), Look(lambda call: call.scores("last"))
    look.sites = f"text.{LAYER}.self"
    with sc.attach(model, look):
        run(model, inputs)
    z = look.seen[0][2]
    gain = gains(model, inputs)[:, None, None]
    assert (gain > 0).sum() > 20
    visible = inputs["attention_mask"].bool()[:, None, None]
    wanted = torch.where(visible, z + gain * z.abs(), -torch.inf).softmax(-1)
    _, after = seen()
    assert_close(after[LAYER][:, :, -1:], wanted)
    assert (after[LAYER][:, :, -1] - seen()[0][LAYER][:, :, -1]).abs().max() > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_local_and_summary_are_the_papers_and_disjoint(seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    first, late = torch.randn(2, 97, generator=noise, dtype=torch.float64).exp() ** 2
    late[:40] = first[:40]  # patches that both layers find important
    local, summary = choose(first, late, 0.25, 1.5)
    assert tuple(set(m.nonzero()[:, 0].tolist()) for m in (local, summary)) == by_hand(first, late)
    assert summary.any() and local.any() and not (local & summary).any() and int(local.sum()) < 24


def test_separators_are_neither_and_do_not_count() -> None:
    first, late = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) ** 8
    spread = torch.full((2, 50), torch.nan)
    places = torch.arange(50)[torch.arange(50) % 5 != 4]
    spread[:, places] = torch.stack([first, late])
    got = choose(*spread, 0.25, 1.5)
    for mask, wanted in zip(got, choose(first, late, 0.25, 1.5), strict=True):
        assert torch.equal(mask[places], wanted) and int(mask.sum()) == int(wanted.sum())


def test_a_hand_made_row() -> None:
    z = torch.tensor([2.0, -3.0, 0.5, -1.0, torch.finfo(torch.float32).min])
    gain = torch.tensor([0.7, 0.7, 0.0, 0.4, 2.0])
    assert_close(raised(z, gain)[:4], torch.tensor([2 * 1.7, -3 * 0.3, 0.5, -1 * 0.6]))
    assert raised(z, gain).softmax(-1)[4] == 0


# ---- the statements -----------------------------------------------------------------------------------


def test_alpha_and_beta_of_zero_change_nothing() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    bare = run(model, inputs)
    with sc.attach(model, PAINT(alpha=0.0, beta=0.0)):
        assert torch.equal(run(model, inputs), bare)


def test_rows_sum_to_one() -> None:
    _, after = seen()
    real = two(family("llava"))["attention_mask"].bool()
    for w in after:
        sums = w.sum(-1).transpose(1, 2)[real]
        assert_close(sums, torch.ones_like(sums))


def test_only_the_newest_row_differs_in_the_first_modified_layer() -> None:
    before, after = seen()
    assert torch.equal(after[LAYER][:, :, :-1], before[LAYER][:, :, :-1])
    for layer in range(LAYER):
        assert torch.equal(after[layer], before[layer])
    assert numbers(PAINT().sites["scores"]) == [*range(2, 32)]


def test_attention_on_the_union_never_falls() -> None:
    model, inputs = eager(), two(family("llava"))
    union = (gains(model, inputs) > 0).float()[:, None, :, None]
    before, after = ((w[LAYER][:, :, -1:] @ union)[..., 0, 0] for w in seen())
    assert (after >= before).all() and (after > before + 0.01).any()


def test_a_prompt_of_words_is_untouched() -> None:
    model, ids = eager(), torch.full((1, 6), 150)
    with torch.no_grad():
        bare = model(input_ids=ids, output_attentions=True)
        with sc.attach(model, PAINT()):
            out = model(input_ids=ids, output_attentions=True)
    for a, b in zip(bare.attentions, out.attentions, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(out.logits, bare.logits)


# ---- generating ---------------------------------------------------------------------------------------


def test_every_generated_token_looks_at_the_prompts_sets() -> None:
    """Also in a second turn, whose picture is another and whose first is remembered."""
    model, inputs = eager(), alone(two(family("llava")), 0)
    first = gains(model, inputs)[0].nonzero()[:, 0].tolist()
    look = Look(lambda call: (call.scores("last"), call.weights("last")), sites=f"text.{LAYER}.self")
    with sc.attach(model, PAINT(), look):
        made = generated(model, inputs, 3)
        more = alone(two(family("llava")), 1)
        asked = followed(inputs, made, more["input_ids"])
        generated(
            model, {**asked, "pixel_values": more["pixel_values"]}, 2, past_key_values=made.past_key_values
        )
    second = gains(model, more)[0].nonzero()[:, 0] + made.sequences.shape[1]
    for step, (_, phase, (z, w)) in enumerate(look.seen):
        raised_ = (w / z.exp())[0, :, 0]  # by what columns stand above the softmax of their scores
        ratio = raised_ / raised_[:, -1:]
        assert phase == ("prefill", "decode", "decode", "extend", "decode")[step]
        changed = ((ratio - 1).abs() > 1e-3).any(0).nonzero()[:, 0].tolist()
        assert changed == (first if step < 3 else first + second.tolist())


def test_features_whose_tower_was_not_seen_are_refused() -> None:
    model, inputs = eager(), alone(two(family("llava")), 0)
    with (
        sc.attach(model, PAINT(sites={"scores": "text.2:.self"})),
        pytest.raises(InputError, match="tower"),
    ):
        run(model, inputs)


def test_it_acts_on_the_embedded_model() -> None:
    model, processor = sc.world.load("vlm")
    picture = sc.world.scene(9, "test").picture()
    inputs = sc.Question(processor, [picture], "what colour is the car ?").inputs(model)
    bare = run(model, inputs)
    with sc.attach(model, PAINT()):
        assert (run(model, inputs)[:, -1] - bare[:, -1]).abs().max() > 1e-3
