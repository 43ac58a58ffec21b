"""How long an answer takes and how much memory, the sample being asked alone, in turn by the bare model, under the
stack, and by an oracle in place of a reduction.

The oracle is the bare model and its tower, with a prompt as short as the reduction makes it on the mean of the layers.
All say as many tokens as the bare model does, two at least. A driver answers as it does, and the time in which it
prepares its pictures counts. Memory is by how much it grew at most.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from saccade.bench import fingerprint
from saccade.bench.costs import Counted
from saccade.bench.rows import About, Timed
from saccade.core.driver import split
from saccade.core.errors import InputError
from saccade.core.host import host_of
from saccade.core.question import Answer, pictures_of, prepare_batch, written
from saccade.core.samples import to_model
from saccade.core.session import attach
from saccade.evals.asking import answers, driven, generated
from saccade.evals.task import Sample, Task
from saccade.stack import Stack

ROUNDS = 5
SIDES = {"cpu": 2048}  # of the matrices by which a machine is measured
SIDE = 8192  # where there is an accelerator

Ask = Callable[[], Answer]


def about(combination: About, device: torch.device) -> About:
    """What timings may stand together."""
    return combination | {
        "timing": {
            "device": name_of(device),
            "threads": torch.get_num_threads(),
            "rounds": ROUNDS,
            "code": fingerprint.of_code([__name__]),
        }
    }


def timed(
    model: Any,
    processor: Any,
    stack: Stack,
    sample: Sample,
    task: Task,
    cost: Counted | None,
    made: dict[str, Any],
) -> Timed:
    """`cost` is what was counted of the sample under the stack."""
    (said,) = answers(model, processor, [sample], max_new_tokens=task.max_new_tokens)
    tokens = max(2, said.tokens)
    under = partial(_under, model, processor, sample, task, tokens)
    ways: dict[str, Callable[[], AbstractContextManager[Ask]]] = {"bare": partial(under, Stack())}
    refused: dict[str, str] = {}
    if stack:
        ways["stack"] = partial(under, stack)
    if split(stack)[0]:
        refused["first"] = "the answer of a driver begins with others"
    peak = {}
    for name, way in ways.items():
        with way() as ask:
            ask()
            try:
                peak[name] = grown(model.device, ask)
            except InputError as e:
                refused["peak"] = e.problem
    try:
        if oracle := _oracle(model, processor, sample, tokens, cost or {}):
            ways["oracle"] = lambda: nullcontext(oracle)
    except InputError as e:
        refused["oracle"] = e.problem
    seconds, first = _interleaved(ways, sample.id)
    limits = roofline(model.device, model.dtype)
    return Timed(sample.id, tokens, seconds, first, peak, refused, limits, made)


def _interleaved(
    ways: dict[str, Callable[[], AbstractContextManager[Ask]]], seed: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every round, and those to the first token; each way is warmed up whenever it is entered."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, list[float]] = {name: [] for name in ways}
    draw, order = random.Random(seed), list(ways)
    for _ in range(ROUNDS):
        draw.shuffle(order)
        for name in order:
            with ways[name]() as ask:
                ask()
                answer = ask()
            seconds[name].append(answer.seconds)
            first[name].append(answer.first)
    return seconds, first


@contextlib.contextmanager
def _under(
    model: Any, processor: Any, sample: Sample, task: Task, tokens: int, stack: Stack
) -> Iterator[Ask]:
    driver, methods = split(stack)
    with attach(model, methods) if stack else nullcontext() as session:
        if driver and session:
            yield lambda: driven(session, driver, processor, sample, task.max_new_tokens)
        else:
            yield lambda: answers(model, processor, [sample], max_new_tokens=tokens, min_new_tokens=tokens)[0]


def _oracle(model: Any, processor: Any, sample: Sample, tokens: int, cost: Counted) -> Ask | None:
    """None where the picture is not reduced."""
    placeholder = host_of(model).vocabulary.placeholders.get("image")
    if "visual" not in cost or placeholder is None or not sample.images:
        return None
    images = pictures_of(sample.images)
    inputs = prepare_batch(processor, [images], [written(processor, len(images), sample.question)])
    short = shortened(inputs["input_ids"], placeholder, round(cost["visual"]))
    if short is None:
        return None
    look = getattr(model.base_model, "get_image_features", None)
    if sample.earlier or look is None:
        raise InputError(
            "There is no oracle for what was said before, nor for a model without get_image_features.",
            "time another task or model",
        )
    seen = {
        name: to_model(model, inputs[name]) for name in inspect.signature(look).parameters if name in inputs
    }

    def ask() -> Answer:
        start = time.perf_counter()
        with torch.no_grad():
            look(**seen)
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        looked = time.perf_counter() - start
        (answer,) = generated(model, processor, short, tokens, tokens)
        answer.seconds, answer.first = answer.seconds + looked, answer.first + looked
        return answer

    return ask


def shortened(ids: torch.Tensor, placeholder: int, visual: int) -> dict[str, torch.Tensor] | None:
    """A prompt of words with so many in place of a picture's tokens (1, tokens), if that makes it shorter."""
    seen = ids[0] == placeholder
    keep = ~seen | (seen.cumsum(0) <= visual)
    if keep.all():
        return None
    words = torch.where(seen, ids[0, -1], ids[0])[keep][None]
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


# ---- the machine -----------------------------------------------------------------------------------------


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if device.type == "cpu" and info.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or device.type)


def grown(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes by which the memory that torch holds grew at most while working."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise InputError(f"The most memory that {device.type} held is not told.", "use cpu or cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of its own beginning and end
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), at, e.nbytes()) for at, e in enumerate(events) if e.name() == "[memory]")
    return max(accumulate(size for _, _, size in changes), default=0)


@lru_cache(None)
def roofline(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs in a second of a product of matrices, and bytes that a product with a vector reads: the best of five."""
    side = SIDES.get(device.type, SIDE)
    left, right = torch.rand(2, side, side, device=device).to(dtype)
    memory = torch.rand(8 * side, 2 * side, device=device)
    vector = memory[0]
    return {
        "flops": 2 * side**3 / _best(lambda: left @ right, device),
        "bytes": memory.nbytes / _best(lambda: memory @ vector, device),
    }


def _best(work: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
