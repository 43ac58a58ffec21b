"""Prompts that are read from nothing at every step and mixed by a formula: a decoding loop written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc

from .shared import Inputs, alone, generated, two

DOUBLE = torch.float64
MODELS = ("llava", "qwen2_5_vl", "world/vlm")
"""Two families of the zoo, and the model that ships."""
ASKED = "describe the image ."
WORDS = 4

Reader = Callable[[Tensor], np.ndarray]
"""Of the words written so far (tokens,), the logits of the next: (words,)."""


@cache
def _embedded() -> tuple[Any, Any]:
    model, processor = sc.world.load("vlm")
    return model.to(DOUBLE), processor


def model_of(name: str) -> Any:
    return _embedded()[0] if name == "world/vlm" else shared(name, DOUBLE)


def sample(name: str, index: int = 0, text: str = ASKED) -> Inputs:
    """One sample, with one picture where `index` is 0."""
    if name == "world/vlm":
        question = sc.Question(_embedded()[1], [sc.world.scene(index, "test").picture()], text)
        inputs = dict(question.inputs(model_of(name)))
    else:
        inputs = alone(two(family(name), DOUBLE), index)
    return {n: value for n, value in inputs.items() if n != "attention_mask"}


def reader(
    model: Any, inputs: Inputs, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: given
) -> Reader:
    """A prompt, read anew for every word. `change` is given what the text tower is given."""

    def read(written: Tensor) -> np.ndarray:
        ids = inputs["input_ids"]
        longer = {**inputs, "input_ids": torch.cat([ids, written[None]], 1)}
        longer.pop("attention_mask", None)  # there is no padding
        if "mm_token_type_ids" in inputs:
            longer["mm_token_type_ids"] = (longer["input_ids"] == model.config.image_token_id).long()
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _, args, given: (args, change(given)), with_kwargs=True
        )
        try:
            return run(model, longer)[0, -1].numpy()
        finally:
            hook.remove()

    return read


def lockstep(
    readers: Sequence[Reader], mix: Callable[..., np.ndarray], words: int = WORDS, written: Any = ()
) -> tuple[list[int], np.ndarray]:
    """What is written greedily, or is `written` already, and the mixed logits: (words, vocabulary)."""
    said, rows = list(written), []
    for step in range(len(said) or words):
        row = mix(*(read(torch.tensor(said[:step], dtype=torch.long)) for read in readers), step=step)
        rows.append(row)
        if len(said) == step:
            said.append(int(row.argmax()))
    return said, np.stack(rows)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def cut(logits: np.ndarray, base: np.ndarray, beta: float) -> np.ndarray:
    """Words whose probability in `base` is below beta of the largest cannot be said."""
    return np.where(np.exp(base - base.max()) >= beta, logits, -np.inf)


def told(
    model: Any, inputs: Inputs, *methods: Any, words: int = WORDS, **options: Any
) -> tuple[list[int], Tensor]:
    """What one sample is answered, and its log-probabilities: (words, vocabulary)."""
    with sc.attach(model, *methods):
        made = generated(model, inputs, words, **options)
    return made.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(
        made.logits
    ).double().log_softmax(-1)


def assert_says(
    model: Any, inputs: Inputs, method: Any, readers: Sequence[Reader], mix: Callable[..., np.ndarray]
) -> None:
    """The method's answer is that of the loop."""
    written, logits = told(model, inputs, method)
    said, expected = lockstep(readers, mix)
    assert written == said
    assert_close(logits.numpy(), log_softmax(expected), atol=2e-5, rtol=0)


@contextmanager
def eager(name: str) -> Iterator[Any]:
    """The model while it says its weights."""
    model = model_of(name)
    native = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(native)


def attention(name: str, inputs: Inputs) -> np.ndarray:
    """Of one prompt by the model's own weights, mean over heads: (layers, tokens, tokens)."""
    with eager(name) as model, torch.no_grad():
        return np.stack([w[0].mean(0).numpy() for w in model(**inputs, output_attentions=True).attentions])


def glances(name: str, inputs: Inputs) -> np.ndarray:
    """What its last word gives the picture: (layers, visual tokens)."""
    return attention(name, inputs)[
        :, -1, (inputs["input_ids"][0] == model_of(name).config.image_token_id).numpy()
    ]


def question(name: str, text: str = ASKED, words: int = WORDS, **options: Any) -> sc.Question:
    """One about a picture, whose answer does not end early."""
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    embedded = name == "world/vlm"
    processor = _embedded()[1] if embedded else family(name).processor()  # type: ignore[misc]
    picture = sc.world.scene(0, "test").picture() if embedded else Image.fromarray(noise)
    options = {"max_new_tokens": words, "min_new_tokens": words, **options}
    return sc.Question(processor, [picture], text, options)


def driven(name: str, driver: Any, asked: sc.Question) -> tuple[Any, list[int], Tensor]:
    """The answer, its tokens and their log-probabilities (words, vocabulary), those of the last generation."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append((ids, logits.double().log_softmax(-1)))
        return logits

    model = model_of(name)
    asked = dataclasses.replace(asked, options={**asked.options, "logits_processor": [spy]})
    with sc.attach(model) as session:
        answer = session.run(driver, asked)
    logits = torch.cat([row for _, row in seen[-asked.options["max_new_tokens"] :]])
    return answer, logits.argmax(-1).tolist(), logits


def assert_answers(name: str, driver: Any, asked: sc.Question, readers: Sequence[Reader], mix: Any) -> Any:
    """The driver's answer is that of the loop, in which it does not end either."""
    end = model_of(name).generation_config.eos_token_id

    def endless(*logits: np.ndarray, step: int) -> np.ndarray:
        row = mix(*logits, step=step)
        row[end] = -np.inf
        return row

    answer, written, logits = driven(name, driver, asked)
    said, expected = lockstep(readers, endless)
    assert written == said
    assert_close(logits.numpy(), log_softmax(expected), atol=2e-5, rtol=0)
    return answer
