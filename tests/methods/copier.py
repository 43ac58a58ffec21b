"""A language model whose weights are set by hand: its head 0 of layer 1 looks so many tokens back, and what it
finds there is said next."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T

WORDS, PLACES = 24, 24  # directions of the stream: one for every word, then one for every place
BACK = 8  # the head of the row that says a word looks at the word that many tokens before it
COPIER, BESIDE = {"text.1.self": (0,)}, {"text.1.self": (1,)}
"""The head that copies, and one that looks at the word after, and says nothing."""


def copier() -> Any:
    width = WORDS + PLACES
    config = T.GPT2Config(
        vocab_size=WORDS,
        n_embd=width,
        n_layer=2,
        n_head=2,
        n_positions=PLACES,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = T.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        body = model.transformer
        body.wte.weight[:, :WORDS] = torch.eye(WORDS)
        body.wpe.weight[:, WORDS:] = torch.eye(PLACES)
        attention = body.h[1].attn
        query, key, value = attention.c_attn.weight.view(width, 3, 2, width // 2).unbind(
            1
        )  # (in, heads, dim)
        for head, later in ((0, 0), (1, 1)):
            query[WORDS:, head] = 3 * torch.eye(PLACES)
            for place in range(PLACES - BACK):
                key[WORDS + place + later, head, place + BACK - 1] = 3
        value[:WORDS, 0] = torch.eye(WORDS)
        attention.c_proj.weight[: width // 2, :WORDS] = 2 * torch.eye(WORDS)
    return model


PROMPT = (5, 9, 3, 14, 7, 11, 2, 8)
"""Of which it repeats every word."""
