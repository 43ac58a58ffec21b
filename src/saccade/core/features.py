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
    from saccade.core.seams.projector import Projection
    from saccade.core.site import Site
    from saccade.core.tokens import Tokens


@dataclass
class Item:
    """One picture, tile or clip, before or behind the projector."""

    kind: str  # image or video
    index: int  # in the order of the prompt
    sample: int
    x: Tensor  # (tokens, width)
    question: Tensor  # ids of the sample's words
    inputs: Mapping[str, Any]  # what the vision tower was given, pixels among it
    box: Tensor | None  # (tokens, 4) in the original picture, where it is known
    run: Run
    first: int = 0  # place of its first feature among those of all items
    stage: str = "after"  # of the projector, or before
    merges: str = ""  # why one of its tokens makes no feature of its own, if so

    def from_tower(self, site: Site, calls: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Values that a site of the tower gave its tokens, (tiles, tokens) call after call, as the mean of those
        that each feature is made of; and the tile of each feature: (tokens,), NaN and -1 for separators."""
        self._refuse_merged("asks where the features come from")
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
        self._refuse_merged("asks for rows and columns")
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

    def edited(self, answer: Tokens | None, stays: Tensor) -> Tensor:
        """The item's tokens with the values that were given for those that stay; what does not stay leaves `stays`."""
        if answer is None:
            return self.x
        if answer.append is not None:
            raise InputError(
                "Tokens were appended to features, which fill the placeholders of the prompt.",
                "append them before a layer of the vision tower (the tokens event)",
            )
        index = answer.index(1, self.x.shape[0])[0].to(self.x.device)
        index = index[index >= 0]
        if index.shape[0] < self.x.shape[0]:
            self._refuse_merged("drops tokens")
            mine = torch.zeros_like(stays)
            mine[index] = True
            stays &= mine
        self.run.renumbers = self.run.renumbers or answer.positions == "renumber"
        if answer.values is None:
            return self.x
        if answer.values.shape[-2] != index.shape[0]:
            raise InputError(
                f"{answer.values.shape[-2]} values were given for {index.shape[0]} features that stay.",
                "give one of each, in their order",
            )
        x = self.x.clone()
        x[index] = answer.values.reshape(-1, x.shape[-1]).to(x.dtype)
        return x

    def _refuse_merged(self, does: str) -> None:
        if self.merges:
            raise InputError(
                f"{type(self.run.method).__name__} {does} before the projector, but {self.merges}.",
                "let it act on the features behind the projector (stage='after'), or use a model whose projector "
                "leaves every token alone, such as LLaVA",
            )


def choose(
    kind: str,
    parts: Sequence[Tensor],
    methods: Sequence[Method],
    inputs: Mapping[str, Any],
    run: Run,
    projection: Projection | None = None,
) -> list[Tensor]:
    """Ask the methods which features go on, those first that act on what the projector read. The others keep their
    slots, which layer 0 then leaves out: the model counts features and placeholders."""
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
    stays = [torch.ones(count, dtype=torch.bool, device=p.device) for count, p in zip(given, parts)]

    def asked(stage: str, xs: Sequence[Tensor], merges: str = "") -> list[Tensor]:
        """What the methods of a stage make of the items' tokens."""
        changed = []
        for index, (x, sample) in enumerate(zip(xs, owners, strict=True)):
            question = ids[sample][~slots[sample] & real[sample]]
            box, first = None if merges else located[index], sum(given[:index])
            for method in (m for m in methods if m.stage == stage):
                run.method = method
                item = Item(kind, index, sample, x, question, inputs, box, run, first, stage, merges)
                x = item.edited(method.features(item), stays[index])
            changed.append(x)
        return changed

    early = next((method for method in methods if method.stage == "before"), None)
    if early is not None:
        projection = _check(projection, early, parts, run)
        tokens = projection.shares(given)
        changed = asked("before", tokens, projection.merges)
        if any(new is not old for new, old in zip(changed, tokens)):
            parts = projection.of(torch.cat(changed)).split(given)
    changed = asked("after", parts)
    for index, mine in enumerate(stays):
        if not bool(mine.any()):
            raise InputError(f"No feature of {kind} {index} is left.", "let the methods keep some in common")
    removed = torch.zeros_like(slots) if run.removed is None else run.removed
    removed[slots] = ~torch.cat(stays).to(slots.device)
    run.removed = removed
    return changed


def _check(projection: Projection | None, method: Method, parts: Sequence[Tensor], run: Run) -> Projection:
    """Refuse a model of which it is not known how its features come from what the projector reads."""
    model = type(run.runtime.model).__name__
    if projection is None:
        why = f"no module behind the vision tower of {model} makes features"
    elif not projection.gives(parts):
        why = f"{model} changes or rearranges what {type(projection.module).__name__} makes"
    elif len(projection.tokens) % len(projection.features):
        why = projection.merges
    else:
        return projection
    raise InputError(
        f"{type(method).__name__} acts before the projector, but {why}.",
        "let it act on the features behind the projector (stage='after'), or use a model such as LLaVA",
    )


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
