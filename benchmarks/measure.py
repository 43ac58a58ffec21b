"""Interleaved ratios, peak memory, and the table that they go into."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch

RESULTS = Path(__file__).parent / "results"
Variant = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Row:
    """One figure: the median over rounds of a variant's time over that of the case's first variant in the same
    round."""

    case: str
    variant: str
    ratio: float
    low: float  # quartiles of the rounds' ratios
    high: float
    limit: float | None
    milliseconds: float
    mebibytes: float | None = None  # by how much a fresh process grew

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        if self.ratio <= self.limit:
            return "holds"
        return "cannot tell" if self.low <= self.limit else "missed"


def interleaved(
    case: str,
    work: Callable[[], object],
    variants: Mapping[str, Variant],
    limits: Mapping[str, float],
    rounds: int,
    instead: Mapping[str, Callable[[], object]] = MappingProxyType({}),
    warm: Callable[[], object] | None = None,
) -> list[Row]:
    """Run all variants once in every round, in a new order each time, the first one being bare. A variant is
    entered, its work (`instead`, where it has its own) run once to warm up, or `warm` where that takes long, and
    timed."""
    base = next(iter(variants))
    now = clock()[1]
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    draw = random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            own = instead.get(name, work)
            with variants[name]():
                (warm or own)()
                start = now()
                own()
                times[name].append(now() - start)
    rows = []
    for name, taken in times.items():
        ratios = [mine / bare for mine, bare in zip(taken, times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(Row(case, name, middle, low, high, limits.get(name), 1e3 * statistics.median(taken)))
    return rows


def clock() -> tuple[str, Callable[[], float]]:
    """On one thread the work is all done by this process, and its own time says nothing of its neighbours'."""
    if torch.get_num_threads() == 1:
        return "CPU time of the process", time.process_time
    return "wall time", time.perf_counter


def peak_bytes(work: Callable[[], object]) -> int:
    """How much this process grew at most while working. In a process that has worked before, freed memory
    hides the growth: measure in a fresh one. (Linux)"""
    gc.collect()
    status = Path("/proc/self/status")
    before = _kilobytes(status.read_text(), "VmRSS")
    work()
    return 1024 * (_kilobytes(status.read_text(), "VmHWM") - before)


def in_fresh_process(module: str, *arguments: str) -> int:
    """What `python -m module arguments` prints last, a number."""
    command = [sys.executable, "-m", module, *arguments]
    # Else glibc moves its own thresholds, and what was freed between small kept blocks stays in the process.
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | fixed)
    return int(done.stdout.split()[-1])


def _kilobytes(status: str, name: str) -> int:
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def machine() -> dict[str, str]:
    names = ("torch", "transformers", "saccade")
    return {
        "cpu": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        ),
        "threads": str(torch.get_num_threads()),
        "clock": clock()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def write(name: str, rows: list[Row], notes: Mapping[str, str]) -> Path:
    """Rows as JSON, as a plot, and as a table under it."""
    from benchmarks.plot import draw  # only who writes needs matplotlib

    RESULTS.mkdir(exist_ok=True)
    about = machine() | dict(notes)
    data = {"about": about, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    draw(rows, RESULTS / f"{name}.svg")
    has_memory = any(row.mebibytes is not None for row in rows)
    head = ["case", "variant", "ratio", "quartiles", "limit", "", "ms", *["MiB"] * has_memory]
    lines = [
        f"# {name.capitalize()}",
        "",
        "Ratios of time to the first variant of each case, all run in turn in one process; median and quartiles.",
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
        f"![Ratios of time to the first variant of each case]({name}.svg)",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for case, members in groupby(rows, lambda row: row.case):
        lines += [_line([case if i == 0 else "", *_cells(row)][: len(head)]) for i, row in enumerate(members)]
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _cells(row: Row) -> list[str]:
    return [
        row.variant,
        f"{row.ratio:.3f}",
        f"{row.low:.3f} to {row.high:.3f}",
        "" if row.limit is None else f"{row.limit:.2f}",
        row.verdict,
        f"{row.milliseconds:.2f}",
        "" if row.mebibytes is None else f"{row.mebibytes:.0f}",
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
