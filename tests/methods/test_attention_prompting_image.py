"""API against a tiny CLIP taken apart by hooks, the model's own attention, and numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
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
from saccade.core.errors import AttachError, InputError, OptionError
from saccade.steering._parts.likeness import ClipLikeness, clip
from saccade.steering.attention_prompting_image import (
    AttentionPromptingImage,
    Parts,
    blended,
    clip_maps,
    merged,
    resized,
    rising,
)

from .clips import saved, tiny
from .embedded import trained
from .lockstep import glances, model_of, question
from .shared import numbers

ASKED = "is there a cup ?"
LAYER = 1
"""The last but one of three."""


EXAMPLE: dict[str, Any] = {"clip": saved("clip")}


def picture(width: int = 48, height: int = 48) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


# ---- CLIP, taken apart -----------------------------------------------------------------------------------


@contextmanager
def added(model: Any, keep: Callable[[str, Tensor], None]) -> Any:
    """What every module adds to the stream of the vision tower, by the test's own hooks."""
    tower = model.vision_model
    hooks = [tower.pre_layrnorm.register_forward_hook(lambda _, __, out: keep("first", out))]
    for i, layer in enumerate(tower.encoder.layers):
        hooks += [
            layer.self_attn.register_forward_hook(lambda _, __, out, i=i: keep(f"attention {i}", out[0])),
            layer.mlp.register_forward_hook(lambda _, __, out, i=i: keep(f"mlp {i}", out)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def given() -> dict[str, Any]:
    return dict(tiny().processor(text=[ASKED], images=[picture()], padding=True, return_tensors="pt"))


def test_what_the_class_token_takes_and_all_other_terms_are_the_pictures_vector() -> None:
    model, streams = shared("clip"), {}
    with torch.no_grad(), added(model, lambda name, out: streams.__setitem__(name, out[0, 0])):
        embeds = model(**given()).image_embeds[0]
    norm, projection = model.vision_model.post_layernorm, model.visual_projection
    last = sum(streams.values())
    std = (last.var(correction=0) + norm.eps).sqrt()
    terms = len(streams)
    assert terms == 7
    length = projection(norm(last)).norm()

    def alone(part: Tensor) -> Tensor:
        return projection((part - last.mean() / terms) * norm.weight / std + norm.bias / terms) / length

    parts = Parts(
        sites={"observe": "vision.1.self", "hidden": ("vision.1.self", "vision.1.layer", "vision.2.layer")}
    )
    with sc.attach(model) as session:
        session.forward(given(), [parts])
    taken, states = parts.vectors(3)
    assert taken.shape == states.shape == (37, 32)
    others = [alone(part) for name, part in streams.items() if name != f"attention {LAYER}"]
    assert_close(taken.sum(0), alone(streams[f"attention {LAYER}"]), atol=1e-5, rtol=0)
    assert_close(taken.sum(0) + sum(others), embeds, atol=1e-4, rtol=0)
    whole = streams["first"] + sum(streams[f"{what} {i}"] for what in ("attention", "mlp") for i in (0, 1))
    assert_close(states[0], alone(whole), atol=1e-5, rtol=0)  # of the class token, whose stream was kept


def test_the_maps_are_products_with_the_text() -> None:
    of_class, of_patches = clip_maps(tiny(), picture(), ASKED, "vision.-2.self")
    model, kept = shared("clip", torch.float32, "eager"), []
    layer = model.vision_model.encoder.layers[LAYER]
    hook = layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    with torch.no_grad():
        out = model(**given(), output_attentions=True, output_hidden_states=True)
        w = out.vision_model_output.attentions[LAYER][0, :, 0]  # (heads, tokens)
        v = kept[0].view(37, 4, 8)
        gains = torch.zeros(37, 32)
        for head in range(4):
            o = layer.self_attn.out_proj.weight[:, 8 * head : 8 * head + 8]
            gains += (w[head][:, None] * v[:, head]) @ o.T
        norm, projection = model.vision_model.post_layernorm, model.visual_projection
        last = out.vision_model_output.hidden_states[3][0, 0]
        scale = norm.weight / (last.var(correction=0) + norm.eps).sqrt()
        length = projection(norm(last)).norm()
        behind = out.vision_model_output.hidden_states[LAYER + 1][0]
        for found, states in ((of_class, gains), (of_patches, behind)):
            plain = (projection(states * scale) @ out.text_embeds[0] / length)[1:].view(6, 6)
            shift = found.float() - plain
            assert_close(shift, shift.mean().expand(6, 6), atol=1e-5, rtol=0)  # all patches have equal shares
            assert found.std() > 0
    hook.remove()


def test_patches_that_speak_of_the_text_where_the_class_token_takes_them_are_the_bright_ones() -> None:
    """Their values are moved to where the output projection, the norm and the last projection make the text of them."""
    model, planted = shared("clip"), torch.zeros(6, 6, dtype=torch.bool)
    planted[1:3, 2:5] = True
    attention = model.vision_model.encoder.layers[LAYER].self_attn
    with torch.no_grad():
        text = model(**given()).text_embeds[0]
        reads = model.visual_projection.weight * model.vision_model.post_layernorm.weight
        value = attention.out_proj.weight.T @ reads.T @ text  # which every head gains by

    def plant(_: Any, __: Any, out: Tensor) -> Tensor:
        moved = out.clone()
        moved[0, 1:][planted.flatten()] += 50 * value / value.norm()
        return moved

    hook = attention.v_proj.register_forward_hook(plant)
    try:
        of_class, of_patches = clip_maps(tiny(), picture(), ASKED, "vision.1.self")
    finally:
        hook.remove()
    assert of_class[planted].min() > of_class[~planted].max()
    m = merged(of_class, torch.zeros_like(of_patches), 5.0)
    assert m[planted].mean() > 0.5 + m[~planted].mean() and m.argmax() in planted.flatten().nonzero()


# ---- from maps to a picture ------------------------------------------------------------------------------


def test_both_maps_are_joined_as_probabilities() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((6, 7)), rng.random((6, 7))
    c = (a - a.min()) / (a.max() - a.min())
    c = 1 / (1 + np.exp(-5 * (c - c.mean()) / c.std(ddof=1)))
    p = (b.max() - b) / (b.max() - b.min())

    def smoothed(m: np.ndarray) -> np.ndarray:
        framed = np.pad(m, 1, mode="edge")
        return np.array([[framed[y : y + 3, x : x + 3].mean() for x in range(7)] for y in range(6)])

    m = 1 - (1 - smoothed(c)) * (1 - smoothed(p))
    expected = (m - m.min()) / (m.max() - m.min())
    found = merged(torch.from_numpy(a), torch.from_numpy(b), 5.0)
    assert_close(found.numpy(), expected)
    assert found.min() == 0 and found.max() == 1


def test_one_returns_the_picture_and_nought_a_constant_grey() -> None:
    image = picture(50, 30)
    assert blended(image, torch.ones(30, 50), 200).tobytes() == image.tobytes()
    assert (np.asarray(blended(image, torch.zeros(30, 50), 200)) == 200).all()
    half = np.asarray(blended(image, torch.full((30, 50), 0.25), 100)).astype(int)
    assert np.abs(half - (0.25 * np.asarray(image) + 75)).max() <= 0.5


def test_a_map_stays_between_0_and_1_on_the_picture() -> None:
    m = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    large = resized(m, (90, 60))
    assert large.shape == (60, 90) and large.min() == 0 and large.max() == 1
    assert torch.equal(rising(torch.full((3, 3), 0.4)), torch.zeros(3, 3))


# ---- the answer ------------------------------------------------------------------------------------------


def test_the_papers_layers() -> None:
    assert numbers(AttentionPromptingImage().sites) == [20]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])
