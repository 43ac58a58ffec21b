"""Find the layers that carry an object to the answer, and let what the strongest say be heard again above them.

    RR_l = (P(patched) - P(corrupted)) / (P(clean) - P(corrupted))      the last token's output of layer l put back
    o_l  <- |o_l| * unit(o_l + lam * sum_k RR_k o_k)        l: a target; k < l: sources; at the last token

for the outputs of attention and of the mlps, each with their own recovery. P is the probability of the right
answer; the corrupted run sees noise on the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError, OptionError
from saccade.core.layout import Layout
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall, Run
from saccade.core.question import Question
from saccade.core.session import Session
from saccade.core.site import match
from saccade.probes._parts.asked import read, said, shows, token_of
from saccade.probes._parts.table import Table, layers, mean
from saccade.probes._parts.tracing import Patch, trace

GROUPS = ("before it", "object", "behind it", "early text", "its name", "late text", "last")
PARTS = ("self", "mlp", "layer")
Recovery = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(eq=False)
class IRI(Method):
    """`session.calibrate` traces and keeps the recovery; `fcct` gives one question's whole map."""

    card = Card(
        slug="fcct_iri",
        name="FCCT / IRI",
        kind="method",
        family="probes",
        form="method",
        target="vlm",
        paper="Causal Tracing of Object Representations in Large Vision Language Models: Mechanistic "
        "Interpretability and Hallucination Mitigation (Li et al., 2025)",
        summary="Trace which layers carry an object to the answer, and inject what they say above them",
        neutral={"lam_attention": 0.0, "lam_mlp": 0.0},
        choices=(
            "The noise on the picture is Gaussian with three times its pixels' deviation; the paper gives no level.",
            "Visual tokens that do not show the object are before it or behind it as they are to its middle one.",
            "Text that stands before the object's name is early, also what stands before the picture.",
            "What sources say is taken as it is before an injection into them.",
            "Sources and targets are the paper's shares of 32 layers: 3 and 10.",
        ),
        tags=("causal tracing", "activation patching", "hallucination", "interpretability", "injection"),
    )

    lam_attention: float = option(0.26, "strength for attention's outputs; 0 is none. LLaVA-1.5's", low=0)
    lam_mlp: float = option(0.16, "strength for the mlps' outputs; 0 is none. LLaVA-1.5's", low=0)
    sources: float = option(3 / 32, "share of the layers, those of the highest recovery", low=0, high=1)
    targets: float = option(10 / 32, "share of the layers into which is injected", low=0, high=1)
    recovery: str | Recovery = option(
        "calibrated", "of attention and mlp in every layer; calibrated: as traced in this model"
    )
    noise: float = option(3.0, "of a calibration: deviation of the noise, in deviations of the pixels", low=0)
    sites: Sites = option("text.*.self|text.*.mlp", "outputs that are steered")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.recovery, str) and self.recovery != "calibrated":
            raise OptionError(
                f"IRI(recovery={self.recovery!r}) is not known.",
                'use "calibrated", or give the recovery of attention and of the mlp in every layer',
            )

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        lam = {"self": self.lam_attention, "mlp": self.lam_mlp}[call.site.kind]
        if lam == 0 or not call.pass_.complete:
            return h
        ratios = self._recovery(call.run)[call.site.kind]
        sources, targets = (highest(ratios, share) for share in (self.sources, self.targets))
        said = call.run.state.setdefault(f"said by {call.site.kind}", {})
        layer, o = call.site.layer, call.last(h)
        heard = [ratios[k] * said[k] for k in sorted(sources) if k < layer]
        if layer in targets and heard:
            injected = louder(o, torch.stack(heard).sum(0), lam)
            h = torch.where(call.rows("last", h), injected[:, None], h)
        if layer in sources:
            said[layer] = o
        return h

    def _recovery(self, run: Run) -> Mapping[str, Sequence[float]]:
        if "recovery" not in run.state:
            if isinstance(self.recovery, str):
                kept = run.calibration()
                found = {part: kept[part].tolist() for part in ("self", "mlp")}
            else:
                found = {part: [*given] for part, given in zip(("self", "mlp"), self.recovery, strict=True)}
            depth = run.matching(tuple(self.sites_of("hidden")))[0].depth
            if wrong := next((part for part, ratios in found.items() if len(ratios) != depth), None):
                raise InputError(
                    f"IRI has {len(found[wrong])} recoveries of {wrong} for {depth} layers.",
                    "give one for every layer of the text, or session.calibrate(method, samples)",
                )
            run.state["recovery"] = found
        return run.state["recovery"]

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples have a `question` (`sc.Question`) about an object that is there, its `answer`, a `word` that
        names the object in it, and the object's `box` in the picture, in pixels."""
        found = mean([fcct(session, **sample, noise=self.noise).recovery for sample in samples])
        last = found.at(group="last")
        return {"map": found.values, **{part: last.at(part=part).values for part in ("self", "mlp")}}


