"""The same run twice: undisturbed, and killed again and again at random: `killed.py WHOLE KILLED LIMIT KILLS`.

Whoever is killed is forked, so that libraries are imported once. Printed is how many were killed, and how many of
them between a batch that was asked and its rows.
"""

import json
import os
import random
import signal
import sys
import time
from multiprocessing import RawValue
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saccade import world
from saccade.bench import runner
from saccade.evals.asking import answers
from saccade.evals.registry import task

STACK, TASK, BATCH = "fastervlm(keep=0.5)", "world/questions", 20
AT_WORK = RawValue("b")


def asking(*given: Any, **options: Any) -> Any:
    AT_WORK.value = 1
    said = answers(*given, **options)
    AT_WORK.value = 0
    return said


def small() -> tuple[Any, Any]:
    """The embedded model with fewer layers, which answers sooner."""
    model, processor = world.load("vlm")
    vision, text = model.model.vision_tower, model.model.language_model
    del vision.encoder.layers[2:], text.layers[1:]
    vision.config.num_hidden_layers, text.config.num_hidden_layers = 2, 1
    return model, processor


def lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*.jsonl"))


def main(whole: Path, killed: Path, limit: int, kills: int) -> None:
    tqdm.monitor_interval = 0  # whose thread would not be forked
    model = {"small": small()}
    rng, total = random.Random(0), 2 * len(task(TASK).samples(limit, 0))

    def run(out: Path) -> None:
        runner.bench(model, STACK, TASK, out, limit, batch=BATCH)

    died = at_work = 0
    runner.answers = asking  # type: ignore[assignment]
    for at in sorted(rng.randrange(total * 3 // 4) for _ in range(kills)):
        child = os.fork()
        if not child:
            AT_WORK.value = 0
            run(killed)
            os._exit(0)
        while lines(killed) < at:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        died += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        at_work += AT_WORK.value
    run(killed)
    run(whole)
    print(json.dumps({"killed": died, "at work": at_work}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
