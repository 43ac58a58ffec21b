"""SparseMM against SnapKV written out, budgets added up by hand, and heads watched in eager attention."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import shared
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.reduction.sparsemm import SparseMM, budgets, hits, inside

from .shared import Inputs, alone, followed, generated, two

EXAMPLE: dict[str, Any] = {"budget": 16, "window": 4, "head_scores": "uniform"}
DISCRETE = ("budget",)
DOUBLE = torch.float64
RAGGED = ((9.0, 1.0, 0.5, 0.5), (0.0, 3.0, 1.0, 1.0), (5.0, 5.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0))
"""Of four layers with four heads, two to a key head: sums 10, 1; 3, 2; 10, 0; 2, 2, of 30."""


# ---- budgets ---------------------------------------------------------------------------------------------


def test_budgets_by_hand() -> None:
    """B=16, w=4: 12 beyond the window, int(1.2) = 1 for all, 11 * 8 heads = 88 by score."""
    scores = torch.tensor(RAGGED).view(4, 2, 2).sum(-1)
    made = [[4 + round(1 + 88 * s / 30) for s in row] for row in ((10, 1), (3, 2), (10, 0), (2, 2))]
    assert budgets(scores, 16, 4, 0.1).tolist() == made


@given(
    scores=st.lists(st.floats(0, 100), min_size=6, max_size=6).filter(lambda s: sum(s) > 0.01),
    window=st.integers(1, 32),
    extra=st.integers(0, 500),
    share=st.floats(0, 1),
    raised=st.integers(0, 5),
)
def test_budgets_add_up_and_grow_with_the_score(
    scores: list[float], window: int, extra: int, share: float, raised: int
) -> None:
    def found(values: list[float]) -> Tensor:
        return budgets(torch.tensor(values, dtype=DOUBLE).view(3, 2), window + extra, window, share)

    once = found(scores)
    assert (once >= window).all()
    assert abs(int(once.sum()) - 6 * (window + extra)) <= 6
    louder = list(scores)
    louder[raised] += 10
    assert found(louder).flatten()[raised] >= once.flatten()[raised]


# ---- what is kept ----------------------------------------------------------------------------------------


def sample(name: str = "llava") -> Inputs:
    single = alone(two(family(name), DOUBLE), 0)
    return {name: value for name, value in single.items() if name != "attention_mask"}


def snapkv(model: Any, inputs: Inputs, sizes: list[list[int]], window: int) -> list[list[list[int]]]:
    """Entries that every key head of every layer keeps, from the weights that the model returns."""
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    kept = []
    for w, limits in zip(attentions, sizes, strict=True):
        heads, length = w.shape[1], w.shape[-1]
        older = length - window
        layer = []
        for head, size in enumerate(limits):
            mine = range(head * heads // len(limits), (head + 1) * heads // len(limits))
            mean = [
                sum(float(w[0, h, length - 1 - r, j]) for h in mine for r in range(window))
                / len(mine)
                / window
                for j in range(older)
            ]
            pooled = [sum(mean[max(0, j - 2) : j + 3]) / 5 for j in range(older)]
            best = sorted(range(older), key=lambda j: -pooled[j])[: size - window]
            layer.append(sorted(best) + list(range(older, length)))
        kept.append(layer)
    return kept


def entries(cache: Any) -> list[list[list[int]]]:
    return [[[p for p in head if p >= 0] for head in layer.positions()[0].tolist()] for layer in cache.layers]


def prefilled(model: Any, inputs: Inputs, **options: Any) -> Any:
    with sc.attach(model, SparseMM(**options)):
        return generated(model, inputs, 1).past_key_values


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_uniform_scores_are_snapkv(name: str) -> None:
    inputs = sample(name)
    got = entries(prefilled(shared(name, DOUBLE), inputs, **EXAMPLE))
    assert got == snapkv(shared(name, DOUBLE, "eager"), inputs, [[16, 16]] * 4, 4)


def test_every_head_keeps_its_budget() -> None:
    inputs = sample()
    got = entries(prefilled(shared("llava", DOUBLE), inputs, **{**EXAMPLE, "head_scores": RAGGED}))
    sizes = budgets(torch.tensor(RAGGED).view(4, 2, 2).sum(-1), 16, 4, 0.1).tolist()
    assert got == snapkv(shared("llava", DOUBLE, "eager"), inputs, sizes, 4)
    length = inputs["input_ids"].shape[1]
    assert [[len(head) for head in layer] for layer in got] == [
        [min(s, length) for s in row] for row in sizes
    ]


def test_a_head_gets_no_more_than_there_is() -> None:
    inputs, only = sample(), ((1.0,) * 4, *((0.0,) * 4,) * 3)
    length = inputs["input_ids"].shape[1]
    got = entries(prefilled(shared("llava", DOUBLE), inputs, budget=40, window=4, head_scores=only))
    assert [len(head) for head in got[0]] == [length, length]
    assert [len(head) for layer in got[1:] for head in layer] == [4 + 3] * 6


def test_the_next_words_see_what_is_kept() -> None:
    """Against a whole forward in which every key head's missing entries are masked for what is written."""
    from dense import oracle

    model, inputs = shared("llava", DOUBLE), sample()
    options = {**EXAMPLE, "head_scores": RAGGED}
    kept = entries(prefilled(model, inputs, **options))
    with sc.attach(model, SparseMM(**options)):
        got = generated(model, inputs, 4)
    prompt, whole = inputs["input_ids"].shape[1], oracle("llava")
    layers = whole.model.language_model.layers
    for layer, heads in zip(layers, kept, strict=True):
        gone = torch.ones(1, 2, prompt + 3, prompt + 3, dtype=torch.bool)
        for head, places in enumerate(heads):
            gone[0, head, :, [*places, *range(prompt, prompt + 3)]] = False
        gone[:, :, :prompt] = False
        layer.self_attn.gone = gone
    try:
        made = run(whole, {**inputs, "input_ids": got.sequences[:, :-1]})[0, prompt - 1 :]
    finally:
        for layer in layers:
            del layer.self_attn.gone
    assert_close(torch.stack(got.logits, 1)[0], made.float(), atol=1e-5, rtol=0)


