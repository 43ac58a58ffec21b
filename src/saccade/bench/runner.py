"""Every model under every stack on every task: what is said is kept as it comes, and is never asked twice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from saccade.bench import fingerprint
from saccade.bench.results import Results
from saccade.bench.rows import About, Row, Writer, locked, read_all
from saccade.core.driver import Driver, split
from saccade.core.errors import InputError
from saccade.core.question import Answer, Question, pictures_of
from saccade.core.session import Session, attach
from saccade.evals.asking import answers
from saccade.evals.registry import task
from saccade.evals.task import Sample, Task
from saccade.loading import load_model
from saccade.stack import Stack, load

PICTURES = 500  # of a task, where no limit is given
Models = str | Iterable[str] | Mapping[str, tuple[Any, Any]]  # a model that is loaded is with its processor


@dataclass(frozen=True)
class Asked:
    """A task, and what is asked: in the order in which it is, so that little of a batch is padded."""

    task: Task
    samples: Sequence[Sample]
    about: dict[str, Any]

    @classmethod
    def of(cls, name: str, limit: int, seed: int) -> Asked:
        found = task(name)
        samples = found.samples(limit, seed)
        if len({one.id for one in samples}) < len(samples):
            raise InputError(f"Samples of {name} share an id.", "give each its own")
        ordered = sorted(samples, key=lambda s: (len(s.images), len(s.earlier), len(s.question), s.question))
        return cls(found, ordered, fingerprint.of_task(name, found, samples, limit, seed))


def bench(
    models: Models,
    stacks: str | Stack | Iterable[str | Stack],
    tasks: str | Iterable[str],
    out: str | os.PathLike[str],
    limit: int | None = None,
    seed: int = 0,
    batch: int = 32,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Results:
    """What all that `out` holds came to, once every model has answered every task, bare and under every stack.

    `limit` is in pictures, or texts where there are none. A run that was cut off goes on where it was; rows of other
    settings or of other code stay apart.

    >>> sc.bench("world/vlm", ["var", "fastervlm(keep=0.25)"], ["world/pope-popular"], out="runs", limit=100)
    """
    if batch < 1:
        raise InputError(f"{batch} questions at a time are none.", "ask one at least")
    folder, chosen = Path(out), _stacks(stacks)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    models = [models] if isinstance(models, str) else models if isinstance(models, Mapping) else list(models)
    asked = [Asked.of(name, PICTURES if limit is None else limit, seed) for name in dict.fromkeys(names)]
    _check(chosen, asked)
    total = len(models) * len(chosen) * sum(len(one.samples) for one in asked)
    with locked(folder), tqdm(total=total, unit="answer", dynamic_ncols=True) as progress:
        read_all(folder)  # what another version wrote is refused before anything runs
        for name, model, processor in _loaded(models, dtype, device, trust_remote_code):
            for stack in filter(None, chosen):
                with attach(model, split(stack)[1]):
                    pass  # what cannot be attached is told at once, not after hours
            known = fingerprint.of_model(name, model)
            for one in asked:
                for stack in chosen:
                    progress.set_description(f"{name}, {stack or 'bare'}, {one.about['name']}")
                    with Writer(folder, _about(known, stack, one)) as writer:
                        _run(writer, model, processor, stack, one, batch, progress)
            del model, processor  # before the next is loaded
    return Results.read(folder)


def _stacks(given: str | Stack | Iterable[str | Stack]) -> list[Stack]:
    """Each once, and before them none, which they are compared to."""
    each = [given] if isinstance(given, str | Stack) else given
    found = [Stack()]
    for one in each:
        stack = one if isinstance(one, Stack) else load(one)
        if stack not in found:
            found.append(stack)
    return found


def _check(stacks: Iterable[Stack], asked: Iterable[Asked]) -> None:
    for stack in stacks:
        for part in stack:
            if not hasattr(part, "card"):
                problem = f"{type(part).__name__} has no card, by whose slug rows would name it."
                raise InputError(problem, "write `card = Card(slug=..., ...)` in its class")
        driver = split(stack)[0]
        for one in asked:
            if driver and any(sample.earlier for sample in one.samples):
                raise InputError(
                    f"{type(driver).__name__} answers one question, and {one.about['name']} asks several in a row.",
                    "leave one of them out",
                )


def _loaded(
    models: Iterable[str] | Mapping[str, tuple[Any, Any]],
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(models, Mapping):
        for name, (model, processor) in models.items():
            yield name, model, processor
    else:
        for name in models:
            yield (name, *load_model(name, dtype, device, trust_remote_code))


def _about(model: dict[str, Any], stack: Stack, asked: Asked) -> About:
    methods = sorted({type(part).__module__ for part in stack})
    return {
        "model": model,
        "stack": fingerprint.of_stack(stack, model["weights"]),
        "written": str(stack),
        "task": asked.about,
        "code": {
            "asking": fingerprint.of_code([fingerprint.ASKING]),
            "stack": fingerprint.of_code(methods),
        },
    }


def _run(
    writer: Writer, model: Any, processor: Any, stack: Stack, asked: Asked, batch: int, progress: tqdm[Any]
) -> None:
    progress.initial += len(writer.done)
    progress.n += len(writer.done)
    progress.refresh()
    if len(writer.done) == len(asked.samples):
        return
    driver, methods = split(stack)
    made = {"torch": torch.__version__, "transformers": transformers.__version__, "batch": batch}
    with attach(model, methods) if stack else contextlib.nullcontext() as session:
        for start in range(0, len(asked.samples), batch):
            due = [one for one in asked.samples[start : start + batch] if one.id not in writer.done]
            most = asked.task.max_new_tokens
            if driver and session:
                said = [_driven(session, driver, processor, one, most) for one in due]
            else:
                said = answers(model, processor, due, batch=batch, max_new_tokens=most)
            writer.add(_row(one, answer, made) for one, answer in zip(due, said, strict=True))
            progress.update(len(due))


def _driven(session: Session, driver: Driver, processor: Any, sample: Sample, max_new_tokens: int) -> Answer:
    images, options = pictures_of(sample.images), {"max_new_tokens": max_new_tokens}
    return session.run(driver, Question(processor, images, sample.question, options))


def _row(sample: Sample, answer: Answer, made: dict[str, Any]) -> Row:
    return Row(
        sample.id,
        sample.question,
        fingerprint.plain(sample.truth),
        sample.group,
        sample.picture,
        str(answer),
        answer.seconds,
        answer.tokens,
        made,
    )
