"""The published table: every method of the catalogue that changes what an embedded model does, all on the same scenes.

python -m saccade.bench.published           one setting a method, on 200 scenes
python -m saccade.bench.published --full    several, on 1,000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saccade import catalog
from saccade.bench import figures
from saccade.bench.calibrate import grid, strength
from saccade.bench.current import current
from saccade.bench.fingerprint import of_code
from saccade.bench.page import Block, blocks, plots
from saccade.bench.results import Figure, Results
from saccade.bench.runner import ALONE, Asked, bench
from saccade.bench.timing import ROUNDS
from saccade.catalog import Entry
from saccade.core.driver import split
from saccade.core.errors import OptionError, SaccadeError, plainly
from saccade.core.session import attach
from saccade.evals.asking import answers, driven
from saccade.evals.task import Sample
from saccade.loading import load_model
from saccade.report.chart import alone
from saccade.report.markdown import table
from saccade.stack import Stack, load
from saccade.world import embedded

SCENES, FULL, SEED = 200, 1000, 0
ROWS, DOCS = Path("build/results"), Path("docs/results")
PLOT = "plot.svg"
TABLED = ("visual tokens", "gflops", "peak mebibytes", "first token ms", "per token ms", "speed-up")
FIRST = 16  # samples of a task, from which the time of all is told
TIMES = 2 * 2 * (ROUNDS + 1)  # that one of the few is asked under a stack and bare
TASKS = {  # by what a model does
    "answers": ("world/broken/captions", "world/broken/pope-adversarial", "world/questions"),
    "writes": ("world/recall of 32", "world/needle in 512", "world/given", "world/coloured"),
}
TOLD = """What `make results` found: every method of the catalogue that changes what an embedded model does, at its
defaults unless others are written, on the same {scenes} scenes of each task as the bare model. In brackets are 95%
intervals, or the quartiles of times and memory; then comes how a value differs from the bare model's, and what that
tells: better, worse, more, less, or that one cannot tell. `results.json` in `src/saccade/bench` has all of it."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m saccade.bench.published", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", action="store_true", help=f"several settings a method, {FULL:,} scenes")
    parser.add_argument("--scenes", type=int, metavar="N", help=f"({SCENES}, or {FULL:,} with --full)")
    parser.add_argument("--methods", nargs="+", metavar="SLUG", help="these alone; needs --to")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help=f"for page, plot and figures (page and plot: {DOCS})"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (%(default)s)")
    args = parser.parse_args()
    if args.to is None and (args.methods or args.scenes or not DOCS.parent.is_dir()):
        parser.error("what is published is whole, and made in the folder of the project: give --to")
    scenes = args.scenes or (FULL if args.full else SCENES)
    return publish(scenes, args.full, args.methods, args.rows, args.jobs, args.to)


def publish(
    scenes: int, several: bool, methods: Iterable[str] | None, rows: Path, jobs: int, to: Path | None
) -> int:
    """1 where a method broke, which is no way to refuse a model."""
    held = Held(scenes)
    for name in embedded.names():
        model, tasks = f"world/{name}", TASKS.get(embedded.card(name)["does"])
        if not tasks:
            print(f"{model} {embedded.card(name)['does']}, and no task asks for that.")
            continue
        loaded, asked = load_model(model), [Asked.of(task, scenes, SEED) for task in tasks]
        settings: dict[Stack, str] = {}
        seconds = seconds_of(loaded, Stack(), asked, jobs)
        for entry in entries(methods):
            slug, stacks = entry.card.slug, list[Stack]()
            with held.tried(slug, model):
                stacks = settings_of(slug, several)
            for stack in stacks:
                with held.tried(f"{stack}", model):
                    seconds += seconds_of(loaded, stack, asked, jobs)
                    settings[stack], held.code[slug] = slug, of_code([entry.module])
        counts = (len({*settings.values()}), len(settings), len(tasks), f"{scenes:,}")
        print("{}: methods {}, settings {}, tasks {}, scenes {}.".format(model, *counts), flush=True)
        print(f"That takes {_long(seconds)}, less what is in {rows} already.", flush=True)
        found = bench(model, settings, tasks, rows, scenes, SEED, jobs=jobs, timing=True)
        runs = current(rows, {model: loaded}, settings, tasks, scenes, SEED)
        held.found += [one for one in found if one.run in runs]
        held.methods |= {str(stack): slug for stack, slug in settings.items()}
    held.write(to)
    for what, model, why in held.broken:
        print(f"{what} broke on {model}: {why}")
    return int(bool(held.broken))


# ---- what is run ---------------------------------------------------------------------------------------


def entries(slugs: Iterable[str] | None = None) -> list[Entry]:
    """Of what changes something: all that is not neutral at some setting, and attaches."""
    chosen = map(catalog.entry, slugs) if slugs else catalog.entries()
    return [one for one in chosen if one.card.kind != "experiment" and one.card.neutral]


