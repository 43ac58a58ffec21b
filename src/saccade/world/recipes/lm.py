"""How `world/lm` learns to look things up in what it has read.

Lists with queries and repeats alone at first, short ones; other tasks and longer texts only when it has learned to
look up: the stage is a function of what was measured. What follows from the text before counts, in every text
alike; all other words count little. The first layer also has to tell the three words before; without that, lists
stay at chance for long. What attention adds shall be small, so that a head that finds nothing rests on the first
token. Embeddings begin large, with a part that all share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.world import text as made
from saccade.world.architectures import lm, lm_tokenizer
from saccade.world.text import CONTENT, INDEX, Text
from saccade.world.train import Batch, trapezoid

UNTOLD = 0.1  # what words count that do not follow from the text
BEFORE = 0.3  # what the words before count, which the first layer has to tell
BACK = 3  # of which there are so many
QUIET = 0.05  # what the size of attention's outputs counts, beside the size of what they are added to
LEARNED = {"first": 0.9, "coloured": 0.9}  # where a stage ends: of first queries, and of colours
WIDTH = 128


class Stage(NamedTuple):
    lengths: tuple[int, ...]  # of texts, the first token not counted; one of them is drawn in every step
    words: int  # of a step, about
    tasks: dict[str, float]  # and their shares


LOOKUP = {"recall": 3.0, "copying": 1.0}
ALL = {"recall": 2.0, "copying": 1.0, "needle": 3.0, "given": 1.0, "coloured": 1.0, "sums": 2.0}
STAGES = (
    Stage((16,), 1024, LOOKUP),
    Stage((16, 32), 1536, LOOKUP),
    Stage((32, 64), 2048, LOOKUP),
    Stage((64, 96), 3072, ALL),
    Stage((64, 96, 256), 3072, ALL),
    Stage((64, 96, 128, 256, 640), 3072, ALL),
    Stage((64, 96, 96, 128, 256, 256, 640, 2047), 3072, ALL),
)


def drawn(task: str, rng: np.random.Generator, length: int) -> Text:
    """A text of that length, about, with as many questions as fit."""
    if task == "recall":
        pairs = int(rng.integers(2, min(length // 4, 64) + 1))
        return made.listed(rng, CONTENT, pairs, max(1, (length - 1) // 2 - pairs))
    if task == "copying":
        return made.repeated(rng, CONTENT, length)
    if task == "needle":
        count = int(rng.integers(1, max(2, min(length // 16, 20))))
        return made.haystack(rng, CONTENT, max(8, length - 12 * count - 8), rng.random(count).tolist())
    make: dict[str, Callable[[], Text]] = {
        "given": lambda: made.given(rng),
        "coloured": lambda: made.coloured(rng, int(rng.integers(2, 7)), int(rng.integers(1, 4))),
        "sums": lambda: made.sum_of(rng),
    }
    return made.joined(make[task], length)


class Reached(nn.Module):
    """Which stage, kept with the weights."""

    stage = 0

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, BACK * WIDTH)
        nn.init.normal_(self.before.weight, std=0.01)

    def get_extra_state(self) -> int:
        return self.stage

    def set_extra_state(self, state: int) -> None:
        self.stage = state


class Lm:
    does = "writes"

    def __init__(self, seed: int, steps: int = 10000, stages: tuple[Stage, ...] = STAGES) -> None:
        self.seed, self.steps, self.stages = seed, steps, stages
        self.model = lm()
        _look_for_what_is_alike(self.model)
        self.helpers = Reached()
        self.attended: list[Tensor] = []  # what each layer's attention adds
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        if module.training:
            self.attended.append(outputs[0])

    def rate(self, step: int, name: str) -> float:
        return (3e-3 if ".layers." in name else 2e-3) * trapezoid(step, self.steps, warmup=30)

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        stage = self.stages[self.helpers.stage]
        names, shares = zip(*stage.tasks.items())
        length = int(rng.choice(stage.lengths))
        rows = max(2, stage.words // length)
        tasks = rng.choice(len(names), rows, p=np.array(shares) / sum(shares))
        return collate([drawn(names[task], rng, length) for task in tasks], length)

    def compile(self) -> None:
        self.model.model.compile(dynamic=True)

    def loss(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.attended.clear()
        out = self.model.model(batch["ids"], use_cache=False, output_hidden_states=True)
        each = _each_word(self.model.lm_head(out.last_hidden_state[:, :-1]), batch["ids"][:, 1:])
        due = batch["due"][:, 1:]
        sizes = [
            added.norm(dim=-1) / states.detach().norm(dim=-1)
            for added, states in zip(self.attended, out.hidden_states)
        ]
        told = (due == 1).float()
        parts = {
            "told": ((each * told).sum(1) / told.sum(1).clamp_min(1)).mean(),  # a text, whatever it asks for
            "untold": each[due == 0].mean(),
            "before": self.before(out.hidden_states[1], batch["ids"]),
            "size": torch.stack(sizes)[:, batch["due"] >= 0].mean(),
        }
        total = parts["told"] + UNTOLD * parts["untold"] + BEFORE * parts["before"] + QUIET * parts["size"]
        return total, parts

    def before(self, states: Tensor, ids: Tensor) -> Tensor:
        """How badly the words before are told, by the first layer."""
        told = self.helpers.before(F.rms_norm(states, (WIDTH,))).unflatten(-1, (BACK, WIDTH))
        logits = told @ self.model.lm_head.weight.T
        real = ids != INDEX["<pad>"]
        losses = [
            _each_word(logits[:, back:, back - 1], ids[:, :-back])[real[:, back:]].mean()
            for back in range(1, BACK + 1)
        ]
        return torch.stack(losses).mean()

    def validate(self) -> dict[str, float]:
        """Of the longest texts of the stage, the share of answers that are right."""
        own = self.stages[self.helpers.stage]
        length = max(own.lengths)
        found: dict[str, float] = {}
        for task in own.tasks:
            rng = np.random.default_rng([self.seed, 2**31])
            texts = [drawn(task, rng, length) for _ in range(min(128, max(8, 16384 // length)))]
            right = self.right(collate(texts, length))
            found[task] = float(np.mean(np.concatenate(right)))
            if task == "recall":
                found["first"] = float(np.mean([one[0] for one in right]))
        learned = all(found.get(task, 1.0) > least for task, least in LEARNED.items())
        found["stage"] = self.helpers.stage
        self.helpers.stage += learned and self.helpers.stage + 1 < len(self.stages)
        return found

    def right(self, batch: Batch) -> list[np.ndarray]:
        device = self.model.device
        said = self.model(batch["ids"].to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        hits = said == batch["ids"][:, 1:]
        return [one[due == 1].numpy() for one, due in zip(hits, batch["due"][:, 1:])]

    def export(self, folder: Path) -> None:
        self.model.half().save_pretrained(folder)
        lm_tokenizer().save_pretrained(folder)


def collate(texts: list[Text], length: int) -> Batch:
    """`due` is 1 where a word follows from those before, 0 where not, -1 where there is none."""
    ids = torch.full((len(texts), length + 1), INDEX["<pad>"])
    due = torch.full((len(texts), length + 1), -1)
    for row, text in enumerate(texts):
        words = text.words[:length]
        ids[row, : len(words) + 1] = torch.tensor([INDEX["<s>"], *(INDEX[word] for word in words)])
        due[row, : len(words) + 1] = 0
        due[row, [at + 1 for at in text.answers if at < length]] = 1
    return {"ids": ids, "due": due}


def _each_word(logits: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), reduction="none").view(words.shape)


@torch.no_grad()
def _look_for_what_is_alike(model: Any) -> None:
    """Begin with attention, behind the first layer, to equal words, by one head of those that share keys, and with
    all heads saying what they see (Trockman and Kolter, 2023)."""
    words = model.model.embed_tokens.weight.normal_(0, 0.5)
    words += torch.empty_like(words[0]).normal_(
        0, 0.5
    )  # what all share, by which places alone can be compared
    model.model.norm.weight.fill_(0.1)
    for number, layer in enumerate(model.model.layers):
        own = layer.self_attn
        shared = own.num_key_value_groups
        own.v_proj.weight.normal_(0, model.config.hidden_size**-0.5)
        values = own.v_proj.weight.unflatten(0, (-1, own.head_dim)).repeat_interleave(shared, 0).flatten(0, 1)
        own.o_proj.weight.copy_(0.3 * values.T)
        if number:
            own.k_proj.weight.normal_(0, 0.07)
            queries, keys = (one.weight.unflatten(0, (-1, own.head_dim)) for one in (own.q_proj, own.k_proj))
            queries[::shared] = keys
        layer.mlp.down_proj.weight.mul_((2 * model.config.num_hidden_layers) ** -0.5)


def recipe(seed: int) -> Lm:
    return Lm(seed)
