"""ControlMLLM against the loop written by hand, on the attentions that a model itself returns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from helpers import shared, unchanged
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.controlmllm import ControlMLLM, nearness

from .shared import Inputs, alone, followed, generated, two

BOX = (9.0, 4.0, 30.0, 24.0)
EXAMPLE = {"boxes": (BOX,), "lr": 0.02}
MODELS = ("llava", "paligemma")
BFLOAT16 = {"lr": 1e-4}
"""Slopes in bfloat16 are coarse, and a long step multiplies that."""

WHOLE = (0.0, 0.0, 48.0, 48.0)


# ---- the loop -----------------------------------------------------------------------------------------


def share(box: tuple[float, ...]) -> Tensor:
    """Of every one of 6 x 6 patches of 8 pixels, how much lies in the box."""
    x0, y0, x1, y1 = box
    return torch.tensor([
        max(0.0, min(x1, 8 * c + 8) - max(x0, 8 * c)) * max(0.0, min(y1, 8 * r + 8) - max(y0, 8 * r)) / 64
        for r in range(6)
        for c in range(6)
    ])  # fmt: skip


@contextmanager
def moved(model: Any, places: list[int], added: Tensor) -> Iterator[None]:
    """What goes into the first layer for these tokens, with something added to it."""

    def add(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        if args[0].shape[1] <= places[-1]:
            return args
        h = args[0].clone()
        h[0, places] += added
        return (h,)

    hook = model.model.language_model.layers[0].register_forward_pre_hook(add)
    try:
        yield
    finally:
        hook.remove()


def by_hand(
    model: Any, inputs: Inputs, m: Tensor, steps: int, lr: float, accumulate: bool = False
) -> tuple[list[float], Tensor]:
    """Energies, and what is added to the visual tokens of one sample at last."""
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
    p = o = carried = torch.zeros(len(places), 64)
    energies = []
    for _ in range(steps):
        o = 0.5 * p + 0.5 * o
        leaf = (o + carried).requires_grad_()
        with moved(model, places, leaf):
            maps = model(**inputs, output_attentions=True).attentions
        a = torch.stack([w[0].mean(0)[places[-1] + 1 :].mean(0)[places] for w in maps]).mean(0)
        energy = (1 - (a * m).sum() / a.sum()) ** 2
        energies.append(float(energy.detach()))
        p = p - lr * 0.5 * torch.autograd.grad(400 * energy, leaf)[0]
        carried = carried + o if accumulate else carried
    return energies, carried + 0.5 * p + 0.5 * o


def eager() -> Any:
    return shared("llava", torch.float32, "eager")


def one() -> Inputs:
    return alone(two(family("llava")), 0)


@cache
def learnt(**options: Any) -> tuple[dict[str, Any], Tensor]:
    """What is told of one sample, and its logits."""
    model, inputs = shared("llava"), one()
    with sc.attach(model, ControlMLLM(**{**EXAMPLE, **options})) as session:
        logits = run(model, inputs)
    return session.results["controlmllm"], logits


@pytest.mark.parametrize("accumulate", [False, True])
def test_energies_and_what_is_added_are_those_of_the_loop(accumulate: bool) -> None:
    told, logits = learnt(accumulate=accumulate)
    energies, added = by_hand(eager(), one(), share(BOX), 5, 0.02, accumulate)
    places = (one()["input_ids"][0] == eager().config.image_token_id).nonzero()[:, 0].tolist()
    assert [float(e) for e in told["energies"]] == pytest.approx(energies, rel=1e-4)
    assert_close(told["added"][0, places], added, atol=1e-4, rtol=1e-3)
    assert float(added.abs().max()) > 1e-2
    with moved(eager(), places, added):
        assert_close(logits, run(eager(), one()), atol=1e-3, rtol=1e-3)


def test_the_answer_is_written_with_the_moved_tokens() -> None:
    """Also a second turn, in which nothing is added again."""
    model, inputs = shared("llava"), one()
    with sc.attach(model, ControlMLLM(**EXAMPLE)):
        first = generated(model, inputs, 3)
        asked = followed(inputs, first, words(1, 4, seed=9))
        second = generated(model, asked, 2, past_key_values=first.past_key_values)
    _, added = by_hand(eager(), inputs, share(BOX), 5, 0.02)
    places = (inputs["input_ids"][0] == eager().config.image_token_id).nonzero()[:, 0].tolist()
    whole = {**inputs, "input_ids": second.sequences, "attention_mask": torch.ones_like(second.sequences)}
    with moved(eager(), places, added):
        logits = run(eager(), whole)[0]
    for made, start in ((first, inputs["input_ids"].shape[1]), (second, asked["input_ids"].shape[1])):
        for step, row in enumerate(made.logits):
            assert_close(row[0], logits[start - 1 + step], atol=2e-3, rtol=1e-2)


# ---- the statements -----------------------------------------------------------------------------------


def test_a_region_of_the_whole_picture_has_no_energy_and_is_the_model() -> None:
    told, logits = learnt(boxes=(WHOLE,), lr=1.0)
    assert all(float(e) == 0 for e in told["energies"]) and len(told["energies"]) == 5
    assert (told["added"] == 0).all()
    assert torch.equal(logits, run(shared("llava"), one()))


def test_no_steps_are_the_model() -> None:
    assert torch.equal(learnt(steps=0)[1], run(shared("llava"), one()))


def test_the_share_inside_the_region_rises_and_the_model_learns_nothing() -> None:
    model = shared("llava")
    with unchanged(model):
        told, _ = learnt(lr=2e-3)
    shares = [1 - math.sqrt(float(e)) for e in told["energies"]]
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_ends_early_where_the_energy_has_changed_enough_or_rises() -> None:
    whole = [float(e) for e in learnt()[0]["energies"]]
    limit = abs(whole[2] - whole[0]) / whole[0] * 0.999
    assert len(learnt(stop=limit)[0]["energies"]) == 3
    rising, _ = learnt(stop=1e9, lr=5.0, steps=12)
    energies = [float(e) for e in rising["energies"]]
    assert len(energies) < 12 and energies[-1] > energies[-2]


def test_nearness_is_a_bell_of_the_normalised_distance() -> None:
    places = torch.tensor([[[x, 0.0, x + 2, 2.0] for x in (0.0, 2.0, 4.0, 8.0)]])
    got = nearness(places, [(0.0, 0.0, 2.0, 2.0)])[0]
    away = [0.0, 1.0, 3.0, 7.0]  # of the middles from the box's edge
    wanted = [math.exp(-((d / 7) ** 2) / (2 * 0.1**2)) / (math.sqrt(2 * math.pi) * 0.1) for d in away]
    assert_close(got, torch.tensor(wanted))
    told, _ = learnt(near=True, steps=1)
    plain, _ = learnt(steps=1)
    assert abs(float(told["energies"][0]) - float(plain["energies"][0])) > 1e-3


# ---- pictures, and what it cannot do ------------------------------------------------------------------


def test_every_picture_has_its_own_box_and_located_pictures_have_theirs() -> None:
    """Of samples with one picture and with two; located ones are twice as large as what the tower is given."""
    model, inputs, f = shared("llava"), two(family("llava")), family("llava")
    boxes = (BOX, WHOLE, (0.0, 0.0, 8.0, 8.0))
    pictures = [Image.new("RGB", (96, 96), (9, 9, 9))] * 3
    found = []
    for given, located in (
        (boxes, []),
        (tuple(tuple(2 * x for x in box) for box in boxes), [pictures[:1], pictures[1:]]),
    ):
        with sc.attach(model, ControlMLLM(boxes=given, steps=1)) as session:
            session.locate(f.processor(), located)
            run(model, inputs)
            found.append(session.results["controlmllm"]["energies"][0])
            session.locate(f.processor(), [])
    assert_close(*found, atol=5e-3, rtol=0)
    assert float(found[0][0]) == pytest.approx(by_hand(eager(), one(), share(BOX), 1, 0.02)[0][0], rel=1e-4)


def test_a_prompt_of_words_is_untouched() -> None:
    model, ids = shared("llava"), words(1, 6)
    bare = run(model, {"input_ids": ids})
    with sc.attach(model, ControlMLLM(**EXAMPLE)):
        assert torch.equal(run(model, {"input_ids": ids}), bare)


@pytest.mark.parametrize(
    ("name", "boxes", "match"), [("llava", (BOX, BOX), "2 boxes for 3"), ("qwen2_5_vl", (BOX,), "locate")]
)
def test_what_it_cannot_do_is_refused(name: str, boxes: Any, match: str) -> None:
    model = shared(name)
    with sc.attach(model, ControlMLLM(boxes=boxes)), pytest.raises(InputError, match=match):
        run(model, two(family(name)))


def test_the_embedded_models_words_look_into_the_box() -> None:
    model, processor = sc.world.load("vlm")
    inputs = sc.Question(processor, [sc.world.scene(9, "test").picture()], "what is this ?").inputs(model)
    bare = run(model, inputs)
    with sc.attach(model, ControlMLLM(boxes=((0.0, 0.0, 32.0, 32.0),), lr=1e-3)) as session:
        moved_ = run(model, inputs)
    energies = [float(e) for e in session.results["controlmllm"]["energies"]]
    assert energies[-1] < energies[0]
    assert (moved_ - bare).abs().max() > 1e-4
