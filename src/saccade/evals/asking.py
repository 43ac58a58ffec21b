"""Asking a model of transformers many questions, in batches of equal numbers of pictures."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.question import Answer, Question, pictures_of, prepare_batch, written
from saccade.core.samples import to_model
from saccade.core.session import Session, attach
from saccade.evals.task import Sample


def answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Iterable[Method] = (),
    *,
    batch: int = 64,
    max_new_tokens: int = 64,
    min_new_tokens: int | None = None,
    title: str = "",
) -> list[Answer]:
    """What the model says to every sample, greedily, with the methods at work. Earlier questions of a sample are
    asked first, and what the model said to them is in the prompt of the next. Progress has a title, or is not shown.
    """
    if batch < 1:
        raise InputError(f"{batch} questions at a time are none.", "ask one at least")
    asked = [(*sample.earlier, sample.question) for sample in samples]
    talks: list[list[tuple[str, Answer]]] = [[] for _ in samples]  # what was asked and said
    methods = tuple(methods)
    attached = attach(model, methods) if methods else contextlib.nullcontext()
    with attached, tqdm(total=sum(map(len, asked)), desc=title, unit="answer", disable=not title) as progress:
        for turn in range(max(map(len, asked), default=0)):
            due = [i for i, questions in enumerate(asked) if turn < len(questions)]
            for some in _batches(due, samples, asked, turn, batch):
                images = [pictures_of(samples[i].images) for i in some]
                texts = [written(processor, len(images[0]), asked[i][turn], talks[i]) for i in some]
                inputs = prepare_batch(processor, images, texts)
                said = generated(model, processor, inputs, max_new_tokens, min_new_tokens)
                for i, text in zip(some, said, strict=True):
                    talks[i].append((asked[i][turn], text))
                progress.update(len(some))
    return [talk[-1][1] for talk in talks]


def driven(session: Session, driver: Driver, processor: Any, sample: Sample, max_new_tokens: int) -> Answer:
    images, options = pictures_of(sample.images), {"max_new_tokens": max_new_tokens}
    return session.run(driver, Question(processor, images, sample.question, options))


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


def generated(
    model: Any, processor: Any, inputs: Any, max_new_tokens: int, min_new_tokens: int | None = None
) -> list[Answer]:
    given = {name: to_model(model, value) for name, value in inputs.items()}
    first, start = _First(), time.perf_counter()
    made = model.generate(
        **given,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stopping_criteria=StoppingCriteriaList([first]),
    )
    ids = getattr(made, "sequences", made)
    begun = 1 if model.config.is_encoder_decoder else given["input_ids"].shape[1]
    lengths = _lengths(model, ids[:, begun:])
    seconds = (time.perf_counter() - start) / len(ids)
    said = ids if model.config.is_encoder_decoder else ids[:, begun:]
    tokenizer = getattr(processor, "tokenizer", processor)
    found = []
    for text, tokens in zip(tokenizer.batch_decode(said, skip_special_tokens=True), lengths, strict=True):
        answer = Answer(text.strip())
        answer.seconds, answer.first, answer.tokens = seconds, first.at - start, tokens
        found.append(answer)
    return found


class _First(StoppingCriteria):
    """Sees when the first token is there, and stops nothing."""

    at = math.nan

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if math.isnan(self.at):
            if input_ids.device.type != "cpu":
                torch.accelerator.synchronize(input_ids.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _lengths(model: Any, said: torch.Tensor) -> list[int]:
    """Tokens up to the one that ends an answer, and that one; (batch, tokens) is padded behind it."""
    ends = model.generation_config.eos_token_id
    last = torch.isin(said, torch.tensor([] if ends is None else ends, dtype=said.dtype, device=said.device))
    behind = last.cumsum(1).bool().sum(1) - last.any(1).long()
    found: list[int] = (said.shape[1] - behind).tolist()
    return found
