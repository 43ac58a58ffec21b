"""A run in a process of its own, which waits before every batch, also in its jobs: `slow.py OUT SECONDS JOBS`."""

import sys
import time
from typing import Any

from saccade.bench import runner
from saccade.evals.asking import answers

OUT, SECONDS, JOBS = sys.argv[1:]


def waiting(*given: Any, **options: Any) -> Any:
    print("asks", flush=True)
    time.sleep(float(SECONDS))
    return answers(*given, **options)


runner.answers = waiting  # type: ignore[assignment]

if __name__ == "__main__":
    runner.bench(
        "world/vlm", ["fastervlm(keep=0.5)"], ["world/questions"], OUT, limit=2, batch=4, jobs=int(JOBS)
    )
