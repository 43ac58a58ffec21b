"""What of a picture a convolutional network decides by, and where one would look in a picture of that.

relevance of the predicted class' logit, from the top down        R_in = x * W^T (R / y)
    linear            W+ in the place of W, and y = W+ x without the bias
    convolution       all of W, and y with the bias
    ReLU, max-pool    to where it came from
saliency of |R|   S_i = mean over scales of 1 - exp(-mean of the 64 smallest d_ij)
                  d = d_colour / (1 + 3 d_place)        of patches of 7 x 7 in Lab
salient relevance = S_i (1 - distance to the nearest pixel of S > 0.8)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.driver import Experiment
from saccade.core.errors import InputError
from saccade.core.system import option
from saccade.probes._parts.drawn import drawn

EPS = 1e-9
PATCH, NEAREST, FOCUS = 7, 64, 0.8
SAME = 0.01  # in Lab: what lies nearer differs by rounding alone
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class SalientRelevance(Experiment):
    """`run()` explains one picture. Without a model it trains a small one on drawn shapes, and shows that it looks
    at the shape."""

    card = Card(
        slug="salient_relevance",
        name="Salient Relevance",
        kind="experiment",
        family="probes",
        form="probe",
        target="cnn",
        paper="Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise "
        "relevance propagation (Li et al., 2017)",
        summary="What a convolutional network decides by, as foci in the picture of its relevance",
        code="Hey1Li/Salient-Relevance-Propagation",
        choices=(
            "The small number that keeps from dividing by zero takes the sign of what it is added to; in the "
            "release it is always positive.",
            "Rules are laid into the backward pass of linear and convolution layers; what else a network does, "
            "such as to normalise or to add, passes relevance on as its gradient times its input does.",
            "The picture of relevance is first brought to 64 pixels: every patch is compared with every other.",
            "Colour distances are shares of the largest in the picture, places shares of its longer side, and "
            "saliency and distances to foci shares of their own largest.",
        ),
        tags=("LRP", "relevance propagation", "saliency", "attribution", "convolutional network", "VGG"),
    )

    model: nn.Module | None = option(None, "a classifier of pictures; none: one trained on drawn shapes")
    pixels: Tensor | None = option(
        None, "(1, 3, height, width), as the model takes them; none: a drawn shape"
    )
    label: int | None = option(None, "class whose logit is explained; none: the predicted one")
    scales: tuple[float, ...] = option((1.0, 0.8, 0.5, 0.3), "sizes at which patches are compared")
    side: int = option(64, "longest side of the picture of relevance, in pixels", low=PATCH)

    def run(self) -> Explained:
        if (self.model is None) != (self.pixels is None):
            raise InputError(
                "SalientRelevance needs a model and a picture.", "give model= and pixels=, or neither"
            )
        if self.model is not None and self.pixels is not None:
            return self.explain(self.model, self.pixels)
        shape = drawn(1, seed=1)
        found = self.explain(trained(), shape.pixels)
        inside = float(found.salient[shape.mask[0]].sum() / found.salient.sum())
        return replace(found, inside=inside, area=float(shape.mask.float().mean()))

    def explain(self, model: nn.Module, pixels: Tensor) -> Explained:
        if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
            raise InputError(
                f"Pixels {tuple(pixels.shape)} are no picture.", "give one, (1, 3, height, width)"
            )
        found, label = relevance(model, pixels, self.label)
        picture = coloured(found[0])
        scale = min(1.0, self.side / max(picture.shape[1:]))
        small = F.interpolate(picture[None], scale_factor=scale, mode="area")[0] if scale < 1 else picture
        seen = saliency(small, self.scales)
        salient = F.interpolate(around_foci(seen)[None, None], picture.shape[1:], mode="bilinear")[0, 0]
        return Explained(label, found[0], picture, seen, salient)


@dataclass(frozen=True, eq=False, repr=False)
class Explained:
    label: int
    relevance: Tensor  # (3, height, width)
    picture: Tensor  # (3, height, width), 0 to 1
    saliency: Tensor  # (rows, columns) of the picture brought to its side
    salient: Tensor  # (height, width)
    inside: float | None = None  # share of it inside the shape, where that was drawn here
    area: float | None = None  # share of the picture that the shape takes

    def __repr__(self) -> str:
        told = f"class {self.label}: relevance {float(self.relevance.sum()):.4g}"
        return told if self.inside is None else f"{told}; {self.inside:.0%} in {self.area:.0%} of the picture"


# ---- relevance -------------------------------------------------------------------------------------------


def relevance(model: nn.Module, pixels: Tensor, label: int | None = None) -> tuple[Tensor, int]:
    """Of the pixels (1, ...) for a class' logit, and the class, the predicted one unless given."""
    x = pixels.detach().clone().requires_grad_()
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.enable_grad(), ruled(model):
            out: Any = model(x)
            logits: Tensor = out if isinstance(out, Tensor) else out.logits
            label = int(logits[0].argmax()) if label is None else label
            (ratio,) = torch.autograd.grad(logits[0, label], x)
    finally:
        for module in training:
            module.training = True
    return (x * ratio).detach(), label


