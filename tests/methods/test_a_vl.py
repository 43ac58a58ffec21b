"""A-VL against whole forwards in which what is not read is masked, and heavy hitters added up one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import OptionError
from saccade.reduction.a_vl import AVL

from .embedded import asked, trained
from .shared import Inputs, alone, generated, two
from .unread import stepwise, told

EXAMPLE: dict[str, Any] = {"spared": 0, "prune_every": 2, "every": 2}
DISCRETE = ("core", "secondary", "text", "filtered")
DOUBLE = torch.float64
NAMES = ("llava", "qwen2_5_vl")
ALL = {"core": 1.0, "secondary": 1.0, "text": 1.0}


def sample(name: str) -> Inputs:
    return alone(two(family(name), DOUBLE), 0)


def pictures(name: str, inputs: Inputs) -> list[int]:
    placeholder = shared(name, DOUBLE).config.image_token_id
    return [i for i, word in enumerate(inputs["input_ids"][0].tolist()) if word == placeholder]


class Sorted:
    """What each layer holds and reads, step by step, and what the picture's part of it was."""

    def __init__(self, image: list[int], **options: Any) -> None:
        self.image, self.o = image, {f: getattr(AVL(**options), f) for f in AVL().__dict__}
        self.core: dict[int, list[int]] = {}
        self.held: dict[int, list[int]] = {}
        self.sums: dict[int, dict[int, float]] = {}
        self.history: list[tuple[int, int, list[int], list[int]]] = []  # step, layer, core, held

    def __call__(self, step: int, layer: int, w: Tensor) -> Tensor | None:
        newest = w.shape[1] - 1
        if step == 0:
            read = list(range(newest + 1))
            self.held[layer], self.sums[layer] = read, {}
        else:
            self.held[layer] = [*self.held[layer], newest]
            left_out = set(self.image) - set(self.core[layer]) if step % self.o["every"] else set()
            read = [j for j in self.held[layer] if j not in left_out]
        s = w[:, read] / w[:, read].sum(1, keepdim=True)
        score = dict(zip(read, s.mean(0).tolist(), strict=True))
        self.sort(step, layer, score)
        seen = torch.zeros(1, newest + 1, dtype=torch.bool)
        seen[0, read] = True
        return None if step == 0 else seen

    def sort(self, step: int, layer: int, score: dict[int, float]) -> None:
        n, image = len(self.image), [j for j in self.held[layer] if j in set(self.image)]
        if step % self.o["every"] == 0:
            best = sorted(image, key=lambda j: -score[j])
            self.core[layer] = best[: round(self.o["core"] * n)]
            if step == 0:
                stays = best[: round(self.o["secondary"] * n)]
                self.held[layer] = [j for j in self.held[layer] if j not in image or j in stays]
        for j, value in score.items():
            if j not in self.image:
                self.sums[layer][j] = self.sums[layer].get(j, 0.0) + value
        if self.o["text"] < 1 and step > self.o["spared"] and step % self.o["prune_every"] == 0:
            words = [j for j in self.held[layer] if j not in self.image]
            stays = h2o(words, self.sums[layer], self.so_far, self.o["text"], self.o["heavy"])
            self.held[layer] = [j for j in self.held[layer] if j in self.image or j in stays]
        self.history.append((step, layer, self.core[layer], self.held[layer]))

    @property
    def so_far(self) -> int:
        """Words of the prompt, and those that were written."""
        return max(max(held) for held in self.held.values()) + 1 - len(self.image)


