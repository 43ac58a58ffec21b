"""PINE against keys that are moved and rotated one by one, and against every order of the segments."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import transformers as T
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import TEXT, enliven, words

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.steering.pine import PINE, Region, join

from .shared import Inputs, alone, generated, two

SPANS = ((3, 5), (5, 9), (9, 12))
EXAMPLE = {"spans": SPANS}
MODELS = ("llama", "qwen2_5_vl")

DOUBLE = torch.float64
HEADS, DIM = 4, 16


# ---- the paper, one query at a time -------------------------------------------------------------------


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """A query or key (dim,) at a position."""
    angle = position * theta ** (-torch.arange(0, DIM, 2, dtype=DOUBLE) / DIM)
    a, b = x[: DIM // 2], x[DIM // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def positions_by_hand(
    q: Tensor, k: Tensor, spans: list[tuple[int, int]], rows: list[int], own: int | None
) -> dict[int, int]:
    """Of every token of the segments, for the queries in `rows` of one head; q and k without positions."""
    start, end = spans[0][0], spans[-1][1]
    weight = [0.0] * len(spans)
    for row in rows:
        seen = [j for j in range(start, end) if own is None or not spans[own][0] <= j < spans[own][1]]
        if seen:
            w = (k[seen] @ q[row] * DIM**-0.5).softmax(0).tolist()
            for segment, (a, b) in enumerate(spans):
                weight[segment] += sum(x for j, x in zip(seen, w, strict=True) if a <= j < b) / (b - a)
    order = sorted(range(len(spans)), key=lambda s: (s != own, -weight[s]))
    found, last = {}, end
    for segment in order:
        a, b = spans[segment]
        found |= {j: last - (b - j) for j in range(a, b)}
        last -= b - a
    return found


def weights_by_hand(model: Any, ids: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """Of the first layer: (heads, tokens, tokens)."""
    layer, theta = model.model.layers[0], model.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(ids))[0]
        q = layer.self_attn.q_proj(x).unflatten(-1, (HEADS, DIM)).transpose(0, 1).double()
        k = (
            layer.self_attn.k_proj(x)
            .unflatten(-1, (-1, DIM))
            .transpose(0, 1)
            .repeat_interleave(2, 0)
            .double()
        )
    tokens, segments = ids.shape[1], [*spans]
    made = torch.zeros(HEADS, tokens, tokens, dtype=DOUBLE)
    for head in range(HEADS):
        for row in range(tokens):
            own = next((s for s, (a, b) in enumerate(segments) if a <= row < b), None)
            place = {j: j for j in range(tokens)}
            together = [row] if own is None else [*range(*segments[own])]
            if row >= spans[0][0]:
                place |= positions_by_hand(q[head], k[head], segments, together, own)
            others = (
                []
                if own is None
                else [j for s, span in enumerate(segments) if s != own for j in range(*span)]
            )
            seen = sorted(
                {*range(spans[0][0] if own is not None else row + 1), *others}
                | (set(range(segments[own][0], row + 1)) if own is not None else set())
            )
            query = turned(q[head, row], place[row], theta)
            keys = torch.stack([turned(k[head, j], place[j], theta) for j in seen])
            made[head, row, seen] = (keys @ query * DIM**-0.5).softmax(0)
    return made


def test_weights_are_those_of_keys_that_were_moved_one_by_one() -> None:
    model, ids = shared("llama", torch.float32, "eager"), words(1, 16)
    with torch.no_grad(), sc.attach(model, PINE(**EXAMPLE)):
        got = model(input_ids=ids, output_attentions=True).attentions[0][0]
    wanted = weights_by_hand(model, ids, SPANS)
    assert_close(got.double(), wanted, atol=1e-5, rtol=0)
    assert_close(got.sum(-1), torch.ones_like(got.sum(-1)))
    for a, b in SPANS:  # within a segment the order is causal, and all others are seen
        inside = got[:, a:b, a:b]
        assert (inside.triu(1) == 0).all() and (inside.diagonal(dim1=1, dim2=2) > 0).all()
        assert (got[:, a:b, [j for j in range(3, 12) if not a <= j < b]] > 0).all()


# ---- the statements -----------------------------------------------------------------------------------


def ordered(
    ids: Tensor, order: tuple[int, ...], start: int, lengths: tuple[int, ...]
) -> tuple[Tensor, tuple[Any, ...]]:
    """A prompt with its segments in another order, and their spans."""
    edges = [start, *(start + sum(lengths[: i + 1]) for i in range(len(lengths)))]
    parts = [ids[:, edges[i] : edges[i + 1]] for i in order]
    ends = [start, *(start + sum(len(p[0]) for p in parts[: i + 1]) for i in range(len(parts)))]
    return torch.cat([ids[:, :start], *parts, ids[:, edges[-1] :]], 1), tuple(itertools.pairwise(ends))


@cache
def cohere() -> Any:
    """Neighbouring dimensions turn together."""
    return enliven(T.CohereForCausalLM._from_config(T.CohereConfig(**TEXT))).double().eval()


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2_5_vl", "cohere"])
def test_answers_are_the_same_in_every_order(name: str) -> None:
    """Reading the prompt and writing; segments of unequal lengths, behind a picture where there is one."""
    model = cohere() if name == "cohere" else shared(name, DOUBLE)
    inputs = alone(two(family("llama" if name == "cohere" else name), DOUBLE), 0)
    start, lengths = inputs["input_ids"].shape[1], (2, 4, 3)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words(1, 15, seed=7)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    answers, bare = [], []
    for order in itertools.permutations(range(3)):
        ids, spans = ordered(inputs["input_ids"], order, start, lengths)
        given = {**inputs, "input_ids": ids}
        bare.append(run(model, given)[0, -1])
        with sc.attach(model, PINE(spans=spans)):
            made = generated(model, given, 3)
        answers.append(torch.stack(made.logits, 1)[0])
    for other in answers[1:]:
        assert_close(other, answers[0], atol=1e-4, rtol=0)
    assert max(float((b - bare[0]).abs().max()) for b in bare) > 0.01


def test_one_segment_is_the_model() -> None:
    model, inputs = shared("llama"), two(family("llama"))
    bare = run(model, inputs)
    for spans in ((), ((3, 9),)):
        with sc.attach(model, PINE(spans=spans)):
            assert torch.equal(run(model, inputs), bare)


def test_every_position_of_the_region_is_taken_once() -> None:
    weight = torch.rand(4, 7, 3, generator=torch.Generator().manual_seed(0))
    moves = Region([*SPANS]).moves(weight)
    tokens = [(j, s) for s, (a, b) in enumerate(SPANS) for j in range(a, b)]
    for head, row in itertools.product(range(4), range(7)):
        places = [j + int(moves[head, row, s]) for j, s in tokens]
        assert sorted(places) == [*range(3, 12)]
        weightiest = int(weight[head, row].argmax())
        assert SPANS[weightiest][1] + int(moves[head, row, weightiest]) == 12


def test_of_two_segments_the_other_comes_second() -> None:
    moves = Region([(0, 3), (3, 8)]).moves(torch.tensor([[torch.inf, 0.3], [0.2, torch.inf]]))
    assert moves.tolist() == [[5, -3], [0, 0]]


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = shared("llama", DOUBLE), {"input_ids": words(1, 20)}
    with sc.attach(model, PINE(**EXAMPLE)):
        at_once = run(model, inputs)
        monkeypatch.setattr("saccade.core.call.CHUNK", 3 * 4 * 20)  # three rows
        assert_close(run(model, inputs), at_once, atol=1e-10, rtol=0)


# ---- a model that likes what it read last --------------------------------------------------------------


def pairs(count: int, last: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two notes, a name and a value each, and the name that is asked for; and the value: it stands in the last note
    that often."""
    drawn = torch.Generator().manual_seed(seed)
    names = torch.stack([torch.randperm(4, generator=drawn)[:2] for _ in range(count)]) + 4
    values = torch.randint(12, 16, (count, 2), generator=drawn)
    asked = (torch.rand(count, generator=drawn) < last).long()
    notes = torch.stack([names, values], -1).flatten(1)
    first, asked = torch.ones(count, 1, dtype=torch.long), asked[:, None]
    return torch.cat([first, notes, names.gather(1, asked)], 1), values.gather(1, asked)[:, 0]


