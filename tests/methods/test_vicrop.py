"""ViCrop against maps from the models' own attention and gradients, a search by brute force, and a toy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import FAMILIES, Family, family, select

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.vicrop import ViCrop, best_box, cut, encoder_side, high_pass

from .shared import numbers

EXAMPLE: dict[str, Any] = {"window": 40}
LAYER = 2
"""Of four, as 14 of 32."""
ASKED, GENERAL = "Is the red cup on the box?", "Write a general description of the image."
RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


def picture(width: int = 90, height: int = 90, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def question(name: str, *images: Image.Image, text: str = ASKED) -> sc.Question:
    processor = FAMILIES[name].processor
    assert processor
    return sc.Question(processor(), images, text, {"max_new_tokens": 4, "min_new_tokens": 4})


def heat(name: str, image: Image.Image, text: str = ASKED, **options: Any) -> Tensor:
    with sc.attach(shared(name)) as session:
        return ViCrop(**options).heat(session, question(name, image, text=text), image)


# ---- maps, by the model itself --------------------------------------------------------------------------


def by_hand(name: str, image: Image.Image, text: str) -> tuple[Tensor, Tensor]:
    """Attention of the last word on the visual tokens, mean over heads; and times what raises the next."""
    model = shared(name, torch.float32, "eager")
    inputs = question(name, image).inputs(model, text=text)
    out = model(**inputs, output_attentions=True)
    a = out.attentions[LAYER]
    (slope,) = torch.autograd.grad(out.logits[0, -1].log_softmax(-1).max(), a)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    plain, raised = (w[0, :, -1, visual].mean(0).detach().double() for w in (a, a * slope.clamp_min(0)))
    return plain, raised


@pytest.mark.parametrize(("name", "shape"), [("llava", (6, 6)), ("qwen2_5_vl", (6, 6))])
def test_rel_and_grad_are_those_of_the_models_own_attention(name: str, shape: tuple[int, int]) -> None:
    """Every token shows one cell of a square picture."""
    image = picture(96, 96)
    asked, raised = by_hand(name, image, ASKED)
    general, _ = by_hand(name, image, GENERAL)
    found = heat(name, image, map="rel")
    assert_close(found, (asked / general).view(shape), atol=0, rtol=0.02)
    assert found.std() > 0.1
    assert_close(heat(name, image, map="grad"), raised.view(shape), atol=0.05 * float(raised.max()), rtol=0)


def test_tiles_and_the_base_view_add_up() -> None:
    """What the newlines get is lost, and so is nothing else."""
    image = picture(60, 40)
    _, raised = by_hand("llava_next", image, ASKED)
    tokens = 16 + 6 * 9
    lines = torch.tensor([i >= 16 and (i - 16) % 9 == 8 for i in range(tokens)])
    assert len(raised) == tokens
    assert float(heat("llava_next", image, map="grad").sum()) == pytest.approx(
        float(raised[~lines].sum()), 1e-3
    )


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_rel_is_one_everywhere_where_the_reference_is_the_question(name: str) -> None:
    found = heat(name, picture(90, 90), text=GENERAL)
    assert_close(found, torch.ones_like(found))
    wide = heat("llava", picture(150, 90), text=GENERAL)  # only the middle comes to its tower
    assert wide.shape == (6, 10)
    assert_close(wide, torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 0, 0]).double().expand(6, 10))


def blurred(colour: np.ndarray) -> np.ndarray:
    bell = [math.exp(-x * x / (2 * 0.8**2)) for x in (-1, 0, 1)]
    rows, columns = colour.shape
    framed = np.pad(colour, 1, mode="reflect")
    return sum(
        bell[i] * bell[j] / sum(bell) ** 2 * framed[i : i + rows, j : j + columns]
        for i in range(3)
        for j in range(3)
    )


def detail(image: Image.Image, size: int) -> np.ndarray:
    small = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) / 255
    layers = [small[..., c] - blurred(small[..., c]) for c in range(3)]
    norm = np.sqrt(sum(layer * layer for layer in layers))
    framed = np.pad(norm, 3, mode="symmetric")
    return np.array([[np.median(framed[y : y + 7, x : x + 7]) for x in range(size)] for y in range(size)])


def test_the_high_pass_map() -> None:
    image = picture(70, 50)
    assert_close(high_pass(image, (48, 48)).double().numpy(), detail(image, 48), atol=1e-6, rtol=0)
    flat = high_pass(Image.new("RGB", (70, 50), (90, 30, 200)), (48, 48))
    assert flat.abs().max() < 1e-6


def test_pure_is_the_ratio_of_pixel_gradients_where_there_is_detail() -> None:
    model, image = shared("llava"), picture(96, 96)
    norms = []
    for text in (ASKED, GENERAL):
        inputs = question("llava", image).inputs(model, text=text)
        pixels = inputs["pixel_values"].requires_grad_()
        model(**inputs).logits[0, -1].log_softmax(-1).max().backward(inputs=[pixels])
        norms.append(pixels.grad[0].square().sum(0).sqrt())
    high = detail(image, 48)
    ratio = (norms[0] / norms[1]).numpy() * (high > np.median(high))
    expected = ratio.reshape(6, 8, 6, 8).mean((1, 3))
    assert_close(heat("llava", image, map="pure").numpy(), expected, atol=1e-4, rtol=1e-3, check_dtype=False)


@pytest.mark.parametrize("kind", ["rel", "grad", "pure"])
@pytest.mark.parametrize(
    "f", [p for p in select("vlm", "processor", "generates") if "cross" not in p.values[0].tags]
)
def test_on_every_family(f: Family, kind: str) -> None:
    model, image = shared(f.name), picture(200, 140)
    asked = question(f.name, image)
    crop = ViCrop(map=kind, window=48, append="qformer" not in f.tags)
    if kind == "pure" and "codes" in f.tags:
        with sc.attach(model) as session, pytest.raises(InputError, match="no gradient comes to pixels"):
            session.run(crop, asked)
        return
    with sc.attach(model) as session:
        answer = session.run(crop, asked)
    (found,), (box,) = answer.found["maps"], answer.found["boxes"]
    assert found.isfinite().all() and (found >= 0).all() and found.std() > 0
    assert_inside(box, image.size)
    assert answer.pictures["crop"].size != image.size
    assert all(p.grad is None for p in model.parameters())


# ---- the layer ------------------------------------------------------------------------------------------


def test_the_papers_layer_of_32() -> None:
    assert numbers(ViCrop().sites)[0] == 14
    assert numbers(ViCrop().sites, depth=4)[0] == LAYER


def test_a_layer_whose_window_does_not_reach_the_picture_is_passed_over() -> None:
    """Gemma 3's layers 0 and 2 see 32 words."""
    text = "Is it red? " * 30
    found = [
        heat("gemma3", picture(), text=text, map="grad", sites=sites)
        for sites in ("text.0:2.self", "text.1.self")
    ]
    assert_close(*found)
    with pytest.raises(InputError, match=r"No layer of text.0.self"):
        heat("gemma3", picture(), text=text, sites="text.0.self")


