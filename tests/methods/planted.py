"""A vision-language model whose weights are wired by hand, so that it is known what goes where and by which head.

Every token of the stream has a constant and a mark of what it is; those of a picture carry a signal too. A route
is a head of one layer whose readers look at the tokens of one mark, or else at the first token, and copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from zoo import FAMILIES

import saccade as sc

CONSTANT, FIRST, IMAGE, WORD, LAST, SIGNAL, MIDDLE, OUT = range(8)
"""Directions of the stream. The first five mark tokens, the others are carried by them."""
DIM = 16  # of a head
SINK, SOURCE = 7, 6  # places in a head that rotate slowly
QUESTION = "Is the red cup on the box?"
ANSWER, OTHERWISE = 200, 201  # what is said with the signal and without


@dataclass(frozen=True)
class Route:
    layer: int
    head: int
    reader: int
    source: int
    takes: int
    gives: int


def planted(*routes: Route, answer: int = ANSWER, otherwise: int = OTHERWISE, signal: float = 0.2) -> Any:
    """`WORD` marks the question's tokens, `LAST` the one that ends the prompt. With `OUT` at a token `answer`
    follows it, and `otherwise` without."""
    model: Any = FAMILIES["llava"].build()
    text, project = model.model.language_model, model.model.multi_modal_projector
    with torch.no_grad():
        for module in (text, project, model.lm_head):
            for parameter in module.parameters():
                parameter.zero_()
        for name, parameter in text.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
        text.embed_tokens.weight[:, CONSTANT] = 1
        for mark, ids in marks().items():
            text.embed_tokens.weight[list(ids), mark] = 1
        direction = torch.linspace(-1, 1, project.linear_1.weight.shape[1])
        project.linear_1.weight[0], project.linear_1.weight[1] = direction, -direction
        project.linear_2.weight[SIGNAL, :2] = signal  # gelu(x) + gelu(-x), nearly the size of x
        project.linear_2.bias[[CONSTANT, IMAGE]] = 1
        for route in routes:
            wire(text.layers[route.layer].self_attn, route)
        model.lm_head.weight[answer, OUT] = 30
        model.lm_head.weight[otherwise, CONSTANT] = 0.5
    return model


def wire(attention: Any, route: Route) -> None:
    group = route.head // 2  # heads share keys and values by twos
    q, k, v = route.head * DIM, group * DIM, group * DIM
    attention.q_proj.weight[q + SINK, CONSTANT] = 2
    attention.q_proj.weight[q + SOURCE, route.reader] = 8
    attention.k_proj.weight[k + SINK, FIRST] = 1
    attention.k_proj.weight[k + SOURCE, route.source] = 1
    attention.v_proj.weight[v, route.takes] = 1
    attention.o_proj.weight[route.gives, q] = 0.1


def marks() -> dict[int, set[int]]:
    """The ids that bear each mark."""
    assert FAMILIES["llava"].processor
    tokenizer = FAMILIES["llava"].processor().tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    frame = ids("user: ") + ids("\nassistant:")
    return {FIRST: {1}, WORD: set(ids(QUESTION)) - set(frame), LAST: {frame[-1]}}


def question(name: str = "llava", text: str = QUESTION, size: int = 48) -> sc.Question:
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    processor = FAMILIES[name].processor
    assert processor
    return sc.Question(processor(), [PIL.Image.fromarray(noise)], text, {"max_new_tokens": 2})


@contextmanager
def blinded(model: Any, layers: range, target: Tensor, source: Tensor) -> Iterator[None]:
    """Rows of `target` do not see columns of `source` (tokens,), by masks that the test makes."""
    tokens = len(target)
    seen = torch.ones(tokens, tokens).tril().bool() & ~(target[:, None] & source)
    mask = torch.zeros(tokens, tokens).masked_fill(~seen, -torch.inf)[None, None]
    hooks = [
        model.model.language_model.layers[i].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        for i in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
