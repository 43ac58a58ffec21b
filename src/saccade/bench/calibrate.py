"""Choosing one constant of a method, on the calibration split and nowhere else. (What a method *measures* of a model
is another thing: `session.calibrate`.)"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from saccade.bench.current import current
from saccade.bench.page import COSTS, TOLD, span
from saccade.bench.results import CANNOT_TELL, NEITHER, Figure, lower, verdict
from saccade.bench.rows import About
from saccade.bench.runner import bench
from saccade.core.errors import InputError, OptionError
from saccade.core.system import System
from saccade.evals.interval import difference
from saccade.evals.registry import for_choosing
from saccade.loading import load_model
from saccade.report.chart import Axis, alone, curve
from saccade.stack import Stack, load, written_value

FACTORS = (0.25, 0.5, 1, 2, 4)  # of the default, where an option has no upper bound
STEPS = 4  # from bound to bound, which are often extremes that nobody wants
PICTURES = 200
GUARD = {"chair_i": "recall", "chair_s": "recall"}  # who names nothing invents nothing


@dataclass(frozen=True)
class Choice:
    """What every value came to. The chosen one scores best, among those that do not make the guard worse."""

    slug: str
    option: str
    stack: Stack  # with the chosen value
    value: str  # as a stack writes it
    figures: Mapping[str, Figure]  # by value
    bare: Figure

    @property
    def best(self) -> Figure:
        return self.figures[self.value]

    @property
    def alike(self) -> list[str]:
        """Values whose score cannot be told from the chosen one's."""
        return [
            value
            for value, figure in self.figures.items()
            if value != self.value
            and verdict(figure.score, difference(figure.found, self.best.found)) == CANNOT_TELL
        ]

    def __repr__(self) -> str:
        task, score = self.bare.task, self.bare.score
        told = "less" if lower(score) else "more"
        lines = [f"{task}, {self.bare.samples:,} answers, by {score}: {told} is better", ""]
        names = {value: f"{self.option}={value}" for value in self.figures}
        wide = max(map(len, names.values()))
        for value, figure in {**self.figures, "": self.bare}.items():
            mark, name = "*" if value == self.value else " ", names.get(value, "bare")
            lines.append(f"{mark} {name:<{wide}}  {span(figure.found).shown}  {figure.verdict}".rstrip())
        if self.alike:
            lines += ["", f"Cannot be told from {self.value}: {', '.join(self.alike)}."]
        return "\n".join(lines)

    def json(self, about: About) -> str:
        held = {
            "stack": str(self.stack),
            "method": self.slug,
            "option": self.option,
            "value": self.value,
            "alike": self.alike,
            **{part: about[part] for part in ("model", "task", "code")},
            "figures": {"bare": self.bare.values()}
            | {value: one.values() for value, one in self.figures.items()},
        }
        return json.dumps(held, indent=2, ensure_ascii=False)

    def curve(self) -> str:
        """As SVG: the score over the values, beside the bare model's."""
        found = [span(figure.found) for figure in self.figures.values()]
        at, score = [*self.figures].index(self.value), self.bare.score
        y = Axis(TOLD.get(score, score), lower(score)).shown("↓↑")
        x = f"{self.option} of {self.slug}"
        return alone(curve([*self.figures], found, at, span(self.bare.found), x, y, ruled="bare"))

    def save(self, out: Path, about: About) -> None:
        """The choice, its curve, and a stack that is loaded by the name of its file."""
        weights = about["model"]["weights"]
        told = (
            f"# {self.option}={self.value} was chosen on {self.bare.task} for {self.bare.model} ({weights})."
        )
        texts = {"json": self.json(about), "svg": self.curve(), "stack": f"{told}\n{self.stack}\n"}
        for suffix, text in texts.items():
            (out / f"{self.slug}-{self.option}.{suffix}").write_text(text, "utf-8")


