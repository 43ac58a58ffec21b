"""Attention-IoU against hand-made numbers, Grad-CAM against its closed form, and what the experiment finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import saccade as sc
from saccade import cli
from saccade.core.errors import InputError
from saccade.evals.attention_iou import (
    Score,
    attention_iou,
    grad_cam,
    heatmap_scores,
    mask_scores,
    ranked,
    scaled,
    subsampled,
    told,
)

EXAMPLE = {"images": 240, "tested": 40, "steps": 50}


def test_by_hand() -> None:
    a, b = torch.tensor([[1.0, 1], [0, 2]]), torch.tensor([[0.0, 1], [1, 2]])
    # a = 1/4 1/4 0 1/2, b = 0 1/4 1/4 1/2: products 1/16 + 1/4; squared halves of sums 1/64 + 1/16 + 1/64 + 1/4
    assert float(attention_iou(a, b)) == pytest.approx((5 / 16) / (22 / 64))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_a_likeness(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 5, 7, 7, generator=draw) * (torch.rand(2, 5, 7, 7, generator=draw) < 0.6)
    found = attention_iou(a, b)
    assert ((found > 0) & (found < 1)).all()
    torch.testing.assert_close(attention_iou(b, a), found)
    torch.testing.assert_close(attention_iou(3 * a, 0.1 * b), found)
    torch.testing.assert_close(attention_iou(a, 2 * a), torch.ones(5).double())
    assert (attention_iou(a, b * (a == 0)) == 0).all()
    assert attention_iou(a[0], torch.zeros(7, 7)).isnan()


def networks() -> list[Any]:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 2], "num_labels": 3}
    resnet = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
    regnet = RegNetForImageClassification(RegNetConfig(**sizes, groups_width=4))
    for model in (resnet, regnet):
        model.classifier[-1].bias.data[1] -= 9  # absent in every image
    return [(m.eval(), getattr(m, name)) for m, name in ((resnet, "resnet"), (regnet, "regnet"))]


@pytest.mark.parametrize(("model", "body"), networks(), ids=["resnet", "regnet"])
def test_grad_cam_of_a_linear_head(model: Any, body: Any) -> None:
    """Behind a mean over places, a channel's slope is its weight, shared by the places."""
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, logits = body(images).last_hidden_state, model(images).logits
    weight = model.classifier[-1].weight
    assert (logits[:, 1] < 0).all() and (logits[:, 2] > 0).all()
    for attribute in (1, 2):
        plain = torch.einsum("c,bchw->bhw", weight[attribute], a) / a[0, 0].numel()
        sign = logits[:, attribute].sign()[:, None, None]
        for signed, wanted in ((False, sign * plain), (True, plain)):
            found = grad_cam(model, body.encoder.stages[-1], images, attribute, signed=signed)
            torch.testing.assert_close(found, wanted.clamp_min(0).detach())
    for p in model.parameters():
        p.requires_grad_(False)
    assert torch.equal(grad_cam(model, body.encoder.stages[-1], images, 2, signed=True), found)
    with pytest.raises(InputError, match="no maps"):
        grad_cam(model, model.classifier, images, 0)


def test_masks_are_made_as_coarse_as_maps() -> None:
    maps = torch.zeros(3, 4, 4)
    maps[0, :, :2] = maps[1, :, 2:] = 5
    maps[2] = torch.arange(16.0).view(4, 4)
    left = torch.zeros(3, 32, 32)
    left[:2, :, :16] = 1
    left[2] = 1
    on, beside, even = mask_scores(maps, left).tolist()
    assert on > 0.97 and beside < 0.2
    ramp = np.arange(16) / np.arange(16).sum()
    assert even == pytest.approx((ramp / 16).sum() / (((ramp + 1 / 16) / 2) ** 2).sum(), rel=1e-4)
    torch.testing.assert_close(
        mask_scores(7 * maps + 2, 9 * left), mask_scores(maps, left), atol=1e-5, rtol=0
    )


def test_two_heatmaps_are_compared_in_the_pictures_size() -> None:
    one, other = torch.rand(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    found = heatmap_scores(one, other, (12, 9))
    large = [
        torch.nn.functional.interpolate(m[:, None], (12, 9), mode="bilinear")[:, 0] for m in (one, other)
    ]
    a, b = ((m - m.amin((1, 2), True)) / (m.amax((1, 2), True) - m.amin((1, 2), True)) for m in large)
    torch.testing.assert_close(found, attention_iou(a, b), atol=1e-5, rtol=0)
    torch.testing.assert_close(heatmap_scores(one, one, (12, 9)), torch.ones(5).double())
    assert scaled(one).amin() == 0 and scaled(one).amax() == pytest.approx(1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, -0.4])
def test_training_sets_of_a_correlation(correlation: float) -> None:
    rng = np.random.default_rng(0)
    labels, others = rng.random((2, 4000)) < [[0.3], [0.6]]
    kept = subsampled(labels, others, correlation, rng)
    assert len({*kept.tolist()}) == len(kept)
    assert np.corrcoef(labels[kept], others[kept])[0, 1] == pytest.approx(correlation, abs=0.02)
    assert labels[kept].mean() == pytest.approx(0.5, abs=0.01) == others[kept].mean()
    groups = [(labels == a) & (others == b) for a in (0, 1) for b in (0, 1)]
    assert any(np.isin(np.flatnonzero(group), kept).all() for group in groups)  # no more are there


def test_means_and_what_drawing_again_says() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.random(400), rng.random(400) < 0.7
    scores[5] = np.nan
    found = told(scores, right)
    for name, own in (("all", slice(None)), ("right", right), ("wrong", ~right)):
        some = scores[own][~np.isnan(scores[own])]
        assert found[name].mean == pytest.approx(some.mean()) and found[name].count == len(some)
        assert found[name].deviation == pytest.approx(some.std() / len(some) ** 0.5, rel=0.1)
    assert told([0.5], [True])["wrong"].count == 0
    assert ranked({"hair": Score(0.2, 0, 1), "bird": Score(0.7, 0, 1), "mouth": Score(0.4, 0, 1)}) == [
        "bird",
        "mouth",
        "hair",
    ]


def test_what_correlates_takes_the_thing_from_the_map() -> None:
    found = sc.AttentionIoU(**EXAMPLE).run().settings
    assert [one.correlation for one in found] == [0, 0.475, 0.95]
    one, _, last = (setting.mask["all"] for setting in found)
    assert one.mean - last.mean > 3 * (one.deviation + last.deviation)
    assert found[-1].heatmap["all"].mean > found[0].heatmap["all"].mean  # both maps read the background


def test_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sc.AttentionIoU, "run", lambda self: {"signed": self.signed})
    assert cli.main(["run", "attention_iou(signed=true)"]) == 0
    assert capsys.readouterr().out == "{'signed': True}\n"
    assert cli.main(["run", "vhr"]) == 2
    assert "no experiment" in capsys.readouterr().err
    assert cli.main(["show", "attention_iou"]) == 0
    assert "saccade run 'attention_iou(correlation=0.95)'" in capsys.readouterr().out
