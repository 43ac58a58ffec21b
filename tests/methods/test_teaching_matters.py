"""What heads look at, patch by patch; alike features, by kernels and pairs; both on the models' own numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import noise

import saccade as sc
from saccade.core.errors import InputError
from saccade.probes._parts.features import (
    agreement,
    cka,
    clusters,
    keypoints,
    neighbours,
    propagated,
    retrieval,
)
from saccade.probes.teaching_matters import Looks, TeachingMatters, alike, features, measured
from saccade.world.scenes import scenes

from .embedded import trained

EXAMPLE: dict[str, Any] = {}
MODELS = ("vit", "dinov2")

SIDE = 5
GRID = [*itertools.product(range(SIDE), range(SIDE))]
PATCHES = torch.arange(SIDE**2 + 1) > 0
"""Behind a class token."""


def weights(*looks: Any) -> Tensor:
    """Of one image, a head for each function from two places to a weight; the rest goes to the class token."""
    w = torch.zeros(1, len(looks), SIDE**2 + 1, SIDE**2 + 1)
    for head, look in enumerate(looks):
        for (i, here), (j, there) in itertools.product(enumerate(GRID), enumerate(GRID)):
            w[0, head, i + 1, j + 1] = look(here, there)
    w[..., 0] = 1 - w[..., 1:].sum(-1)
    return w


def right(here: Any, there: Any) -> float:
    return 0.7 * (there == (here[0], here[1] + 1))


def evenly(here: Any, there: Any) -> float:
    return 0.5 / SIDE**2


def itself(here: Any, there: Any) -> float:
    return 0.4 * (here == there)


def far(here: Any, there: Any) -> float:
    return 0.7 * (there == (here[0] - 2, here[1]))


def drawn(images: int = 3, heads: int = 2) -> Tensor:
    w = noise(images, heads, SIDE**2 + 1, SIDE**2 + 1).softmax(-1)
    w[0, 0, 3] = torch.eye(SIDE**2 + 1)[0]  # a patch that looks at the class token alone
    return w


def looks(w: Tensor) -> Looks:
    return Looks(("vision.0.self",), **{name: t[:, None] for name, t in measured(w, PATCHES).items()})


# ---- where heads look ------------------------------------------------------------------------------------


def test_the_right_neighbour_is_found_and_is_the_only_local_offset() -> None:
    found = looks(weights(right, evenly, itself, far))
    peak = int(found.aligned[0, 0, 0].argmax())
    assert divmod(peak, 2 * SIDE - 1) == (SIDE - 1, SIDE)
    assert float(found.offset()[0, 0]) == pytest.approx(1 / (SIDE - 1))
    assert found.offset()[0, 1:3].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found.offset_local() == {"vision.0.self": (0,)}
    assert found.heads("offset").top(2) == {"vision.0.self": (0, 3)}


def test_half_of_the_mass_is_no_local_offset() -> None:
    def both(here: Any, there: Any) -> float:
        return 0.3 * (there in ((here[0], here[1] + 1), (here[0], here[1] - 1)))

    assert looks(weights(both, evenly)).offset_local() == {}


def test_distance_of_a_uniform_head_is_that_of_the_grid_and_of_a_looker_at_itself_zero() -> None:
    distance = looks(weights(evenly, itself)).distance[0, 0].tolist()
    mean = sum(math.dist(a, b) / (SIDE - 1) for a in GRID for b in GRID) / SIDE**4
    assert distance == pytest.approx([mean, 0])


def test_the_class_tokens_column_does_not_matter() -> None:
    w = drawn()
    louder = w.clone()
    louder[..., 0] *= 7
    a, b = looks(w), looks(louder)
    assert_close(a.distance, b.distance)
    assert_close(a.aligned, b.aligned)
    assert_close(7 * a.to_class, b.to_class)


def test_every_measure_is_that_of_loops() -> None:
    w = drawn()
    found, inner = looks(w), w[:, :, 1:, 1:].double().numpy()
    for image, head in itertools.product(range(3), range(2)):
        m = inner[image, head]
        sums = m.sum(1, keepdims=True)
        a = np.divide(m, sums, out=np.zeros_like(m), where=sums > 0)
        map_ = np.zeros((2 * SIDE - 1, 2 * SIDE - 1))
        far_ = 0.0
        for (i, here), (j, there) in itertools.product(enumerate(GRID), enumerate(GRID)):
            far_ += a[i, j] * math.dist(here, there) / (SIDE - 1) / SIDE**2
            map_[there[0] - here[0] + SIDE - 1, there[1] - here[1] + SIDE - 1] += a[i, j] / SIDE**2
        assert_close(found.aligned[image, 0, head].double(), torch.tensor(map_), atol=1e-6, rtol=1e-5)
        assert float(found.distance[image, 0, head]) == pytest.approx(far_, rel=1e-5)
        over = np.mean([m[:, j].std(ddof=1) for j in range(SIDE**2)])
        assert float(found.over_tokens[image, 0, head]) == pytest.approx(over, rel=1e-4)
        given = np.mean([float(w[image, head, i + 1, 0]) for i in range(SIDE**2)])
        assert float(found.to_class[image, 0, head]) == pytest.approx(given, rel=1e-5)
        assert_close(found.of_class[image, 0, head].flatten(), w[image, head, 0, 1:])
    over = [inner[0, :, i, j].std(ddof=1) for i in range(SIDE**2) for j in range(SIDE**2)]
    assert float(found.over_heads[0, 0]) == pytest.approx(np.mean(over), rel=1e-4)
    got = w.double().mean(2)[:, 0].numpy()  # by image, what every token gets of head 0
    classes = [(got[0] + got[2]) / 2, got[1]]
    apart = np.mean([np.std([c[j] for c in classes]) for j in range(SIDE**2 + 1)])
    assert float(found.over_classes([4, 2, 4])[0, 0]) == pytest.approx(apart, rel=1e-4)


def test_bright_patches_hold_sixty_percent() -> None:
    w = torch.zeros(1, 2, SIDE**2 + 1, SIDE**2 + 1)
    w[0, :, 0, 1:5] = torch.tensor([0.1, 0.3, 0.2, 0.2])  # of 0.8: 0.3 + 0.2 are enough, for they pass 0.48
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 0, 1:4] = True
    assert looks(w).iou(mask).scores.tolist() == [pytest.approx([2 / 3, 2 / 3])]


def test_images_of_two_runs_are_joined() -> None:
    w = drawn()
    apart = Looks.joined([looks(w[:1]), looks(w[1:])])
    assert_close(apart.offset(), looks(w).offset())
    assert_close(apart.over_classes([0, 1, 1]), looks(w).over_classes([0, 1, 1]))


def test_patches_that_are_no_square_are_refused() -> None:
    with pytest.raises(InputError, match="26 patches are no square"):
        measured(drawn(), torch.ones(SIDE**2 + 1, dtype=torch.bool))


# ---- features --------------------------------------------------------------------------------------------


def hsic(x: Tensor, y: Tensor) -> float:
    """tr(K H L H) of linear kernels."""
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    return float(torch.trace(x @ x.T @ h @ y @ y.T @ h))


def test_cka_is_that_of_kernels_and_does_not_see_turns_and_sizes() -> None:
    x, y = noise(30, 6, seed=1).double(), noise(30, 4, seed=2).double() + 3
    turn = torch.linalg.qr(noise(6, 6, seed=3).double()).Q
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, 0.2 * x @ turn + 5) == pytest.approx(1)
    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert cka(x, y) == pytest.approx(expected) and expected < 0.5
    assert cka(3 * x @ turn, y) == pytest.approx(expected)


def test_clusters_of_blobs_are_the_blobs() -> None:
    labels = torch.arange(60) % 3
    x = noise(60, 4) + 20 * torch.eye(4)[labels]
    assert agreement(clusters(x, 3), labels) == pytest.approx({"purity": 1, "nmi": 1, "ari": 1})


def test_agreement_is_counted_in_samples_and_in_pairs() -> None:
    found, labels = [0, 0, 1, 1, 1, 2, 2, 0], [0, 0, 0, 1, 1, 1, 1, 1]
    got = agreement(torch.tensor(found), torch.tensor(labels))
    assert got["purity"] == pytest.approx((2 + 2 + 2) / 8)
    n = len(found)

    def entropy(of: list[Any]) -> float:
        return -sum(of.count(v) / n * math.log(of.count(v) / n) for v in set(of))

    pair = [*zip(found, labels, strict=True)]
    information = entropy(found) + entropy(labels) - entropy(pair)
    assert got["nmi"] == pytest.approx(2 * information / (entropy(found) + entropy(labels)))
    pairs = [*itertools.combinations(range(n), 2)]
    a = [found[i] == found[j] for i, j in pairs]
    b = [labels[i] == labels[j] for i, j in pairs]
    both, chance = sum(p and q for p, q in zip(a, b)), sum(a) * sum(b) / len(pairs)
    assert got["ari"] == pytest.approx((both - chance) / ((sum(a) + sum(b)) / 2 - chance))


def test_neighbours_vote_by_their_similarity() -> None:
    known = torch.tensor([[1.0, 0.05], [0.9, 0.5], [0.9, 0.6], [0.0, 1.0]])
    x, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0, 1, 1, 2])
    assert neighbours(known, labels, x, k=3).tolist() == [0]  # e^(1/0.07) against two of e^(0.9/0.07)
    assert neighbours(known, labels, x, k=3, temperature=10.0).tolist() == [1]


def test_retrieval_is_the_mean_of_average_precisions() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.5])
    x, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 0, 1, 2])
    # in order of nearness: 0: 1 2 3 4, 1: 0 2 3 4, 2: 1 0 3 4, 3: 2 1 0 4; the last has none of its own
    expected = np.mean([1 / 2, 1 / 3, 1 / 2, 1 / 2])
    assert retrieval(x, labels) == pytest.approx(expected)


def test_keypoints_are_found_where_the_most_similar_patch_is() -> None:
    a = noise(4, 5, 16)
    b = 3 * a.roll(1, 1)  # everything has moved one patch to the right
    wanted = torch.tensor([[0.1, 0.1], [0.5, 0.9], [0.3, 0.4]])
    moved = torch.tensor([0.2, 0.0])
    middles = torch.tensor([[0.1, 0.125], [0.5, 0.875], [0.3, 0.375]]) + moved
    assert keypoints(a, b, wanted, middles, alpha=0.01) == 1
    assert keypoints(a, b, wanted, wanted, alpha=0.15) == 0
    assert keypoints(a, b, wanted, middles + torch.tensor([[0.0, 0.09], [0.0, 0.11], [0.12, 0.0]])) == 1 / 3


def test_segments_follow_a_thing_through_a_video_from_near_patches_alone() -> None:
    ground, thing = torch.eye(2)
    frames = ground.repeat(5, 6, 6, 1) + 0.01 * noise(5, 6, 6, 2)
    for t in range(5):
        frames[t, 2, t] = thing  # one patch to the right in every frame
    first = torch.stack([1 - frames[0, ..., 1].round(), frames[0, ..., 1].round()], -1)
    found = propagated(frames, first, last=1, radius=1, k=1)
    for t in range(5):
        truth = torch.zeros(6, 6)
        truth[2, t] = 1
        assert torch.equal(found[t].argmax(-1), truth.long())
    frames[1, 2, 1], frames[1, 2, 4] = ground, thing  # too far at once
    assert propagated(frames, first, radius=1, k=1)[1].argmax(-1).sum() == 0


def test_segments_are_weighed_by_similarity() -> None:
    frames, first = noise(2, 1, 3, 4).double(), torch.eye(3, dtype=torch.float64)[None]
    x = frames / frames.norm(dim=-1, keepdim=True)
    for place in range(3):
        w = [math.exp(float(x[1, 0, place] @ x[0, 0, s]) / 0.1) for s in range(3)]
        weak = min(range(3), key=w.__getitem__)
        kept = [0 if s == weak else w[s] for s in range(3)]
        expected = [v / sum(kept) for v in kept]
        assert propagated(frames, first, k=2)[1, 0, place].tolist() == pytest.approx(expected)


# ---- on models -------------------------------------------------------------------------------------------


def test_models_are_measured_by_the_weights_that_they_return() -> None:
    for name in MODELS:
        model, inputs = shared(name, torch.float32, "eager"), family(name).inputs()
        with torch.no_grad():
            out = model(**inputs, output_attentions=True, output_hidden_states=True)
        with sc.attach(shared(name), TeachingMatters()) as session:
            run(session.model, inputs)
            states = {of: features(session, inputs, of) for of in ("patches", "class")}
        found: Looks = session.results["teaching_matters"]
        for layer, w in enumerate(out.attentions):
            grid = [*itertools.product(range(6), range(6))]
            away = torch.tensor([[math.dist(a, b) / 5 for b in grid] for a in grid])
            inner = w[:, :, 1:, 1:] / w[:, :, 1:, 1:].sum(-1, keepdim=True)
            assert_close(found.distance[:, layer], (inner * away).sum(-1).mean(-1), atol=1e-5, rtol=1e-5)
            assert_close(found.to_class[:, layer], w[:, :, 1:, 0].mean(-1), atol=1e-5, rtol=1e-5)
            h = out.hidden_states[layer + 1]
            assert_close(states["patches"][f"vision.{layer}.layer"], h[:, 1:], atol=1e-4, rtol=1e-4)
            assert_close(states["class"][f"vision.{layer}.layer"], h[:, 0], atol=1e-4, rtol=1e-4)


def test_the_trained_models_tower_looks_near_in_its_middle_layers() -> None:
    model, processor = trained()
    pictures = [scene.picture() for scene in scenes(3, "test")]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    tower = model.model.vision_tower
    with sc.attach(tower, TeachingMatters()) as session:
        run(tower, {"pixel_values": pixels})
        same = features(session, {"pixel_values": pixels})
    by_layer = session.results["teaching_matters"].distance.mean((0, 2))
    assert by_layer.argmin() in (2, 3) and by_layer.min() < 0.7 * by_layer.max()
    likeness = alike(same, same).values
    assert likeness.diagonal().tolist() == pytest.approx([1] * len(likeness))
    assert likeness[0, 1] > likeness[0, -1]
