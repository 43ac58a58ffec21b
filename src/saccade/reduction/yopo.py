"""Read a picture with less of the model, settled once: fewer neighbours, heads, neurons and layers.

neighbours  of visual tokens a visual query (i, j) sees those with |di|, |dj| <= (w - 1) / 2, later ones too
heads       r_h = weights on visual keys / weights on all others, summed over queries;  h is active where
            r_h > threshold in more than half of the samples, and in layers 0 and 1;
            o_h = sum_j a_hj v_j  over keys j that are not visual, a as it was, where h is not
neurons     of a visual token the first I / c alone
layers      visual tokens leave before layer round(drop * depth)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError, OptionError
from saccade.core.features import Item
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall
from saccade.core.session import Session
from saccade.core.tokens import Tokens, TokensCall, gather_tokens

WHOLE = 2  # first layers in which every head is active


@dataclass(eq=False)
class YOPO(Method):
    card = Card(
        slug="yopo",
        name="YOPO",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        trains="light",
        paper="Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See (Zhang et al., 2024)",
        summary="Give visual tokens fewer neighbours, heads, neurons and layers, settled once for a model",
        needs=("image",),
        neutral={"window": 0, "active": "all", "cut": 1.0, "drop": 1.0},
        code="ZhangAIPI/YOPO_MLLM_Pruning",
        choices=(
            "Neighbours, heads and neurons are cut by masks, as in the released code: what they would spare is counted "
            "by operations(), and only the layers without visual tokens run faster.",
            "Tokens leave before the last layers; the released code sets LLaVA's weights to 0 after the softmax, and "
            "Qwen's scores to -inf, which equals leaving.",
            "In an inactive head visual queries still read words; the released code for LLaVA silences them there.",
            "Tokens of other pictures, tiles and frames are no neighbours; separators keep the model's own mask.",
            "Most samples decide which heads are active; the released code for LLaVA asks for more than 40 of 100.",
            "The fine-tuning of the cut model is not part of it.",
        ),
        headline="88% reduction of computation on LLaVA with performance kept",
        tags=("structured pruning", "local attention", "attention heads", "neurons", "layer dropping"),
    )

    window: int = option(5, "side w of the neighbourhood, odd; 0 leaves the model's own mask", low=0)
    active: str | tuple[tuple[int, ...], ...] = option(
        "calibrated", "heads that read pictures: calibrated, all, or the numbers of those of every layer"
    )
    threshold: float = option(0.035, "of a calibration: ratio above which a head is active", low=0)
    cut: float = option(2.0, "c: visual tokens have one of c neurons", low=1)
    drop: float = option(0.625, "share of the layers that see visual tokens; 1 is all", low=0, high=1)
    sites: Sites = option(
        {"replace": "text.*.self", "hidden": "text.*.neurons", "tokens": "text.*.layer"},
        "attention and neurons that are cut, and layers before which tokens may leave",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.window % 2 == 0:
            raise OptionError(f"window={self.window} has no middle.", "give an odd number, or 0")
        if isinstance(self.active, str) and self.active not in ("calibrated", "all"):
            raise OptionError(f"active={self.active!r} is unknown.", "use calibrated, all, or numbers")

    def features(self, item: Item) -> Tokens | None:
        if self.window:
            known = item.run.state
            if item.first == 0:
                known[item.kind] = []
            number = torch.full_like(item.x[:, :1], item.index, dtype=torch.long)
            known[item.kind].append(torch.cat([number, item.grid().to(number)], 1))
        return None

    def replace(self, call: AttentionCall) -> Tensor | None:
        visual = call.columns("visual")
        if not bool(visual.any()):
            return None
        changed = self._narrowed(call)
        active = self._active(call)
        if bool(active.all()):
            return call.native(**changed) if changed else None
        gone = visual[:, :: call.groups] if visual.shape[1] > 1 else visual
        blind = call.native(v=call.v.masked_fill(gone.mT, 0), **changed)
        if not bool(active.any()):
            return blind
        return torch.where(active[:, None, None], call.native(**changed), blind)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        visual = call.rows("visual", h)
        first = int(h.shape[-1] / self.cut)
        if first == h.shape[-1] or not bool(visual.any()):
            return h
        return torch.cat([h[..., :first], h[..., first:].masked_fill(visual, 0)], -1)

    def tokens(self, call: TokensCall) -> Tokens | None:
        if call.layer != round(self.drop * call.site.depth):
            return None
        visual = call.tokens("visual")
        if not bool(visual.any()):
            return None
        call.pass_.check_complete("takes whole pictures out")
        return Tokens(~visual)

    def _narrowed(self, call: AttentionCall) -> dict[str, Any]:
        """What the operator is given in place of the model's mask, where pictures are read."""
        if not self.window or not bool(call.queries("visual").any()):
            return {}
        call.pass_.check_complete("lets visual tokens see later ones")
        picture, tile, row, column = (part[:, None] for part in self._places(call).unbind(-1))
        among = (tile >= 0).mT & (tile >= 0)  # (batch, queries, queries)
        near = (picture.mT == picture) & (tile.mT == tile)
        for line in (row, column):
            near &= (line.mT - line).abs() <= self.window // 2
        queries = call.q.shape[2]
        lowest = torch.finfo(call.q.dtype).min
        mask = call.q.new_zeros(*call.q.shape[:2], queries, call.k.shape[2])
        allowed = call.allowed(slice(0, queries))
        if allowed is not None:
            mask = mask.masked_fill(~allowed, lowest) if allowed.dtype == torch.bool else mask + allowed
        window = torch.zeros_like(near, dtype=mask.dtype).masked_fill(~near, lowest)
        own = torch.where(among[:, None], window[:, None], mask[..., -queries:])
        mask = torch.cat([mask[..., :-queries], own], -1)
        return {"mask": mask, "causal": False, "window": None, "segments": None}

    def _places(self, call: AttentionCall) -> Tensor:
        """Picture, tile, row and column of the pass' tokens (batch, queries, 4), -1 of what is in no row."""
        tokens = call.q.shape[2] if call.keep is None else call.pass_.full(call.site)
        layout = call.qlayout
        places = layout.kind.new_full((layout.shape[0], tokens, 4), -1)
        for kind in ("image", "video"):
            there = layout.where(kind)[:, -tokens:]
            beams = there.shape[0] // call.run.samples
            known = torch.cat([*call.run.state.get(kind, ()), places.new_empty(0, 4)])
            if len(known) != int(there[::beams].sum()):
                raise InputError(
                    f"YOPO saw {len(known)} features of {kind}s, and this pass has {int(there[::beams].sum())}.",
                    "let pictures through the vision tower once for each prompt, or cut no neighbours (window=0)",
                )
            one = places[::beams].masked_scatter(there[::beams, :, None], known)
            places = torch.where(there[..., None], one.repeat_interleave(beams, 0), places)
        return places if call.keep is None else gather_tokens(places, call.keep, 1)

    def _active(self, call: AttentionCall) -> Tensor:
        """Of this layer: (heads,), bool."""
        layers = [site.layer for site in call.run.places(self, "replace")]
        if "active" not in call.run.state:
            heads = call.q.shape[1]
            if self.active == "calibrated":
                found = majority(call.run.calibration()["ratios"], self.threshold)[layers]
            else:
                every = (tuple(range(heads)),) * len(layers)
                chosen = every if isinstance(self.active, str) else self.active
                found = torch.tensor([[head in numbers for head in range(heads)] for numbers in chosen])
                if max((n for numbers in chosen for n in numbers), default=0) >= heads:
                    found = found[:0]
            if found.shape != (len(layers), heads):
                raise InputError(
                    f"YOPO was told of other heads than the {heads} of {len(layers)} layers.",
                    "give the numbers of the active heads of every layer in sites",
                )
            call.run.state["active"] = found.to(call.q.device)
        return call.run.state["active"][layers.index(call.site.layer)]

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples are inputs of a forward with pictures; the paper takes about 100."""
        ratios = []
        for sample in samples:
            watch = Watch(sites="text.*.self")
            session.forward(sample, [watch], last_only=True)
            ratios.append(torch.stack([watch.ratios[layer] for layer in sorted(watch.ratios)], 1))
        found = torch.cat(ratios) if ratios else torch.zeros(1)
        if not bool((found > 0).any()):
            raise InputError("No head was seen to read a picture.", "give inputs with pictures")
        return {"ratios": found}


@dataclass(eq=False)
class Watch(Method):
    """How much more heads read pictures than all else."""

    ratios: dict[int, Tensor] = field(default_factory=dict)  # by layer: (samples, heads)

    def observe(self, call: AttentionCall) -> None:
        visual = call.columns("visual")
        read = rest = call.q.new_zeros(call.q.shape[:2], dtype=torch.float32)
        for rows in call.chunks():
            w = call.weights(rows, keep=False) * call.queries("all")[:, None, rows, None]
            read = read + (w * visual).sum((2, 3))
            rest = rest + (w * ~visual).sum((2, 3))
        self.ratios[call.site.layer] = (read / rest).float().cpu()


def majority(ratios: Tensor, threshold: float) -> Tensor:
    """Which heads are active, of ratios (samples, layers, heads): (layers, heads), bool."""
    found = 2 * (ratios > threshold).sum(0) > len(ratios)
    found[:WHOLE] = True
    return found


def operations(
    words: int,
    patches: int,
    width: int,
    neurons: int,
    heads: int,
    active: Sequence[int],
    window: int = 0,
    cut: float = 1.0,
    drop: float = 1.0,
) -> float:
    """Multiplications of a prompt's layers, of which each has so many `active` heads."""
    total = 0.0
    for layer, reading in enumerate(active):
        visual = patches if layer < round(drop * len(active)) else 0
        around = min(window**2, visual) if window else visual
        total += 4 * width**2 * (words + visual)
        total += 2 * width * words * (words + visual)
        total += 2 * width * reading / heads * visual * (words + around)
        total += 3 * width * (neurons * words + int(neurons / cut) * visual)
    return total