@contextlib.contextmanager
def ruled(model: nn.Module) -> Iterator[None]:
    """Going backward, what a linear or convolution layer gets is R / y of its output, and gives R / x of its input:
    every other layer then passes on relevance by its gradient."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(_linear).remove)
            elif isinstance(module, CONVOLUTIONS):
                stack.callback(module.register_forward_hook(_convolution).remove)
        yield


def _linear(module: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return Positive.apply(args[0], y.detach(), module.weight.detach().clamp_min(0))


def _convolution(module: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return Divided.apply(y)


class Positive(torch.autograd.Function):
    """y = W x + b, of which the relevance goes by W+ alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(y / away_from_zero(x @ weight.mT), weight)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, ratio: Tensor) -> tuple[Tensor, None, None]:
        share, weight = ctx.saved_tensors
        return (ratio * share) @ weight, None, None


class Divided(torch.autograd.Function):
    """y, by which relevance is divided without coming near zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y / away_from_zero(y))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, ratio: Tensor) -> Tensor:
        return ratio * ctx.saved_tensors[0]


def away_from_zero(z: Tensor) -> Tensor:
    return z + torch.where(z < 0, -EPS, EPS)


def coloured(relevance: Tensor) -> Tensor:
    """Sizes (3, height, width) as a picture, 0 to 1, its channels on one scale."""
    low, high = relevance.abs().aminmax()
    return (relevance.abs() - low) / (high - low).clamp_min(torch.finfo(relevance.dtype).tiny)


# ---- saliency --------------------------------------------------------------------------------------------


def saliency(picture: Tensor, scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3)) -> Tensor:
    """How much the surroundings of every pixel differ from those most like them: 0 to 1, (height, width)."""
    size = picture.shape[1:]
    seen = torch.stack(
        [
            F.interpolate(_at_scale(picture, scale)[None, None], size, mode="bilinear")[0, 0]
            for scale in scales
        ]
    ).mean(0)
    return seen / seen.max() if seen.max() > 0 else seen


def _at_scale(picture: Tensor, scale: float) -> Tensor:
    size = [max(2, round(scale * side)) for side in picture.shape[1:]]
    small = F.interpolate(picture[None], size, mode="bilinear", antialias=True)
    padded = F.pad(lab(small[0])[None], (PATCH // 2,) * 4, mode="replicate")
    patches = F.unfold(padded, PATCH)[0].T  # (pixels, values)
    places = torch.cartesian_prod(*(torch.arange(side) for side in size)).to(patches) / max(size)
    colour = torch.cdist(patches, patches, compute_mode="donot_use_mm_for_euclid_dist")
    colour = torch.where(colour < SAME, 0, colour)
    colour = colour / colour.max().clamp_min(SAME)
    distance = colour / (1 + 3 * torch.cdist(places, places))
    distance.fill_diagonal_(torch.inf)  # nothing is compared with itself
    nearest = distance.topk(min(NEAREST, len(distance) - 1), largest=False).values
    return (1 - (-nearest.mean(-1)).exp()).view(size)


def around_foci(saliency: Tensor) -> Tensor:
    """Less, the farther from what stands out most."""
    foci = (saliency > FOCUS).nonzero()
    if not len(foci):
        return saliency
    places = torch.cartesian_prod(*(torch.arange(side) for side in saliency.shape))
    far = torch.cdist(places.double(), foci.double()).amin(1).view(saliency.shape).to(saliency)
    return saliency * (1 - far / far.max().clamp_min(1))


def lab(rgb: Tensor) -> Tensor:
    """Colours (3, ...) of sRGB, 0 to 1, in CIE Lab under D65."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    to_xyz = linear.new_tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = torch.tensordot(to_xyz / to_xyz.sum(1, keepdim=True), linear, 1)
    root = torch.where(
        xyz > (6 / 29) ** 3, xyz.clamp_min(1e-6) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29
    )
    x, y, z = root
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# ---- a model ---------------------------------------------------------------------------------------------


def trained(steps: int = 60) -> nn.Module:
    """A small network that tells discs from squares."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 8 * 8, 2),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(steps):
            batch = drawn(64, seed=100 + step)
            optimizer.zero_grad()
            F.cross_entropy(model(batch.pixels), batch.kind).backward()
            optimizer.step()
    return model.eval()
