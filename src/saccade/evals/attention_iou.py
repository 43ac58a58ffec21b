"""How two maps overlap, without thresholds: whether a classifier looks at what it names, or at what goes with it.

    a = A / sum(A);  b = B / sum(B)
    Attention-IoU = sum(a b) / sum(((a + b) / 2)^2)

A is the Grad-CAM of an attribute at the last convolutions, its target |logit|. In the mask score B is where the thing
is; in the heatmap score B is the Grad-CAM of another attribute: where it is high, both read the same pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.driver import Experiment
from saccade.core.errors import InputError
from saccade.core.system import option
from saccade.evals._boats import drawn, trained
from saccade.evals.interval import bootstrap

TINY = 1e-7


def attention_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of maps (..., height, width) that are nowhere negative, 0 to 1; NaN where one of them is nothing."""
    a, b = (m.double() / m.double().sum((-2, -1), keepdim=True) for m in (a, b))
    return (a * b).sum((-2, -1)) / ((a + b) / 2).square().sum((-2, -1))


def grad_cam(
    model: nn.Module, layer: nn.Module, images: Tensor, attribute: int, *, signed: bool = False
) -> Tensor:
    """Where (images, height, width) the layer's channels speak for an attribute's |logit|, or for its logit."""
    held: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, out: held.append(out))
    try:
        with torch.enable_grad():
            out = model(
                images.clone().requires_grad_()
            )  # the layer's output then has a gradient, whatever trains
            logit = getattr(out, "logits", out)[:, attribute]
            (slope,) = torch.autograd.grad((logit if signed else logit.abs()).sum(), held[0])
    finally:
        hook.remove()
    if slope.ndim != 4:
        raise InputError(
            f"The layer gives {tuple(slope.shape)}, no maps.", "name the last block of convolutions"
        )
    return (slope.mean((2, 3), keepdim=True) * held[0]).sum(1).relu().detach()


def scaled(maps: Tensor) -> Tensor:
    """Of every map the smallest is 0 and the largest 1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + TINY)


def mask_scores(maps: Tensor, masks: Tensor) -> Tensor:
    """Maps against the masks of a thing (images, height, width), made as coarse as the maps."""
    small = F.interpolate(
        masks[:, None].float(), maps.shape[-2:], mode="bilinear", antialias=True, align_corners=False
    )[:, 0]
    return attention_iou(scaled(maps), small / (small.amax((-2, -1), keepdim=True) + TINY))


def heatmap_scores(maps: Tensor, others: Tensor, size: Sequence[int]) -> Tensor:
    """Maps against those of another attribute, both as large as the pictures (height, width)."""
    one, other = (
        F.interpolate(m[:, None], [*size], mode="bilinear", align_corners=False)[:, 0] for m in (maps, others)
    )
    return attention_iou(scaled(one), scaled(other))


@dataclass(frozen=True)
class Score:
    """A mean over images, and its standard deviation when they are drawn again."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


def told(scores: ArrayLike, right: ArrayLike, seed: int = 0) -> dict[str, Score]:
    """Of all images, of those that were classified rightly, and of the others; maps of nothing are left out."""
    scores, right = np.asarray(scores, np.float64), np.asarray(right, bool)
    found = {}
    for name, own in (("all", np.ones_like(right)), ("right", right), ("wrong", ~right)):
        some = scores[own & np.isfinite(scores)]
        if not len(some):
            found[name] = Score(np.nan, np.nan, 0)
            continue
        mean = bootstrap(np.stack([some, np.ones_like(some)]), lambda sums: sums[..., 0] / sums[..., 1], seed)
        assert mean.draws is not None
        found[name] = Score(mean.value, float(mean.draws.values().std()), len(some))
    return found


def ranked(scores: Mapping[str, Score]) -> list[str]:
    """Attributes from the highest mean to the lowest."""
    return sorted(scores, key=lambda name: -scores[name].mean)


