"""What `saccade bench` costs beside its forwards: `python -m benchmarks.harness [--rounds N] [--samples N]`.

The bare loop draws the same samples, prepares the same batches, generates and decodes. The bench also checks and
hashes what it asks, counts a few samples, writes every row, and makes the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from typing import Any

import torch

from benchmarks.measure import Row, interleaved, write
from saccade import world
from saccade.bench.runner import bench
from saccade.core.question import pictures_of, prepare_batch, written
from saccade.evals.registry import task

TASK = "world/questions"
BATCH = 32
LIMIT = 1.03


def loop(model: Any, processor: Any, pictures: int) -> list[str]:
    asked = task(TASK)
    samples = sorted(asked.samples(pictures, 0), key=lambda one: (len(one.question), one.question))
    said: list[str] = []
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        images = [pictures_of(one.images) for one in some]
        texts = [written(processor, len(own), one.question) for own, one in zip(images, some, strict=True)]
        inputs = prepare_batch(processor, images, texts)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=asked.max_new_tokens)
        answers = ids[:, inputs["input_ids"].shape[1] :]
        said += processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return said


def run(rounds: int, samples: int) -> tuple[list[Row], dict[str, str]]:
    model, processor = world.load("vlm")
    pictures = samples * 10 // len(task(TASK).samples(10, 0))
    count = len(task(TASK).samples(pictures, 0))

    def harness() -> None:
        with tempfile.TemporaryDirectory() as out:
            bench({"world/vlm": (model, processor)}, [], TASK, out, limit=pictures, batch=BATCH)

    rows = interleaved(
        f"{count} samples of {TASK}",
        lambda: loop(model, processor, pictures),
        dict.fromkeys(("bare loop", "saccade bench"), contextlib.nullcontext),
        {"saccade bench": LIMIT},
        rounds,
        instead={"saccade bench": harness},
    )
    return rows, {"model": "world/vlm, float32", "batch": f"{BATCH}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="more rounds, narrower quartiles (5)")
    parser.add_argument("--samples", type=int, default=2000, help="about so many (2000)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found, said = run(chosen.rounds, chosen.samples)
    print(write("harness", found, said).read_text())
