"""Recording: what is kept is what eager attention gives, and the model does not notice."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Exact, cast, shared, skip_blind_chunks
from PIL import Image
from torch import Tensor, nn
from zoo import family

import saccade as sc
from saccade.core.errors import InputError, OptionError, SaccadeError
from saccade.core.layout import KINDS, Layout
from saccade.core.method import Method
from saccade.core.record import VERSION, Part, Recording
from saccade.core.reduce import SEGMENTS
from saccade.core.site import Site
from saccade.core.tokens import Tokens
from saccade.core.words import pieces, words

ORACLES = ["llava", "qwen2_5_vl", "llava_next"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}


def exact(name: str, images: tuple[int, ...] = (1, 2), side: str = "left") -> tuple[Any, Any, Any]:
    """A model, the same with eager attention, and inputs, in float64."""
    f = family(name)
    if "tiles" in f.tags:
        images = (1, 1)
    inputs = cast(f.inputs(images=images, side=side), torch.float64)
    return shared(name, torch.float64), shared(name, torch.float64, "eager"), inputs


def recorded(model: Any, inputs: Any, record: Any = None, **options: Any) -> tuple[Any, Recording]:
    skip_blind_chunks(inputs, options)
    with sc.attach(model, record or sc.Record(dtype="float32")) as session:
        out = model.generate(**inputs, **{**GREEDY, **options})
    return out, session.results["Record"]


def forced(eager: Any, inputs: Any, sequences: Tensor) -> Tensor:
    """Weights (layer, sequence, head, row, column) of the whole sequences in one eager forward."""
    times = len(sequences) // len(inputs["input_ids"])
    longer = sequences.shape[1] - inputs["input_ids"].shape[1]
    batch = {}
    for name, value in inputs.items():
        if name == "input_ids":
            batch[name] = sequences
        elif value.shape[:2] == inputs["input_ids"].shape:
            tail = torch.full((len(value), longer), int(name == "attention_mask"), dtype=value.dtype)
            batch[name] = torch.cat([value, tail], 1).repeat_interleave(times, 0)
        else:
            batch[name] = value
    if times > 1:  # pictures lie flat: those of one sample after another
        assert len(inputs["input_ids"]) == 1
        for name in ("pixel_values", "image_grid_thw"):
            if name in batch:
                batch[name] = batch[name].repeat(times, *[1] * (batch[name].ndim - 1))
    with torch.no_grad(), Exact():
        return torch.stack(eager(**batch, output_attentions=True).attentions)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), atol=2e-6, rtol=0)


# ---- against eager attention --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
def test_the_rows_that_say_the_answer_are_those_of_eager_attention(name: str) -> None:
    model, eager, inputs = exact(name)
    bare = model.generate(**inputs, **GREEDY, output_logits=True)
    out, seen = recorded(model, inputs, output_logits=True)
    assert torch.equal(out.sequences, bare.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, bare.logits, strict=True))
    prompt = inputs["input_ids"].shape[1]
    assert seen.answer_start == prompt
    weights = forced(eager, inputs, out.sequences)
    for sample in range(2):
        found = seen.map("text.*.self", sample=sample)
        assert found.axes == ("layer", "head", "row", "column")
        assert found.labels["row"] == tuple(range(prompt - 1, prompt + 4))
        assert found.labels["column"] == tuple(range(prompt + 4))
        close(found.tensor, weights[:, sample, :, prompt - 1 : prompt + 4, : prompt + 4])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ORACLES)
def test_rows_and_columns_of_a_prompt(name: str, side: str) -> None:
    model, eager, inputs = exact(name, side=side)
    weights = forced(eager, inputs, inputs["input_ids"])
    with torch.no_grad():
        bare = model(**inputs).logits
        records = [
            sc.Record(rows="all", columns="image", dtype="float32"),
            sc.Record(rows="last", columns="visual", heads=(3, 0), sites="text.1:.self", dtype="float32"),
            sc.Record(rows="question", dtype="float32"),
        ]
        found = []
        for record in records:
            with sc.attach(model, record) as session:
                assert torch.equal(model(**inputs).logits, bare)
            found.append(session.results["Record"])
    layout: Layout = found[0].layouts[0]
    for sample, real in enumerate(inputs["attention_mask"].bool()):
        image = layout.where("image")[sample]
        close(found[0].map(sample=sample).tensor, weights[:, sample][:, :, real][..., image])
        last = int(real.nonzero().max())
        close(found[1].map(sample=sample).tensor, weights[1:, sample, [3, 0], last : last + 1][..., image])
        question = found[2].map(sample=sample)
        for i, row in enumerate(question.labels["row"]):
            close(question.tensor[:, :, i], weights[:, sample, :, row])
        assert set(layout.where("question")[sample].nonzero()[:, 0].tolist()) <= set(question.labels["row"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("ends", [False, True])
def test_beams_are_those_that_come_back(name: str, ends: bool) -> None:
    model, eager, inputs = exact(name, (1,))
    beams = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 6, "length_penalty": 0.0}
    if ends:
        tried, _ = recorded(model, inputs, **beams)
        beams |= {"eos_token_id": int(tried.sequences[1, -3]), "pad_token_id": 0}
    out, seen = recorded(model, inputs, **beams)
    prompt = inputs["input_ids"].shape[1]
    weights = forced(eager, inputs, out.sequences)
    assert seen.ids is not None and torch.equal(seen.ids, out.sequences)
    lengths = []
    for sample, ids in enumerate(out.sequences):
        found = seen.map(sample=sample)
        said = ids[prompt:].tolist()
        end = beams.get("eos_token_id")
        tokens = said.index(end) + 1 if end in said else len(said)
        stop = prompt + tokens - 1
        lengths.append(tokens)
        assert found.labels["row"][:tokens] == tuple(range(prompt - 1, stop))
        close(found.tensor[:, :, :tokens, :stop], weights[:, sample, :, prompt - 1 : stop, :stop])
    assert not ends or len(set(lengths)) > 1


def test_several_samples_and_sampled_answers() -> None:
    model, eager, inputs = exact("llava", (1,))
    torch.manual_seed(0)
    out, seen = recorded(model, inputs, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3
    weights = forced(eager, inputs, out.sequences)
    prompt = inputs["input_ids"].shape[1]
    for sample in range(3):
        found = seen.map(sample=sample).tensor
        close(found, weights[:, sample, :, prompt - 1 : -1, :-1])


def test_a_later_turn_has_logical_positions() -> None:
    model, eager, inputs = exact("llava", (1,))
    record = sc.Record(dtype="float32")
    with sc.attach(model, record) as session:
        first = model.generate(**inputs, **GREEDY)
        longer = torch.cat([first.sequences, torch.tensor([[150, 151, 152]])], 1)
        second = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        out = model.generate(**second, **GREEDY, past_key_values=first.past_key_values)
    seen = session.results["Record"]
    weights = forced(eager, inputs, out.sequences)
    found = seen.map()
    assert found.labels["row"] == tuple(range(longer.shape[1] - 1, longer.shape[1] + 4))
    close(found.tensor, weights[:, 0, :, longer.shape[1] - 1 : -1, :-1])
    answered = seen.layouts[0].where("generated")[0].nonzero()[:, 0].tolist()
    before = inputs["input_ids"].shape[1]
    assert answered == [*range(before, before + 5), *range(longer.shape[1], longer.shape[1] + 5)]


def test_a_prompt_in_chunks_is_recorded_as_in_one_piece() -> None:
    model, _, inputs = exact("llava", (1,))
    _, whole = recorded(model, inputs)
    _, chunked = recorded(model, inputs, prefill_chunk_size=7)
    assert chunked.map().labels == whole.map().labels
    close(chunked.map().tensor, whole.map().tensor)
    _, rows = recorded(model, inputs, sc.Record(rows=slice(3, 12), dtype="float32"), prefill_chunk_size=7)
    assert rows.map().labels["row"] == tuple(range(3, 12))


def test_forwards_on_a_cache_are_one_recording() -> None:
    model, eager, inputs = exact("llava", (1, 2))
    ids = inputs["input_ids"]
    with torch.no_grad(), sc.attach(model, sc.Record(rows="last", dtype="float32")) as session:
        out = model(**inputs, use_cache=True)
        fed, mask = ids, inputs["attention_mask"]
        for order in (None, [1, 0]):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            if order:  # samples change places, as beams do
                out.past_key_values.reorder_cache(torch.tensor(order))
                token, fed, mask = token[order], fed[order], mask[order]
            fed, mask = torch.cat([fed, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
    seen = session.results["Record"]
    weights = forced(eager, inputs, fed[[1, 0]])[:, [1, 0]]
    for sample in range(2):
        found = seen.map(sample=sample)
        assert found.labels["row"] == tuple(range(ids.shape[1] - 1, ids.shape[1] + 2))
        close(found.tensor, weights[:, sample, :, -3:])


def test_a_vision_tower() -> None:
    model, eager, inputs = exact("llava", (1, 2))
    _, seen = recorded(model, inputs, sc.Record(sites="vision.*.self", rows="all", dtype="float32"))
    tower = eager.model.vision_tower
    with torch.no_grad():
        weights = torch.stack(tower(inputs["pixel_values"], output_attentions=True).attentions)
    recorded_layers = len(seen.sites)
    for picture in range(3):
        close(seen.map(sample=picture).tensor, weights[:recorded_layers, picture])
    with pytest.raises(InputError, match="no sample 3"):
        seen.map(sample=3)
    _, seen = recorded(model, inputs, sc.Record(sites="vision.*.self", rows="all", columns="image"))
    assert seen.map().tensor.shape[-1] == 36  # without the class token


def test_a_packed_vision_tower_is_recorded_call_by_call() -> None:
    f = family("qwen2_5_vl")
    _, seen = recorded(
        shared("qwen2_5_vl"), f.inputs(), sc.Record(sites="vision.*.self", rows="all", dtype="float32")
    )
    for sample in range(2):
        total = seen.map("vision.0.self", sample=sample).tensor.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_edits_of_others_are_seen() -> None:
    class First(Method):
        def weights(self, call: Any, w: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(torch.zeros_like(w[..., 0]).long(), w.shape[-1]).to(w)

    model, inputs = shared("llava"), family("llava").inputs(images=(1,))
    with sc.attach(model, First(sites="text.*.self"), sc.Record()) as session:
        model.generate(**inputs, **GREEDY)
    assert (session.results["Record"].map().tensor[..., 0] == 1).all()


def test_heads_that_hold_different_keys() -> None:
    class Evict(Method):
        def evict(self, call: Any, cache: Any) -> Tensor | None:
            if call.phase != "prefill":
                return None
            entries = range(call.k.shape[2])
            kept = [[i for i in entries if i not in gone] for gone in (range(2, 5), range(4, 7))]
            return torch.tensor([kept])

    model, inputs = shared("llava"), family("llava").inputs(images=(1,))
    prompt = inputs["input_ids"].shape[1]
    for columns in ("all", "image"):
        record = sc.Record(columns=columns, heads=(3, 0), dtype="float32")
        with sc.attach(model, Evict(sites="text.*.self"), record) as session:
            model.generate(**inputs, **GREEDY)
        found = session.results["Record"].map()
        later = found.tensor[:, :, 1:]
        at = {position: i for i, position in enumerate(found.labels["column"])}
        for position in (2, 3, 4, 5, 6):
            if position in at:
                gone = [position in range(4, 7), position in range(2, 5)]
                for head in (0, 1):
                    assert (later[:, head, :, at[position]] == 0).all() == gone[head]
        if columns == "all":
            assert found.labels["column"] == tuple(range(prompt + 4))
            torch.testing.assert_close(later.sum(-1), torch.ones_like(later[..., 0]))


def test_tokens_that_left_have_no_row_and_no_column() -> None:
    class Drop(Method):
        def tokens(self, call: Any) -> Tokens | None:
            keep = ~call.tokens("image")
            if call.phase != "prefill":
                return None
            keep[0, 6:10] = keep[1, 20:23] = True  # not as many in both
            return Tokens(keep)

    model, inputs = shared("llava"), family("llava").inputs(images=(1, 1))
    for rows in ("all", "generated"):
        with sc.attach(model, Drop(sites="text.2.layer"), sc.Record(rows=rows, dtype="float32")) as session:
            model.generate(**inputs, **GREEDY)
        seen = session.results["Record"]
        image = seen.layouts[0].where("image")
        for sample, kept in enumerate((range(6, 10), range(20, 23))):
            gone = set(image[sample].nonzero()[:, 0].tolist()) - set(kept)
            for layer, fewer in ((1, False), (2, True)):
                found = seen.map(f"text.{layer}.self", sample=sample)
                whole = found.tensor.sum(-1)
                torch.testing.assert_close(whole, torch.ones_like(whole))
                at = [i for i, position in enumerate(found.labels["column"]) if position in gone]
                assert bool((found.tensor[..., at] == 0).all()) == fewer
                assert bool(gone & set(found.labels["row"])) == (rows == "all" and not fewer)


# ---- what is kept -------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_stored() -> None:
    model, inputs = shared("llava"), family("llava").inputs(images=(1, 1))
    with torch.no_grad(), sc.attach(model, sc.Record(rows="last", columns="image")) as session:
        model(**inputs)
    seen = session.results["Record"]
    layers, heads, samples, tokens = 4, 4, 2, 36
    assert seen.nbytes == layers * heads * samples * 1 * tokens * 2
    assert sum(part.weights.untyped_storage().nbytes() for part in seen.parts) == seen.nbytes
    assert len({id(part.rows) for part in seen.parts}) == len({id(part.columns) for part in seen.parts}) == 1


@pytest.mark.parametrize("images", [(1,), (1, 2)])
def test_reductions_are_those_of_the_whole(images: tuple[int, ...]) -> None:
    model, _, inputs = exact("llava", images)
    _, whole = recorded(model, inputs)
    layout = whole.layouts[0]

    def kept(reduce: str, **options: Any) -> Recording:
        return recorded(model, inputs, sc.Record(reduce=reduce, dtype="float32", **options))[1]

    mean, sums, entropy, top = map(kept, ("mean_heads", "segments", "entropy", "topk(4)"))
    for sample in range(len(images)):
        w = whole.map(sample=sample).tensor.double()
        close(mean.map(sample=sample).tensor, w.mean(1, keepdim=True))
        close(entropy.map(sample=sample).tensor[..., 0], -(w * w.clamp_min(1e-30).log()).sum(-1))
        masks = {name: layout.where(name)[sample] for name in ("visual", "question", "generated", "all")}
        first = torch.arange(layout.shape[1]) == masks["all"].nonzero()[0]
        masks = {k: (m & ~first)[: w.shape[-1]] for k, m in masks.items()} | {"first": first[: w.shape[-1]]}
        found = sums.map(sample=sample)
        assert found.labels["column"] == SEGMENTS
        for i, name in enumerate(("first", "visual", "question", "generated")):
            close(found.tensor[..., i], w[..., masks[name]].sum(-1))
        close(found.tensor.sum(-1), torch.ones_like(w[..., 0]))
        close(top.map(sample=sample).tensor.sum(-1), w.topk(4, -1).values.sum(-1))
        dense = top.map(sample=sample).tensor
        assert ((dense == 0) | (dense - w[..., : dense.shape[-1]]).abs().lt(2e-6)).all()
        assert (dense > 0).sum(-1).eq(4).all()
        for layer, share in whole.share(sample=sample).items():
            assert sums.share(sample=sample)[layer] == pytest.approx(share, abs=1e-6)
    near = kept("topk(4)", columns="image").map()
    assert set(near.labels["column"]) == set(layout.where("image")[0].nonzero()[:, 0].tolist())


class Draw(Method):
    """Gives shares of all attention to places of the picture and to a word, whatever is asked."""

    given = (0.18, 0.31, 0.03, 0.32)

    def weights(self, call: Any, w: Tensor) -> Tensor:
        drawn = torch.zeros_like(w)
        for sample, image in enumerate(call.columns("image")[:, 0, 0]):
            asked = int(image.nonzero()[-1]) + 1  # a word of the question, which is no sink
            places = [*image.nonzero()[[3, 11, 14], 0].tolist(), asked]
            drawn[sample, :, :, places] = torch.tensor(self.given).to(w)
        return torch.where(call.rows("after_image"), (1 - sum(self.given)) * w + drawn, w)


def by_hand(w: Tensor, question: Tensor) -> list[int]:
    """Sinks of a layer, of weights (heads, rows, keys) of the whole prompt."""
    rows = question.nonzero()[:, 0].tolist()
    rows = rows[-min(16, -(-len(rows) // 2)) :]
    seen = [k for k in range(w.shape[-1]) if all(w[:, r, k].max() > 0 for r in rows)]
    drawn = {k: sum(float(w[:, r, k].mean()) for r in rows) / len(rows) for k in seen}
    return [
        k for k in seen if drawn[k] >= min(0.3, 10 / len(seen)) and (not question[k] or k == rows[0] == 0)
    ]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_sinks_draw_whatever_is_asked(name: str) -> None:
    model, _, inputs = exact(name, (1, 2))
    whole, kept = sc.Record(rows="all", dtype="float32"), sc.Record(columns="sinks", dtype="float32")
    found = []
    for record in (whole, kept):
        with sc.attach(model, Draw(sites="text.1:3.self"), record) as session:
            model.generate(**inputs, **GREEDY)
        found.append(session.results["Record"])
    seen, sinks = found
    layout, some = seen.layouts[0], 0
    for sample in range(2):
        question = layout.where("question")[sample]
        everything = seen.map(sample=sample)
        at = list(everything.labels["row"])
        for layer, (site, told) in enumerate(seen.sinks(sample).items()):
            w = torch.zeros(4, question.shape[0], question.shape[0])
            w[:, at] = torch.nn.functional.pad(everything.tensor[layer], (0, question.shape[0] - at[-1] - 1))
            assert list(told) == by_hand(w, question)
            some += len(told)
            if told:
                only = sinks.map(site, sample=sample)
                assert {c for i, c in enumerate(only.labels["column"]) if only.tensor[..., i].any()} == set(
                    told
                )
                rows = [at.index(row) for row in only.labels["row"]]
                here = [only.labels["column"].index(column) for column in told]
                close(
                    only.tensor[..., here], everything.tensor[layer : layer + 1][:, :, rows][..., list(told)]
                )
    assert some >= 3
    with pytest.raises(InputError, match="whose rows and all columns"):
        sinks.sinks()


def test_sinks_of_a_tower_are_those_of_all_rows() -> None:
    class Always(Method):
        def weights(self, call: Any, w: Tensor) -> Tensor:
            drawn = torch.zeros_like(w)
            drawn[..., 5] = 0.4
            return 0.6 * w + drawn

    model, inputs = shared("llava"), family("llava").inputs(images=(1,))
    record = sc.Record(sites="vision.1.self", rows="all", columns="sinks")
    with sc.attach(model, Always(sites="vision.1.self"), record) as session:
        model.generate(**inputs, **GREEDY)
    assert session.results["Record"].map().labels["column"] == (5,)


def test_rows_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = shared("llava"), family("llava").inputs()
    found = []
    for limit in (2**26, 2000):
        monkeypatch.setattr("saccade.core.call.CHUNK", limit)
        with torch.no_grad(), sc.attach(model, sc.Record(rows="all", dtype="float32")) as session:
            model(**inputs)
        found.append(session.results["Record"].map().tensor)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduce": "median"}, "topk"),
        ({"reduce": "topk(0)"}, "topk"),
        ({"reduce": "segments", "columns": "image"}, "all columns"),
        ({"rows": slice(0, 9, 2)}, "neighbours"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        sc.Record(**options)


def test_what_cannot_be_recorded_is_said() -> None:
    model, inputs = shared("llava"), family("llava").inputs(images=(1,))
    with sc.attach(model, sc.Record(heads=(4,))), pytest.raises(InputError, match=r"no head 4, only 4"):
        model(**inputs)
    with torch.no_grad(), sc.attach(model, sc.Record(columns="video")) as session:
        model(**inputs)
    with pytest.raises(InputError, match="columns=video"):
        session.results["Record"].map()


# ---- maps ---------------------------------------------------------------------------------------------


class Speller:
    """A tokenizer of words of two letters, as ids; 1 is special."""

    all_special_ids = (1,)
    parts = ("", "", " the", " cu", "p", " is", " red", ".")

    def decode(self, ids: list[int], **_: Any) -> str:
        return (
            "".join(self.parts[i] for i in ids).strip()
            if len(ids) == 1
            else "".join(self.parts[i] for i in ids).lstrip()
        )


def handmade(answer: int = 8) -> Recording:
    """One sample: begin, four image tokens, a base view, a newline, 'the' | 'cup is red.' (positions 8 on).

    The picture is 4 wide and 2 high; its tokens are 2 x 1, the base view covers it.
    """
    kinds = ["special", *["image"] * 6, "text", *["generated"] * 5]
    box = torch.full((1, 13, 4), torch.nan)
    box[0, 1:5] = torch.tensor([[0, 0, 2, 1], [2, 0, 4, 1], [0, 1, 2, 2], [2, 1, 4, 2]]).float()
    box[0, 5] = torch.tensor([0.0, -2, 4, 4])  # sticks out: its part in the picture counts
    layout = Layout(
        kind=torch.tensor([[KINDS.index(k) for k in kinds]]),
        item=torch.tensor([[-1, 0, 0, 0, 0, 0, 0, *[-1] * 6]]),
        turn=torch.zeros(1, 13, dtype=torch.long),
        sample=torch.zeros(1, dtype=torch.long),
        box=box,
    )
    rows = torch.arange(7, 12)[None]
    weights = torch.rand(2, 1, 2, 5, 12, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(-1, keepdim=True)
    columns = torch.arange(12)[None]
    return Recording(
        parts=[Part(f"text.{i}.self", 0, 0, 0, rows, columns, w) for i, w in enumerate(weights)],
        sites=[
            Site(f"text.{i}.self", "", nn.Identity(), "text", i, "self", "interface", 2) for i in range(2)
        ],
        layouts=[layout],
        ids=torch.tensor([[1, *[0] * 6, 2, 3, 4, 5, 6, 7]]),
        answer_start=answer,
        options={"rows": "generated", "columns": "all", "reduce": None},
    ).with_words(Speller())


def test_words_and_the_rows_that_say_them() -> None:
    seen = handmade()
    assert [w.text for w in seen.words] == ["the", "cup", "is", "red", "."]
    assert [w.positions for w in seen.words] == [(7,), (8, 9), (10,), (11,), (12,)]
    assert [w.said for w in seen.words] == [False, True, True, True, True]
    assert seen.answer() == "cup is red."
    whole = seen.map()
    for found in (seen.map(word="cup"), seen.map(word="CUP"), seen.map(word=1), seen.map(word=-4)):
        torch.testing.assert_close(
            found.tensor, whole.tensor[:, :, [0, 1]].mean(2)
        )  # rows 7 and 8 say 8 and 9
        assert found.axes == ("layer", "head", "column")
    torch.testing.assert_close(seen.map(word="cup", reading=True).tensor, whole.tensor[:, :, [1, 2]].mean(2))
    torch.testing.assert_close(seen.map(word="the").tensor, whole.tensor[:, :, 0])  # given: its own row
    torch.testing.assert_close(seen.map(word=["the", "red"]).tensor, whole.tensor[:, :, [0, 3]].mean(2))
    torch.testing.assert_close(seen.seen().tensor, whole.tensor.mean(2))
    with pytest.raises(InputError, match="did you mean cup"):
        seen.map(word="cub")
    with pytest.raises(InputError, match="rows"):
        seen.map(word=".", reading=True)  # the last token was never fed
    with pytest.raises(InputError, match="no word 5"):
        seen.map(word=5)


def test_the_row_that_predicts_a_word_is_where_its_logits_come_from() -> None:
    model, eager, inputs = exact("llava", (1,))
    processor = family("llava").processor()
    known = range(270, len(processor.tokenizer))  # above single bytes
    out, seen = recorded(model, inputs, suppress_tokens=[i for i in range(512) if i not in known])
    seen.with_words(processor)
    word = next(w for w in seen.words if w.said)
    weights = forced(eager, inputs, out.sequences)
    with torch.no_grad():
        logits = eager(**{**inputs, "input_ids": out.sequences, "attention_mask": None}).logits[0]
    for position in word.positions:
        logits[position - 1, [i for i in range(512) if i not in known]] = -torch.inf
        assert int(logits[position - 1].argmax()) == int(out.sequences[0, position])
    rows = [position - 1 for position in word.positions]
    close(seen.map(word=seen.words.index(word)).tensor, weights[:, 0][:, :, rows].mean(2)[..., :-1])


def test_axes_are_chosen_and_reduced() -> None:
    found = handmade().map()
    torch.testing.assert_close(found.mean("layer", "head").tensor, found.tensor.mean((0, 1)))
    torch.testing.assert_close(found.max("row").tensor, found.tensor.amax(2))
    torch.testing.assert_close(found.heads(-1).tensor, found.tensor[:, 1:])
    torch.testing.assert_close(found.layers("50%:").tensor, found.tensor[1:])
    assert found.layers(-1).labels["layer"] == ("text.1.self",)
    assert repr(found.mean("head")) == "<Map of layer 2, row 5, column 12>"
    top = found.top(2)
    mean = found.tensor.mean((0, 1, 2))
    assert [t.position for t in top] == mean.topk(2).indices.tolist() and top[0].weight == float(mean.max())
    for wrong in (lambda: found.heads(2), lambda: found.layers(7), lambda: found.mean("head").max("head")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(SaccadeError, match=r"text\.9"):
        handmade().map("text.9.self")


def test_a_map_is_a_table() -> None:
    pandas = pytest.importorskip("pandas")
    seen = handmade()
    found = seen.map(word="cup").layers(-1)
    table = found.to_pandas()
    assert list(table) == ["layer", "head", "column", "kind", "text", "weight"] and len(table) == 2 * 12
    line = table[(table["head"] == 1) & (table["column"] == 8)].iloc[0]
    assert (line["layer"], line["kind"], line["text"]) == ("text.1.self", "generated", " cu")
    assert line["weight"] == float(found.tensor[0, 1, 8])
    share = table.groupby("kind")["weight"].sum() / 2
    assert share["image"] == pytest.approx(float(found.tensor[..., 1:7].sum() / 2))
    assert isinstance(found.mean("column").to_pandas(), pandas.DataFrame)


def test_a_table_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        handmade().map().to_pandas()


def test_a_map_lies_on_the_picture() -> None:
    found = handmade().with_pictures([Image.new("RGB", (4, 2))]).map().mean("layer", "head", "row")
    w = found.tensor.double().numpy()
    tiles = np.array([[w[1], w[1], w[2], w[2]], [w[3], w[3], w[4], w[4]]]) / 2
    wanted = tiles + w[5] / 8  # the base view's part in the picture has eight pixels
    np.testing.assert_allclose(found.on_picture(), wanted, atol=1e-7)
    assert found.on_picture().sum() == pytest.approx(w[1:6].sum())  # token 6 ends a row: it has no place
    coarse = found.on_picture(shape=(1, 2))
    np.testing.assert_allclose(coarse, wanted.reshape(2, 2, 2).sum((0, 2))[None], atol=1e-7)
    assert found.on_picture(shape=(5, 3)).sum() == pytest.approx(w[1:6].sum())
    assert found.grid().shape == (2, 2)
    every = handmade().with_pictures([Image.new("RGB", (4, 2))]).map()
    np.testing.assert_allclose(every.grids().mean((0, 1, 2)), found.grid(), atol=1e-6)
    assert every.grids().shape == (2, 2, 5, 2, 2)
    with pytest.raises(InputError, match="picture 1"):
        found.on_picture(1)
    seen = handmade()
    seen.layouts[0].box.fill_(torch.nan)
    with pytest.raises(InputError, match="no boxes"):
        seen.map().on_picture()


def test_pictures_keep_their_size(tmp_path: Any) -> None:
    seen = handmade().with_pictures([Image.new("RGB", (8, 2), (200, 10, 10))])
    assert seen.map().on_picture().shape == (2, 8)
    large = handmade().with_pictures([Image.new("RGB", (3000, 1500))])
    assert large.map().on_picture(shape=(4, 4)).shape == (4, 4)
    assert (large.pictures[0][0].width, large.map().picture().size) == (3000, (1024, 512))


def test_the_overlay_is_hot_where_the_weights_are() -> None:
    seen = handmade().with_pictures([Image.new("RGB", (4, 2), (90, 90, 90))])
    for part in seen.parts:
        part.weights[..., 1:7] = torch.tensor([0.0, 0, 0, 0.5, 0, 0])  # lower right
    drawn = np.asarray(seen.overlay()).astype(int)
    assert drawn.shape[1] == 512 and drawn.shape[0] > 256  # enlarged, with a scale below
    hot, cold = drawn[250, 500], drawn[10, 10]
    assert hot.sum() > cold.sum() + 200 and hot[0] > hot[2]
    other = np.asarray(seen.overlay(image=Image.new("RGB", (600, 300), (0, 90, 0))))
    assert other.shape[1] == 600


def test_shares_are_of_everything() -> None:
    seen = handmade()
    for layer, share in enumerate(seen.share("cup").values()):
        w = seen.map(word="cup").tensor.mean(1)[layer]
        assert share["image"] == pytest.approx(float(w[1:7].sum()))
        assert share["first"] == pytest.approx(float(w[0]))
        assert sum(share.values()) == pytest.approx(1)
    seen.options["columns"] = "image"
    with pytest.raises(InputError, match="all columns"):
        seen.share()


# ---- files and terminals ------------------------------------------------------------------------------


def test_a_file_holds_everything(tmp_path: Any) -> None:
    model, inputs = shared("llava"), family("llava").inputs()
    for record in (sc.Record(), sc.Record(reduce="topk(3)"), sc.Record(sites="*.self", rows="all")):
        _, seen = recorded(model, inputs, record)
        seen.with_words(family("llava").processor()).with_pictures([Image.new("RGB", (9, 7))], [])
        seen.prompt = "Where?\u2028"
        seen.save(tmp_path / "seen.safetensors")
        back = Recording.load(tmp_path / "seen.safetensors")
        assert (back.texts, back.options, back.prompt) == (seen.texts, seen.options, seen.prompt)
        assert torch.equal(
            back.map("text.1:3.self", sample=1).tensor, seen.map("text.1:3.self", sample=1).tensor
        )
        assert back.map("text.*.self").labels == seen.map("text.*.self").labels
        assert back.pictures[0][0].image().size == (9, 7) and back.words_of(1) == seen.words_of(1)
        for a, b in zip(back.layouts, seen.layouts, strict=True):
            assert torch.equal(a.kind, b.kind) and torch.equal(a.item, b.item) and a.named == b.named
        assert back.nbytes == seen.nbytes


def test_other_files_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    text = tmp_path / "text.safetensors"
    text.write_text("no recording")
    other, old, broken = (tmp_path / f"{name}.safetensors" for name in ("other", "old", "broken"))
    save_file({"a": torch.zeros(1)}, other)
    save_file({"a": torch.zeros(1)}, old, {"format": "saccade.recording", "version": "0"})
    handmade().save(broken)
    ours = {"format": "saccade.recording", "version": VERSION}
    save_file(
        {"a": torch.zeros(1)}, broken, ours | {"data": json.dumps({"parts": [{"rows": {"tensor": "t0"}}]})}
    )
    for path, said in (
        (tmp_path / "none.safetensors", "cannot be read"),
        (text, "cannot be read"),
        (other, "no recording"),
        (old, "version 0"),
        (broken, "damaged"),
    ):
        with pytest.raises(SaccadeError, match=said):
            Recording.load(path)
    with pytest.raises(SaccadeError, match="cannot be written"):
        handmade().save(tmp_path / "no" / "folder")


def test_plain_is_a_picture_in_letters() -> None:
    seen = handmade().with_pictures([Image.new("RGB", (4, 2))])
    seen.prompt = "Where is\033[2J the cup?"
    text = seen.plain("red", width=40)
    lines = text.splitlines()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(len, lines)) <= 40 + 30  # the bars' names and numbers beside a narrow picture
    assert lines[2].startswith("┌") and sum(line.startswith("│") for line in lines) == 10
    assert "while saying: red" in text and "image" in text and "█" in text
    assert "\033[38;2;" in seen.plain("red", colour=True)
    seen.layouts[0].box.fill_(torch.nan)
    assert "┌" not in seen.plain()  # words and shares without places


def test_a_notebook_shows_text_as_text() -> None:
    seen = handmade().with_pictures([Image.new("RGB", (4, 2))])
    seen.prompt = "<script>alert(1)</script>"
    page = seen._repr_html_()
    assert "<script" not in page and "&lt;script" in page and "data:image/png;base64," in page
    assert len(page) < 300_000


# ---- words --------------------------------------------------------------------------------------------


def test_the_pieces_of_a_text_make_it_up() -> None:
    tokenizer = family("llava").processor().tokenizer
    text = "user: Where's the 猫 naïve cup-holder? ok😀 yes."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = pieces(tokenizer, [None, *ids, None])
    assert texts[0] is None and texts[-1] is None
    assert "".join(t or "" for t in texts) == text
    found = [w.text for w in words(texts, len(texts))]
    assert found == ["user", ":", "Where's", "the", "猫", "naïve", "cup-holder", "?", "ok", "😀", "yes", "."]
    for word in words(texts, len(texts)):
        assert word.text in tokenizer.decode([[0, *ids][p] for p in word.positions])


def test_words_end_at_breaks_and_at_the_answer() -> None:
    assert [w.text for w in words(["a", "b", None, "c", "d"], 4)] == ["ab", "c", "d"]
    assert [w.positions for w in words(["", "", "é", "t", None, "", "x"], 9)] == [(0, 1, 2, 3), (5, 6)]