def subsampled(
    labels: np.ndarray, others: np.ndarray, correlation: float, rng: np.random.Generator
) -> np.ndarray:
    """As many samples as there are in which two balanced labels (samples,), bool, correlate so much."""
    same, groups = (1 + correlation) / 4, {}
    for one in (False, True):
        for other in (False, True):
            members = np.flatnonzero((labels == one) & (others == other))
            groups[one, other] = rng.permutation(members), same if one == other else 0.5 - same
    count = min(len(members) / share for members, share in groups.values() if share > TINY)
    return np.concatenate([members[: round(count * share)] for members, share in groups.values()])


@dataclass(frozen=True)
class Setting:
    """What a classifier became that saw so much correlation."""

    correlation: float
    accuracy: float
    mask: dict[str, Score]  # the thing's map on the thing
    heatmap: dict[str, Score]  # the thing's map on the background's


@dataclass(frozen=True)
class Overlap:
    settings: list[Setting]

    def __repr__(self) -> str:
        lines = [
            f"{'correlation':>11}  {'accuracy':>8}  {'mask score':>15}  {'right only':>15}  {'heatmap score':>15}"
        ]
        for one in self.settings:
            scores = (one.mask["all"], one.mask["right"], one.heatmap["all"])
            told = "  ".join(f"{score!s:>15}" for score in scores)
            lines.append(f"{one.correlation:11.2f}  {one.accuracy:8.1%}  {told}")
        return "\n".join(lines)


@dataclass(eq=False, kw_only=True)
class AttentionIoU(Experiment):
    """Small ResNets learn to tell boats from cars, and beaches from streets, where the two go together more and more.
    Those that read the background lose the thing."""

    card = Card(
        slug="attention_iou",
        name="Attention-IoU",
        kind="experiment",
        family="evals",
        form="metric",
        target="cnn",
        paper="Attention IoU: Examining Biases in CelebA using Attention Maps (Serianni et al., 2025)",
        summary="Overlap of an attribution map with a mask, or with another attribute's map, without thresholds",
        code="aaronserianni/attention-iou",
        choices=(
            "Images of which a map is nothing are left out of the means, as in the released code.",
            "Masks are made coarse with antialiasing, as torchvision's resizing of the released code does.",
            "In place of Waterbirds, boats and cars of the world on its beaches and streets.",
        ),
        tags=("bias", "grad-cam", "spurious correlation", "attribution", "segmentation", "fairness"),
    )

    correlation: float = option(0.95, "of thing and background in training, at most", low=0.01, high=0.99)
    images: int = option(1600, "drawn for training, of which those that correlate are kept", low=40)
    tested: int = option(200, "drawn for testing, where nothing correlates", low=8)
    steps: int = option(150, "of training", low=1)
    signed: bool = option(False, "explain the logit and not its size: absent attributes then have no map")
    seed: int = option(0, "of pictures, weights and batches")

    def run(self) -> Overlap:
        train, test = drawn(self.images, [self.seed, 0]), drawn(self.tested, [self.seed, 1])
        boats, beaches = train.labels.T.astype(bool)
        found = []
        for correlation in (0.0, self.correlation / 2, self.correlation):
            rng = np.random.default_rng([self.seed, 2])
            kept = subsampled(boats, beaches, correlation, rng)
            model = trained(train.at(kept), self.steps, self.seed)
            layer = model.resnet.encoder.stages[-1]
            thing, ground = (
                grad_cam(model, layer, test.images, attribute, signed=self.signed) for attribute in (0, 1)
            )
            with torch.no_grad():
                right = ((model(test.images).logits[:, 0] > 0).numpy() == test.labels[:, 0]).astype(bool)
            heatmaps = heatmap_scores(thing, ground, test.images.shape[-2:])
            mask = told(mask_scores(thing, test.masks), right)
            found.append(Setting(correlation, float(right.mean()), mask, told(heatmaps, right)))
        return Overlap(found)