# ---- the box --------------------------------------------------------------------------------------------


def searched(
    values: np.ndarray, size: tuple[int, int], window: float, divide: bool = True
) -> tuple[int, ...]:
    """By trying every window: left, top and side of the best."""
    rows, columns = values.shape
    across, down = size[0] / columns, size[1] / rows
    found = []
    for times in RATIOS:
        w, h = (min(n, int(window * times / cell)) for n, cell in ((columns, across), (rows, down)))
        if (w, h) == (columns, rows):
            if times == 1:
                return (0, 0, *size)
            continue
        sums = {
            (x, y): sum(values[y + j][x + i] for i in range(w) for j in range(h))
            for x in range(columns - w + 1)
            for y in range(rows - h + 1)
        }
        (x, y), top = max(sums.items(), key=lambda item: item[1])
        near = [sums[p] for p in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if p in sums]
        gain = (top - sum(near) / len(near)) / (w * h if divide else 1)
        found.append((gain, window * times, (x + w / 2) * across, (y + h / 2) * down))
    _, side, middle_x, middle_y = max(found)
    edges = []
    for middle, limit in ((middle_x, size[0]), (middle_y, size[1])):
        start = max(0, min(middle - side / 2, limit - side))
        edges.append((start, min(limit, start + side)))
    return (edges[0][0], edges[1][0], edges[0][1], edges[1][1])


def assert_inside(box: tuple[int, ...], size: tuple[int, int]) -> None:
    assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


