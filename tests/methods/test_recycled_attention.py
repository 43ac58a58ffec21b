"""Recycled attention against whole forwards in which every step's unread keys are masked, chosen one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from dense import readers, without
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.reduction.recycled_attention import RecycledAttention

from .shared import Inputs, alone, generated, two
from .unread import stepwise, told

EXAMPLE: dict[str, Any] = {"keep": 6, "every": 2, "similarity": 0.8}
MODELS = ("llama", "gpt2")
DISCRETE = ("every", "similarity")
DOUBLE = torch.float64
STEPS = 9


def sample(name: str) -> Inputs:
    return alone(two(family(name), DOUBLE), 0)


# ---- by hand ---------------------------------------------------------------------------------------------


def by_hand(name: str, inputs: Inputs, written: Tensor, **options: Any) -> tuple[Tensor, list[list[int]]]:
    """Logits of one sample's words, and how many keys each layer reads at each step."""
    model, keep, every = shared(name, DOUBLE, "eager"), options["keep"], options["every"]
    over = {"max": max, "mean": lambda ws: sum(ws) / len(ws)}[options.get("group", "max")]
    limit = options.get("similarity", 2.0)
    best: dict[int, list[list[int]]] = {}  # by layer and key head
    since: dict[int, int] = {}
    asked: dict[int, Tensor] = {}
    queries: dict[int, Tensor] = {}
    hooks = [
        module.c_attn.register_forward_hook(
            lambda _, __, out, layer=layer: queries.update({layer: out[0, -1, :64].view(4, 16)})
        )  # of GPT-2, where nothing rotates them
        for layer, module in (readers(model).items() if limit <= 1 else ())
    ]

    def choose(step: int, layer: int, w: Tensor) -> Tensor | None:
        heads, keys = w.shape
        key_heads = getattr(model.config, "num_key_value_heads", heads)
        full = step == 0 or (since[layer] + 1) % every == 0
        if full and step and limit <= 1:
            full = float(F.cosine_similarity(queries[layer], asked[layer], dim=-1).mean()) < limit
        if full:
            group = heads // key_heads
            score = [
                [over([float(w[h * group + g, j]) for g in range(group)]) for j in range(keys)]
                for h in range(key_heads)
            ]
            best[layer] = [sorted(range(keys), key=lambda j: -s[j])[:keep] for s in score]
            since[layer] = 0
            asked.update({layer: queries[layer]} if limit <= 1 else {})
            return None
        since[layer] += 1
        seen = torch.zeros(heads, keys, dtype=torch.bool)
        for head in range(heads):
            recent = [keys - 1 - i for i in range(since[layer])]
            seen[head, (recent + best[layer][head * key_heads // heads])[:keep]] = True
        return seen

    try:
        return stepwise(model, inputs, written, choose)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"keep": 6, "every": 4}),
        ("llama", {"keep": 3, "every": 7, "group": "mean"}),
        ("gpt2", {"keep": 40, "every": 5}),
        ("gpt2", {"keep": 5, "every": 2, "similarity": 0.8}),
    ],
)
def test_every_step_reads_what_was_chosen(name: str, options: dict[str, Any]) -> None:
    """Indices after full steps, the group's reduction, what leaves, and how many keys are read."""
    inputs = sample(name)
    got, counted = told(shared(name, DOUBLE), inputs, RecycledAttention(**options))
    prompt = inputs["input_ids"].shape[1]
    logits, reads = by_hand(name, inputs, got.sequences[0, prompt:], **options)
    assert_close(torch.cat(got.logits), logits.float(), atol=1e-5, rtol=0)
    assert counted == reads
    assert got.past_key_values.layers[0].keys.shape[2] == prompt + 5  # the cache loses nothing
    if "similarity" in options:  # of the steps that ask, some are full and some are not
        assert {count > 5 for step in reads[2::2] for count in step} == {True, False}, reads