def test_the_models_own_map_is_its_attention_to_the_picture(name: str) -> None:
    """With one word, that of the prompt's last."""
    side, layer = (12, 5) if name == "world/vlm" else (6, 2)
    asked = question(name, ASKED, words=1)
    square = asked.images[0].crop((0, 0, 90, 90)).resize((96, 96))
    asked = dataclasses.replace(asked, images=[square])
    a = glances(name, dict(asked.inputs(model_of(name))))[layer].reshape(side, side)
    c = (a - a.min()) / (a.max() - a.min())
    c = 1 / (1 + np.exp(-5 * (c - c.mean()) / c.std(ddof=1)))
    framed = np.pad(c, 1, mode="edge")
    expected = np.array([[framed[y : y + 3, x : x + 3].mean() for x in range(side)] for y in range(side)])
    with sc.attach(model_of(name)) as session:
        answer = session.run(AttentionPromptingImage(sites=f"text.{layer}.self"), asked)
        dimmed = blended(square, resized(answer.found["maps"][0], square.size), 200)
        assert answer == asked.ask(session, [dimmed])
    assert_close(answer.found["maps"][0].numpy(), expected, atol=0.02, rtol=0)
    assert answer.pictures["dimmed"].tobytes() == dimmed.tobytes()


def test_the_model_is_given_the_dimmed_pictures_alone() -> None:
    asked = question("llava")
    asked = dataclasses.replace(asked, images=[asked.images[0], picture(60, 80)])
    with sc.attach(shared("llava")) as session:
        answer = session.run(AttentionPromptingImage(clip=tiny()), asked)
        dimmed = [
            blended(
                image,
                resized(merged(*clip_maps(tiny(), image, asked.text, "vision.1.self"), 5.0), image.size),
                0,
            )
            for image in asked.images
        ]
        assert answer == asked.ask(session, dimmed)
    assert [*answer.pictures] == ["map", "dimmed", "map 1", "dimmed 1"]
    assert all(answer.pictures[f"dimmed{of}"].tobytes() == d.tobytes() for of, d in zip(("", " 1"), dimmed))


def test_a_clip_is_named_in_a_stack() -> None:
    model, processor = trained()
    image = sc.world.scene(9, "test").picture()
    stack = f"attention_prompting_image(clip={EXAMPLE['clip']})"
    found = [
        sc.ask(model, processor, image, ASKED, s).found["maps"][0]
        for s in (stack, AttentionPromptingImage(clip=tiny()))
    ]
    assert_close(*found, atol=1e-5, rtol=0)


def test_what_is_no_clip_with_a_class_token_is_refused() -> None:
    with pytest.raises(InputError, match="does not compare pictures with words"):
        clip(saved("llava"))
    with pytest.raises(OptionError, match="No level of grey"):
        AttentionPromptingImage(grey=256)
    siglip = ClipLikeness(shared("siglip"), family("siglip").processor())  # type: ignore[misc]
    with sc.attach(shared("llava")) as session, pytest.raises(AttachError, match="SiglipModel"):
        session.run(AttentionPromptingImage(clip=siglip), question("llava"))