@pytest.mark.parametrize("size", [(672, 672), (1000, 400), (500, 900)])
@pytest.mark.parametrize("shape", [(24, 24), (12, 18)])
def test_the_search_is_that_by_brute_force(size: tuple[int, int], shape: tuple[int, int]) -> None:
    for seed in range(6):
        values = np.random.default_rng(seed).random(shape) ** 4
        found = best_box(torch.from_numpy(values), size, 150, RATIOS)
        assert_inside(found, size)
        assert np.abs(np.array(found) - searched(values, size, 150)).max() <= 1


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union."""
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared_ = max(0, sides[0]) * max(0, sides[1])
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared_ / (sum(areas) - shared_)


@pytest.mark.parametrize("corner", [(0, 0), (5, 3), (12, 12), (2, 11)])
def test_it_finds_a_bright_square(corner: tuple[int, int]) -> None:
    values = 0.1 * torch.rand(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = corner
    values[y : y + 12, x : x + 12] += 1
    planted = (28 * x, 28 * y, 28 * (x + 12), 28 * (y + 12))
    assert overlap(best_box(values, (672, 672), 336, RATIOS), planted) > 0.5


def test_the_division_by_the_area_changes_the_choice() -> None:
    """A bright spot inside a large pale one: by sums the large window gains more, by means the small one."""
    values = torch.zeros(30, 30, dtype=torch.float64)
    values[5:25, 5:25] = 1
    values[9:19, 9:19] = 1.9
    found = best_box(values, (300, 300), 100, (1.0, 2.0))
    assert found == (90, 90, 190, 190)
    sums = values.unfold(0, 20, 1).unfold(1, 20, 1).sum((-1, -2))
    small = values.unfold(0, 10, 1).unfold(1, 10, 1).sum((-1, -2))
    gains = [
        float(s[at] - (s[at[0] - 1, at[1]] + s[at[0], at[1] - 1]) / 2)
        for s, at in ((sums, (5, 5)), (small, (9, 9)))
    ]
    assert gains[0] > gains[1] and gains[0] / 400 < gains[1] / 100


def test_a_window_that_covers_the_map_is_the_whole_picture() -> None:
    values = torch.rand(6, 6, dtype=torch.float64)
    assert best_box(values, (48, 30), 48, RATIOS) == (0, 0, 48, 30)
    assert best_box(values, (100, 30), 48, RATIOS) != (0, 0, 100, 30)


@pytest.mark.parametrize(
    ("name", "side"), [("llava", 48), ("llava_next", 32), ("internvl", 64), ("qwen2_5_vl", 224)]
)
def test_the_smallest_window_is_the_encoders_input(name: str, side: int) -> None:
    with sc.attach(shared(name)) as session:
        assert encoder_side(session, question(name), picture(600, 500)) == side
        boxes = [
            session.run(ViCrop(ratios=(1.0,), **w), question(name, picture(300, 300))).found["boxes"]
            for w in ({}, {"window": side})
        ]
    assert boxes[0] == boxes[1] != [(0, 0, 300, 300)]


# ---- large pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 60), (1024, 1025), (3000, 500), (7, 2050)])
def test_a_picture_is_cut_into_equal_parts_that_are_not_too_long(size: tuple[int, int]) -> None:
    image = picture(*size)
    parts = cut(image, 1024)
    assert len(parts) == math.ceil(size[1] / 1024) and len(parts[0]) == math.ceil(size[0] / 1024)
    again = np.concatenate([np.concatenate([np.asarray(p) for p in row], 1) for row in parts])
    assert np.array_equal(again, np.asarray(image))
    sides = [p.size for row in parts for p in row]
    assert max(max(side) for side in sides) <= 1024
    assert max(np.ptp([side[i] for side in sides]) for i in (0, 1)) <= 1


def test_parts_are_mapped_one_by_one() -> None:
    image = picture(120, 60)
    whole = heat("llava", image, blocks=60)
    parts = [heat("llava", image.crop(box)) for box in ((0, 0, 60, 60), (60, 0, 120, 60))]
    assert_close(whole, torch.cat(parts, 1))
    assert heat("llava", image, blocks=119).shape == whole.shape and not torch.equal(
        heat("llava", image), whole
    )


# ---- the crop -------------------------------------------------------------------------------------------


@contextmanager
def features(model: Any) -> Iterator[list[Tensor]]:
    """What comes out of the projector, call by call."""
    seen: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda _, __, out: seen.append(out.detach())
    )
    try:
        yield seen
    finally:
        hook.remove()


def test_a_crop_of_the_whole_picture_says_everything_twice() -> None:
    model = shared("llava")
    with sc.attach(model) as session, features(model) as seen:
        session.run(ViCrop(window=10**4), question("llava", picture()))
    assert seen[-1].shape[:2] == (2, 36)
    assert_close(seen[-1][0], seen[-1][1], atol=1e-5, rtol=0)


def test_the_answer_is_that_to_the_pictures_and_their_crops() -> None:
    model, images = shared("llava"), [picture(120, 90), picture(80, 100, 1)]
    asked = question("llava", *images)
    with sc.attach(model) as session:
        answer = session.run(ViCrop(**EXAMPLE), asked)
        crops = [image.crop(box) for image, box in zip(images, answer.found["boxes"], strict=True)]
        assert answer == asked.ask(session, [*images, *crops])
        for image, found in zip(images, answer.found["maps"], strict=True):
            assert torch.equal(found, heat("llava", image))  # each by itself
    assert [*answer.pictures] == ["map", "box", "crop", "map 1", "box 1", "crop 1"]
    assert answer.pictures["map 1"].size == answer.pictures["box 1"].size == images[1].size
    assert answer.pictures["crop 1"].tobytes() == crops[1].tobytes()
    assert answer.seconds > 0 and answer.tokens == 4


def test_from_one_line(tmp_path: Any) -> None:
    model, processor = shared("llava"), family("llava").processor()
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    bare = sc.ask(model, processor, picture(), ASKED, **options)
    asked = [
        sc.ask(model, processor, picture(), ASKED, s, **options)
        for s in ("vicrop(window=40)", "vicrop(append=false)")
    ]
    both = sc.ask(model, processor, picture(), ASKED, "zerotuning(gamma=100.0)+vicrop(window=40)", **options)
    assert asked[0] != bare == asked[1] and both not in (bare, asked[0])
    assert "ZeroTuning" in both.session_summary
    for name, found in both.pictures.items():
        found.save(tmp_path / f"{name}.png")


@pytest.mark.parametrize("f", select("qformer", "processor"))
def test_a_model_that_reads_one_picture_has_no_place_for_a_crop(f: Family) -> None:
    with sc.attach(shared(f.name)) as session, pytest.raises(InputError, match="no place for a crop"):
        session.run(ViCrop(), question(f.name, picture()))


# ---- a toy ----------------------------------------------------------------------------------------------


def redness(pixels: Tensor) -> Tensor:
    """Of every patch of 8 x 8: (pictures, 36)."""
    excess = (pixels[:, 0] - pixels[:, 1]).unflatten(1, (6, 8)).unflatten(3, (6, 8)).mean((2, 4)).flatten(1)
    return (excess - excess.median(1, keepdim=True).values).clamp_min(0)


@contextmanager
def toy(model: Any, red: int, yes: int, no: int) -> Iterator[None]:
    """It sees 6 x 6 patches, knows in which is most red, looks there when it is asked about red, and says yes
    where a whole patch is."""
    known: dict[str, Any] = {}

    def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        known["red"] = redness(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])

    def read(_: nn.Module, args: Any, __: Any) -> None:
        known["ids"] = args[0][0]

    def key(_: nn.Module, __: Any, k: Tensor) -> Tensor:
        image = known["ids"] == model.config.image_token_id
        if not image.any():
            return k
        k = k.clone().unflatten(-1, (-1, 16))
        k[0, image, :, 7] += 4 * (known["red"] / known["red"].amax(1, keepdim=True)).flatten()[:, None]
        return k.flatten(-2)

    def query(_: nn.Module, __: Any, q: Tensor) -> Tensor:
        q = q.clone().unflatten(-1, (-1, 16))
        q[0, -1, :, 7] += 8 * bool((known["ids"] == red).any())
        return q.flatten(-2)

    def speak(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        said = torch.full_like(logits, -10.0)
        said[..., yes if known["red"].max() > 0.3 else no] = 10
        return said

    attention = model.model.language_model.layers[LAYER].self_attn
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(see, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(read),
        attention.k_proj.register_forward_hook(key),
        attention.q_proj.register_forward_hook(query),
        model.lm_head.register_forward_hook(speak),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("at", [(150, 63), (20, 203)])
def test_a_small_detail_is_seen_with_the_crop_only(at: tuple[int, int]) -> None:
    model, processor = shared("llava"), family("llava").processor()
    red, yes, no = (
        processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" red", "y", "n")
    )
    image = Image.new("RGB", (240, 240), (120, 120, 120))
    ImageDraw.Draw(image).rectangle((*at, at[0] + 5, at[1] + 5), fill=(255, 0, 0))
    options = {"max_new_tokens": 1}
    with toy(model, red, yes, no):
        bare = sc.ask(model, processor, image, "Is a red square there?", **options)
        answer = sc.ask(model, processor, image, "Is a red square there?", "vicrop", **options)
    x0, y0, x1, y1 = answer.found["boxes"][0]
    assert x0 <= at[0] and at[0] + 6 <= x1 and y0 <= at[1] and at[1] + 6 <= y1
    assert (bare, answer) == ("n", "y")