def test_a_budget_of_the_whole_prompt_is_the_full_cache() -> None:
    model, inputs = shared("llava"), alone(two(family("llava")), 0)
    length = inputs["input_ids"].shape[1]
    bare = generated(model, inputs).logits
    for budget, same in ((length, True), (length + 1, True), (length - 1, False)):
        with sc.attach(model, SparseMM(budget=budget, window=4, head_scores=RAGGED)):
            got = generated(model, inputs).logits
        assert all(torch.equal(a, b) for a, b in zip(got, bare)) == same, budget


def test_a_later_turn_ends_on_its_budgets_again() -> None:
    model, inputs = shared("llava", DOUBLE), sample()
    with sc.attach(model, SparseMM(**EXAMPLE)):
        first = generated(model, inputs, 5)
        more = followed(inputs, first, torch.full((1, 9), 150))
        second = generated(model, more, 1, past_key_values=first.past_key_values)
    last = more["input_ids"].shape[1]
    for layer in entries(second.past_key_values):
        for head in layer:
            assert len(head) == 16
            assert head[-4:] == list(range(last - 4, last))


# ---- calibration -----------------------------------------------------------------------------------------


def test_hits_on_attention_made_by_hand() -> None:
    best = torch.tensor([[3, 3, 9], [4, 8, 5], [3, 3, 3], [5, 1, 5]])  # (steps, heads)
    regions = [
        ({11, 12}, torch.tensor([3, 4, 5])),
        ({12, 13}, torch.tensor([8])),
        ({14}, torch.tensor([], dtype=int)),
    ]
    # word 11 is in region one alone; 12 in two strings; 13 in the second; 99 in none; 14 shows nowhere
    assert_close(hits(best, [11, 12, 11, 99], regions), torch.tensor([2 / 3, 2 / 3, 1 / 3]))
    assert_close(hits(best, [99, 13, 12, 12], regions), torch.tensor([0.0, 1.0, 0.0]))
    assert_close(hits(best, [14, 14, 14, 14], regions), torch.zeros(3))


