"""READ on maps made by hand, on the states that models return, and on a model that is taught to point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as T
from helpers import shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.question import prepare_batch, written
from saccade.probes.read_sasp import ReadSASP, Similar, gridded, points, soften, spread
from saccade.world.scenes import scenes

from .embedded import trained
from .planted import QUESTION, question

EXAMPLE: dict[str, Any] = {}
MODELS = ("llava", "qwen2_5_vl")

SIZE = (130, 90)
REGION = (20.0, 0.0, 110.0, 90.0)
"""The middle square of a picture that is wider than high."""


def bump(rows: int = 24, at: tuple[float, float] = (15.0, 7.0)) -> Tensor:
    """A Gaussian around a row and a column."""
    y, x = torch.meshgrid(torch.arange(float(rows)), torch.arange(float(rows)), indexing="ij")
    return torch.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / 40)


# ---- points ----------------------------------------------------------------------------------------------


def coarse(sim: Tensor) -> np.ndarray:
    """Means of two by two, which is what a bilinear map of half the size has, from 0 to 1."""
    m = sim.numpy().astype(float)
    small = (m[::2, ::2] + m[1::2, ::2] + m[::2, 1::2] + m[1::2, 1::2]) / 4
    return (small - small.min()) / (small.max() - small.min())


def cell(point: Sequence[int]) -> tuple[int, int]:
    return int(point[1] // 7.5), int((point[0] - 20) // 7.5)


def test_points_are_the_middles_of_cells_in_order_of_the_map() -> None:
    small = coarse(bump())
    hard, labels = points(bump(), REGION, SIZE, keep=1000)
    assert len(hard) == 144 and sorted(map(cell, hard.tolist())) == sorted(np.ndindex(12, 12))
    values = [small[cell(point)] for point in hard.tolist()]
    of = {label: [v for v, own in zip(values, labels.tolist()) if own == label] for label in (1, 0, -1)}
    assert min(of[1]) >= 0.8 and max(of[0]) <= 0.2 and all(0.2 < v < 0.8 for v in of[-1])
    assert of[1] == sorted(of[1], reverse=True) and of[0] == sorted(of[0])
    assert labels.tolist() == [1] * len(of[1]) + [0] * len(of[0]) + [-1] * len(of[-1])
    row, column = cell(hard[0].tolist())
    assert (row, column) in {(7, 3), (7, 4)}
    assert hard[0].tolist() == [int(20 + (column + 0.5) * 7.5), int((row + 0.5) * 7.5)]


def test_at_most_thirty_are_kept_and_none_in_the_padding() -> None:
    hard, labels = points(bump(), REGION, SIZE)
    assert len(hard) == len(labels) == 30 == ReadSASP().keep
    assert (hard[:, 0] >= 20).all() and (hard[:, 0] < 110).all() and (hard >= 0).all()


def test_constants_and_positive_factors_change_nothing() -> None:
    plain = points(bump(), REGION, SIZE)
    for other in (bump() + 7, 0.25 * bump(), 40 * bump() - 3):
        hard, labels = points(other, REGION, SIZE)
        assert torch.equal(hard, plain[0]) and torch.equal(labels, plain[1])
        assert_close(spread(other, REGION, SIZE), spread(bump(), REGION, SIZE), atol=1e-4, rtol=0)


def test_a_map_over_the_picture_is_zero_in_the_padding() -> None:
    full = spread(bump(), REGION, SIZE)
    assert full.shape == (90, 130)
    assert (full[:, :20] == 0).all() and (full[:, 110:] == 0).all() and full[:, 20:110].max() > 0.95
    row, column = divmod(int(full.argmax()), 130)
    assert abs(row - 15.5 * 90 / 24) < 3 and abs(column - 20 - 7.5 * 90 / 24) < 3


def test_soft_points_are_expectations_near_the_hard_ones_and_carry_gradients() -> None:
    sim = bump().double().requires_grad_()
    hard, _ = points(sim.detach(), REGION, SIZE)
    full = spread(sim, REGION, SIZE)
    soft = soften(hard, full)
    m = full.detach().numpy()
    p = np.exp(m) / np.exp(m).sum()
    y, x = np.mgrid[:90, :130]
    for (px, py), got in zip(hard.tolist(), soft.tolist(), strict=True):
        w = np.exp(-((x - px) ** 2) - (y - py) ** 2.0) * p
        w /= w.sum()
        assert got == pytest.approx([(w * x).sum(), (w * y).sum()], abs=1e-9)
        assert abs(got[0] - px) <= 2 and abs(got[1] - py) <= 2
    soft.sum().backward()
    assert sim.grad is not None and sim.grad.abs().max() > 1e-6


def test_what_is_no_grid_or_no_map_is_refused() -> None:
    boxes = torch.tensor([[0.0, 0, 5, 5], [5, 0, 10, 5], [0, 5, 5, 10]])
    with pytest.raises(InputError, match="no grid"):
        gridded(torch.arange(3.0), boxes)
    with pytest.raises(InputError, match="same everywhere"):
        points(torch.ones(6, 6), REGION, SIZE)


def test_tokens_without_a_place_are_left_out() -> None:
    boxes = torch.tensor([[torch.nan] * 4, [0.0, 0, 5, 5], [5, 0, 10, 5], [torch.nan] * 4])
    sim, region = gridded(torch.arange(4.0), boxes)
    assert sim.tolist() == [[1, 2]] and region == (0, 0, 10, 5)


# ---- on models -------------------------------------------------------------------------------------------


def seen(model: Any, asked: sc.Question, **options: Any) -> tuple[Similar, sc.Answer]:
    with sc.attach(model) as session:
        answer = session.run(ReadSASP(**options), asked)
    return answer.found["read_sasp"], answer


def test_the_map_is_of_the_last_states_of_the_picture_and_of_the_state_that_says_the_word() -> None:
    """Of every word of an answer that is made of a few."""
    for name in MODELS:
        model, asked = shared(name), question(name, size=64)
        encode = asked.processor.tokenizer.encode
        known = {encode(f" {word}")[-1]: word for word in ("red", "cup", "table", "green", "cat", "door")}
        options = {
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "no_repeat_ngram_size": 1,
            "suppress_tokens": [i for i in range(len(model.lm_head.weight)) if i not in known],
        }
        asked = sc.Question(asked.processor, asked.images, asked.text, options)
        inputs = asked.inputs(model)
        start = inputs["input_ids"].shape[1]
        image = inputs["input_ids"][0] == model.config.image_token_id
        made = model.generate(
            **inputs, **options, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        states = torch.cat([step[-1] for step in made.hidden_states], 1)[0]
        said = [known[i] for i in made.sequences[0, start:].tolist()]
        assert len(set(said)) == 4
        for say in ("", *said):
            before = start - 1 + (said.index(say) if say else 0)
            expected = states[:start][image] @ states[before]
            assert_close(seen(model, asked, say=say)[0].sim.flatten(), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(InputError, match="not say 'zebra'"):
            seen(model, asked, say="zebra")


def taught(model: Any, processor: Any, pictures: Sequence[Image.Image], masks: Tensor) -> int:
    """Teach the embedding of the prompt's last token, which says the answer, to be similar to what is bright."""
    text = written(processor, 1, QUESTION)
    inputs = prepare_batch(processor, [[picture] for picture in pictures], [text] * len(pictures))
    ids = inputs["input_ids"]
    image, last = ids[0] == model.config.image_token_id, int(ids[0, -1])
    table = model.get_input_embeddings().weight
    step = torch.zeros(table.shape[1], requires_grad=True)
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, args, out: out + (args[0] == last)[..., None] * step
    )
    optimizer = torch.optim.Adam([step], lr=0.1)
    for _ in range(30):
        h = model(**inputs, output_hidden_states=True).hidden_states[-1]
        sim = torch.einsum("btw,bw->bt", h[:, image], h[:, -1])
        loss = -torch.cosine_similarity(
            sim - sim.mean(1, keepdim=True), masks - masks.mean(1, keepdim=True)
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hook.remove()
    with torch.no_grad():
        table[last] += step
    return last


def squares(count: int, seed: int) -> tuple[list[Image.Image], Tensor]:
    """Grey noise with a bright square of two by two patches, and which patches it is (count, 36)."""
    rng, pictures, masks = np.random.default_rng(seed), [], torch.zeros(count, 6, 6)
    for mask in masks:
        row, column = rng.integers(0, 5, 2)
        pixels = rng.integers(60, 120, (48, 48, 3), dtype=np.uint8)
        pixels[8 * row : 8 * row + 16, 8 * column : 8 * column + 16] += 110
        mask[row : row + 2, column : column + 2] = 1
        pictures.append(Image.fromarray(pixels))
    return pictures, masks.flatten(1)


def test_in_a_toy_segmentation_model_the_token_that_points_is_more_consistent_than_others() -> None:
    model, processor = family("llava").build(), question().processor
    taught(model, processor, *squares(8, seed=0))
    for picture, mask in zip(*squares(2, seed=1), strict=True):
        asked = sc.Question(processor, [picture], QUESTION, {"max_new_tokens": 2})
        found, _ = seen(model, asked)
        truth = F.interpolate(mask.view(1, 1, 6, 6), (48, 48))[0, 0]
        inputs = asked.inputs(model)
        h = model(**inputs, output_hidden_states=True).hidden_states[-1][0].detach()
        image = inputs["input_ids"][0] == model.config.image_token_id
        others = [
            float(
                np.corrcoef(
                    spread((h[image] @ s).view(6, 6), (0, 0, 48, 48), (48, 48)).flatten(), truth.flatten()
                )[0, 1]
            )
            for s in h[~image][:-1]
        ]
        assert found.consistency(truth) > 0.5 and found.consistency(truth) > max(others)


def test_points_prompt_a_sam() -> None:
    """A tiny one, untrained: other points, other masks."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.SamConfig(
        vision_config={**small, "mlp_dim": 64, "output_channels": 32, "image_size": 64, "patch_size": 8,
                       "window_size": 4, "num_pos_feats": 16, "global_attn_indexes": [1]},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**small, "mlp_dim": 64, "iou_head_hidden_dim": 32, "attention_downsample_rate": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    sam = T.SamModel(config).eval()
    eye = T.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    processor = T.SamProcessor(eye)
    asked = question()
    found, _ = seen(shared("llava"), asked)
    made = processor(asked.images[0], **found.prompts, return_tensors="pt")
    assert_close(made["input_points"][0, 0].double(), found.points.double() * 64 / 48, atol=1e-3, rtol=0)
    assert torch.equal(made["input_labels"][0, 0], found.labels)
    elsewhere = {**made, "input_points": made["input_points"].flip(-1)}
    with torch.no_grad():
        masks = [sam(**inputs).pred_masks for inputs in (made, elsewhere)]
    assert masks[0].isfinite().all() and (masks[0] - masks[1]).abs().max() > 1e-6


def test_the_trained_models_map_covers_its_picture_for_the_word_that_it_says() -> None:
    model, processor = trained()
    scene = next(scenes(1, "test"))
    asked = sc.Question(processor, [scene.picture()], "what place is this ?", {"max_new_tokens": 3})
    found, answer = seen(model, asked)
    assert answer == scene.place
    assert found.sim.shape == (12, 12) and found.region == (0, 0, 96, 96) and found.size == (96, 96)
    again, _ = seen(model, asked, say=scene.place)
    assert torch.equal(again.points, found.points)
    assert f"{found.points[0, 0]:7.1f} {found.points[0, 1]:7.1f}   1" in repr(found)
