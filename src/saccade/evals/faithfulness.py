"""Measuring how faithful a map is: pictures without its places, and how likely the same answer is beside them.

Pixels are removed, not tokens: the tower has spread what a place shows over its neighbours' tokens, which would still
tell it. They take the mean colour of their picture, for that of the place itself would tell what was there. All
pictures are said the answer to in one batch, word for word, with the methods at work as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.faithfulness import Faithfulness
from saccade.core.method import Method
from saccade.core.question import prepare_batch, written
from saccade.core.record import Recording, Words
from saccade.core.samples import to_model
from saccade.core.session import attach

STEPS = 8  # from all places to none
RANDOM = 3  # orders
TOKENS = 8192  # in one batch


def faithfulness(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    seen: Recording,
    word: Words = None,
    methods: Iterable[Method] = (),
    sample: int = 0,
    seed: int = 0,
) -> Faithfulness:
    """Of the map of a word, a mean over layers and heads. What must become unlikely is that word or, where it is one
    of the question, the answer."""
    known, words = seen.words_of(sample), seen.indices(word, sample)
    said = [i for i in words if known[i].said] or seen.indices(None, sample)
    if not said:
        raise InputError("There is no word whose likelihood could fall.", "ask so that something is answered")
    found = seen.seen(words, sample)
    heats = [found.grid(item) for item in range(len(images))]
    shapes, heat = [one.shape for one in heats], np.concatenate([one.ravel() for one in heats])
    counts = [round(len(heat) * step / STEPS) for step in range(STEPS + 1)]
    orders = {"map": [order(heat, seed)], "reversed": [order(heat, seed)[::-1]]}
    orders["random"] = [np.random.default_rng([seed, run]).permutation(len(heat)) for run in range(RANDOM)]
    without = [one[:count] for runs in orders.values() for one in runs for count in counts[1:-1]]
    rows = [blanked(images, shapes, places) for places in (without[0][:0], *without, orders["map"][0])]
    p = likelihood(
        model, processor, rows, seen, [p for i in said for p in known[i].positions], methods, sample
    )
    curves = iter(p[1:-1].reshape(-1, STEPS - 1).tolist())
    return Faithfulness(
        words,
        " ".join(known[i].text for i in words) if word is not None else "",
        sample,
        [count / len(heat) for count in counts],
        {name: [[float(p[0]), *next(curves), float(p[-1])] for _ in runs] for name, runs in orders.items()},
    )


def order(heat: np.ndarray, seed: int) -> np.ndarray:
    """Places from the brightest to the faintest, equal ones as they come at random."""
    shuffled = np.random.default_rng(seed).permutation(len(heat))
    return shuffled[np.argsort(-heat[shuffled], kind="stable")]


def blanked(
    images: Sequence[Image.Image], shapes: Sequence[tuple[int, ...]], places: np.ndarray
) -> list[Image.Image]:
    """The pictures without places, which are counted through all of them, (rows, columns) each."""
    gone, made = np.zeros(sum(rows * columns for rows, columns in shapes), bool), []
    gone[places] = True
    for image, (rows, columns) in zip(images, shapes, strict=True):
        here, gone = gone[: rows * columns].reshape(rows, columns), gone[rows * columns :]
        pixels = np.array(image.convert("RGB"))
        y, x = np.ogrid[: image.height, : image.width]
        mean = pixels.mean((0, 1)).round()
        pixels[here[y * rows // image.height, x * columns // image.width]] = mean
        made.append(Image.fromarray(pixels))
    return made


def likelihood(
    model: Any,
    processor: Any,
    pictures: Sequence[Sequence[Image.Image]],
    seen: Recording,
    positions: Sequence[int],
    methods: Iterable[Method] = (),
    sample: int = 0,
) -> np.ndarray:
    """Of tokens at positions of the answer, beside each row of pictures: the geometric mean of their probabilities."""
    assert seen.ids is not None
    answer: list[int] = seen.ids[sample, seen.answer_start : max(positions) + 1].tolist()
    at = [position - seen.answer_start for position in positions]
    text = written(processor, len(pictures[0]), seen.prompt)
    batch, found = max(1, TOKENS // seen.ids.shape[1]), []
    with attach(model, tuple(methods)):
        for start in range(0, len(pictures), batch):
            some = pictures[start : start + batch]
            inputs = prepare_batch(processor, some, [text] * len(some))
            logits = _replayed(model, inputs, answer)[:, at].double()
            chosen = torch.tensor([answer[i] for i in at], device=logits.device)
            log_p = logits.log_softmax(-1).gather(-1, chosen.expand(len(some), -1)[..., None])
            found.append(log_p[..., 0].mean(1).exp().cpu())
    return torch.cat(found).numpy()


def _replayed(model: Any, inputs: Any, answer: Sequence[int]) -> Tensor:
    """What was predicted where the answer is said word for word: (rows, tokens, vocabulary)."""
    first: list[int] = []

    def next_token(_: int, ids: Tensor) -> list[int]:
        first[:] = first or [len(ids)]
        return [answer[len(ids) - first[0]]]

    made = model.generate(
        **{name: to_model(model, value) for name, value in inputs.items()},
        do_sample=False,
        num_beams=1,
        max_new_tokens=len(answer),
        prefix_allowed_tokens_fn=next_token,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(made.logits, 1)