def calibrate(
    stack: str | Stack,
    model: str | Mapping[str, tuple[Any, Any]],
    task: str,
    option: str | None = None,
    values: Iterable[Any] | None = None,
    score: str | None = None,
    out: str | os.PathLike[str] = "calibration",
    limit: int = PICTURES,
    seed: int = 0,
    batch: int = 32,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Choice:
    """The best value of one option, by a task's first score unless another is named; where the task is one of results,
    its sibling on the calibration split is asked. The method's first strength is chosen, on a grid around its default
    and between its bounds, unless they are given. Values that are texts are read as a stack has them.

    The rows, the choice and its curve are in `out`; a run that was cut off goes on where it was.

    >>> sc.calibrate("vhr", "world/vlm", "world/broken/captions").stack
    """
    name, whole = for_choosing(task), load(stack) if isinstance(stack, str) else stack
    at, field = strength(whole, option)
    part, folder = whole[at], Path(out)
    tried = grid(part, field) if values is None else [_read(part, field.name, value) for value in values]
    stacks = {
        written_value(value): Stack(
            [*whole[:at], dataclasses.replace(part, **{field.name: value}), *whole[at + 1 :]]
        )
        for value in tried
    }
    if not stacks:
        raise InputError(f"No value of {field.name} is given.", "give some, or none to have a grid made")
    loaded = {model: load_model(model, dtype, device, trust_remote_code)} if isinstance(model, str) else model
    found = bench(loaded, stacks.values(), name, folder, limit, seed, batch)
    runs = current(folder, loaded, stacks.values(), [name], limit, seed)
    by_stack: dict[str, dict[str, Figure]] = {}
    for figure in found:
        if figure.run in runs:
            by_stack.setdefault(runs[figure.run]["written"], {})[figure.score] = figure
    if not {"", *map(str, stacks.values())} <= by_stack.keys():
        raise InputError("The code was changed while it ran.", "run the same command again")
    choice = choose(part.card.slug, field.name, stacks, by_stack, score)
    choice.save(folder, runs[choice.best.run])
    return choice


def choose(
    slug: str,
    option: str,
    stacks: Mapping[str, Stack],
    found: Mapping[str, Mapping[str, Figure]],
    score: str | None = None,
) -> Choice:
    """`stacks` are by the value of the option, and figures by stack, "" being bare, and by score."""
    bare = found[""]
    known = [name for name in bare if name not in COSTS and name not in NEITHER]
    score = score or known[0]
    if score not in known:
        raise InputError(f"{score!r} has no better and worse.", f"choose by one of {', '.join(known)}")
    figures = {value: found[str(stack)][score] for value, stack in stacks.items()}
    guard = GUARD.get(score)
    worth = {
        value: -figure.found.value if lower(score) else figure.found.value
        for value, figure in figures.items()
        if isfinite(figure.found.value)
        and (guard is None or found[str(stacks[value])][guard].verdict != "worse")
    }
    if not worth:
        raise InputError(
            f"No value of {option} can be chosen: each makes {guard or score} worse.", "give weaker values"
        )
    best = max(worth, key=lambda value: worth[value])
    return Choice(slug, option, stacks[best], best, figures, bare[score])


# ---- what is tried -------------------------------------------------------------------------------------


def strength(stack: Stack, option: str | None = None) -> tuple[int, dataclasses.Field[Any]]:
    """Where the method is whose option is chosen, and the option."""
    found = []
    for at, part in enumerate(stack):
        names = [option] if option else [*part.card.neutral]
        own = {field.name: field for field in dataclasses.fields(part) if field.init}
        found += [(at, own[name]) for name in names if name in own][:1]
    if len(found) == 1:
        return found[0]
    if option and not found:
        raise OptionError(f"{stack} has no option {option!r}.", "`saccade show SLUG` lists a method's")
    problem = f"{stack} has {'several options' if found else 'no option'} that could be meant."
    raise OptionError(problem, "name one, of one method")


def grid(method: System, field: dataclasses.Field[Any]) -> list[Any]:
    """Values to try: between the bounds of an option, or around its default where it has no upper one; with the
    default itself, and the neutral value."""
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    default, neutral = field.default, method.card.neutral.get(field.name)
    if choices:
        return list(choices)
    if isinstance(default, bool):
        return [False, True]
    if not isinstance(default, int | float) or (high is None and not default):
        raise OptionError(f"No grid follows from {field.name} of {method.card.slug}.", "give the values")
    if high is None:
        around = [default * factor for factor in FACTORS]
    else:
        start = 0 if low is None else low
        around = [start + (high - start) * step / STEPS for step in range(1, STEPS)]
    extra = [neutral] if isinstance(neutral, int | float) else []
    whole = isinstance(default, int)
    rounded = [round(value) if whole else float(f"{value:.3g}") for value in around]
    return sorted({default, *extra, *(value for value in rounded if low is None or value >= low)})


def _read(method: System, option: str, value: Any) -> Any:
    """A text is what it is in a stack."""
    if not isinstance(value, str):
        return value
    (read,) = load(f"{method.card.slug}({option}={value})")
    return getattr(read, option)
