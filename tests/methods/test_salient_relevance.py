"""Relevance by what it conserves and by rules written out; saliency by pictures of which it is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn
from torch.testing import assert_close
from zoo.base import enliven, generator

import saccade as sc
from saccade.core.errors import InputError
from saccade.probes._parts.drawn import drawn
from saccade.probes.salient_relevance import (
    SalientRelevance,
    around_foci,
    coloured,
    lab,
    relevance,
    saliency,
    trained,
)

EXAMPLE: dict[str, Any] = {}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def filled(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    model = enliven(nn.Sequential(*layers), seed).double()
    assert isinstance(model, nn.Sequential)
    return model


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_linear_layers_without_bias_keep_the_sum_for_inputs_that_are_not_negative() -> None:
    model, x = (
        filled(nn.Linear(20, 15, bias=False), nn.ReLU(), nn.Linear(15, 4, bias=False)),
        noise(1, 20).abs(),
    )
    for label in range(4):
        found, _ = relevance(model, x, label)
        assert_close(found.sum(), logits(model, x)[0, label], rtol=1e-5, atol=0)
    plain = x * torch.autograd.functional.jacobian(model, x)[0, label, 0]  # type: ignore[no-untyped-call]
    assert float((found - plain).abs().max()) > 0.01 * float(found.abs().max())


def test_a_linear_layer_goes_by_its_positive_weights_and_without_its_bias() -> None:
    model, x = filled(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), noise(1, 6, seed=1).abs()
    (w1, _), (w2, _) = ((layer.weight, layer.bias) for layer in (model[0], model[2]))
    h = model[1](model[0](x))
    top = logits(model, x)[0, 2]
    r = h * w2.clamp_min(0)[2] * top / (w2.clamp_min(0)[2] @ h[0])
    v = w1.clamp_min(0)
    expected = x * ((r / (x @ v.T)) @ v)
    assert_close(relevance(model, x, 2)[0], expected.detach(), rtol=1e-6, atol=1e-9)


def test_a_convolution_keeps_the_sum_and_divides_by_its_own_output() -> None:
    model = filled(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 36, 2, bias=False))
    x = noise(1, 3, 6, 6, seed=2).abs()
    y = logits(model[0], x)
    assert float(y.abs().min()) > 1e-4
    found, label = relevance(model, x)
    v = model[2].weight.clamp_min(0)[label]
    r = y * v.view_as(y) * logits(model, x)[0, label] / (v @ y.flatten())
    expected = x * F.conv_transpose2d(r / y, model[0].weight, padding=1)
    assert_close(found, expected.detach(), rtol=1e-5, atol=1e-9)
    assert_close(found.sum(), r.sum(), rtol=1e-5, atol=0)


def test_a_convolutions_bias_takes_its_share() -> None:
    model, x = filled(nn.Conv2d(2, 3, 4), nn.Flatten()), noise(1, 2, 4, 4, seed=3)
    found, label = relevance(model, x)
    assert_close(found, (x * model[0].weight[label]).detach(), rtol=1e-6, atol=1e-9)  # R = y, divided by y
    assert_close(found.sum(), (logits(model, x)[0] - model[0].bias)[label].detach())


def test_of_positive_weights_without_bias_relevance_is_input_times_weight() -> None:
    model = filled(nn.Linear(7, 6, bias=False), nn.Linear(6, 3, bias=False))
    for parameter in model.parameters():
        parameter.data.abs_()
    x = noise(1, 7).abs()
    weight = (model[1].weight @ model[0].weight).detach()
    assert_close(relevance(model, x, 1)[0], x * weight[1], rtol=1e-6, atol=0)


def test_a_max_pool_gives_to_its_winners_alone_and_an_unused_channel_gets_nothing() -> None:
    model = filled(nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, bias=False), nn.Flatten())
    model[1].weight.data[:, 1] = 0
    x = noise(1, 3, 6, 6, seed=4)
    found, _ = relevance(model, x)
    best = F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="nearest") == x
    best[:, 1] = False
    assert torch.equal(found != 0, best)


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_networks_that_normalise_and_add_keep_it_where_nothing_is_added_from_outside(name: str) -> None:
    """Two of transformers. Without biases and means all of the logit comes from the picture, but for weights below
    zero in the last layer; the model is as it was."""
    if name == "resnet":
        config = T.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        )
        model: Any = enliven(T.ResNetForImageClassification(config)).double().eval()
    else:
        shape = {"depth_multiplier": 0.125, "min_depth": 4, "image_size": 64, "hidden_act": "relu"}
        model = enliven(T.MobileNetV1ForImageClassification(T.MobileNetV1Config(**shape, num_labels=4)))
        model = model.double().eval()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    head = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    head.weight.data.abs_()
    x = 1e6 * noise(1, 3, 64, 64, seed=5)  # much, for layers make it less and less
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, label = relevance(model, x)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    assert_close(found.sum(), model(x).logits[0, label].detach(), rtol=1e-5, atol=0)
    explained = SalientRelevance(model=model, pixels=x, side=16).run()
    assert explained.salient.shape == (64, 64) and explained.label == label


# ---- saliency --------------------------------------------------------------------------------------------


def blob(row: int, column: int, size: int = 24) -> Tensor:
    picture = torch.zeros(3, size, size)
    picture[:, row : row + 4, column : column + 4] = 1.0
    return picture


def test_of_a_constant_picture_nothing_is_salient() -> None:
    flat = torch.full((3, 20, 16), 0.4)
    assert torch.equal(saliency(flat), torch.zeros(20, 16))
    assert torch.equal(around_foci(saliency(flat)), torch.zeros(20, 16))


def test_a_bright_blob_is_a_focus_and_less_is_seen_farther_from_it() -> None:
    seen = around_foci(saliency(blob(6, 12)))
    top = divmod(int(seen.argmax()), 24)
    assert 6 <= top[0] < 10 and 12 <= top[1] < 16
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    far = ((rows - 7.5) ** 2 + (columns - 13.5) ** 2).sqrt()
    rings = [seen[(far >= low) & (far < low + 4)].mean() for low in range(0, 12, 4)]
    assert rings[0] > rings[1] > rings[2]


def test_one_scale_is_the_formula() -> None:
    """Patch by patch, on a picture smaller than 64 patches and one larger."""
    for size in ((6, 7), (10, 9)):
        picture = torch.rand(3, *size, generator=generator(0), dtype=torch.float64)
        padded = F.pad(lab(picture)[None], (3, 3, 3, 3), mode="replicate")[0]
        at = [(r, c) for r in range(size[0]) for c in range(size[1])]
        patches = [padded[:, r : r + 7, c : c + 7] for r, c in at]
        colour = torch.tensor(
            [[float((p - q).norm()) for q in patches] for p in patches], dtype=torch.float64
        )
        expected = []
        for i, (r, c) in enumerate(at):
            d = sorted(
                float(colour[i, j] / colour.max())
                / (1 + 3 * ((r - y) ** 2 + (c - x) ** 2) ** 0.5 / max(size))
                for j, (y, x) in enumerate(at)
                if j != i
            )[:64]
            expected.append(1 - torch.tensor(-sum(d) / len(d), dtype=torch.float64).exp())
        made = torch.stack(expected).view(size)
        assert_close(saliency(picture, (1.0,)), made / made.max())


def test_foci_are_kept_and_the_farthest_is_nothing() -> None:
    seen = torch.full((1, 6), 0.5)
    seen[0, 1] = 1.0
    assert_close(around_foci(seen), torch.tensor([[0.375, 1.0, 0.375, 0.25, 0.125, 0.0]]))


def test_colours_are_those_of_the_standard() -> None:
    """Published values of white, red and a grey."""
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.5]]).T
    expected = torch.tensor([[100.0, 0.0, 0.0], [53.24, 80.09, 67.20], [53.39, 0.0, 0.0]]).T
    assert_close(lab(colours), expected, atol=0.02, rtol=0)


def test_relevance_is_a_picture_of_sizes_on_one_scale() -> None:
    made = coloured(torch.tensor([[[1.0, -3.0]], [[0.0, 2.0]], [[-4.0, 0.0]]]))
    assert_close(made, torch.tensor([[[0.25, 0.75]], [[0.0, 0.5]], [[1.0, 0.0]]]))


# ---- the finding -----------------------------------------------------------------------------------------


def test_a_trained_network_is_right_and_decides_by_the_shape() -> None:
    model, test = trained(), drawn(200, seed=7)
    assert float((logits(model, test.pixels).argmax(-1) == test.kind).float().mean()) > 0.9
    found = SalientRelevance().run()
    assert found.inside is not None and found.area is not None and found.inside > 2 * found.area
    assert f"{found.inside:.0%}" in repr(found)


def test_half_of_what_is_needed_is_refused() -> None:
    with pytest.raises(InputError, match="model and a picture"):
        sc.SalientRelevance(model=trained(1)).run()
    with pytest.raises(InputError, match="no picture"):
        sc.SalientRelevance(model=trained(1), pixels=torch.zeros(2, 3, 8, 8)).run()