@pytest.mark.slow
def test_a_model_trained_to_like_the_last_note_likes_none_with_it() -> None:
    """Its mean over both orders is not kept: it was never trained to read notes side by side."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 20}
    model: Any = T.LlamaForCausalLM(T.LlamaConfig(**{**TEXT, **small, **heads}))
    learn = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(451):
        ids, value = pairs(128, 0.75, step)
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, -1], value)
        learn.zero_grad()
        loss.backward()
        learn.step()
    model.eval()
    ids, value = pairs(400, 0.5, 10_000)
    swapped = ids[:, [0, 3, 4, 1, 2, 5]]
    right: dict[str, list[float]] = {}
    for name, methods in (("bare", []), ("pine", [PINE(spans=((1, 3), (3, 5)))])):
        with sc.attach(model, *methods):
            last = ids[:, 5] == ids[:, 3]  # the answer stands in the second note
            for order, at in ((ids, last), (swapped, ~last)):
                hits = run(model, {"input_ids": order})[:, -1].argmax(-1) == value
                right.setdefault(name, []).extend(
                    [float(hits[at].float().mean()), float(hits[~at].float().mean())]
                )
    assert min(right["bare"][::2]) > max(right["bare"][1::2]) + 0.1  # it likes the last
    assert right["pine"][0] == right["pine"][3] and right["pine"][1] == right["pine"][2]


# ---- what it cannot do, and the embedded model --------------------------------------------------------


@pytest.mark.parametrize("spans", [((3, 5), (6, 9)), ((3, 5), (5, 5)), ((5, 9), (3, 5))], ids=str)
def test_spans_that_do_not_follow_each_other_are_refused(spans: Any) -> None:
    with pytest.raises(OptionError, match="follow"):
        PINE(spans=spans)


@pytest.mark.parametrize(
    ("name", "spans", "match"), [("gpt2", SPANS, "rotary"), ("llama", ((3, 5), (5, 90)), "one pass")]
)
def test_what_it_cannot_do_is_refused(name: str, spans: Any, match: str) -> None:
    model = shared(name)
    with sc.attach(model, PINE(spans=spans)), pytest.raises(InputError, match=match):
        run(model, {"input_ids": words(1, 16)})


def test_the_embedded_model_answers_alike_in_every_order() -> None:
    """Of sentences about its picture."""
    model, processor = sc.world.load("vlm")
    model = model.double()
    inputs = dict(sc.Question(processor, [sc.world.scene(9, "test").picture()], "what").inputs(model))
    told = ["there is a car .", "the cup is red .", "this is a boat , not a house ."]
    answers = []
    for order in itertools.permutations(told):
        made, spans = join(processor.tokenizer, "", order, "what colour is the car ?")
        begin, more = inputs["input_ids"].shape[1], made["input_ids"][:, spans[0][0] :]
        moved = tuple((a - spans[0][0] + begin, b - spans[0][0] + begin) for a, b in spans)
        given: Inputs = {
            "input_ids": torch.cat([inputs["input_ids"], more], 1),
            "pixel_values": inputs["pixel_values"],
        }
        assert processor.tokenizer.decode(more[0, : spans[0][1] - spans[0][0]]).strip() == order[0]
        with sc.attach(model, PINE(spans=moved)):
            answers.append(run(model, given)[0, -1])
    for other in answers[1:]:
        assert_close(other, answers[0], atol=1e-4, rtol=0)
