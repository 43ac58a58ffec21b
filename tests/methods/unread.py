"""Steps of an answer, each a whole forward in which the keys that it does not read are masked, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from dense import everything, readers
from torch import Tensor

import saccade as sc

from .shared import Inputs, generated

Choose = Callable[[int, int, Tensor], Tensor | None]
"""Of a step and a layer, and the weights (heads, keys) of the newest row if it read all: what it reads (heads or 1,
keys), bool; None for all."""


def stepwise(model: Any, inputs: Inputs, written: Tensor, choose: Choose) -> tuple[Tensor, list[list[int]]]:
    """Logits of one sample's words, and how many keys each layer reads at each step, of its first head."""
    start, stop = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + len(written)
    gone: dict[int, Tensor] = {}
    logits, reads = [], []
    for step in range(len(written)):
        row, counts = start - 1 + step, []

        def forward(step: int = step, row: int = row) -> Any:
            cut = {layer: mask[:, :, : row + 1, : row + 1] for layer, mask in gone.items()}
            return everything(model, inputs, written[None, :step], cut, output_attentions=True)

        for layer in readers(model):  # a layer's choice rests on those below
            w = forward().attentions[layer][0, :, row]
            seen = choose(step, layer, w)
            if layer not in gone:
                gone[layer] = torch.zeros(1, w.shape[0], stop, stop, dtype=torch.bool)
            if seen is not None:
                gone[layer][0, :, row, : row + 1] = ~seen
            counts.append(row + 1 if seen is None else int(seen[0].sum()))
        logits.append(forward().logits[0, -1])
        reads.append(counts)
    return torch.stack(logits), reads


def told(model: Any, inputs: Inputs, *methods: Any, tokens: int = 6) -> tuple[Any, list[list[int]]]:
    """What is generated, and how many keys the fused kernel is given in each layer of the text at each step."""
    lengths: list[int] = []
    kernel = F.scaled_dot_product_attention

    def counting(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(k.shape[2])
        return kernel(q, k, *args, **kwargs)

    with sc.attach(model, *methods), mock.patch.object(F, "scaled_dot_product_attention", counting):
        made = generated(model, inputs, tokens)
    layers = len(made.past_key_values.layers)
    lengths = lengths[-layers * tokens :]  # those before are of the vision tower
    return made, [lengths[i : i + layers] for i in range(0, len(lengths), layers)]