def test_between_full_steps_keep_keys_are_read() -> None:
    inputs = sample("llama")
    prompt = inputs["input_ids"].shape[1]
    _, counted = told(shared("llama", DOUBLE), inputs, RecycledAttention(keep=6, every=4), tokens=STEPS)
    assert counted == [[prompt + n if n % 4 == 0 else 6] * 4 for n in range(STEPS)]


# ---- what changes nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"keep": 6, "every": 1}, {"keep": 100, "every": 50}])
@pytest.mark.parametrize("name", MODELS)
def test_full_steps_or_room_for_all_is_the_model(name: str, options: dict[str, Any]) -> None:
    inputs = sample(name)
    bare = generated(shared(name, DOUBLE), inputs, STEPS)
    got, _ = told(shared(name, DOUBLE), inputs, RecycledAttention(**options), tokens=STEPS)
    assert torch.equal(got.sequences, bare.sequences)
    assert_close(torch.cat(got.logits), torch.cat(bare.logits), atol=1e-6, rtol=0)


def test_a_threshold_below_all_cosines_never_triggers_and_one_above_always() -> None:
    inputs = sample("gpt2")
    prompt = inputs["input_ids"].shape[1]
    for similarity, full in ((-1.0, False), (1.1, True)):
        method = RecycledAttention(keep=6, every=3, similarity=similarity)
        _, counted = told(shared("gpt2", DOUBLE), inputs, method, tokens=STEPS)
        expected = [prompt + n if n == 0 or (full and n % 3 == 0) else 6 for n in range(STEPS)]
        assert counted == [[count] * 4 for count in expected]


# ---- on a text ---------------------------------------------------------------------------------------------

TOPICS, LENGTH, READ = 8, 64, 40


def topical() -> Any:
    """A model that looks for the one topic of a text, and then expects that topic's word."""
    width = 2 * TOPICS + 2
    config = T.GPT2Config(
        vocab_size=width, n_embd=width, n_layer=1, n_head=1, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager", tie_word_embeddings=False,
    )  # fmt: skip
    model = T.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(width, dtype=DOUBLE))
        attention = model.transformer.h[0].attn
        _, key, value = attention.c_attn.weight.view(width, 3, width).unbind(1)
        attention.c_attn.bias[0] = 10.0  # of every query
        key[:TOPICS, 0] = 4.0
        value[:TOPICS, TOPICS : 2 * TOPICS] = torch.eye(TOPICS, dtype=DOUBLE)
        attention.c_proj.weight.copy_(torch.eye(width, dtype=DOUBLE))
        model.lm_head.weight.copy_(0.6 * torch.eye(width, dtype=DOUBLE))
    return model


def texts() -> Tensor:
    """(texts, tokens): a topic at place 12, and its word, among others, from there on."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(TOPICS, 2 * TOPICS, (8, LENGTH), generator=draw)
    own = torch.arange(8)[:, None] + TOPICS
    ids = torch.where(torch.rand(8, LENGTH, generator=draw) < 0.6, own, ids)
    ids[:, 12] = torch.arange(8)
    return ids


@torch.no_grad()
def test_a_texts_perplexity_is_below_that_of_sinks_and_a_window_of_as_many_keys() -> None:
    model, ids, keep, every = topical(), texts(), 12, 8
    with sc.attach(model, RecycledAttention(keep=keep, every=every)):
        out = model(ids[:, :READ], use_cache=True)
        rows = [out.logits[:, -1]]
        for place in range(READ, LENGTH - 1):
            out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
            rows.append(out.logits[:, -1])
    read = [place + 1 if (place - READ + 1) % every == 0 else keep for place in range(READ - 1, LENGTH - 1)]
    window = round(sum(read) / len(read)) - 4
    at = torch.arange(LENGTH)
    gone = (at[None] >= 4) & (at[None] <= at[:, None] - window)
    gone[:READ] = False
    with without(model, {0: gone[None, None]}):
        windowed = model(ids, use_cache=False).logits[:, READ - 1 : -1]

    def surprise(logits: Tensor) -> float:
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, READ:].flatten()))

    assert surprise(torch.stack(rows, 1)) < surprise(windowed) - 0.5
