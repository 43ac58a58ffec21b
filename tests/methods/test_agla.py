"""AGLA against two pictures that are asked about by hand, a tiny BLIP's own gradient, and numpy."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from torch import nn
from torch.testing import assert_close
from zoo import family
from zoo.base import TOWER, enliven
from zoo.vlm import EYE

from saccade.steering._parts.matching import BlipMatcher, Match, blip
from saccade.steering.agla import AGLA, blurred, local_view

from .lockstep import assert_answers, cut, driven, eager, model_of, question, reader


def tiny_blip() -> tuple[Any, Any]:
    words = {
        **TOWER,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "encoder_hidden_size": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    config = T.BlipConfig(text_config={**words, "eos_token_id": 2, "sep_token_id": 2}, vision_config=EYE)
    model: Any = enliven(T.BlipForImageTextRetrieval(config)).eval()
    for side in (model.vision_proj, model.text_proj):
        torch.nn.init.ones_(side.bias)  # so that any two are alike
    return model, family("blip").processor()  # type: ignore[misc]


def saved() -> str:
    folder = Path(tempfile.mkdtemp())
    for part in tiny_blip():
        part.save_pretrained(folder)
    return str(folder)


EXAMPLE: dict[str, Any] = {"matcher": saved(), "alpha": 50.0, "beta": 0.0}
ASKED = "Is there a cup?"


def heat(rows: int = 6, columns: int = 6) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(4))


def made_up(picture: Image.Image, text: str) -> Match:
    assert text in (ASKED, "describe the image .")
    return Match(heat(), 0.7)


# ---- the local picture -----------------------------------------------------------------------------------


def test_the_heat_is_stretched_and_smoothed() -> None:
    """A Gaussian of 0.02 of the longer side over what is stretched, borders going on as they are."""
    wide = torch.nn.functional.interpolate(heat(3, 4)[None, None].double(), (40, 60), mode="bicubic")[
        0, 0
    ].numpy()
    deviation = 0.02 * 60
    expected = np.zeros((40, 60))
    total = 0.0
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            weight = np.exp(-(dy * dy + dx * dx) / (2 * deviation**2))
            rows = np.clip(np.arange(40) + dy, 0, 39)
            columns = np.clip(np.arange(60) + dx, 0, 59)
            expected += weight * wide[rows][:, columns]
            total += weight
    assert_close(blurred(heat(3, 4), (40, 60)).numpy(), expected / total, atol=1e-6, rtol=0)


@pytest.mark.parametrize("similarity", [-0.4, 0.0, 0.3, 1.0])
def test_a_share_of_the_pixels_stays_and_they_are_those_of_the_largest_heat(similarity: float) -> None:
    noise = np.random.default_rng(0).integers(1, 255, (50, 80, 3), dtype=np.uint8)  # none is black
    local = np.asarray(local_view(Image.fromarray(noise), Match(heat(), similarity)))
    kept = (local > 0).all(-1)
    assert np.array_equal(local, noise * kept[..., None])
    rho = min(1 - similarity / 2, 1 - 1e-5)
    assert kept.sum() == pytest.approx(rho * kept.size, abs=1.01)
    values = blurred(heat(), (50, 80)).numpy()
    assert kept.all() or values[kept].min() >= values[~kept].max()


def test_blip_says_how_well_and_where_they_match() -> None:
    """By its own attention, in the middle of four layers, and its gradient through hooks of the test's own."""
    model, processor = tiny_blip()
    picture = question("llava").images[0]
    match = BlipMatcher(model, processor)(picture, ASKED)
    given = processor(images=picture, text=ASKED, return_tensors="pt")
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        out[1].retain_grad()
        seen.append(out[1])

    hook = model.text_encoder.encoder.layer[2].crossattention.self.register_forward_hook(keep)
    model(**given).itm_score[0, 1].backward()
    hook.remove()
    cam = (seen[0] * seen[0].grad.clamp_min(0))[0].detach()  # (heads, words, 1 + patches)
    expected = sum(cam[h, w, 1:] for h in range(4) for w in range(1, cam.shape[1])) / (4 * (cam.shape[1] - 1))
    assert_close(match.heat, expected.view(6, 6), atol=1e-8, rtol=1e-4)
    assert match.heat.std() > 0
    with torch.no_grad():
        picture_, words = (
            model.vision_proj(model.vision_model(given["pixel_values"]).last_hidden_state[0, 0]),
            model.text_proj(model.text_encoder(given["input_ids"]).last_hidden_state[0, 0]),
        )
    cosine = float(picture_ @ words / picture_.norm() / words.norm())
    assert match.similarity == pytest.approx(cosine, abs=1e-5)


