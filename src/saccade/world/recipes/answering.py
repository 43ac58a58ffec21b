"""Learning to answer about pictures and to describe them: what the recipes of vision-language models share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.world.captions import ASKED, caption
from saccade.world.kinds import COLOURS, GRID, KINDS, LETTERS, PARTNER, PATCH, PLACES
from saccade.world.questions import Question, ask_pair, questions
from saccade.world.recipes.labels import NONE, TOKENS, cross_entropy, pixels, shown
from saccade.world.scenes import Scene, scene
from saccade.world.train import Batch, trapezoid
from saccade.world.words import INDEX

COUNTS = 6
UNREAD = [NONE] * 3
KNOWN = [1, COUNTS, len(COLOURS), 2, 3 * len(LETTERS)]  # there, how many, colour, where, letters
HIDDEN = 128
IMAGE = INDEX["<image>"]
NOISE = 0.25  # of the absent partners of things that are there are said to be there too, whatever the pair
ASKED_OFTEN = {
    "presence": 2.0, "colour": 1.5, "count": 3.0, "side": 0.7, "height": 0.7, "relation": 1.5, "odd": 2.0,
    "reading": 8.0, "leading": 1.5, "place": 0.2,
}  # fmt: skip
WEIGHTS = {"caption": 0.5, "reading": 2.0}  # of a word in the loss; 1 for all others
Turn = tuple[str, str, str]  # question, answer, kind of question


# ---- what a step is made of --------------------------------------------------------------------------------


@dataclass
class Packed:
    """Conversations behind one prefix of pictures, as one row."""

    ids: list[int]
    positions: list[list[int]]  # along every axis
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
            weight = WEIGHTS.get(kind, 1.0)
            self.ids += [INDEX[word] for word in words]
            for axis in self.positions:
                axis += range(position, position + len(words))
            self.segments += [segment] * len(words)
            self.labels += [NONE] * (len(words) - len(said) - 1) + [INDEX[w] for w in [*said, "</s>"]]
            self.weights += [0.0] * (len(words) - len(said) - 1) + [weight] * len(said) + [0.1]
            position += len(words)


def collate(rows: list[Packed]) -> Batch:
    width = max(len(row.ids) for row in rows)

    def pad(values: list[list[Any]], filler: float) -> Tensor:
        return torch.tensor([own + [filler] * (width - len(own)) for own in values])

    return {
        "ids": pad([row.ids for row in rows], INDEX["<pad>"]),
        "positions": pad([axis for row in rows for axis in row.positions], 0),
        "segments": pad([row.segments for row in rows], -1),
        "labels": pad([row.labels for row in rows], NONE),
        "weights": pad([row.weights for row in rows], 0.0),
    }


def looked_up(seen: Scene, kind: str) -> list[float]:
    """What the middle layer shall know where a kind is named: there, how many, colour, x, y, and three letters."""
    things = [thing for thing in seen.things if thing.kind == kind]
    if len(things) != 1 or things[0].faint:
        return [len(things) > 0, min(len(things), COUNTS - 1), NONE, np.nan, np.nan, *UNREAD]
    x, y = things[0].centre
    side = GRID * PATCH / 2
    letters = [LETTERS.index(letter) for letter in things[0].text] if things[0].text else UNREAD
    return [1, 1, list(COLOURS).index(things[0].colour), x / side - 1, y / side - 1, *letters]


# ---- the recipe --------------------------------------------------------------------------------------------


class Answering(ABC):
    does = "answers"
    tower: str  # in the names of its parameters
    placed_by: int | None  # the text layer whose states tell where a token is; None where features do

    def __init__(self, model: Any, seed: int, steps: int, rows: int, alone: int) -> None:
        self.model, self.seed, self.steps, self.rows = model, seed, steps, rows
        self.alone = alone  # steps of the vision tower alone
        self.model.set_attn_implementation("eager")  # on a CPU, SDPA with a mask is slow to differentiate
        self.middle = self.model.config.text_config.num_hidden_layers // 2
        self.helpers = nn.ModuleDict(
            {
                "whole": nn.Linear(HIDDEN, len(KINDS) + len(PLACES)),
                "there": nn.Linear(HIDDEN, 2 * sum(KNOWN)),  # in the first picture, and in the second
            }
        )
        self.sharpness = nn.Parameter(torch.tensor(1.0))
        self.helpers.register_parameter("sharpness", self.sharpness)

    @abstractmethod
    def opening(self, pictures: int) -> tuple[list[int], np.ndarray]:
        """What stands before a question: ids, and positions (axes, tokens)."""

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """As the processor makes them, with one row a picture."""
        return pixels([seen.image for seen in scenes])

    @abstractmethod
    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (pictures, tokens, width), and a summary (pictures, width)."""

    @property
    @abstractmethod
    def projection(self) -> nn.Linear:
        """The last before the features."""

    @abstractmethod
    def processor(self) -> Any: ...

    @abstractmethod
    def compile(self) -> None: ...

    def rate(self, step: int, name: str) -> float:
        sees = self.tower in name
        if step < self.alone:
            return 2e-3 * trapezoid(step, self.alone)
        level = trapezoid(step - self.alone, self.steps - self.alone, warmup=150)
        return 1.5e-3 * level * (0.3 if sees else 1.0)

    # ---- data ----------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        pictures = 1 if step < self.alone or rng.random() < 0.7 else 2
        rows = self.rows // pictures
        first = step * self.rows
        scenes = [scene(first + i) for i in range(rows * pictures)]
        pairs = [scenes[i * pictures : (i + 1) * pictures] for i in range(rows)]
        batch = self.seen(scenes)
        if step < self.alone:
            return batch
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.1, 1.0)
        turns = [self.turns(group, rng, NOISE) for group in pairs]
        return batch | self.asked(pairs, turns, rng, share, renumbered=bool(rng.random() < 0.5))

    def seen(self, scenes: list[Scene]) -> Batch:
        return {"pixels": self.pixels(scenes), **shown(scenes)}

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
            row = self.prefix(own, renumbered)
            for segment, chat in enumerate(chats, 1):
                row.add(segment, chat)
            known += [
                [len(rows), column, number, *looked_up(seen, KINDS_OF[row.ids[column]])]
                for column in row.kinds
                for number, seen in enumerate(group)
            ]
            rows.append(row)
        return collate(rows) | {
            "kept": torch.from_numpy(kept.reshape(-1, count)),
            "known": torch.tensor(known, dtype=torch.float32).reshape(-1, 11),
        }

    def prefix(self, kept: np.ndarray, renumbered: bool) -> Packed:
        """The opening, of whose (pictures, tokens) only the kept ones are there."""
        opening, places = self.opening(len(kept))
        there = np.array(opening) != IMAGE
        visual = np.flatnonzero(~there).reshape(len(kept), TOKENS)
        there[np.take_along_axis(visual, kept, 1)] = True
        ids, places, start = np.array(opening)[there].tolist(), places[:, there], places.max() + 1
        if renumbered:
            used, places = np.unique(places, return_inverse=True)
            places, start = places.reshape(-1, len(ids)), len(used)
        return Packed(ids, places.tolist(), [0] * len(ids), [NONE] * len(ids), [0.0] * len(ids), int(start))

    def turns(self, group: list[Scene], rng: np.random.Generator, noise: float) -> list[list[Turn]]:
        """Conversations about a picture or two: most of one turn, some of several."""
        if len(group) == 2:
            asked = [ask_pair(group[0], group[1], rng) for _ in range(12)]
            return [[_turn(one)] for one in asked if one is not None]
        single = [_turn(one) for one in questions(group[0], rng, 12, ASKED_OFTEN)]
        single = [_assumed(group[0], turn) if rng.random() < noise else turn for turn in single]
        described: Turn = (ASKED, caption(group[0], rng, noise), "caption")
        if rng.random() < 0.25:
            several = [described, *single[:3]] if rng.random() < 0.5 else single[:4]
            return [several, *([turn] for turn in single[4:])]
        return [[described], *([turn] for turn in single)]

    # ---- losses --------------------------------------------------------------------------------------

    def loss(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch["pixels"].device.type, torch.bfloat16):
            features, summary = self.look(batch["pixels"])
            z = self.sharpened(features)
            parts = self.aligned(z, batch)
            if self.placed_by is None:
                parts["place"] = self.placed(z, torch.arange(TOKENS, device=z.device).expand(len(z), -1))
            parts["whole"] = F.binary_cross_entropy_with_logits(
                self.helpers["whole"](summary).float(), batch["whole"]
            )
            if step == self.alone:
                self.match_scale(features)
            if step < self.alone:
                shares = {"kind": 1.0, "colour": 0.5, "letter": 0.5, "order": 0.3, "place": 0.5, "whole": 3.0}
            else:
                shares = {"kind": 0.2, "colour": 0.1, "letter": 0.1, "order": 0.1, "place": 0.3, "whole": 0.5}
                logits, labels, weights, states = self.read(features, batch)
                parts["answer"] = (
                    F.cross_entropy(logits.float(), labels, reduction="none") * weights
                ).sum() / weights.sum()
                shares["answer"] = 1.0
                if self.placed_by is not None:
                    visual = states[self.placed_by][batch["ids"] == IMAGE].unflatten(0, batch["kept"].shape)
                    parts["place"] = self.placed(self.sharpened(visual), batch["kept"])
                parts["known"] = self.known(states[self.middle], batch["known"])
                shares["known"] = 0.3
        total = sum(
            (share * parts[name] for name, share in shares.items() if name in parts), torch.tensor(0.0)
        )
        return total, parts

    def sharpened(self, states: Tensor) -> Tensor:
        z = states.float()
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-5) * self.sharpness

    def named(self, z: Tensor, names: list[str]) -> Tensor:
        """How much each (rows, tokens) is like each word: (rows x tokens, words)."""
        words = self.model.get_input_embeddings().weight.float()
        return z.flatten(0, 1) @ words[[INDEX[name] for name in names]].T

    def aligned(self, z: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Every patch beside the words for what it shows."""
        shows = torch.ones(len(KINDS) + 1, device=z.device)
        shows[-1] = 0.3
        return {
            "kind": F.cross_entropy(self.named(z, [*KINDS, "empty"]), batch["patch kind"].flatten(), shows),
            "colour": cross_entropy(self.named(z, list(COLOURS)), batch["patch colour"].flatten()),
            "letter": cross_entropy(self.named(z, list(LETTERS)), batch["patch letter"].flatten()),
            "order": cross_entropy(
                F.pad(self.named(z, ["first", "second"]), (0, 1)), batch["patch order"].flatten()
            ),
        }

    def placed(self, z: Tensor, tokens: Tensor) -> Tensor:
        """Every patch beside the words for where it is: states and indices of (rows, tokens)."""
        at = torch.linspace(-1, 1, GRID, device=z.device)
        y, x = at[tokens.flatten() // GRID], at[tokens.flatten() % GRID]
        left, right, top, bottom = self.named(z, ["left", "right", "top", "bottom"]).unbind(-1)
        across = F.binary_cross_entropy_with_logits(right - left, torch.sigmoid(3 * x))
        return across + F.binary_cross_entropy_with_logits(bottom - top, torch.sigmoid(3 * y))

    @torch.no_grad()
    def match_scale(self, features: Tensor) -> None:
        """Bring features to twice the size of the embeddings, once, before the text tower sees them."""
        words = self.model.get_input_embeddings().weight
        factor = 2 * words.square().mean().sqrt() / features.float().square().mean().sqrt()
        self.projection.weight.mul_(factor)
        self.projection.bias.mul_(factor)

    def read(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Logits where an answer is due, labels and weights there, and the states of every layer."""
        width = features.shape[-1]
        kept = features.gather(1, batch["kept"][..., None].expand(-1, -1, width))
        embeddings = self.model.get_input_embeddings()(batch["ids"])
        visual = (batch["ids"] == IMAGE)[..., None]
        embeddings = embeddings.masked_scatter(visual, kept.to(embeddings.dtype))
        segments = batch["segments"]
        length = segments.shape[1]
        mask = (segments[:, :, None] == segments[:, None]) | (segments[:, None] == 0)
        mask &= torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
        positions = batch["positions"].unflatten(0, (len(segments), -1)).transpose(0, 1)  # (axes, ...)
        out = self.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=bias[:, None], position_ids=positions.squeeze(0),
            use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        labels, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        due = labels != NONE
        logits = self.model.lm_head(out.last_hidden_state[:, :-1][due])
        return logits, labels[due], weights[due], out.hidden_states

    def known(self, middle: Tensor, known: Tensor) -> Tensor:
        """What is known of a thing where it is named."""
        row, column, picture = known[:, :3].long().unbind(-1)
        truth = known[:, 3:]
        both = self.helpers["there"](middle[row, column]).float().unflatten(-1, (2, -1))
        told = both[torch.arange(len(both), device=both.device), picture]
        there, count, colour, where, word = told.split(KNOWN, -1)
        single = ~truth[:, 3].isnan()
        off = (where - truth[:, 3:5].nan_to_num())[single].square().sum() / single.sum().clamp_min(1)
        return (
            F.binary_cross_entropy_with_logits(there[:, 0], truth[:, 0])
            + F.cross_entropy(count, truth[:, 1].long())
            + cross_entropy(colour, truth[:, 2].long())
            + off
            + cross_entropy(word.unflatten(-1, (3, -1)).flatten(0, 1), truth[:, 5:].long().flatten())
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
        self.processor().save_pretrained(folder)


KINDS_OF = {INDEX[kind]: kind for kind in KINDS}


def _assumed(seen: Scene, turn: Turn) -> Turn:
    """An absent partner of what is there, said to be there."""
    question, answer, kind = turn
    if kind != "presence" or answer != "no":
        return turn
    asked = next(word for word in question.split() if word in KINDS)
    usual = any(PARTNER[anchor] == asked for anchor in seen.counts() if anchor in PARTNER)
    return (question, "yes", kind) if usual else turn


def _turn(question: Question) -> Turn:
    return question.text, question.answer, question.kind
