"""Asking a model of transformers many questions, in batches of equal numbers of pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from tqdm import tqdm

from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.question import pictures_of, prepare_batch, written
from saccade.core.samples import to_model
from saccade.core.session import attach
from saccade.evals.task import Sample


def answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Iterable[Method] = (),
    *,
    batch: int = 64,
    max_new_tokens: int = 64,
    title: str = "",
) -> list[str]:
    """What the model says to every sample, greedily, with the methods at work. Earlier questions of a sample are
    asked first, and what the model said to them is in the prompt of the next."""
    if batch < 1:
        raise InputError(f"{batch} questions at a time are none.", "ask one at least")
    asked = [(*sample.earlier, sample.question) for sample in samples]
    talks: list[list[tuple[str, str]]] = [[] for _ in samples]  # what was asked and said
    methods = tuple(methods)
    attached = attach(model, methods) if methods else contextlib.nullcontext()
    with attached, tqdm(total=sum(map(len, asked)), desc=title, unit="answer") as progress:
        for turn in range(max(map(len, asked), default=0)):
            due = [i for i, questions in enumerate(asked) if turn < len(questions)]
            for some in _batches(due, samples, asked, turn, batch):
                images = [pictures_of(samples[i].images) for i in some]
                texts = [written(processor, len(images[0]), asked[i][turn], talks[i]) for i in some]
                inputs = prepare_batch(processor, images, texts)
                said = _generated(model, processor, inputs, max_new_tokens)
                for i, text in zip(some, said, strict=True):
                    talks[i].append((asked[i][turn], text))
                progress.update(len(some))
    return [talk[-1][1] for talk in talks]


def _batches(
    due: list[int], samples: Sequence[Sample], asked: Sequence[Sequence[str]], turn: int, size: int
) -> Iterator[list[int]]:
    """Equal numbers of pictures together, and the same questions, so that little is padded."""

    def pictures(i: int) -> int:
        return len(samples[i].images)

    ordered = sorted(due, key=lambda i: (pictures(i), len(asked[i][turn]), asked[i][turn]))
    for _, alike in groupby(ordered, pictures):
        group = list(alike)
        yield from (group[at : at + size] for at in range(0, len(group), size))


def _generated(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    given = {name: to_model(model, value) for name, value in inputs.items()}
    made = model.generate(**given, do_sample=False, max_new_tokens=max_new_tokens)
    ids = getattr(made, "sequences", made)
    said = ids if model.config.is_encoder_decoder else ids[:, given["input_ids"].shape[1] :]
    tokenizer = getattr(processor, "tokenizer", processor)
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
