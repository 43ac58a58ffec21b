"""Every model under every stack on every task: what is said is kept as it comes, and is never asked twice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, product
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tqdm import tqdm

from saccade.bench import fingerprint, timing
from saccade.bench.costs import Counted, counted
from saccade.bench.results import Results
from saccade.bench.rows import About, Row, Writer, locked, path_of, read, read_all
from saccade.core.driver import split
from saccade.core.errors import InputError, SaccadeError
from saccade.core.question import Answer
from saccade.core.session import attach
from saccade.evals.asking import answers, driven
from saccade.evals.registry import task
from saccade.evals.task import Sample, Task
from saccade.loading import check_name, load_model
from saccade.stack import Stack, load

PICTURES = 500  # of a task, where no limit is given
ALONE = 4  # samples of a task: of 2,000 answers a few more
ROUNDED = 32  # and so many where numbers are rounded so much that an answer may hang on its batch
NO_COUNT: tuple[Counted, None] = (
    {"refused": "A driver runs the model several times, and what is counted is one run."},
    None,
)
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
Models = str | Iterable[str] | Mapping[str, tuple[Any, Any]]  # a model that is loaded is with its processor


@dataclass(frozen=True)
class Asked:
    """A task, and what is asked: in the order in which it is, so that little of a batch is padded."""

    task: Task
    samples: Sequence[Sample]
    about: dict[str, Any]

    @property
    def few(self) -> list[Sample]:
        """Those that are asked alone too, and counted."""
        return self.spread(ALONE)

    def spread(self, most: int) -> list[Sample]:
        """From all over."""
        count = min(most, len(self.samples))
        return [self.samples[(2 * i + 1) * len(self.samples) // (2 * count)] for i in range(count)]

    @classmethod
    def of(cls, name: str, limit: int, seed: int) -> Asked:
        found = task(name)
        samples = found.samples(limit, seed)
        if len({one.id for one in samples}) < len(samples):
            raise InputError(f"Samples of {name} share an id.", "give each its own")
        ordered = sorted(samples, key=lambda s: (len(s.images), len(s.earlier), len(s.question), s.question))
        return cls(found, ordered, fingerprint.of_task(name, found, samples, limit, seed))


@dataclass(frozen=True)
class Settings:
    out: Path
    limit: int
    seed: int
    batch: int
    dtype: str | None
    device: str | None
    trust_remote_code: bool

    def asked(self, name: str) -> Asked:
        return Asked.of(name, self.limit, self.seed)


class Progress:
    """One display with the time left, whoever works."""

    def __init__(self, total: int, unit: str) -> None:
        self.bar = tqdm(total=total, unit=unit, dynamic_ncols=True)

    def begin(self, what: str, done: int) -> None:
        """Of `what` so many are done already, and took no time."""
        self.bar.set_description(what, refresh=False)
        self.bar.initial += done
        self.bar.n += done
        self.bar.refresh()

    def add(self, count: int) -> None:
        self.bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@dataclass(frozen=True)
class _Told:
    """The progress of a job, for the process that shows it."""

    tell: Connection

    def begin(self, what: str, done: int) -> None:
        self.tell.send(("begin", what, done))

    def add(self, count: int) -> None:
        self.tell.send(("add", count))


def bench(
    models: Models,
    stacks: str | Stack | Iterable[str | Stack],
    tasks: str | Iterable[str],
    out: str | os.PathLike[str],
    limit: int | None = None,
    seed: int = 0,
    batch: int = 32,
    *,
    jobs: int = 1,
    timing: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Results:
    """What all that `out` holds came to, once every model has answered every task, bare and under every stack.

    `limit` is in pictures, or texts where there are none. A run that was cut off goes on where it was; rows of other
    settings or of other code stay apart. `jobs` are processes, each of which loads the model. `timing` asks a few
    samples of each task alone, again and again, in turn with the bare model; see `saccade.bench.timing`.

    >>> sc.bench("world/vlm", ["var", "fastervlm(keep=0.25)"], ["world/pope-popular"], out="runs", limit=100)
    """
    for number, what in ((batch, "questions at a time"), (jobs, "jobs")):
        if number < 1:
            raise InputError(f"{number} {what} are none.", "give one at least")
    models = [models] if isinstance(models, str) else models if isinstance(models, Mapping) else list(models)
    if not isinstance(models, Mapping):
        for name in models:
            check_name(name)
    elif jobs > 1:
        raise InputError("Every job loads its model, and these are loaded.", "give names, or one job")
    settings = Settings(
        Path(out), PICTURES if limit is None else limit, seed, batch, dtype, device, trust_remote_code
    )
    chosen, names = _stacks(stacks), list(dict.fromkeys([tasks] if isinstance(tasks, str) else tasks))
    asked = [settings.asked(name) for name in names]
    _check(chosen, asked)
    with locked(settings.out):
        read_all(settings.out)  # what another version wrote is refused before anything runs
        with Progress(
            len(models) * len(chosen) * sum(len(one.samples) for one in asked), "answer"
        ) as progress:
            if jobs > 1:
                _in_jobs(jobs, list(product(models, names, chosen)), settings, progress)
            else:
                for name, model, processor in _loaded(models, settings):
                    _try(model, chosen)
                    _answer(name, model, processor, product(asked, chosen), settings, progress)
                    del model, processor  # before the next is loaded
        if timing:
            _time(models, chosen, asked, settings)
    return Results.read(settings.out)


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
    models: Iterable[str] | Mapping[str, tuple[Any, Any]], settings: Settings
) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(models, Mapping):
        for name, (model, processor) in models.items():
            yield name, model, processor
    else:
        for name in models:
            yield (name, *load_model(name, settings.dtype, settings.device, settings.trust_remote_code))


def _in_jobs(
    jobs: int, combinations: Sequence[tuple[str, str, Stack]], settings: Settings, progress: Progress
) -> None:
    """Each combination in one process, which ends when this one does: nobody is left to tell."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    taken = context.Value("i")  # of the combinations
    running: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(min(jobs, len(combinations))):
            told, tell = context.Pipe(duplex=False)
            given = (combinations, taken, settings, threads, tell)
            running[told] = context.Process(target=_job, args=given)
            running[told].start()
            tell.close()
        while running:
            for told in cast(list[Connection], wait(list(running))):
                try:
                    what, *facts = told.recv()
                except EOFError:
                    process = running.pop(told)
                    process.join()
                    if process.exitcode:
                        raise InputError(
                            f"A job ended with {process.exitcode}.",
                            "run the same command, which goes on, with one",
                        ) from None
                    continue
                if what == "fail":
                    raise facts[0]
                getattr(progress, what)(*facts)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _job(
    combinations: Sequence[tuple[str, str, Stack]],
    taken: Synchronized[int],
    settings: Settings,
    threads: int,
    tell: Connection,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the other process is sent too, and ends this one
    torch.set_num_threads(threads)
    try:
        asked = {name: settings.asked(name) for name in dict.fromkeys(task for _, task, _ in combinations)}
        for name, parts in groupby(_untaken(combinations, taken), lambda one: one[0]):
            for _, model, processor in _loaded([name], settings):
                _try(model, dict.fromkeys(stack for _, _, stack in combinations))
                mine = ((asked[task], stack) for _, task, stack in parts)
                _answer(name, model, processor, mine, settings, _Told(tell))
                del model, processor
    except SaccadeError as e:
        tell.send(("fail", e))


def _untaken(
    combinations: Sequence[tuple[str, str, Stack]], taken: Synchronized[int]
) -> Iterator[tuple[str, str, Stack]]:
    while True:
        with taken.get_lock():
            at, taken.value = taken.value, taken.value + 1
        if at >= len(combinations):
            return
        yield combinations[at]


def _try(model: Any, stacks: Iterable[Stack]) -> None:
    """What cannot be attached is told at once, not after hours."""
    for stack in filter(None, stacks):
        with attach(model, split(stack)[1]):
            pass


def _answer(
    name: str,
    model: Any,
    processor: Any,
    combinations: Iterable[tuple[Asked, Stack]],
    settings: Settings,
    progress: Progress | _Told,
) -> None:
    known = fingerprint.of_model(name, model)
    for one, stack in combinations:
        with Writer(settings.out, _about(known, stack, one)) as writer:
            progress.begin(f"{name}, {stack or 'bare'}, {one.about['name']}", len(writer.done))
            _run(writer, model, processor, stack, one, settings.batch, progress)


_of_code = lru_cache(None)(fingerprint.of_code)  # which may change on the disk while this runs


def _about(model: dict[str, Any], stack: Stack, asked: Asked) -> About:
    methods = tuple(sorted({type(part).__module__ for part in stack}))
    return {
        "model": model,
        "stack": fingerprint.of_stack(stack, model["weights"]),
        "written": str(stack),
        "task": asked.about,
        "code": {
            "asking": _of_code(fingerprint.ASKING),
            "stack": _of_code(methods),
        },
    }


def _run(
    writer: Writer,
    model: Any,
    processor: Any,
    stack: Stack,
    asked: Asked,
    batch: int,
    progress: Progress | _Told,
) -> None:
    if len(writer.done) == len(asked.samples):
        return
    driver, methods = split(stack)
    few, most = {one.id for one in asked.few}, asked.task.max_new_tokens
    rounded = {one.id for one in asked.spread(0 if driver or model.dtype == torch.float32 else ROUNDED)}
    with attach(model, methods) if stack else contextlib.nullcontext() as session:
        for start in range(0, len(asked.samples), batch):
            due = [one for one in asked.samples[start : start + batch] if one.id not in writer.done]
            if driver and session:
                said = [driven(session, driver, processor, one, most) for one in due]
            else:
                said = answers(model, processor, due, batch=batch, max_new_tokens=most)
            rows = [
                _row(one, answer, VERSIONS | {"batch": batch}) for one, answer in zip(due, said, strict=True)
            ]
            for at, one in enumerate(due):
                if one.id in few:
                    cost, alone = NO_COUNT if driver else counted(model, processor, one, most)
                    rows[at] = replace(rows[at], cost=cost, alone=alone)
                if one.id in rounded and rows[at].alone is None:
                    (alone,) = answers(model, processor, [one], max_new_tokens=most)
                    rows[at] = replace(rows[at], alone=str(alone))
            writer.add(rows)
            progress.add(len(due))


def _time(
    models: Iterable[str] | Mapping[str, tuple[Any, Any]],
    stacks: Sequence[Stack],
    asked: Sequence[Asked],
    settings: Settings,
) -> None:
    """In this process, alone on the machine, behind all answers."""
    total = len(list(models)) * len(stacks) * sum(len(one.few) for one in asked)
    with Progress(total, "timing") as progress:
        for name, model, processor in _loaded(models, settings):
            known = fingerprint.of_model(name, model)
            for one, stack in product(asked, stacks):
                about = _about(known, stack, one)
                costs = {row.id: row.cost for row in read(path_of(settings.out, about))[1]}
                with Writer(settings.out, timing.about(about, model.device)) as writer:
                    progress.begin(f"{name}, {stack or 'bare'}, {one.about['name']}", len(writer.done))
                    for due in [sample for sample in one.few if sample.id not in writer.done]:
                        cost = costs[due.id]
                        writer.add([timing.timed(model, processor, stack, due, one.task, cost, VERSIONS)])
                        progress.add(1)
            del model, processor


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
