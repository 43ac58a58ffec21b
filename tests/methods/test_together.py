"""A reduction, an eviction, an edit and a contrast in one `generate()`, against a loop written by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from dense import CLOSE, generate
from helpers import Exact, cast, shared, unchanged
from PIL import Image
from torch import Tensor
from zoo import family

import saccade as sc
from saccade.core.errors import AttachError

from .shared import Inputs, alone
from .towers import DOUBLE, attention

KEEP, OUTLIERS = 18, 7  # of 36 patches
BUDGET, WINDOW, SHARE = 16, 4, 0.1
SCORES = ((9.0, 1.0, 0.5, 0.5), (0.0, 3.0, 1.0, 1.0), (5.0, 5.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0))
SINK, DIMS, TAU = 0.3, (5, 47), 1.3
EDITED = 2  # of four layers VAR edits the third
ALPHA, BETA = 1.0, 0.05
DIM, WORDS = 16, 6
STACK = {
    "fastervlm": f"fastervlm(keep={KEEP / 36})",
    "sparsemm": f"sparsemm(budget={BUDGET}, window={WINDOW}, share={SHARE}, "
    f"head_scores={[list(layer) for layer in SCORES]})",
    "var": f"var(p={SINK}, dims={list(DIMS)}, tau={TAU}, least=0, rho=0)",
    "damro": f"damro(k={OUTLIERS}, alpha={ALPHA}, beta={BETA})",
}


def asked() -> Inputs:
    """Two pictures and two questions, the shorter one padded on the left."""
    f, noise = family("llava"), np.random.default_rng(0)
    processor = f.processor()
    processor.tokenizer.padding_side = "left"
    pictures = [Image.fromarray(noise.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(2)]
    text = [f.prompt(1, "what is on the table ?"), f.prompt(1, "is there a red cup behind the old book ?")]
    made = dict(processor(images=pictures, text=text, padding=True, return_tensors="pt"))
    assert not made["attention_mask"].all()
    return cast(made, DOUBLE)


def answered(*slugs: str) -> Any:
    """What is generated, and its logits."""
    model = shared("llava", DOUBLE)
    with sc.attach(model, sc.load("+".join(STACK[slug] for slug in slugs))):
        return generate(model, asked(), WORDS)


# ---- the loop --------------------------------------------------------------------------------------------


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotated by their places (heads, tokens, dim)."""
    angles = torch.arange(x.shape[1])[:, None] * frequencies  # (tokens, dim / 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def redistributed(h: Tensor, w: Tensor, held: Tensor, image: Tensor) -> Tensor:
    """What VAR makes of the weights (heads, tokens, tokens): row by row, of the entries that a head holds."""
    massive = h.abs() / h.square().mean(-1, keepdim=True).sqrt() > TAU
    sinks = {j for j in range(len(image)) if massive[j, list(DIMS)].any()}
    pictures = image.nonzero()[:, 0].tolist()
    w = w.clone()
    for head, row in itertools.product(range(w.shape[0]), range(pictures[-1] + 1, w.shape[1])):
        mine = [j for j in range(row + 1) if held[head, row, j]]
        emptied = [j for j in mine if j in sinks]
        useful = [j for j in mine if j in pictures and j not in sinks]
        if not useful or not any(j in pictures for j in emptied):
            continue
        freed = (1 - SINK) * w[head, row, emptied].sum()
        w[head, row, emptied] *= SINK
        w[head, row, useful] += freed * w[head, row, useful] / w[head, row, useful].sum()
    return w


