"""Query Perturbation against singular vectors of the keys that a layer really has."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers as T
from helpers import Look, shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import enliven, noise, words
from zoo.vision import EYE
from zoo.vlm import QFORMER

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.query_perturbation import QueryPerturbation, projector

BOX, OTHER = (9.0, 4.0, 30.0, 24.0), (0.0, 30.0, 20.0, 48.0)
EXAMPLE = {"boxes": ((BOX, OTHER),)}
MODELS = ("blip2", "instructblip")
BFLOAT16 = {"alpha": 0.5}
"""The strength multiplies the rounding of queries too."""

DOUBLE = torch.float64
SITE = "qformer.0.cross"


def share(box: tuple[float, ...]) -> Tensor:
    """Of every token, a class token and 6 x 6 patches of 8 pixels, how much of its patch lies in the box."""
    x0, y0, x1, y1 = box
    parts = [
        max(0.0, min(x1, 8 * c + 8) - max(x0, 8 * c)) * max(0.0, min(y1, 8 * r + 8) - max(y0, 8 * r)) / 64
        for r in range(6)
        for c in range(6)
    ]
    return torch.tensor([0.0, *parts], dtype=DOUBLE)


def by_hand(keys: Tensor, energy: float = 0.99) -> Tensor:
    """The projector of keys (keys, dim), by their singular vectors."""
    _, sizes, vectors = torch.linalg.svd(keys.double())
    power, kept = (sizes**2).tolist(), 1
    while sum(power[: kept + 1]) < energy * sum(power):
        kept += 1
    return sum(torch.outer(v, v) for v in vectors[:kept])


def queries(name: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Before and after, and the keys, each (pictures, heads, tokens, dim)."""
    model, look = shared(name, DOUBLE), Look(lambda call: (call.given[0], call.q, call.k), sites=SITE)
    inputs = {n: v.to(DOUBLE) if v.is_floating_point() else v for n, v in family(name).inputs().items()}
    with sc.attach(model, QueryPerturbation(**options), look):
        run(model, inputs)
    return look.seen[0][2]


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_queries_are_turned_by_the_mean_of_their_boxes_projectors(name: str) -> None:
    """Two pictures, of two boxes and of none."""
    q, turned, k = queries(name, boxes=((BOX, OTHER), ()), alpha=8.0)
    for head in range(q.shape[1]):
        p = sum(by_hand(k[0, head] * share(box)[:, None]) for box in (BOX, OTHER)) / 2
        assert_close(turned[0, head], q[0, head] + 8 * q[0, head] @ p)
    assert torch.equal(turned[1], q[1])
    assert (turned - q).abs().max() > 0.1


def test_alpha_follows_the_area_and_queries_can_keep_their_length() -> None:
    q, turned, k = queries("blip2", boxes=((BOX,),), by_area=True)
    p = by_hand(k[1, 2] * share(BOX)[:, None])
    wanted = q[1, 2] + 8 * float(share(BOX).sum()) / 36 * q[1, 2] @ p
    assert_close(turned[1, 2], wanted)
    _, kept, _ = queries("blip2", boxes=((BOX,),), by_area=True, keep_norm=True)
    assert_close(kept[1, 2], wanted / wanted.norm(dim=-1, keepdim=True) * q[1, 2].norm(dim=-1, keepdim=True))


# ---- the statements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"alpha": 0.0, **EXAMPLE}, {"boxes": ()}, {"boxes": ((),)}], ids=str)
def test_without_alpha_or_boxes_it_is_the_model(options: dict[str, Any]) -> None:
    model, inputs = shared("blip2"), family("blip2").inputs()
    bare = run(model, inputs)
    with sc.attach(model, QueryPerturbation(**options)):
        assert torch.equal(run(model, inputs), bare)


def test_a_projector_is_symmetric_idempotent_and_of_the_rank_that_was_kept() -> None:
    keys = noise(30, 8).double() * torch.tensor([9.0, 5, 3, 1, 0.5, 0.2, 0.1, 0.05])
    p = projector(keys, 0.99)
    assert_close(p, p.T)
    assert_close(p @ p, p)
    power = torch.linalg.svdvals(keys) ** 2
    kept = max(1, int((power.cumsum(0) / power.sum() < 0.99).sum()))
    assert 1 < kept < 8
    assert torch.linalg.matrix_rank(p) == kept and float(p.trace()) == pytest.approx(kept)


def test_of_keys_in_one_direction_it_is_that_direction() -> None:
    k = noise(8).double()
    keys = torch.outer(noise(20, seed=5).double(), k)
    assert_close(projector(keys, 0.99), torch.outer(k, k) / (k @ k))