@dataclass(frozen=True, repr=False)
class Traces:
    """How much of an answer comes back with each part, layer and group of tokens."""

    recovery: Table  # (part, layer, group)
    clean: float  # probability of the answer
    corrupted: float

    def __repr__(self) -> str:
        return f"P clean {self.clean:.3g}, corrupted {self.corrupted:.3g}; recovery\n{self.recovery!r}"


def fcct(
    session: Session,
    question: Question,
    answer: str,
    word: str,
    box: tuple[float, float, float, float],
    *,
    noise: float = 3.0,
    seed: int = 0,
    rows: int = 32,
) -> Traces:
    """Clean outputs of attention, mlp and layer put back for each group of tokens, into a run with noise."""
    clean = question.inputs(session.model)
    layout, _ = read(session, question, clean, located=True)
    groups = grouped(layout, shows(layout, box), said(question, word, clean, layout))
    sites = [site for part in PARTS for site in match(f"text.*.{part}", session.sites)]
    patches = [Patch(site, groups[group]) for site in sites for group in GROUPS]
    token = token_of(question, answer)
    traced = trace(
        session,
        clean,
        noisy(clean, noise, seed),
        patches,
        lambda logits: logits.double().softmax(-1)[:, token].cpu(),
        rows,
    )
    depth = sites[0].depth
    values = torch.full((len(PARTS), depth, len(GROUPS)), torch.nan, dtype=torch.float64)
    for site, found in zip(sites, traced.recovery.view(len(sites), len(GROUPS)), strict=True):
        values[PARTS.index(site.kind), site.layer] = found
    axes = {"part": PARTS, "layer": layers(depth), "group": GROUPS}
    return Traces(Table(values, axes), float(traced.clean), float(traced.corrupted))


def grouped(layout: Layout, shown: Tensor, name: Tensor) -> dict[str, Tensor]:
    """Every token of one prompt in one of the groups: (tokens,), bool."""
    visual, last, real = (layout.where(kind)[0].cpu() for kind in ("visual", "last", "all"))
    text, at = real & ~visual, torch.arange(len(real))
    if not bool(shown.any()):
        raise InputError("No visual token shows what is in the box.", "give a box within the first picture")
    middle = at[shown].float().median()
    named = at[name].min()
    return dict(
        zip(
            GROUPS,
            (
                visual & ~shown & (at < middle),
                shown,
                visual & ~shown & (at > middle),
                text & (at < named),
                name,
                text & (at > named) & ~name & ~last,
                last,
            ),
            strict=True,
        )
    )


def noisy(inputs: Mapping[str, Any], sigma: float, seed: int) -> dict[str, Any]:
    """The inputs with noise over their pixels; padding, of zeros, stays."""
    noise = torch.Generator().manual_seed(seed)
    changed = dict(inputs)
    for name, value in inputs.items():
        if "pixel_values" in name:
            drawn = torch.randn(value.shape, generator=noise, dtype=torch.float32).to(value)
            changed[name] = torch.where(
                value == 0, value, value + sigma * value.float().std().to(value) * drawn
            )
    return changed


def highest(ratios: Sequence[float], share: float) -> list[int]:
    """The layers of the highest recovery."""
    count = round(share * len(ratios)) or (share > 0)
    return sorted(range(len(ratios)), key=lambda layer: -ratios[layer])[:count]


def louder(o: Tensor, heard: Tensor, lam: float) -> Tensor:
    """Outputs (batch, width) with what was heard, of their own length."""
    wide = o.to(torch.promote_types(o.dtype, torch.float32))
    return (wide.norm(dim=-1, keepdim=True) * F.normalize(wide + lam * heard.to(wide), dim=-1)).to(o.dtype)