def read(model: Any, states: Tensor, held: Tensor, image: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Logits (tokens, words) of embeddings (tokens, width), and every layer's weights. A key head sees what is
    `held` (layers, key heads, rows, keys); with the picture's places VAR is at work."""
    weights, tower = [], model.model.language_model
    ahead = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
    for number, layer in enumerate(tower.layers):
        x, mine = layer.input_layernorm(states), layer.self_attn
        q, k, v = (
            p(x).unflatten(-1, (-1, DIM)).transpose(0, 1) for p in (mine.q_proj, mine.k_proj, mine.v_proj)
        )
        q, k = (turned(t, tower.rotary_emb.inv_freq) for t in (q, k))
        k, v, there = (t.repeat_interleave(2, 0) for t in (k, v, held[number]))  # by query head
        w = (q @ k.mT / DIM**0.5).masked_fill(ahead | ~there, -torch.inf).softmax(-1)
        if image is not None and number == EDITED:
            w = redistributed(states, w, there, image)
        states = states + mine.o_proj((w @ v).transpose(0, 1).flatten(1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        weights.append(w)
    return model.lm_head(tower.norm(states)), weights


def left(weights: list[Tensor]) -> Tensor:
    """What SparseMM leaves of a prompt (layers, key heads, tokens)."""
    tokens = weights[0].shape[1]
    older, kept = tokens - WINDOW, torch.zeros(4, 2, tokens, dtype=torch.bool)
    kept[..., older:] = True
    equal = int((BUDGET - WINDOW) * SHARE)
    for layer, head in itertools.product(range(4), range(2)):
        part = sum(SCORES[layer][2 * head : 2 * head + 2]) / sum(map(sum, SCORES))
        count = round(equal + part * (BUDGET - WINDOW - equal) * 8)
        mean = weights[layer][2 * head : 2 * head + 2, older:, :older].mean((0, 1)).tolist()
        pooled = [sum(mean[max(0, j - 2) : j + 3]) / 5 for j in range(older)]
        kept[layer, head, sorted(range(older), key=lambda j: -pooled[j])[:count]] = True
    return kept


class Prompt:
    """One that is followed: of the picture the patches that the class token looks at most."""

    def __init__(self, model: Any, inputs: Inputs, patches: int, edited: bool) -> None:
        self.model, self.kept = model, None
        ids = inputs["input_ids"][0]
        looked = attention("llava", model, inputs)[0][0, 1:]
        chosen = looked.topk(patches).indices.sort().values
        (features,) = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        first, words = int((ids == model.config.image_token_id).nonzero()[0]), model.get_input_embeddings()
        self.states = torch.cat([words(ids[:first]), features[chosen], words(ids[first + 36 :])])
        places = torch.arange(len(self.states))
        self.image = (places >= first) & (places < first + patches) if edited else None

    def next(self, written: list[int]) -> Tensor:
        """Logits (words,) behind what was written."""
        states = torch.cat([self.states, self.model.get_input_embeddings()(torch.tensor(written, dtype=int))])
        prompt, tokens = len(self.states), len(states)
        held = torch.ones(4, 2, tokens, tokens, dtype=torch.bool)
        if self.kept is not None:
            held[:, :, prompt:, :prompt] = self.kept[:, :, None]
        logits, weights = read(self.model, states, held, self.image)
        if self.kept is None:
            self.kept = left(weights)
            assert not self.kept.all()
        return logits[-1]


@torch.no_grad()
def by_hand(inputs: Inputs) -> tuple[Tensor, list[int]]:
    """Logits (words written, words) and what is written of one sample."""
    model = shared("llava", DOUBLE)
    with Exact():
        seen, outliers = Prompt(model, inputs, KEEP, True), Prompt(model, inputs, OUTLIERS, False)
        logits: list[Tensor] = []
        written: list[int] = []
        for _ in range(WORDS):
            whole, alone_ = seen.next(written), outliers.next(written)
            mixed = (1 + ALPHA) * whole - ALPHA * alone_
            p = whole.softmax(-1)
            logits.append(mixed.masked_fill(p < BETA * p.max(), -torch.inf))
            written.append(14 + int(logits[-1][14:].argmax()))  # no special token
    return torch.stack(logits), written


def test_a_stack_of_four_is_the_loop_written_by_hand() -> None:
    out, inputs = answered(*STACK), asked()
    for sample in range(2):
        logits, written = by_hand(alone(inputs, sample))
        got = torch.stack([step[sample] for step in out.logits])
        assert out.sequences[sample, inputs["input_ids"].shape[1] :].tolist() == written
        ruled_out = logits.isinf()
        assert torch.equal(got.isinf(), ruled_out) and ruled_out.any()
        assert float((got - logits)[~ruled_out].abs().max()) < CLOSE


@pytest.mark.parametrize("left_out", STACK)
def test_each_of_them_counts(left_out: str) -> None:
    whole, without = (torch.stack(answered(*slugs).logits) for slugs in (STACK, {*STACK} - {left_out}))
    assert float((whole.softmax(-1) - without.softmax(-1)).abs().max()) > 1e-3


def test_methods_of_different_events_may_stand_in_any_order() -> None:
    first = torch.stack(answered(*STACK).logits)
    for slugs in (tuple(STACK)[::-1], ("var", "damro", "fastervlm", "sparsemm")):
        assert torch.equal(torch.stack(answered(*slugs).logits), first)


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        (f"{STACK['sparsemm']}+{STACK['sparsemm']}", "would both thin out the cache"),
        (f"moba(block=4)+{STACK['var']}", "replaces attention"),
        (f"{STACK['var']}+moba(block=4)", "replaces attention"),
    ],
    ids=["two evictions", "moba+var", "var+moba"],
)
def test_methods_that_cannot_stand_together_are_refused(stack: str, why: str) -> None:
    with unchanged(shared("llava")), pytest.raises(AttachError, match=why):
        sc.attach(shared("llava"), sc.load(stack))
