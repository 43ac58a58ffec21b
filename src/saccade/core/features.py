"""Features of a picture on their way to the text tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.sources import first_lines, sources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from saccade.core.method import Method
    from saccade.core.passes import Run
    from saccade.core.site import Site


@dataclass
class Item:
    """One picture, tile or clip, behind the projector."""

    kind: str  # image or video
    index: int  # in the order of the prompt
    sample: int
    x: Tensor  # (tokens, width)
    question: Tensor  # ids of the sample's words
    inputs: Mapping[str, Any]  # what the vision tower was given, pixels among it
    box: Tensor | None  # (tokens, 4) in the original picture, where it is known
    run: Run
    first: int = 0  # place of its first feature among those of all items

    def from_tower(self, site: Site, calls: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Values that a site of the tower gave its tokens, (tiles, tokens) call after call, as the mean of those
        that each feature is made of; and the tile of each feature: (tokens,), NaN and -1 for separators."""
        values = torch.cat([call.flatten() for call in calls])
        made_of, tokens = sources(self.run.runtime, self.inputs, self.kind, site)
        if tokens != values.shape[0]:
            raise InputError(
                f"{site.name} was seen with {values.shape[0]} tokens, and features are made of {tokens}.",
                "let the picture through the vision tower once for each prompt",
            )
        mine = made_of[self.first : self.first + self.x.shape[0]].to(values.device)  # (tokens, most)
        there = mine >= 0
        if not there.any():
            raise InputError(
                f"No feature of this {self.kind} is made of certain tokens at {site.name}.",
                "use a model whose projector leaves patches in their places, not one with queries",
            )
        packed = all(call.shape[0] == 1 for call in calls)  # windows of a picture come one by one
        sizes = [len(values)] if packed else [call.shape[1] for call in calls for _ in range(call.shape[0])]
        tile_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(values.device)
        tiles = tile_of[mine[:, 0].clamp_min(0)]
        mean = values[mine.clamp_min(0)].masked_fill(~there, 0).sum(1) / there.sum(1)  # NaN of none
        return mean, torch.where(there[:, 0], tiles, -1)

    def grid(self) -> Tensor:
        """Tile (or frame), row and column of every feature, (tokens, 3), counted from 0 among those of its tile that
        are there; -1 for separators."""
        packed: Tensor | None = self.inputs.get(f"{self.kind}_grid_thw")
        if packed is not None:
            frames, height, width = packed[self.index].tolist()
            side = math.isqrt(frames * height * width // self.x.shape[0])  # of the patches in a feature
            at = torch.arange(self.x.shape[0], device=self.x.device)
            rows, columns = height // side, width // side
            return torch.stack([at // (rows * columns), at // columns % rows, at % columns], -1)
        lines = first_lines(self.run.runtime, self.inputs, self.kind)
        mine = lines[self.first : self.first + self.x.shape[0]].to(self.x.device, copy=True)
        if mine.shape[1] != 3:
            raise InputError(
                f"Nobody says how many patches a row of this {self.kind} has.",
                "use a method that does not go by rows",
            )
        for tile in mine[mine[:, 0] >= 0, 0].unique():
            own = mine[:, 0] == tile
            for axis in (1, 2):
                mine[own, axis] = mine[own, axis].unique(return_inverse=True)[1]
        return mine


def choose(
    kind: str, parts: Sequence[Tensor], methods: Sequence[Method], inputs: Mapping[str, Any], run: Run
) -> list[Tensor]:
    """Ask the methods which features go on. The others keep their slots, which layer 0 then leaves out:
    the model counts features and placeholders."""
    ids = run.prompt_ids()
    placeholder = run.runtime.host.vocabulary.placeholders.get(kind)
    if ids is None or placeholder is None:
        raise InputError(
            f"{type(methods[0]).__name__} chooses among features, and the prompt's placeholders are not known.",
            "pass input_ids and pixel_values to generate() or to the model, not inputs_embeds",
        )
    slots = ids == placeholder  # (samples, tokens)
    wanted, given = slots.sum(1).tolist(), [p.shape[0] for p in parts]
    if sum(wanted) != sum(given):
        raise InputError(
            f"{sum(given)} features of {len(parts)} {kind}s do not fill {sum(wanted)} placeholders.",
            "make the prompt with the model's own processor",
        )
    owners = _owners(given, wanted)
    given_ids: Any = run.runtime.host.ids(run.inputs)[0]
    mask = run.runtime.host.mask(run.inputs, given_ids.shape[1])
    real = torch.ones_like(slots) if mask is None else mask[:, -ids.shape[1] :].to(slots.device) != 0
    boxes = run.boxes.get(kind)
    located = [None] * len(parts) if boxes is None else boxes.split(given)
    kept, changed = [], []
    for index, (x, sample) in enumerate(zip(parts, owners, strict=True)):
        stays = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        question = ids[sample][~slots[sample] & real[sample]]
        for method in methods:
            run.method = method
            item = Item(kind, index, sample, x, question, inputs, located[index], run, sum(given[:index]))
            answer = method.features(item)
            if answer is None:
                continue
            index_kept = answer.index(1, x.shape[0])[0].to(x.device)
            index_kept = index_kept[index_kept >= 0]
            mine = torch.zeros_like(stays)
            mine[index_kept] = True
            stays &= mine
            if answer.values is not None:
                if answer.values.shape[-2] != index_kept.shape[0]:
                    raise InputError(
                        f"{answer.values.shape[-2]} values were given for {index_kept.shape[0]} features that stay.",
                        "give one of each, in their order",
                    )
                x = x.clone()
                x[index_kept] = answer.values.reshape(-1, x.shape[-1]).to(x.dtype)
            run.renumbers = run.renumbers or answer.positions == "renumber"
        if not bool(stays.any()):
            raise InputError(f"No feature of {kind} {index} is left.", "let the methods keep some in common")
        kept.append(stays)
        changed.append(x)
    removed = torch.zeros_like(slots) if run.removed is None else run.removed
    removed[slots] = ~torch.cat(kept).to(slots.device)
    run.removed = removed
    return changed


def refuse_unnamed(run: Run) -> None:
    """Features that come as embeddings are never seen, and nothing would be chosen."""
    choosing = run.overriding("features")
    if not choosing:
        return
    if run.runtime.host.ids(run.inputs)[0] is None or run.inputs.get("mm_encoder_outputs") is not None:
        raise InputError(
            f"{type(choosing[0]).__name__} chooses among features, and inputs_embeds or mm_encoder_outputs hide them.",
            "pass input_ids and pixel_values to generate() or to the model",
        )


def _owners(given: list[int], wanted: list[int]) -> list[int]:
    """The sample of every item, items and samples in order."""
    owners, sample, left = [], 0, wanted[0]
    for count in given:
        while left <= 0:
            sample += 1
            left = wanted[sample]
        owners.append(sample)
        left -= count
    return owners
