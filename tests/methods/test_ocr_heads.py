"""OCR heads on crafted recordings, on the weights that models return, and on a model wired to look at a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from zoo import family

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.heads import Heads
from saccade.core.layout import KINDS, Layout
from saccade.core.record import Part, Recording
from saccade.core.site import Site
from saccade.probes.ocr_heads import OCRHeads, likeness, longest_run
from saccade.world.scenes import scenes

from .planted import ANSWER, FIRST, IMAGE, LAST, MIDDLE, OTHERWISE, OUT, QUESTION, SIGNAL, Route, planted
from .shared import alone, two
from .test_retrieval_heads import told

EXAMPLE: dict[str, Any] = {}
BOX = (0.0, 0.0, 20.0, 10.0)
BOXES = [(0, 0, 10, 10), (10, 0, 20, 10), (0, 10, 10, 20), (19.5, 9, 29.5, 10), (18, 0, 28, 10)]
"""Two in BOX, one below it, and two beside it of which it covers a twentieth and a fifth."""


def recording(said: list[int], looks: dict[int, list[int]]) -> Recording:
    """A word, five tokens of a picture, a word, and what was said: `looks` are the positions that each of two
    heads attends to most, by the position of the row."""
    length = 7 + len(said)
    kind = torch.full((1, length), KINDS.index("text"))
    kind[:, 1:6], kind[:, 7:] = KINDS.index("image"), KINDS.index("generated")
    box = torch.full((1, length, 4), torch.nan)
    box[0, 1:6] = torch.tensor(BOXES)
    layout = Layout(kind, kind - kind, kind - kind, torch.zeros(1, dtype=torch.long), box)
    rows = torch.tensor([sorted(looks)])
    where = torch.tensor([looks[row] for row in sorted(looks)]).T[None, :, :, None]  # (1, heads, rows, 1)
    columns = torch.arange(length)[None]
    part = Part("text.0.self", 0, 0, 0, rows, columns, torch.ones(where.shape), where)
    site = Site("text.0.self", "", torch.nn.Identity(), "text", 0, "self", "interface", 1)
    options = {"rows": "generated", "columns": "prompt", "reduce": "topk(1)"}
    return Recording([part], [site], [layout], torch.tensor([[1, *[9] * 5, 2, *said]]), 7, options)


def events(said: list[int], looks: dict[int, list[int]], **options: Any) -> list[list[float]]:
    """By word: of both heads."""
    found = OCRHeads(answer=(31, 32), box=BOX, **options).judge(recording(said, looks), 0)
    return [event[0].tolist() for event in found]


def test_a_peak_in_the_box_scores_the_answers_share_that_is_right_and_others_nothing() -> None:
    assert events([31, 32, 3], {7: [1, 0], 8: [2, 6]}) == [[1, 0], [1, 0]]
    assert events([31, 3, 3], {7: [1, 3], 8: [2, 2]}) == [[0.5, 0]]
    assert events([3, 3, 32], {7: [1, 1], 8: [1, 1], 9: [2, 3]}) == [[0.5, 0]]


def test_a_sliver_of_a_token_is_no_evidence() -> None:
    assert events([31, 32], {7: [4, 5]}) == [[0, 1]]


def test_the_row_that_says_a_word_is_one_before_that_which_reads_it() -> None:
    looks = {6: [1, 0], 7: [0, 1], 8: [6, 6]}
    assert events([31, 32], looks) == [[0, 1], [0, 0]]
    assert events([31, 32], looks, predicting=True) == [[1, 0], [0, 1]]


def test_the_longest_run_is_of_neighbours() -> None:
    assert longest_run([1, 2, 3, 4], [9, 2, 3, 1, 4]) == 2
    assert longest_run([1, 2], [3]) == longest_run([1], []) == 0
    assert longest_run([1, 1, 2], [1, 1, 1, 2]) == 3


def test_a_head_with_few_high_events_is_no_ocr_head() -> None:
    """A mean of 0.2 of events of which a twentieth is not zero; beside it one of the same mean, of many."""
    values = torch.zeros(100, 1, 2)
    values[:5, :, 0], values[:20, :, 1] = 4.0, 1.0
    assert Heads("ocr_heads", ("text.0.self",), values).reaching(0.1, often=0.1) == {"text.0.self": (1,)}


def test_tables_are_compared_by_their_heads_and_by_their_scores() -> None:
    """Two of three heads that are in either are in both; 0.04 + 0.06 over the lengths."""
    a, b = (
        Heads("", ("x",), torch.tensor([[scores]])) for scores in ([0.2, 0.3, 0.0, 0.0], [0.2, 0.2, 0.1, 0.0])
    )
    jaccard, cosine = likeness(a, b)
    assert jaccard == 2 / 3
    assert cosine == pytest.approx(0.1 / (0.13 * 0.09) ** 0.5)


# ---- on models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_it_follows_the_weights_that_the_model_returns(name: str) -> None:
    """Of the prompt's keys alone, though the words that were written weigh more in some rows."""
    model, inputs = shared(name, implementation="eager"), alone(two(family(name)), 0)
    words = torch.tensor([[120, 121, 122, 123, 124, 125]])
    out = told(model, inputs, words, output_attentions=True, return_dict_in_generate=True)
    with sc.attach(shared(name), OCRHeads()) as session:
        told(shared(name), inputs, words)
    found: Tensor = session.results["ocr_heads"].events
    ids = inputs["input_ids"][0]
    image, later = ids == model.config.image_token_id, 0
    assert found.shape == (5, 4, 4)  # the last word is read by no row
    assert 0 < found.sum() < found.numel()
    for event, step in zip(found, out.attentions[1:], strict=True):
        for layer in range(4):
            w = step[layer][0, :, -1]
            later += int((w.argmax(-1) >= len(ids)).sum())
            assert event[layer].tolist() == image[w[:, : len(ids)].argmax(-1)].float().tolist()
    assert later


