"""How `world/vlm` learns to see, to answer and to describe.

First the vision tower alone: every patch's projected feature is put beside the embeddings of the words for what
it shows (kind, colour, letter, left or right, top or bottom). Then all together: one picture, many questions,
packed in a row behind it, each seeing the picture and itself. At the word that names a thing, the middle layer
also has to tell whether it is there, how often, its colour and its place; without that, yes and no stay at
chance for long. In half of the steps visual tokens are missing, their positions kept or closed up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.world.architectures import MEAN, STD, vlm, vlm_processor
from saccade.world.captions import ASKED, caption
from saccade.world.kinds import COLOURS, GRID, KINDS, LETTERS, PATCH, PLACES
from saccade.world.questions import Question, ask_pair, questions
from saccade.world.scenes import Scene, letter_boxes, scene
from saccade.world.train import Batch, trapezoid
from saccade.world.words import INDEX

TOKENS = GRID * GRID
COUNTS = 6
HIDDEN = 128
NONE = -100  # no label
Turn = tuple[str, str, str]  # question, answer, kind of question


# ---- what a step is made of --------------------------------------------------------------------------------


@dataclass
class Packed:
    """Conversations behind one prefix of pictures, as one row."""

    ids: list[int]
    positions: list[int]
    segments: list[int]  # 0 the prefix, which all see
    labels: list[int]
    weights: list[float]
    start: int  # position of what follows the prefix
    kinds: list[int] = field(default_factory=list)  # columns of words that name a kind of thing, in questions

    def add(self, segment: int, turns: list[Turn]) -> None:
        position = self.start
        for number, (question, answer, kind) in enumerate(turns):
            asked = question.split() if number == 0 else ["user", ":", *question.split()]
            self.kinds += [len(self.ids) + i for i, word in enumerate(asked) if word in KINDS]
            said = answer.split()
            words = [*asked, "assistant", ":", *said, "</s>"]
            weight = 0.5 if kind == "caption" else 1.0
            self.ids += [INDEX[word] for word in words]
            self.positions += range(position, position + len(words))
            self.segments += [segment] * len(words)
            self.labels += [NONE] * (len(words) - len(said) - 1) + [INDEX[w] for w in [*said, "</s>"]]
            self.weights += [0.0] * (len(words) - len(said) - 1) + [weight] * len(said) + [0.1]
            position += len(words)


def prefix(pictures: int, kept: np.ndarray, renumbered: bool) -> Packed:
    """`<s> user : <image> ...`, of whose (pictures, tokens) only the kept ones are there."""
    head = [INDEX[word] for word in ("<s>", "user", ":")]
    places = np.concatenate([len(head) + number * TOKENS + kept[number] for number in range(pictures)])
    ids = head + [INDEX["<image>"]] * len(places)
    positions = np.arange(len(ids)) if renumbered else np.concatenate([np.arange(len(head)), places])
    start = len(ids) if renumbered else len(head) + pictures * TOKENS
    return Packed(ids, positions.tolist(), [0] * len(ids), [NONE] * len(ids), [0.0] * len(ids), start)


def collate(rows: list[Packed]) -> Batch:
    width = max(len(row.ids) for row in rows)

    def pad(values: list[list[Any]], filler: float) -> Tensor:
        return torch.tensor([own + [filler] * (width - len(own)) for own in values])

    return {
        "ids": pad([row.ids for row in rows], INDEX["<pad>"]),
        "positions": pad([row.positions for row in rows], 0),
        "segments": pad([row.segments for row in rows], -1),
        "labels": pad([row.labels for row in rows], NONE),
        "weights": pad([row.weights for row in rows], 0.0),
    }


def patches(seen: Scene) -> dict[str, np.ndarray]:
    """What every patch shows most of: (tokens,) kind, colour and letter."""
    ids = seen.ids.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(TOKENS, -1)
    kind, colour = np.full(TOKENS, len(KINDS)), np.full(TOKENS, NONE)
    most = np.full(TOKENS, 0.08 * PATCH * PATCH)
    for number, thing in enumerate(seen.things):
        area = (ids == number).sum(1)
        here = area > most
        kind[here], colour[here] = KINDS.index(thing.kind), list(COLOURS).index(thing.colour)
        most = np.maximum(most, area)
    letter, most = np.full(TOKENS, NONE), np.full(TOKENS, 0.0)
    corner = PATCH * np.arange(GRID)
    for thing in seen.things:
        for sign, (x0, y0, x1, y1) in zip(thing.text or "", letter_boxes(thing), strict=True):
            wide = np.clip(np.minimum(corner + PATCH, x1) - np.maximum(corner, x0), 0, None)
            high = np.clip(np.minimum(corner + PATCH, y1) - np.maximum(corner, y0), 0, None)
            area = np.outer(high, wide).reshape(-1)
            here = area > np.maximum(most, 8)
            letter[here], most = LETTERS.index(sign), np.maximum(most, area)
    return {"patch kind": kind, "patch colour": colour, "patch letter": letter}


def whole(seen: Scene) -> np.ndarray:
    """Which kinds are there, and which place it is."""
    there = [float(kind in seen.counts()) for kind in KINDS]
    return np.array(there + [float(place == seen.place) for place in PLACES], np.float32)


def looked_up(seen: Scene, kind: str) -> list[float]:
    """What the middle layer shall know where a kind is named: there, how many, colour, x, y."""
    things = [thing for thing in seen.things if thing.kind == kind]
    if len(things) != 1:
        return [len(things) > 0, min(len(things), COUNTS - 1), NONE, np.nan, np.nan]
    x, y = things[0].centre
    side = GRID * PATCH / 2
    return [1, 1, list(COLOURS).index(things[0].colour), x / side - 1, y / side - 1]


def pixels(scenes: list[Scene]) -> Tensor:
    """(pictures, 3, height, width)"""
    raw = torch.from_numpy(np.stack([seen.image for seen in scenes])).permute(0, 3, 1, 2)
    return (raw.float() / 255 - MEAN) / STD


# ---- the recipe --------------------------------------------------------------------------------------------


class Vlm:
    does = "answers"

    def __init__(self, seed: int, steps: int = 4200, rows: int = 32, alone: int = 400) -> None:
        self.seed, self.steps, self.rows = seed, steps, rows
        self.alone = alone  # steps of the vision tower alone
        self.model = vlm()
        _see_places(self.model)
        self.middle = self.model.config.text_config.num_hidden_layers // 2
        self.helpers = nn.ModuleDict(
            {
                "whole": nn.Linear(HIDDEN, len(KINDS) + len(PLACES)),
                "there": nn.Linear(HIDDEN, 1 + COUNTS + len(COLOURS) + 2),
            }
        )
        self.sharpness = nn.Parameter(torch.tensor(1.0))
        self.helpers.register_parameter("sharpness", self.sharpness)

    def rate(self, step: int, name: str) -> float:
        sees = "vision_tower" in name
        if step < self.alone:
            return 2e-3 * trapezoid(step, self.alone)
        level = trapezoid(step - self.alone, self.steps - self.alone, warmup=150)
        return 1.5e-3 * level * (0.3 if sees else 1.0)

    # ---- data ----------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        pictures = 1 if step < self.alone or rng.random() < 0.8 else 2
        rows = self.rows // pictures
        first = step * self.rows
        scenes = [scene(first + i) for i in range(rows * pictures)]
        pairs = [scenes[i * pictures : (i + 1) * pictures] for i in range(rows)]
        batch = self.seen(scenes)
        if step < self.alone:
            return batch
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.1, 1.0)
        turns = [self.turns(group, rng, noise=0.1) for group in pairs]
        return batch | self.asked(pairs, turns, rng, share, renumbered=bool(rng.random() < 0.5))

    def seen(self, scenes: list[Scene]) -> Batch:
        labels = [patches(seen) for seen in scenes]
        return {
            "pixels": pixels(scenes),
            "whole": torch.from_numpy(np.stack([whole(seen) for seen in scenes])),
            **{name: torch.from_numpy(np.stack([own[name] for own in labels])) for name in labels[0]},
        }

    def asked(
        self,
        groups: list[list[Scene]],
        turns: list[list[list[Turn]]],
        rng: np.random.Generator,
        share: float = 1.0,
        renumbered: bool = False,
    ) -> Batch:
        """Conversations behind their pictures, of whose tokens only a share is there."""
        pictures, count = len(groups[0]), max(4, round(share * TOKENS))
        kept = np.sort(rng.random((len(groups), pictures, TOKENS)).argsort(-1)[..., :count], -1)
        rows: list[Packed] = []
        known: list[list[float]] = []
        for group, chats, own in zip(groups, turns, kept):
            row = prefix(pictures, own, renumbered)
            for segment, chat in enumerate(chats, 1):
                row.add(segment, chat)
            if pictures == 1:
                known += [
                    [len(rows), column, *looked_up(group[0], KINDS_OF[row.ids[column]])]
                    for column in row.kinds
                ]
            rows.append(row)
        return collate(rows) | {
            "kept": torch.from_numpy(kept.reshape(-1, count)),
            "known": torch.tensor(known, dtype=torch.float32).reshape(-1, 7),
        }

    def turns(self, group: list[Scene], rng: np.random.Generator, noise: float) -> list[list[Turn]]:
        """Conversations about a picture or two: most of one turn, some of several."""
        if len(group) == 2:
            asked = [ask_pair(group[0], group[1], rng) for _ in range(10)]
            return [[_turn(one)] for one in asked if one is not None]
        single = [_turn(one) for one in questions(group[0], rng, 12)]
        described: Turn = (ASKED, caption(group[0], rng, noise), "caption")
        if rng.random() < 0.25:
            several = [described, *single[:3]] if rng.random() < 0.5 else single[:4]
            return [several, *([turn] for turn in single[4:])]
        return [[described], *([turn] for turn in single)]

    # ---- losses --------------------------------------------------------------------------------------

    def loss(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch["pixels"].device.type, torch.bfloat16):
            features, summary = self.look(batch["pixels"])
            parts = self.aligned(features, batch)
            parts["whole"] = F.binary_cross_entropy_with_logits(
                self.helpers["whole"](summary).float(), batch["whole"]
            )
            if step == self.alone:
                self.match_scale(features)
            if step < self.alone:
                shares = {"kind": 1.0, "colour": 0.5, "letter": 0.5, "place": 0.5, "whole": 3.0}
            else:
                shares = {"kind": 0.2, "colour": 0.1, "letter": 0.1, "place": 0.3, "whole": 0.5}
                logits, labels, weights, middle = self.read(features, batch)
                parts["answer"] = (
                    F.cross_entropy(logits.float(), labels, reduction="none") * weights
                ).sum() / weights.sum()
                shares["answer"] = 1.0
                if len(batch["known"]):
                    parts["known"] = self.known(middle, batch["known"])
                    shares["known"] = 0.3
        total = sum(
            (share * parts[name] for name, share in shares.items() if name in parts), torch.tensor(0.0)
        )
        return total, parts

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (pictures, tokens, width), and the vision tower's own summary."""
        config = self.model.config
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        chosen = out.hidden_states[config.vision_feature_layer][:, 1:]
        return self.model.model.multi_modal_projector(chosen), out.pooler_output

    def aligned(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Every patch beside the words for what it shows."""
        z = features.float()
        z = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-5) * self.sharpness).flatten(0, 1)
        words = self.model.get_input_embeddings().weight.float()

        def logits(names: list[str]) -> Tensor:
            return z @ words[[INDEX[name] for name in names]].T

        shows = torch.ones(len(KINDS) + 1, device=z.device)
        shows[-1] = 0.3
        rows = len(features)
        at = torch.linspace(-1, 1, GRID, device=z.device)
        y, x = (sides.flatten().repeat(rows) for sides in torch.meshgrid(at, at, indexing="ij"))
        left, right, top, bottom = logits(["left", "right", "top", "bottom"]).unbind(-1)
        parts = {
            "kind": F.cross_entropy(logits([*KINDS, "empty"]), batch["patch kind"].flatten(), shows),
            "colour": _cross_entropy(logits(list(COLOURS)), batch["patch colour"].flatten()),
            "letter": _cross_entropy(logits(list(LETTERS)), batch["patch letter"].flatten()),
            "place": F.binary_cross_entropy_with_logits(right - left, torch.sigmoid(3 * x))
            + F.binary_cross_entropy_with_logits(bottom - top, torch.sigmoid(3 * y)),
        }
        return parts

    @torch.no_grad()
    def match_scale(self, features: Tensor) -> None:
        """Bring features to twice the size of the embeddings, once, before the text tower sees them."""
        words = self.model.get_input_embeddings().weight
        factor = 2 * words.square().mean().sqrt() / features.float().square().mean().sqrt()
        last = self.model.model.multi_modal_projector.linear_2
        last.weight *= factor
        last.bias *= factor

    def read(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits where an answer is due, labels and weights there, and the middle layer's states."""
        width = features.shape[-1]
        kept = features.gather(1, batch["kept"][..., None].expand(-1, -1, width))
        embeddings = self.model.get_input_embeddings()(batch["ids"])
        visual = (batch["ids"] == INDEX["<image>"])[..., None]
        embeddings = embeddings.masked_scatter(visual, kept.to(embeddings.dtype))
        segments = batch["segments"]
        length = segments.shape[1]
        mask = (segments[:, :, None] == segments[:, None]) | (segments[:, None] == 0)
        mask &= torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        out = self.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask[:, None], position_ids=batch["positions"],
            use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        due = labels != NONE
        logits = self.model.lm_head(out.last_hidden_state[:, :-1][due])
        return logits, labels[due], weights[due], out.hidden_states[self.middle]

    def known(self, middle: Tensor, known: Tensor) -> Tensor:
        """What is known of a thing where it is named."""
        row, column = known[:, :2].long().unbind(-1)
        told = self.helpers["there"](middle[row, column]).float()
        there, count, colour, where = told.split([1, COUNTS, len(COLOURS), 2], -1)
        single = ~known[:, 5].isnan()
        off = (where - known[:, 5:].nan_to_num())[single].square().sum() / single.sum().clamp_min(1)
        return (
            F.binary_cross_entropy_with_logits(there[:, 0], known[:, 2])
            + F.cross_entropy(count, known[:, 3].long())
            + _cross_entropy(colour, known[:, 4].long())
            + off
        )

    # ---- validation ----------------------------------------------------------------------------------

    def validate(self, count: int = 192) -> dict[str, float]:
        """Share of right answers by kind of question, with the answer so far given."""
        device = self.model.device
        right: dict[str, list[bool]] = {}
        for start in range(0, count, 48):
            scenes = [scene(start + i, "calibration") for i in range(48)]
            for pictures in (1, 2):
                rng = np.random.default_rng([self.seed, start, pictures])
                groups = [scenes[i : i + pictures] for i in range(0, 48, pictures)]
                turns = [self.turns(group, rng, noise=0.0) for group in groups]
                batch = self.seen(scenes) | self.asked(groups, turns, rng)
                batch = {name: value.to(device) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16):
                    logits, labels, _, _ = self.read(self.look(batch["pixels"])[0], batch)
                hits, at = (logits.argmax(-1) == labels).tolist(), 0
                for _, answer, kind in (turn for own in turns for chat in own for turn in chat):
                    length = len(answer.split())
                    right.setdefault(kind, []).append(all(hits[at : at + length]))
                    at += length + 1
        return {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())}

    def export(self, folder: Path) -> None:
        self.model.half().save_pretrained(folder)
        vlm_processor().save_pretrained(folder)


KINDS_OF = {INDEX[kind]: kind for kind in KINDS}


def _turn(question: Question) -> Turn:
    return question.text, question.answer, question.kind


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Zero where there is nothing to tell."""
    told = (labels != NONE).sum().clamp_min(1)
    return F.cross_entropy(logits, labels, ignore_index=NONE, reduction="sum") / told


@torch.no_grad()
def _see_places(model: Any) -> None:
    """Begin with places as waves of both axes, patches at the same scale, and attention to what is alike."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    width = embeddings.position_embedding.weight.shape[1]
    waves = 1.5 / 30.0 ** (torch.arange(width // 4) / (width // 4))
    at = torch.arange(GRID).float()
    y, x = (sides.flatten()[:, None] * waves for sides in torch.meshgrid(at, at, indexing="ij"))
    embeddings.position_embedding.weight[1:] = 0.7 * torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    weight = embeddings.patch_embedding.weight
    weight.normal_(0, weight[0].numel() ** -0.5)
    embeddings.class_embedding.normal_(0, 0.5)
    for layer in tower.encoder.layers:
        layer.self_attn.q_proj.weight.normal_(0, 0.07)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def recipe(seed: int) -> Vlm:
    return Vlm(seed)