def settings_of(slug: str, several: bool) -> list[Stack]:
    """The defaults, and where several are wanted, the values of its strength beside them, but the neutral one."""
    stack = load(slug)
    if not several:
        return [stack]
    _, option = strength(stack)
    try:
        around = grid(stack[0], option)
    except OptionError:  # of some strengths no values follow
        return [stack]
    values = [value for value in around if value != stack[0].card.neutral.get(option.name)]
    return list(dict.fromkeys([stack, *(Stack([replace(stack[0], **{option.name: v})]) for v in values)]))


def seconds_of(loaded: tuple[Any, Any], stack: Stack, asked: Iterable[Asked], jobs: int) -> float:
    """That all samples will take, from a first batch, and the timing of the few. It also tells who refuses."""
    total = 0.0
    for one in asked:
        step = -(-len(one.samples) // FIRST)
        batch, few = one.samples[::step], one.samples[:1]
        whole, alone = (_asked(*loaded, stack, some, one.task.max_new_tokens) for some in (batch, few))
        total += whole / len(batch) * len(one.samples) / jobs + alone * ALONE * TIMES
    return total


def _asked(model: Any, processor: Any, stack: Stack, samples: Sequence[Sample], most: int) -> float:
    driver, methods = split(stack)
    start = time.perf_counter()
    with attach(model, methods) as session:
        if driver:
            for sample in samples:
                driven(session, driver, processor, sample, most)
        else:
            answers(model, processor, samples, max_new_tokens=most)
    return time.perf_counter() - start


def _long(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"about {minutes} minutes" if minutes < 120 else f"about {minutes / 60:.0f} hours"


# ---- what is written -----------------------------------------------------------------------------------


@dataclass
class Held:
    """All that is published."""

    scenes: int
    found: Results = field(default_factory=Results)
    methods: dict[str, str] = field(default_factory=dict)  # by stack
    code: dict[str, str] = field(default_factory=dict)  # by method, as it was
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # stack, model, why
    broken: list[tuple[str, str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def tried(self, stack: str, model: str) -> Iterator[None]:
        """What refuses or breaks is told, and the others are measured."""
        try:
            yield
        except SaccadeError as e:
            self.refused.append((stack, model, e.problem))
        except Exception as e:
            self.broken.append((stack, model, f"{type(e).__name__}: {e}"))

    def write(self, to: Path | None) -> None:
        """Without a folder, where the package and the pages have them."""
        file, docs = (to / figures.FILE.name, to) if to else (figures.FILE, DOCS)
        docs.mkdir(parents=True, exist_ok=True)
        made = blocks(self.found)
        file.write_text(self.json(made), "utf-8")
        (docs / "index.md").write_text(self.page(made), "utf-8")
        (docs / PLOT).write_text(alone(plots(made[0])[0]), "utf-8")

    def json(self, made: Iterable[Block]) -> str:
        """A line for every figure."""
        held = [
            {"method": self.methods.get(one.stack, ""), **_short(one)}
            for block in made
            for scores in block.stacks.values()
            for name in (*block.headline, *block.costs)
            if (one := scores.get(name))
        ]
        lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in held)
        about = {
            "scenes": self.scenes,
            "seed": SEED,
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "code": self.code,
            "refused": self.refused,
        }
        head = json.dumps(about, indent=2, ensure_ascii=False).removesuffix("\n}")
        return f'{head},\n  "figures": [\n{lines}\n]\n}}\n'

    def page(self, made: Iterable[Block]) -> str:
        parts = [
            "# Results",
            TOLD.format(scenes=f"{self.scenes:,}"),
            f"![What is invented against what is named]({PLOT})",
        ]
        for block in made:
            names = [*block.headline, *(cost for cost in block.costs if cost in TABLED)]
            rows = [
                (f"`{stack}`", *(_cell(scores.get(name)) for name in names))
                for stack, scores in block.stacks.items()
            ]
            parts += [f"## {block.model}, {block.task}", table(["stack", *names], rows)]
        if self.refused:
            rows = [(f"`{stack}`", model, " ".join(why.split())) for stack, model, why in self.refused]
            parts += ["## Not measured", table(["stack", "model", "why"], rows)]
        return "\n\n".join(parts) + "\n"


def _short(figure: Figure) -> dict[str, Any]:
    """What is read again."""
    values = figure.values()
    numbers = ("value", "low", "high", "change", "change_low", "change_high")
    rounded = {name: None if values[name] is None else float(f"{values[name]:.4g}") for name in numbers}
    return (
        {name: values[name] for name in ("model", "stack", "task", "score")}
        | rounded
        | {"verdict": figure.verdict}
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    held = _short(figure)
    return " ".join(filter(None, (figures.shown(held), figures.moved(held))))


if __name__ == "__main__":
    sys.exit(plainly(main)())