def test_what_lies_outside_stays_and_what_lies_inside_grows() -> None:
    q, turned, k = queries("blip2", boxes=((BOX,),), alpha=3.0)
    p = by_hand(k[0, 1] * share(BOX)[:, None])
    rest = torch.eye(len(p), dtype=DOUBLE) - p
    assert_close(turned[0, 1] @ p, 4 * q[0, 1] @ p)
    assert_close(turned[0, 1] @ rest, q[0, 1] @ rest)
    assert 0 < torch.linalg.matrix_rank(p) < len(p)


def test_attention_on_the_box_does_not_fall_where_its_keys_agree_with_the_query() -> None:
    """A toy layer: keys in the box lean to the query, the others stand across."""
    drawn, d = torch.Generator().manual_seed(0), 16
    q = torch.randn(d, generator=drawn, dtype=DOUBLE)
    keys = torch.randn(36, d, generator=drawn, dtype=DOUBLE)
    box = torch.arange(36) < 9
    keys[~box] -= torch.outer(keys[~box] @ q, q) / (q @ q)
    keys[box] = 0.1 * keys[box] + torch.outer(torch.rand(9, generator=drawn, dtype=DOUBLE), q)
    masses = []
    for alpha in (0.0, 1.0, 8.0):
        turned = q + alpha * q @ projector(keys * box[:, None], 0.99)
        masses.append(float((keys @ turned / math.sqrt(d)).softmax(0)[box].sum()))
    assert masses[0] < masses[1] < masses[2]


# ---- retrieval ----------------------------------------------------------------------------------------


@cache
def retrieval() -> Any:
    config = T.Blip2Config(
        vision_config=EYE,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=8,
        image_text_hidden_size=16,
    )
    return enliven(T.Blip2ForImageTextRetrieval._from_config(config)).eval()


@pytest.mark.parametrize("matching", [True, False], ids=["matching", "contrast"])
def test_a_retrieval_models_scores_are_those_of_turned_queries(matching: bool) -> None:
    """By hooks on the layers' own projections. The text has no part in it."""
    model, inputs = retrieval(), {"pixel_values": noise(2, 3, 48, 48), "input_ids": words(2, 6)}
    inputs |= {"attention_mask": torch.ones(2, 6), "use_image_text_matching_head": matching}

    def scores() -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits_per_image

    bare = scores()
    with sc.attach(model, QueryPerturbation(**EXAMPLE)):
        got = scores()
    crossing = [
        layer.crossattention.attention for layer in model.qformer.encoder.layer if layer.has_cross_attention
    ]
    hooks = []
    for attention in crossing:

        def turn(module: Any, args: Any, q: Tensor, attention: Any = attention) -> Tensor:
            states = seen[0]
            k = attention.key(states).unflatten(-1, (4, -1)).transpose(1, 2)
            q = q.unflatten(-1, (4, -1)).transpose(1, 2).clone()
            for picture in range(2):
                for head in range(4):
                    p = sum(by_hand(k[picture, head] * share(box)[:, None]) for box in (BOX, OTHER)) / 2
                    q[picture, head] += 8 * q[picture, head] @ p.float()
            return q.transpose(1, 2).flatten(-2)

        hooks.append(attention.query.register_forward_hook(turn))
    seen: list[Tensor] = []
    tower = model.vision_model.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    wanted = scores()
    for hook in (*hooks, tower):
        hook.remove()
    assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert (got - bare).abs().max() > 1e-3


def test_boxes_lie_in_located_pictures() -> None:
    """Twice as large as what the tower is given."""
    f, model = family("blip2"), shared("blip2")
    picture, answers = Image.new("RGB", (96, 96), (90, 120, 30)), []
    inputs = {
        **f.inputs((1,)),
        "pixel_values": f.processor().image_processor(picture, return_tensors="pt")["pixel_values"],
    }
    for scale, located in ((1, []), (2, [picture])):
        with sc.attach(
            model, QueryPerturbation(boxes=((tuple(scale * x for x in (8.0, 8.0, 32.0, 24.0)),),))
        ) as session:
            session.locate(f.processor(), located)
            answers.append(run(model, inputs))
            session.locate(f.processor(), [])
    assert_close(*answers, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("boxes", "match"), [(((BOX,),) * 3, "3 pictures for 2"), ((((60.0, 0, 70, 9),),), "outside")]
)
def test_what_it_cannot_do_is_refused(boxes: Any, match: str) -> None:
    model = shared("blip2")
    with sc.attach(model, QueryPerturbation(boxes=boxes)), pytest.raises(InputError, match=match):
        run(model, family("blip2").inputs())