def test_muting_the_head_that_reads_the_picture_ends_the_right_answer_and_others_do_not() -> None:
    # The others look at the first token: keys are shared by two heads, so they name the picture as well.
    places = [(layer, head) for layer in range(4) for head in range(4) if (layer, head) != (1, 2)]
    model = planted(
        Route(1, 2, LAST, IMAGE, SIGNAL, OUT), *(Route(*at, FIRST, IMAGE, MIDDLE, MIDDLE) for at in places)
    )
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    asked = sc.Question(family("llava").processor(), [Image.fromarray(noise)], QUESTION)  # type: ignore[misc]

    def said(*methods: Any) -> tuple[int, Any]:
        with sc.attach(model, *methods) as session:
            ids = model.generate(**asked.inputs(model), max_new_tokens=1, min_new_tokens=1, do_sample=False)
        return int(ids[0, -1]), session.results.get("ocr_heads")

    word, table = said(OCRHeads(predicting=True))
    assert word == ANSWER
    assert table.top(1) == table.reaching(0.1) == {"text.1.self": (2,)}
    assert said(sc.MuteHeads(heads=table.top(1)))[0] == OTHERWISE
    for seed in range(4):
        assert said(sc.MuteHeads(heads=table.random(2, seed, without=table.top(1))))[0] == ANSWER


def test_without_boxes_a_box_is_refused() -> None:
    model, inputs = shared("llava"), alone(two(family("llava")), 0)
    with sc.attach(model, OCRHeads(box=BOX)), pytest.raises(InputError, match="no boxes"):
        model.generate(**inputs, max_new_tokens=2)


def test_on_the_trained_model_a_box_narrows_what_counts_as_evidence() -> None:
    """Of a sign's letters: heads that look into its box look at the picture."""
    model, processor = sc.world.load("vlm")
    scene, sign = next((one, t) for one in scenes(50, "test") for t in one.unique() if t.text)
    inputs = sc.Question(processor, [scene.picture()], "read the sign .").inputs(model)

    def events(box: tuple[float, ...] | None) -> Tensor:
        with sc.attach(model, OCRHeads(box=box)) as session:
            session.locate(processor, [scene.picture()])
            model.generate(**inputs, do_sample=False, max_new_tokens=4)
        return session.results["ocr_heads"].events

    narrow, anywhere = events(tuple(map(float, sign.box))), events(None)
    assert 0 < narrow.sum() < anywhere.sum()
    assert (narrow <= anywhere).all()