def test_a_region_is_what_shows_a_part_of_the_box() -> None:
    cell = [[x, y, x + 8, y + 8] for y in range(0, 24, 8) for x in range(0, 24, 8)]
    boxes = torch.tensor([[float("nan")] * 4, *cell])
    assert inside(boxes, (8, 8, 16, 16)).tolist() == [5]
    assert inside(boxes, (7, 9, 9, 15)).tolist() == [4, 5]
    assert inside(boxes, (0, 0, 24, 1)).tolist() == [1, 2, 3]


@contextmanager
def home() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, SACCADE_HOME=folder):
        yield


def written() -> tuple[Any, Any, Any, Inputs]:
    """A picture of 48 x 48, its processor and the prompt."""
    f = family("llava")
    processor = f.processor()
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    inputs = processor(images=[picture], text=[f.prompt(1, "read it")], return_tensors="pt")
    return picture, processor, f, dict(inputs)


def test_calibration_counts_what_eager_attention_shows() -> None:
    picture, processor, _, inputs = written()
    plain = {name: v for name, v in inputs.items() if name != "attention_mask"}
    eager, model = shared("llava", torch.float32, "eager"), shared("llava")
    out = generated(eager, plain, 6, output_attentions=True)
    answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    single = [word for word in answer if answer.count(word) == 1]
    regions = [(single[:2], (0, 0, 48, 24)), (single[1:3], (8, 8, 40, 40)), ([5, 6], (0, 0, 9, 9))]
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    shown = [
        [
            first + 6 * r + c
            for r in range(6)
            for c in range(6)
            if 8 * c < x1 and 8 * c + 8 > x0 and 8 * r < y1 and 8 * r + 8 > y0
        ]
        for _, (x0, y0, x1, y1) in regions
    ]  # fmt: skip
    made = torch.zeros(4, 4)
    for word, attentions in zip(answer, out.attentions):
        mine = [n for n, (words, _) in enumerate(regions) if word in words]
        if len(mine) == 1:
            for layer, w in enumerate(attentions):
                for head in range(4):
                    made[layer, head] += (int(w[0, head, -1].argmax()) in shown[mine[0]]) / len(
                        shown[mine[0]]
                    )
    assert made.sum() > 0
    with home(), sc.attach(model, SparseMM(budget=16, window=4)) as session:
        sample = {
            **inputs,
            "regions": regions,
            "processor": processor,
            "images": [picture],
            "max_new_tokens": 6,
        }
        session.calibrate(SparseMM(), [sample, sample])
        found = SparseMM().calibrate(session, [sample])["head_scores"]
        assert_close(found, made / made.sum())
        got = entries(generated(model, inputs, 1).past_key_values)
    sizes = budgets((made / made.sum()).view(4, 2, 2).sum(-1), 16, 4, 0.1)
    length = inputs["input_ids"].shape[1]
    assert [[len(head) for head in layer] for layer in got] == sizes.clamp_max(length).tolist()


def test_a_calibration_that_saw_nothing_is_refused() -> None:
    picture, processor, _, inputs = written()
    sample = {**inputs, "regions": [([7], (0, 0, 9, 9))], "processor": processor, "images": [picture]}
    with home(), sc.attach(shared("llava")) as session, pytest.raises(InputError, match="No head"):
        session.calibrate(SparseMM(), [{**sample, "max_new_tokens": 2}])


def test_without_a_calibration_it_says_so() -> None:
    with (
        home(),
        sc.attach(shared("llava"), SparseMM(budget=16, window=4)),
        pytest.raises(InputError, match="calibrate"),
    ):
        generated(shared("llava"), two(family("llava")))


# ---- refusals --------------------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(OptionError, match="window"):
        SparseMM(budget=16)
    with pytest.raises(OptionError, match="calibrated, uniform"):
        SparseMM(head_scores="random")
    wrong = SparseMM(**{**EXAMPLE, "head_scores": ((1.0, 2.0),)})
    with sc.attach(shared("llava"), wrong), pytest.raises(InputError, match="4 layers of 4 heads"):
        generated(shared("llava"), two(family("llava")))


def test_a_prompt_in_pieces_is_refused() -> None:
    with (
        sc.attach(shared("llava"), SparseMM(**EXAMPLE)),
        pytest.raises(InputError, match="prefill_chunk_size"),
    ):
        generated(
            shared("llava"),
            sample() | {"pixel_values": sample()["pixel_values"].float()},
            prefill_chunk_size=10,
        )