# ---- the answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alpha", "beta"), [("llava", 2.0, 0.5), ("qwen2_5_vl", 1.0, 0.1), ("world/vlm", 2.0, 0.01)]
)
def test_the_answer_is_that_of_both_pictures_in_lockstep(name: str, alpha: float, beta: float) -> None:
    asked = question(name, "describe the image .")
    local = local_view(asked.images[0], Match(heat(), 0.7))
    readers = [
        reader(model_of(name), dict(asked.inputs(model_of(name), [p]))) for p in (asked.images[0], local)
    ]
    driver = AGLA(alpha=alpha, beta=beta, matcher=made_up)
    mix = lambda whole, part, step: cut(whole + alpha * part, whole, beta)  # noqa: E731
    answer = assert_answers(name, driver, asked, readers, mix)
    assert answer.pictures["local"].tobytes() == local.tobytes()
    assert answer.found == {"similarity": [0.7]}


def test_where_the_local_picture_is_the_picture_the_model_answers() -> None:
    """Logits are then scaled."""
    asked = question("llava")
    read = reader(model_of("llava"), dict(asked.inputs(model_of("llava"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saccade.steering.agla.local_view", lambda picture, match: picture)
        assert_answers("llava", AGLA(beta=0.0, matcher=made_up), asked, [read], lambda row, step: 3 * row)


def test_at_alpha_zero_it_is_the_model_with_what_is_implausible_left_out() -> None:
    asked = question("llava")
    read = reader(model_of("llava"), dict(asked.inputs(model_of("llava"))))
    assert_answers(
        "llava", AGLA(alpha=0.0, matcher=made_up), asked, [read], lambda row, step: cut(row, row, 0.5)
    )


def test_a_matcher_of_the_hub_is_loaded_once_by_its_name() -> None:
    matcher = blip(EXAMPLE["matcher"])
    assert matcher is blip(EXAMPLE["matcher"]) and not matcher.model.training
    picture = question("llava").images[0]
    assert_close(matcher(picture, ASKED).heat, BlipMatcher(*tiny_blip())(picture, ASKED).heat)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])
def test_without_a_matcher_half_of_the_picture_stays_that_raises_the_models_own_answer(name: str) -> None:
    """By gradient and attention of the model itself, where every token shows one cell of a square picture."""
    embedded = name == "world/vlm"
    asked = question(name)
    picture = asked.images[0] if embedded else asked.images[0].crop((0, 0, 90, 90)).resize((96, 96))
    answer, _, _ = driven(name, AGLA(alpha=1.0), dataclasses.replace(asked, images=[picture]))
    side, layer = (12, 4) if embedded else (6, 2)  # 44% of the layers
    raised = raising(name, dict(asked.inputs(model_of(name), [picture])), layer).view(side, side)
    local, expected = (
        np.asarray(p) for p in (answer.pictures["local"], local_view(picture, Match(raised, 1.0)))
    )
    assert (local == expected).all(-1).mean() > 0.995  # pixels of about the same heat may change places
    assert (local > 0).any(-1).mean() == pytest.approx(0.5, abs=0.02)


def raising(name: str, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """Attention of the last word on the picture times what raises the next, mean over heads."""
    with eager(name) as model:
        out = model(**inputs, output_attentions=True)
    w = out.attentions[layer]
    (slope,) = torch.autograd.grad(out.logits[0, -1].log_softmax(-1).max(), w)
    visual = inputs["input_ids"][0] == model.config.image_token_id
    return (w * slope.clamp_min(0))[0, :, -1, visual].mean(0).detach()
