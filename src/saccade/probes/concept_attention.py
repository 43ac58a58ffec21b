"""Where a picture that is being made shows a concept, told in the space of attention's outputs.

    o_c = softmax(q_c [k_c; k_image]^T / sqrt(d)) [v_c; v_image]        concepts see each other and the image alone
    o_x = the image's own output, which never sees a concept
    map = mean over steps and layers of softmax over concepts (o_c . o_x)

Concepts begin as the first token of what the T5 makes of each, and go through the text stream's own weights,
modulated by the time alone. Outputs are those before the projection, all heads in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.branch import Branch
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Denoising, Run
from saccade.core.site import Site

AVERAGES = ("maps", "scores")


@dataclass(eq=False)
class ConceptAttention(Method):
    """`session.results["concept_attention"]` are `ConceptMaps` of the prompts' pictures."""

    card = Card(
        slug="concept_attention",
        name="ConceptAttention",
        kind="method",
        family="probes",
        form="probe",
        target="dit diffusion",
        paper="ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features (Helbling et al., 2025)",
        summary="Maps of freely named concepts in the picture that a diffusion transformer makes",
        needs=("sampling",),
        code="helblazer811/ConceptAttention",
        choices=(
            "Concepts go through an extra call of the denoiser, to which the image's keys and values are lent; the "
            "release carries them beside the prompt. It costs the rest of a call, and the picture stays as it is.",
            "The last fifth of the layers, as the release's pipeline takes 15 to 18 of 19; the paper takes 10 to 18.",
            "The softmax goes first, as in the pipeline; average=scores goes last, as in its newer helper.",
            "Their pooled vector is zero, as in the release's own Flux; its pipeline for diffusers takes that of all "
            "concepts in a row.",
            "A real picture is given to an image-to-image pipeline with half of four steps, and steps=(0,).",
            "SD3 and CogVideoX encode concepts one by one too; the release joins those of SD3 to a sentence.",
        ),
        headline="outperforms 11 zero-shot interpretability methods on ImageNet-Segmentation",
        tags=("saliency", "zero-shot segmentation", "diffusion transformer", "Flux", "SD3", "concepts"),
    )

    concepts: tuple[str, ...] = option((), "what is looked for, and what else there is, such as background")
    first: float = option(0.79, "share of the two-stream layers below those that count", low=0, high=1)
    last: float = option(1.0, "share of them up to which they count", low=0, high=1)
    steps: tuple[int, ...] = option((), "steps that count, from 0; none: all")
    average: str = option("maps", "what is averaged: maps, or scores before the softmax", choices=AVERAGES)
    sites: Sites = option("dit.*.joint", "joint attention; layers of one stream are left out")

    def begin(self, run: Run) -> None:
        if not self.concepts:
            raise InputError("ConceptAttention has no concepts.", "concepts=('cat', 'background')")
        run.state.update(image={}, sums={})

    def observe(self, call: AttentionCall) -> None:
        if "cond" not in call.pass_.rows or not streams([call.site]):
            return
        assert call.out is not None
        rows = call.pass_.rows["cond"].to(call.q.device)
        at = call.columns("visual")[0, 0, 0]
        call.run.state["image"][call.site.name] = tuple(t[rows][:, :, at] for t in (call.k, call.v, call.out))

    def branches(self, run: Run) -> Iterable[Branch]:
        p = run.last
        assert isinstance(p, Denoising) and p.context is not None
        count, rows = len(self.concepts), len(next(iter(p.rows.values())))
        if count > p.text:
            raise InputError(f"{count} concepts are more than the text's {p.text} tokens.", "name fewer")
        states = p.context.new_zeros(rows, *p.context.shape[1:])
        states[:, :count] = run.sampling.encode(self.concepts)[:, 0].to(states)
        inputs: dict[str, Any] = {"encoder_hidden_states": states}
        if (pooled := p.inputs.get("pooled_projections")) is not None:
            inputs["pooled_projections"] = pooled.new_zeros(rows, *pooled.shape[1:])
        if (ids := p.inputs.get("txt_ids")) is not None:
            inputs["txt_ids"] = torch.zeros_like(ids)
        sites = streams(run.places(self, "observe"))
        start = min(round(self.first * len(sites)), len(sites) - 1)
        counted = sites[start : max(start + 1, round(self.last * len(sites)))]
        yield Branch(
            inputs,
            (
                Concepts(
                    sites=tuple(site.name for site in sites),
                    count=count,
                    image=run.state["image"],
                    sums=run.state["sums"],
                    counted=tuple(site.name for site in counted),
                    steps=self.steps,
                    average=self.average,
                ),
            ),
        )

    def end(self, run: Run) -> ConceptMaps | None:
        sums = run.state["sums"]
        if not sums:
            return None
        maps: Tensor = sums["sum"] / sums["count"]
        maps = maps if self.average == "maps" else maps.softmax(1)
        grid = sums["grid"]
        return ConceptMaps(self.concepts, maps if grid is None else maps.unflatten(-1, grid))


@dataclass(eq=False, kw_only=True)
class Concepts(Method):
    """The extra call: its first tokens of text are concepts, and what they see of the image is lent to them."""

    count: int = 0
    image: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # keys, values, outputs
    sums: dict[str, Any] = field(default_factory=dict)
    counted: Sequence[str] = ()
    steps: Sequence[int] = ()
    average: str = "maps"

    def replace(self, call: AttentionCall) -> Tensor:
        p = call.pass_
        assert isinstance(p, Denoising)
        at = call.columns("text")[0, 0, 0].nonzero()[: self.count, 0]
        k, v, seen = self.image.pop(call.site.name)
        out = torch.zeros_like(call.q)
        out[:, :, at] = mine = call.native(
            q=call.q[:, :, at],
            k=torch.cat([call.k[:, :, at], k], 2),
            v=torch.cat([call.v[:, :, at], v], 2),
            mask=None,
        )
        if call.site.name in self.counted and (not self.steps or p.i in self.steps):
            scores = torch.einsum("bhcd,bhxd->bcx", mine.float(), seen.float())
            made = scores.softmax(1) if self.average == "maps" else scores
            self.sums["sum"] = self.sums.get("sum", 0) + made
            self.sums["count"] = self.sums.get("count", 0) + 1
            self.sums["grid"] = p.grid(made.shape[-1])
        return out


def streams(sites: Sequence[Site]) -> list[Site]:
    """Those whose layer has weights of its own for the text."""
    return [site for site in sites if ".single." not in site.name]


@dataclass(frozen=True, eq=False, repr=False)
class ConceptMaps:
    """Sums over the concepts are 1 everywhere."""

    concepts: tuple[str, ...]
    maps: Tensor  # (pictures, concepts, rows, columns), of a clip frames before them

    def segmentation(self) -> Tensor:
        """The number of the concept that is most at every place: (pictures, rows, columns)."""
        return self.maps.argmax(1)

    def masks(self) -> Tensor:
        """Where each concept is above its own mean: like the maps, bool."""
        return self.maps > self.maps.flatten(2).mean(-1).view(
            *self.maps.shape[:2], *[1] * (self.maps.ndim - 2)
        )

    def __repr__(self) -> str:
        shares = self.maps.flatten(2).mean(-1)
        told = (
            f"  picture {i}: " + "  ".join(f"{c} {s:.3f}" for c, s in zip(self.concepts, row, strict=True))
            for i, row in enumerate(shares.tolist())
        )
        return "\n".join(["share of the picture", *told])
