"""CARVE against the model's own attention, regions found by a walk, and maps made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import saccade as sc
from saccade.steering._parts.masks import kept, strongest
from saccade.steering.carve import CARVE, contrast, refine

from .embedded import trained
from .lockstep import eager, model_of, question
from .shared import numbers

EXAMPLE: dict[str, Any] = {"words": 3}
ASKED, GENERAL = "is there a cup ?", "describe the image ."


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# ---- the map ---------------------------------------------------------------------------------------------


def test_the_papers_layers_of_32() -> None:
    assert numbers(CARVE().sites) == [20, 21, 22, 23, 24, 25]


def test_equal_attention_contrasts_to_one_everywhere() -> None:
    a = noise(1, 1, 4, 5) + 0.1
    assert_close(contrast(a, a, 0.0), torch.ones(4, 5, dtype=torch.float64))


def test_noise_that_both_share_is_divided_out() -> None:
    disturbance = noise(1, 1, 12, 12) ** 6 + 1e-3
    signal = torch.zeros(12, 12, dtype=torch.float64)
    signal[3:6, 7:10] = 1
    asked = disturbance * (0.5 + signal)
    assert correlation(contrast(asked, disturbance, 1e-8), signal) > 0.95
    assert correlation(asked[0, 0], signal) < 0.6


def test_later_words_weigh_linearly_more_up_to_the_shorter_answer() -> None:
    asked = torch.tensor([[[[2.0, 6.0]]], [[[1.0, 10.0]]], [[[99.0, 99.0]]]])  # three words, one layer
    general = torch.tensor([[[[1.0, 2.0]]], [[[4.0, 5.0]]]])
    assert_close(contrast(asked, general, 0.0), torch.tensor([[1 * 2 + 2 * 0.25, 1 * 3 + 2 * 2.0]]))


def by_hand(asked: sc.Question, name: str, text: str, layers: list[int], words: int) -> np.ndarray:
    """Of every greedy word the attention on the picture, mean over heads: (words, layers, tokens)."""
    found = []
    with eager(name) as model, torch.no_grad():
        inputs = dict(asked.inputs(model, text=text))
        visual = (inputs["input_ids"][0] == model.config.image_token_id).numpy()
        inputs.pop("attention_mask")
        for _ in range(words):
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
            out = model(**inputs, output_attentions=True)
            rows = [out.attentions[layer][0, :, -1].mean(0).numpy() for layer in layers]
            found.append([row[: len(visual)][visual] for row in rows])
            out.logits[0, -1, model.generation_config.eos_token_id] = -torch.inf
            inputs["input_ids"] = torch.cat([inputs["input_ids"], out.logits[:, -1:].argmax(-1)], 1)
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "layers", "side"), [("llava", [1, 2], 6), ("qwen2_5_vl", [1, 2], 6), ("world/vlm", [4, 5], 12)]
)
def test_the_map_is_that_of_the_models_own_attention(name: str, layers: list[int], side: int) -> None:
    """Every token shows one cell of a square picture."""
    square = question(name).images[0].crop((0, 0, 90, 90)).resize((96, 96))
    asked = dataclasses.replace(question(name, ASKED, min_new_tokens=3), images=[square])
    found, general = (by_hand(asked, name, f"{text} no .", layers, 3) for text in (ASKED, GENERAL))
    s = sum((t + 1) * (found[t] / (general[t] + 1e-8)).sum(0) for t in range(3))
    expected = Image.fromarray(s.reshape(side, side).astype(np.float32))
    driver = CARVE(words=3, reference=GENERAL, suffix=" no .", sites=f"text.{layers[0]}:{layers[1] + 1}.self")
    with sc.attach(model_of(name)) as session:
        heat = driver.heat(session, asked, square)
    assert heat.std() > 0
    again = np.asarray(expected.resize((96, 96), Image.Resampling.BILINEAR))
    assert_close(heat.numpy(), again, atol=0.03 * s.max(), rtol=0, check_dtype=False)


# ---- what is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.2, 0.55])
def test_a_share_p_of_the_pixels_is_kept_and_they_are_the_hottest(p: float) -> None:
    heat = noise(50, 40)
    mask = kept(heat, p)
    assert mask.sum() == pytest.approx(p * mask.size, abs=1)
    assert heat.numpy()[mask].min() > heat.numpy()[~mask].max()


def test_at_p_one_every_pixel_is_kept() -> None:
    heat = noise(30, 40)
    mask = strongest(heat, kept(heat, 1.0), 3)
    assert mask.all()
    picture = question("llava").images[0]
    assert refine(picture, np.ones((90, 130), bool)).tobytes() == picture.tobytes()


def walked(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Regions of pixels that share a side."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        edge = [left.pop()]
        region = set(edge)
        while edge:
            y, x = edge.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    region.add(near)
                    edge.append(near)
        found.append(region)
    return found


@pytest.mark.parametrize("k", [1, 3, 1000])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_regions_that_are_kept_have_the_largest_sums(k: int, share: float) -> None:
    """Not those with the most pixels. At 0.6 they wind through the picture."""
    heat = noise(40, 30, seed=3) ** 30
    mask = kept(heat, share)
    found = walked(mask)
    assert len(found) > 5
    found.sort(key=lambda region: -sum(float(heat[at]) for at in region))
    expected = np.zeros_like(mask)
    for region in found[:k]:
        for at in region:
            expected[at] = True
    assert np.array_equal(strongest(heat, mask, k), expected)


def test_what_is_kept_is_cut_out_and_covers_the_pictures_size() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(1, 255, (60, 80, 3), dtype=np.uint8))
    mask = np.zeros((60, 80), bool)
    mask[10:20, 30:40] = mask[40:50, 50:55] = True
    expected = Image.fromarray(np.asarray(picture) * mask[..., None])
    expected = expected.crop((30, 10, 55, 50)).resize((80, 128), Image.Resampling.LANCZOS)  # 80 / 25 times
    found = refine(picture, mask)
    assert found.size == (80, 128) and found.tobytes() == expected.tobytes()


# ---- the answer ------------------------------------------------------------------------------------------


def test_the_answer_is_that_to_the_refined_pictures() -> None:
    model, asked = shared("llava"), question("llava")
    images = [asked.images[0], asked.images[0].crop((0, 0, 70, 80))]
    asked = sc.Question(asked.processor, images, ASKED, asked.options)
    with sc.attach(model) as session:
        answer = session.run(CARVE(), asked)
        refined = [answer.pictures[name] for name in ("refined", "refined 1")]
        assert answer == asked.ask(session, refined)
        assert session.run(CARVE(append=True), asked) == asked.ask(session, [*images, *refined])
        for image, box, again in zip(images, answer.found["boxes"], refined, strict=True):
            heat = CARVE().heat(session, asked, image)
            mask = strongest(heat, kept(heat, 0.2), 3)
            assert refine(image, mask).tobytes() == again.tobytes()
            rows, columns = np.nonzero(mask)
            assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [*answer.pictures] == ["map", "kept", "refined", "map 1", "kept 1", "refined 1"]


def test_the_stacks_methods_are_not_in_the_map() -> None:
    asked = question("llava")
    maps = []
    for stack in ((), sc.load("zerotuning(gamma=100.0)")):
        with sc.attach(shared("llava"), *stack) as session:
            maps.append(CARVE().heat(session, asked, asked.images[0]))
    assert torch.equal(*maps)


def test_on_the_trained_model_from_one_line() -> None:
    model, processor = trained()
    image = sc.world.scene(9, "test").picture()
    text, stack = "what colour is the car ?", 'carve(suffix="",reference="describe the image .")'
    answer = sc.ask(model, processor, image, text, stack)
    assert answer == sc.ask(model, processor, answer.pictures["refined"], text)
    assert (
        answer.pictures["refined"].size >= image.size
        and answer.pictures["refined"].tobytes() != image.tobytes()
    )
