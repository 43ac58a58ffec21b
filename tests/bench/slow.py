"""A run in a process of its own, of the model that ships, which waits before every batch: `slow.py OUT SECONDS`."""

import sys
import time
from typing import Any

from saccade import world
from saccade.bench import runner
from saccade.evals.asking import answers

if __name__ == "__main__":
    out, seconds = sys.argv[1], float(sys.argv[2])

    def waiting(*given: Any, **options: Any) -> Any:
        print("asks", flush=True)
        time.sleep(seconds)
        return answers(*given, **options)

    runner.answers = waiting  # type: ignore[assignment]
    models = {"world/vlm": world.load("vlm")}
    runner.bench(models, ["fastervlm(keep=0.5)"], ["world/questions"], out, limit=2, batch=4)
