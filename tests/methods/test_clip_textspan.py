"""Parts of CLIP's vectors against the models' own, and texts of planted directions."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from helpers import shared, unchanged
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import HEADS, TOWER, enliven, generator
from zoo.vision import EYE, pixels

import saccade as sc
from saccade.core.errors import AttachError, InputError
from saccade.probes.clip_textspan import Parts, TextSpan, textspan

EXAMPLE: dict[str, Any] = {}


@cache
def clip(name: str) -> Any:
    if name == "clip":
        return shared("clip")
    reader = {**TOWER, "vocab_size": 512, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    if name == "metaclip2":
        config = T.MetaClip2Config(text_config=reader, vision_config=EYE, projection_dim=32)
        return enliven(T.MetaClip2Model._from_config(config)).eval()
    eye = T.CLIPVisionConfig(**{**EYE, **HEADS, "image_size": 64}, projection_dim=24)
    return enliven(T.CLIPVisionModelWithProjection._from_config(eye)).eval()


def parts_of(model: Any, inputs: dict[str, Tensor]) -> Parts:
    with sc.attach(model, TextSpan()) as session:
        run(model, inputs)
    return session.results["clip_textspan"]


def pictures(name: str, batch: int = 3) -> tuple[Any, dict[str, Tensor]]:
    inputs = pixels(batch, 64) if name == "vision" else family("clip").inputs(batch=batch)
    return clip(name), inputs  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["clip", "metaclip2", "vision"])
def test_parts_sum_to_the_models_own_vector_and_the_model_answers_as_before(name: str) -> None:
    model, inputs = pictures(name)
    with torch.no_grad():
        expected = model(**inputs).image_embeds
    with unchanged(model):
        parts = parts_of(model, inputs)
        with sc.attach(model, TextSpan()), torch.no_grad():
            assert torch.equal(model(**inputs).image_embeds, expected)
    assert_close(parts.vectors, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    assert parts.heads.shape[:3] == (3, 3, 4)
    assert parts.grid == ((8, 8) if name == "vision" else (6, 6))


def test_every_part_is_that_of_the_formula() -> None:
    """Multiplied out token by token from the weights that the model returns."""
    model = clip("clip")
    eager = shared("clip", implementation="eager")
    inputs = pixels(2)
    with torch.no_grad():
        out = eager.vision_model(**inputs, output_attentions=True, output_hidden_states=True)
    with sc.attach(model, TextSpan()) as session, torch.no_grad():
        vector = model.get_image_features(**inputs).pooler_output
    parts = session.results["clip_textspan"]
    eye, proj = eager.vision_model, eager.visual_projection.weight
    last, norm = out.hidden_states[-1][:, 0], eye.post_layernorm
    mean, std = last.mean(-1), (last.var(-1, correction=0) + norm.eps).sqrt()
    n, m = 37, 7  # tokens; parts of three layers
    heads, places = torch.zeros(2, 3, 4, 32), torch.zeros(2, n, 32)
    for picture in range(2):

        def read(part: Tensor, pieces: int, i: int = picture) -> Tensor:
            centred = (part - mean[i] / (m * pieces)) / std[i] * norm.weight + norm.bias / (m * pieces)
            return proj @ centred / vector[i].norm()

        for layer in range(3):
            block = eye.encoder.layers[layer]
            a = block.self_attn
            x = block.layer_norm1(out.hidden_states[layer][picture])
            v = a.v_proj(x)
            for head in range(4):
                at = slice(8 * head, 8 * head + 8)
                for i in range(n):
                    w = out.attentions[layer][picture, head, 0, i]
                    c = w * (a.out_proj.weight[:, at] @ v[i, at]) + a.out_proj.bias / (n * 4)
                    piece = read(c, n * 4)
                    heads[picture, layer, head] += piece
                    places[picture, i] += piece
        assert_close(parts.mlps[picture, 0], read(out.hidden_states[0][picture, 0], 1), atol=1e-5, rtol=1e-4)
    assert_close(parts.heads, heads, atol=1e-5, rtol=1e-4)
    assert_close(parts.places, places, atol=1e-5, rtol=1e-4)


def test_with_every_part_at_its_mean_all_pictures_are_one_and_with_some_the_others_stay() -> None:
    parts = parts_of(*pictures("clip"))
    everything = torch.ones(3, 4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    flat = parts.ablated(*everything)
    assert_close(flat, flat[:1].expand_as(flat), atol=1e-6, rtol=0)
    assert_close(flat[0], parts.vectors.mean(0), atol=1e-6, rtol=0)
    one = torch.zeros(3, 4, dtype=torch.bool)
    one[1, 2] = True
    expected = parts.vectors - parts.heads[:, 1, 2] + parts.heads[:, 1, 2].mean(0)
    assert_close(parts.ablated(one, ~everything[1]), expected, atol=1e-6, rtol=0)
    assert flat[0].norm() < 0.999 and (parts.vectors[0] - parts.vectors[1]).norm() > 0.01


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_directions_are_orthogonal_and_explain_ever_more() -> None:
    found = textspan(noise(50, 12), noise(30, 12, seed=1), count=8)
    assert_close(found.directions @ found.directions.T, torch.eye(8, dtype=torch.float64))
    assert (found.explained.diff() >= 0).all() and 0 < found.explained[0] < found.explained[-1] < 1
    assert len(set(found.chosen)) == 8


def test_texts_are_chosen_one_after_the_other_as_the_formula_says() -> None:
    """By least squares on all that were chosen before, written out."""
    c, texts = noise(40, 10), noise(25, 10, seed=1)
    basis = torch.linalg.svd(c).Vh[:6]
    seen = texts @ basis.T @ basis
    centred, chosen = c - c.mean(0), []
    for _ in range(5):
        span = seen[chosen]
        off = torch.eye(10, dtype=torch.float64) - torch.linalg.pinv(span) @ span
        chosen.append(int((centred @ off @ (seen @ off).T).std(0).argmax()))
    found = textspan(c, texts, count=5, rank=6)
    assert found.chosen == chosen
    fitted = centred @ torch.linalg.pinv(seen[chosen]) @ seen[chosen]
    assert_close(found.made, c.mean(0) + fitted)
    assert_close(found.explained[-1], 1 - (centred - fitted).square().sum() / centred.square().sum())


def test_a_planted_direction_of_most_variance_is_first_whatever_the_mean() -> None:
    texts = F.normalize(noise(30, 12, seed=1), dim=-1)
    c = noise(60, 1) * 5 * texts[17] + 0.1 * noise(60, 12, seed=2) + 20 * texts[3]
    assert textspan(c, texts).chosen[0] == 17


def test_after_rank_many_steps_the_texts_that_span_it_make_all_of_it_and_it_ends() -> None:
    c = noise(40, 4) @ noise(4, 12, seed=1)
    found = textspan(c, c[:9])
    assert len(found.chosen) == 4
    assert_close(found.made, c)
    assert_close(found.explained[-1], torch.tensor(1.0, dtype=torch.float64))


def test_a_text_many_times_as_long_is_first() -> None:
    c, texts = noise(50, 12), F.normalize(noise(30, 12, seed=1), dim=-1)
    other = next(i for i in range(30) if i != textspan(c, texts, count=1).chosen[0])
    texts[other] *= 1000
    assert textspan(c, texts, count=1).chosen == [other]


def test_heat_is_of_the_predicted_class_where_it_is_seen() -> None:
    """Two classes, of which the second is looked at in the right half; what both gain and the class token do not
    count."""
    places = torch.zeros(1, 5, 2)
    places[0, [2, 4], 1] = 1.0
    places[0, 1:] += torch.tensor([[4.0], [0.0], [2.0], [1.0]])  # of both classes
    places[0, 0] = 9.0
    mlps = torch.tensor([[[0.0, 0.1]]])
    parts = Parts(torch.zeros(1, 1, 1, 2), mlps, places, (2, 2))
    heat = parts.heat(torch.eye(2), (4, 4))
    assert_close(heat[0, :, [0, 3]], torch.tensor([[0.0, 1.0]]).expand(4, 2))
    assert ((heat > heat.mean())[0].float().mean(0) == torch.tensor([0, 0, 1, 1])).all()


def test_pictures_of_several_runs_are_joined_and_one_has_no_spread() -> None:
    model, inputs = pictures("vision")
    whole = parts_of(model, inputs)
    singles = [parts_of(model, {"pixel_values": one[None]}) for one in inputs["pixel_values"]]
    assert_close(Parts.joined(singles).heads, whole.heads, atol=1e-5, rtol=1e-4)
    assert whole.span(2, 1, noise(20, 24)).chosen == Parts.joined(singles).span(2, 1, noise(20, 24)).chosen
    with pytest.raises(InputError, match="spread"):
        singles[0].span(0, 0, noise(20, 24))


def test_a_model_without_such_a_vector_is_refused() -> None:
    model = shared("llava")
    with sc.attach(model, TextSpan()), pytest.raises(AttachError, match="visual_projection"):
        run(model, family("llava").inputs())