def h2o(words: list[int], sums: dict[int, float], so_far: int, text: float, heavy: float) -> list[int]:
    budget = round(text * so_far)
    recent = max(1, round((1 - heavy) * budget))
    older = sorted(words[:-recent], key=lambda j: -sums[j])
    return older[: budget - recent] + words[-recent:]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {"text": 1.0}),
        ("qwen2_5_vl", {"every": 2, "spared": 2, "prune_every": 2, "text": 0.5, "core": 0.2}),
    ],
)
def test_every_step_reads_and_every_layer_holds_what_was_sorted(name: str, options: dict[str, Any]) -> None:
    """Sizes of both sets, which keys are read in update steps and others, and which text leaves when."""
    inputs = sample(name)
    image, prompt = pictures(name, inputs), inputs["input_ids"].shape[1]
    got, counted = told(shared(name, DOUBLE), inputs, AVL(**options), tokens=6)
    by_hand = Sorted(image, **options)
    logits, reads = stepwise(shared(name, DOUBLE, "eager"), inputs, got.sequences[0, prompt:], by_hand)
    assert_close(torch.cat(got.logits), logits.float(), atol=1e-5, rtol=0)
    assert counted == reads
    for layer, kept in enumerate(got.past_key_values.layers):
        assert [p for p in kept.positions()[0].tolist() if p >= 0] == sorted(by_hand.held[layer])
    n = len(image)
    chosen = {layer: core for step, layer, core, _ in by_hand.history if step == 0}
    again = [core for step, layer, core, _ in by_hand.history if set(core) != set(chosen[layer])]
    assert again or options.get("every", 3) > 2  # a core is chosen anew, from what is held
    for step, _, core, held in by_hand.history:
        assert set(core) <= set(held) and len(core) == round(by_hand.o["core"] * n)
        assert len(set(held) & set(image)) == round(by_hand.o["secondary"] * n)
        if options.get("text") == 1 and step:
            assert reads[step][0] == prompt - n + step + (len(core) if step % 3 else round(0.5 * n))


@pytest.mark.parametrize("name", NAMES)
def test_everything_kept_is_the_model(name: str) -> None:
    inputs = sample(name)
    bare = generated(shared(name, DOUBLE), inputs, 6)
    got, _ = told(shared(name, DOUBLE), inputs, AVL(**ALL))
    assert_close(torch.cat(got.logits), torch.cat(bare.logits), atol=1e-6, rtol=0)


def test_to_update_at_every_step_is_to_read_the_secondary_set_always() -> None:
    inputs = sample("llava")
    always, wide, narrow = (
        torch.cat(told(shared("llava", DOUBLE), inputs, AVL(core=core, every=every, text=1.0))[0].logits)
        for core, every in ((0.1, 1), (0.5, 4), (0.1, 4))
    )
    assert_close(always, wide, atol=1e-6, rtol=0)
    assert float((always - narrow).abs().max()) > 1e-3


def test_the_filter_leaves_the_first_layers_complete() -> None:
    """FastV behind the second of four layers: by that layer's own weights, positions as they were."""
    model, inputs = shared("llava", DOUBLE), sample("llava")
    image, length = pictures("llava", inputs), inputs["input_ids"].shape[1]
    sites = {**AVL().sites, "observe": "text.1.self"}  # type: ignore[dict-item]
    with sc.attach(model, AVL(**ALL, filtered=0.25, sites=sites)):
        layers = generated(model, inputs, 1).past_key_values.layers
    with torch.no_grad():
        w = shared("llava", DOUBLE, "eager")(**inputs, output_attentions=True).attentions[1][0].mean(0)[-1]
    stays = sorted(image, key=lambda j: -float(w[j]))[: round(0.25 * len(image))]
    left = [j for j in range(length) if j not in image or j in stays]
    for layer, expected in zip(layers, (range(length), range(length), left, left), strict=True):
        assert layer.positions()[0].tolist() == list(expected)


def test_of_every_sample_of_a_batch_the_small_trained_model_holds_its_own_half() -> None:
    (model, _), inputs = trained(), asked()
    with sc.attach(model, AVL(core=0.2, secondary=0.5, every=2)):
        made = generated(model, inputs, 3)
    image = inputs["input_ids"] == model.config.image_token_id
    for layer in made.past_key_values.layers:
        for held, mine in zip(layer.positions(), image, strict=True):
            held = held[held >= 0]
            assert int(mine[held[held < len(mine)]].sum()) == round(0.5 * int(mine.sum()))


def test_a_core_that_is_not_held_is_refused() -> None:
    with pytest.raises(OptionError, match="secondary"):
        AVL(core=0.6, secondary=0.5)
