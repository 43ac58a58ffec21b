"""What the tests of sparse prefills share: models that attend by a rule of the tests' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import shared
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from zoo import family, run

import saccade as sc
from saccade.core.method import Method

from .shared import alone, generated, two

DOUBLE = torch.float64


def softmax_over(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Of one head: queries and keys (tokens, dim), q scaled, seen (queries, keys)."""
    return (q @ k.T).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def by_rule(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """An attention for one sample: `answer` gives a head's output for a prompt, of scaled queries, keys and values;
    what is written on the prompt sees all."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        scale, groups = options.get("scaling") or q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
        heads = [(q[0, h] * scale, k[0, h // groups], v[0, h // groups]) for h in range(q.shape[1])]
        if q.shape[2] == k.shape[2]:
            out = [answer(*head) for head in heads]
        else:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            out = [softmax_over(*head, seen) for head in heads]
        return torch.stack(out)[None].transpose(1, 2).contiguous(), None

    return attention


def check_in_a_model(
    name: str, word: str, answer: Callable[[Tensor, Tensor, Tensor], Tensor], *methods: Method
) -> None:
    """Two samples, one of them padded, as prompts and while they are written on, against each alone by the rule."""
    AttentionInterface.register(word, by_rule(answer))
    AttentionMaskInterface.register(word, eager_mask)
    model, oracle, inputs = shared(name, DOUBLE), shared(name, DOUBLE, word), two(family(name), DOUBLE)
    with sc.attach(model, *methods):
        got = generated(model, inputs, 4)
    for sample in range(2):
        single = alone(inputs, sample)
        expected = generated(oracle, single, 4)
        start = inputs["input_ids"].shape[1]
        assert torch.equal(got.sequences[sample, start:], expected.sequences[0, -4:])
        difference = torch.stack(got.logits, 1)[sample] - torch.stack(expected.logits, 1)[0]
        assert float(difference.abs().max()) < 1e-5
    bare = run(model, inputs)[0, -1]
    with sc.attach(model, *methods):
        assert float((run(model, inputs)[0, -1] - bare).abs().max()) > 1e-4


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, (batch, heads, tokens, dim)."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def noise(tokens: int, *, heads: int = 4, key_heads: int = 2, batch: int = 1, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, tokens, 8, generator=generator, dtype=DOUBLE)
        for n in (heads, key_heads, key_heads)
    ]
