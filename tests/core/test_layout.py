"""What every token is: kinds, pictures, turns and samples, in prefill, under beams and in later turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look, greedy, shared
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import FAMILIES, Family, run, select
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.layout import KINDS, Layout, items_of


def layouts(name: str, forward: Any, site: str = "text.0.self") -> list[Layout]:
    look = Look(lambda call: call.klayout, sites=site)
    with sc.attach(shared(name), look):
        forward(shared(name))
    return [told for _, _, told in look.seen]


def layout_of(ids: list[list[int]], generated: int = 0, pad: Tensor | None = None) -> Layout:
    """Ids of one digit: 0 text, 1 image, 4 special."""
    kind = torch.tensor(ids)
    if generated:
        kind[:, -generated:] = KINDS.index("generated")
    if pad is not None:
        kind = kind.masked_fill(pad, KINDS.index("pad"))
    zeros = torch.zeros_like(kind)
    return Layout(kind, torch.where(kind == 1, 0, -1), zeros, torch.arange(len(ids)))


# ---- names -------------------------------------------------------------------------------------------------


def test_segments_of_a_prompt() -> None:
    pad = torch.tensor([[True, True, False, False, False, False, False, False, False]])
    layout = layout_of([[0, 0, 4, 0, 1, 1, 0, 0, 0]], generated=1, pad=pad)
    told = {name: layout.where(name)[0].nonzero()[:, 0].tolist() for name in (
        "all", "first", "image", "visual", "special", "text", "pad", "prompt", "before_image", "question",
        "after_image", "generated", "image:0", "image:1", "last", "first|image:0|last",
    )}  # fmt: skip
    assert told == {
        "all": [2, 3, 4, 5, 6, 7, 8], "first": [2], "image": [4, 5], "visual": [4, 5], "special": [2],
        "text": [3, 6, 7], "pad": [0, 1], "prompt": [2, 3, 4, 5, 6, 7], "before_image": [2, 3],
        "question": [6, 7], "after_image": [6, 7, 8], "generated": [8], "image:0": [4, 5], "image:1": [],
        "last": [8], "first|image:0|last": [2, 4, 5, 8],
    }  # fmt: skip


def test_segments_of_a_prompt_without_a_picture() -> None:
    layout = layout_of([[4, 0, 0]])
    assert not layout.where("before_image").any()
    assert not layout.where("after_image").any()
    assert layout.where("question").all()


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean image"):
        layout_of([[0, 1]]).where("imag")


@given(
    lengths=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3),
    cut=st.integers(0, 12),
)
def test_items_are_counted_by_their_lengths_also_in_chunks(lengths: list[list[int]], cut: int) -> None:
    width = 12
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    expected = torch.full((len(lengths), width), -1)
    for row, counts in enumerate(lengths):
        flat = [i for i, count in enumerate(counts) for _ in range(count)]
        mask[row, : len(flat)] = True
        expected[row, : len(flat)] = torch.tensor(flat, dtype=torch.long)
    none = torch.zeros(len(lengths), dtype=torch.long)
    assert torch.equal(items_of(mask, lengths, none), expected)
    parts = [items_of(mask[:, :cut], lengths, none), items_of(mask[:, cut:], lengths, mask[:, :cut].sum(1))]
    assert torch.equal(torch.cat(parts, 1), expected)


# ---- the families ------------------------------------------------------------------------------------------


def expected_items(f: Family, inputs: dict[str, Any]) -> Tensor:
    """Between pictures the zoo writes three ordinary words; marks and breaks within a picture are no words.

    Where a picture is cut into tiles without a mark between them, every tile of 16 tokens is an item.
    """
    ids = inputs["input_ids"]
    items = torch.full_like(ids, -1)
    for row in range(len(ids)):
        item, words_since, tokens = -1, 3, 0
        for column, i in enumerate(ids[row].tolist()):
            if i == 3:
                begins = words_since >= 3 or (f.name == "internvl" and tokens == 16)
                item += begins
                tokens = 1 if begins else tokens + 1
                words_since = 0
                items[row, column] = item
            elif i >= 100:
                words_since += 1
    return items


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("f", select("vlm", "multi_image"))
def test_kinds_and_items_of_several_pictures(f: Family, side: str) -> None:
    images = (1, 2)
    inputs = f.inputs(images=images, side=side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    (layout,) = layouts(f.name, lambda model: run(model, inputs))
    image = ids == 3  # the first id that a family of the zoo names
    assert torch.equal(layout.where("image"), image)
    assert torch.equal(layout.where("pad"), mask == 0)
    assert layout.sample.tolist() == [0, 1]
    assert layout.where("text")[ids >= 100].all()  # and what marks a picture, where no configuration names it
    assert layout.where("special")[ids == 1].all()
    assert not layout.where("special")[ids >= 100].any()
    assert (layout.turn == 0).all()
    if not {"cross"} & f.tags:  # one token stands for a picture that comes by cross-attention
        assert torch.equal(layout.item, expected_items(f, inputs))
    assert (layout.item[~image] == -1).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("f", select("vlm", "multi_image", "generates"))
def test_a_generation_sees_the_same_and_its_own_words(f: Family, options: dict[str, Any]) -> None:
    images = (2, 1)
    if f.name == "llama4" and options:
        pytest.skip("llama4 does not repeat its pictures for several answers")
    inputs = f.inputs(images=images, side="left")
    torch.manual_seed(0)
    told = layouts(f.name, lambda model: greedy_or(model, inputs, options))
    rows = 2 if options else 1
    ids = inputs["input_ids"].repeat_interleave(rows, 0)
    tokens = ids.shape[1]
    for step, layout in enumerate(told):
        assert layout.shape[1] == tokens + step
        order = layout.sample * rows  # beams change places within their sample
        assert torch.equal(layout.where("image")[:, :tokens], (ids == 3)[order])
        assert torch.equal(layout.where("pad")[:, :tokens], (inputs["attention_mask"] == 0)[layout.sample])
        assert layout.where("generated")[:, tokens:].all()
        assert not layout.where("generated")[:, :tokens].any()
        if "cross" not in f.tags:
            items = expected_items(f, inputs)[layout.sample]
            assert torch.equal(layout.item[:, :tokens], items)
    assert len(told) == 3


def greedy_or(model: Any, inputs: Any, options: dict[str, Any]) -> None:
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **options)


def test_pictures_of_a_later_turn_are_further_items() -> None:
    """The whole conversation is given again, with the new picture only."""
    model = shared("llava")
    first = FAMILIES["llava"].inputs(images=(1, 1))
    look = Look(lambda call: call.klayout, sites="text.0.self")
    picture = [3] * 36
    more = torch.tensor([[150, *picture, 151, 152]] * 2)
    with sc.attach(model, look):
        out = model.generate(**first, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, more], 1)
        model.generate(
            input_ids=ids, pixel_values=first["pixel_values"].flip(0), past_key_values=out.past_key_values,
            max_new_tokens=2, min_new_tokens=2,
        )  # fmt: skip
    layout = look.seen[-1][2]
    tokens = first["input_ids"].shape[1]
    begin = tokens + 3 + 1
    assert (layout.item[:, begin : begin + 36] == 1).all()
    assert torch.equal(layout.where("image:0")[:, :tokens], first["input_ids"] == 3)
    assert layout.where("generated")[0].nonzero()[:, 0].tolist() == [
        tokens,
        tokens + 1,
        tokens + 2,
        begin + 38,
    ]
    assert layout.where("question")[0].nonzero()[:, 0].tolist() == [begin + 36, begin + 37]
    assert (layout.turn[:, tokens + 3 :] == 1).all()
    assert (layout.turn[:, : tokens + 3] == 0).all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_prompt_in_chunks_has_the_items_of_the_whole(name: str) -> None:
    inputs = FAMILIES[name].inputs(images=(2, 1))
    (whole,) = layouts(name, lambda model: run(model, inputs))
    told = layouts(name, lambda model: greedy(model, inputs, 2, prefill_chunk_size=17))
    assert len(told) > 3
    last = told[-1]
    tokens = whole.shape[1]
    assert torch.equal(last.item[:, :tokens], whole.item)
    assert torch.equal(last.kind[:, :tokens], whole.kind)


@pytest.mark.parametrize("f", select("video"))
def test_clips_are_video(f: Family) -> None:
    assert f.video
    inputs = f.video(8)
    (layout,) = layouts(f.name, lambda model: run(model, inputs))
    clip = inputs["input_ids"] == 4
    assert clip.any()
    assert torch.equal(layout.where("video"), clip)
    assert torch.equal(layout.where("visual"), clip)
    assert not layout.where("image").any()
    frames = 17 if f.name == "video_llava" else int(clip.sum())  # its tower gives frames one by one
    assert torch.equal(layout.item[clip], torch.arange(int(clip.sum())) // frames)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_embeddings_instead_of_ids_are_named_where_kinds_are_asked(how: str) -> None:
    model = shared("llama")
    with torch.no_grad():
        inputs = {"inputs_embeds": model.get_input_embeddings()(words(2, 9))}
    look = Look(lambda call: call.columns("all").sum().item(), sites="text.0.self")
    with sc.attach(model, look):
        run(model, inputs) if how == "forward" else greedy(model, inputs, 2)
    assert look.seen[0][2] == 18
    for name in ("image", "question", "text"):
        with sc.attach(model, Look(lambda call, n=name: call.columns(n), sites="text.0.self")):
            with pytest.raises(InputError, match="called with inputs_embeds") as error:
                run(model, inputs) if how == "forward" else greedy(model, inputs, 2)
            assert "input_ids" in error.value.remedy


def test_a_vision_tower_has_a_space_of_its_own() -> None:
    inputs = FAMILIES["llava"].inputs()
    (layout,) = layouts("llava", lambda model: run(model, inputs), "vision.0.self")
    assert layout.shape == (2, 37)
    assert layout.where("special").nonzero()[:, 1].tolist() == [0, 0]
    assert layout.where("image").sum() == 72


def test_cross_attention_has_two_spaces() -> None:
    inputs = FAMILIES["mllama"].inputs()
    look = Look(lambda call: (call.qlayout, call.klayout, call.k.shape[2]), sites="text.1.cross")
    with sc.attach(shared("mllama"), look):
        run(shared("mllama"), inputs)
    queries, keys, count = look.seen[0][2]
    assert queries.shape == inputs["input_ids"].shape
    assert keys.shape[1] == count
    assert keys.where("image").all()
