"""Let patches leave a vision transformer inside of its layers, and one token stand for what has left.

    a_j   mean over heads of the class token's attention on patch j, in layers 1/4, 1/2 and 3/4 up
    x     what goes into the layer, and what its attention adds
    keep the k = ceil(keep * n) of the n patches with the largest a_j;   fused  <- sum of a_j * x_j over the others

The layer's mlp and the layers above have the class token, the kept and the fused, which may leave or be fused again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.importance import class_token
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall
from saccade.core.site import Site
from saccade.core.tokens import Tokens, TokensCall, gather_tokens
from saccade.reduction._parts.choice import highest


@dataclass(eq=False)
class EViT(Method):
    card = Card(
        slug="evit",
        name="EViT",
        kind="method",
        family="reduction",
        form="method",
        target="vit",
        trains="full",
        paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations "
        "(Liang et al., 2022)",
        summary="Keep the patches that the class token attends to, and fuse the others into one token",
        neutral={"keep": 1.0},
        code="youweiliang/evit",
        choices=(
            "Kept patches stand in their order and the fused token where the first of its patches stood; "
            "without positions in the layers the order changes nothing.",
            "The mlp of the three layers still runs on what has left, whose results are thrown away: with a rate "
            "of 0.7 DeiT-S spares 30% of its operations, where the paper's own layers spare 34%.",
            "Blocks 4, 7 and 10 of 12 scale with the depth; in the last layer nothing leaves.",
            "The rate is annealed by whoever trains: method.keep = annealed(progress, rate) before a step.",
        ),
        headline="DeiT-S 50% faster with 0.3% lower accuracy; +1% accuracy at equal cost with higher resolution",
        tags=("token pruning", "token fusion", "class token", "vision transformer", "training acceleration"),
    )

    keep: float = option(0.7, "share of the patches that each stage leaves; 1 changes nothing", low=0, high=1)
    fuse: bool = option(True, "whether a token stands for what has left")
    sites: Sites = option(
        {
            "output": "vision.25%.self|vision.50%.self|vision.75%.self",
            "hidden": "vision.*.self|vision.*.mlp",
            "tokens": "vision.*.layer",
        },
        "the stages' attention, and the layers that they are among",
    )

    def tokens(self, call: TokensCall) -> Tokens | None:
        leaving: Stage | None = call.run.state.pop("stage", None)
        h, answer = call.h, None
        if leaving is not None:
            leaving.check(h)
            answer = Tokens(leaving.keep)
            h = gather_tokens(h, answer.index(*h.shape[:2]), 1)
        stages = [site.layer for site in call.run.places(self, "output")]
        if self.keep < 1 and call.layer in stages and call.layer < call.site.depth - 1:
            call.run.state["stage"] = Stage(call.site, h)
        return answer

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        stage: Stage | None = call.run.state.get("stage")
        if stage is None:
            return o
        row = class_token(call)
        if row is None:
            raise InputError(
                f"EViT ranks patches by the class token's attention, and {call.site.tower} has none.",
                "use a tower with one, such as ViT, DeiT or CLIP's",
            )
        patches = call.columns("image")[:, 0, 0]
        count = math.ceil(self.keep * int(patches[0].sum()))
        a = call.weights(row).mean(1)[:, 0]
        stays = highest(a, patches, torch.full_like(row, count))
        stage.attention, stage.leave, stage.keep = a, patches & ~stays, stays | ~patches
        return o

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        stage: Stage | None = call.run.state.get("stage")
        if stage is None:
            return h
        if call.site.kind == "self" and self.fuse and bool(stage.leave.any()):
            h = stage.fuse(h)
        stage.added = stage.added + h
        return h


@dataclass
class Stage:
    """A layer in which patches leave: (tiles, tokens)."""

    site: Site
    h: Tensor  # what goes in, (tiles, tokens, width)
    added: Tensor | float = 0.0  # by attention and the mlp
    attention: Tensor = field(init=False)  # of the class token
    leave: Tensor = field(init=False)
    keep: Tensor = field(init=False)

    def fuse(self, given: Tensor) -> Tensor:
        """What attention gives, so that the first of those that leave becomes the sum of them all."""
        weights = (self.attention * self.leave)[..., None]
        fused = (weights * (self.h + given)).sum(1, keepdim=True).to(given.dtype)
        first = self.leave & (self.leave.cumsum(1) == 1)
        self.keep = self.keep | first
        return torch.where(first[..., None], fused - self.h, given)

    def check(self, out: Tensor) -> None:
        """Refuse a layer that scales or drops what attention gives before it is added."""
        apart = (out - self.h - self.added).detach().norm()
        rounding = torch.finfo(out.dtype).eps * out.detach().norm()
        if bool(apart > 1e-3 * torch.as_tensor(self.added).detach().norm() + 2 * rounding):
            raise InputError(
                f"{self.site.name} ({type(self.site.module).__name__}) does not simply add what its attention and "
                "mlp give, so EViT cannot fuse tokens between them.",
                "use a model without layer scale, such as ViT, DeiT or CLIP's, and train without stochastic depth",
            )


def annealed(progress: float, rate: float) -> float:
    """The share that stays at that part (0 to 1) of a training which begins with all and ends with `rate`."""
    return rate + (1 - rate) * (math.cos(math.pi * min(1.0, max(0.0, progress))) + 1) / 2
