"""What rows come to: the scores of every combination, what it took, and how it differs from the bare model."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.bench import measured
from saccade.bench.fingerprint import fingerprint
from saccade.bench.measured import CANNOT_TELL, COUNTED, FLIPS, NOTHING
from saccade.bench.rows import About, Row, Timed, read_all, read_timed
from saccade.core.errors import InputError
from saccade.evals.interval import Estimate, bootstrap, difference
from saccade.evals.registry import task
from saccade.evals.task import Scores, by_picture
from saccade.report.markdown import table

LEAST = 6  # pictures that must differ: five all go one way by chance too often, 2 * 0.5**5 > 0.05
LOWER = {"chair_i", "chair_s"}  # is better, as with every `partner beside anchor`
NEITHER = {"yes", "assumed", "words", "spearman", "pearson", "tokens"}
SECONDS = "seconds"  # which a batch shares, and a busy machine changes: without intervals
HEAD = ("task", "model", "stack", "samples", "score", "value", "against bare", "run")


@dataclass(frozen=True)
class Figure:
    """One score of one combination; what differs from the bare model is on the samples that both have answered."""

    task: str
    model: str
    stack: str
    run: str  # the fingerprint, by which older code is told from newer
    samples: int
    of: int
    score: str
    found: Estimate
    change: Estimate | None = None
    verdict: str = ""
    note: str = ""  # why there is no value, or on which machine it was timed

    @property
    def shown(self) -> str:
        return self.share or _shown(self.found)

    @property
    def share(self) -> str:
        """Of what is so few that a ratio would hide it: how many of how many."""
        value, count = self.found.value, self.found.count
        return f"{round(value * count)} of {count}" if self.score == FLIPS and count else ""

    def cells(self) -> tuple[str, ...]:
        change = f"{_shown(self.change, '+')} {self.verdict}" if self.change else self.verdict or self.note
        return (
            self.task,
            self.model,
            self.stack,
            f"{self.samples}" if self.samples == self.of else f"{self.samples} of {self.of}",
            self.score,
            self.shown,
            change,
            self.run,
        )

    def values(self) -> dict[str, Any]:
        """With a name for each."""
        same = {"task": self.task, "model": self.model, "stack": self.stack, "run": self.run}
        ends = {"value": self.found.value, "low": self.found.low, "high": self.found.high}
        change = self.change or NOTHING
        against = {"change": change.value, "change_low": change.low, "change_high": change.high}
        numbers = {name: None if math.isnan(x) else x for name, x in (ends | against).items()}
        counts = {"samples": self.samples, "of": self.of, "score": self.score, "count": self.found.count}
        return {**same, **counts, **numbers, "verdict": self.verdict, "note": self.note}


class Results(list[Figure]):
    """Figures that read as a table."""

    @classmethod
    def read(cls, out: Path) -> Results:
        """Of all combinations in a folder, also of those that are not done."""
        if not out.is_dir():
            raise InputError(f"There is no folder {out}.", "give the one that `saccade bench --out` wrote")
        runs = sorted(
            ((about, rows) for about, rows in read_all(out) if rows), key=lambda run: _order(run[0])
        )
        bare = {_partner(about): rows for about, rows in runs if not about["stack"]}
        timed = {_combination(about): (about, rows) for about, rows in read_timed(out) if rows}
        figures = cls()
        for about, rows in runs:
            beside = bare.get(_partner(about), [])
            figures += _figures(about, rows, beside if about["stack"] else [])
            if fingerprint(about) in timed:
                figures += _timed(about, rows, beside, *timed[fingerprint(about)])
        return figures

    def __repr__(self) -> str:
        return self.plain(shutil.get_terminal_size().columns) if self else "no results"

    def plain(self, width: int) -> str:
        """A block for every combination."""
        lines: list[str] = []
        before: tuple[str, ...] = ()
        names = max((len(figure.score) for figure in self), default=0)
        values = max((len(figure.shown) for figure in self), default=0)
        for figure in self:
            *what, score, value, change, run = figure.cells()
            if (*what, run) != before:
                before = (*what, run)
                lines += ["", f"{what[0]}  {what[1]}  {what[2]}  ({what[3]} answers, {run})"[:width]]
            lines.append(f"  {score:<{names}}  {value:<{values}}  {change}".rstrip())
        return "\n".join(lines).lstrip("\n")

    def markdown(self) -> str:
        return table(HEAD, (figure.cells() for figure in self))

    def csv(self) -> str:
        text = io.StringIO()
        if self:
            writer = csv.DictWriter(text, list(self[0].values()), lineterminator="\n")
            writer.writeheader()
            writer.writerows(figure.values() for figure in self)
        return text.getvalue()

    def json(self) -> str:
        return json.dumps([figure.values() for figure in self], indent=2, ensure_ascii=False)


def _order(about: About) -> tuple[Any, ...]:
    return about["task"]["name"], about["model"]["name"], about["written"], fingerprint(about)


def _partner(about: About) -> str:
    """What a combination shares with the bare one beside it."""
    return fingerprint([about["model"], about["task"], about["code"]["asking"]])


def _combination(timing: About) -> str:
    return fingerprint({key: value for key, value in timing.items() if key != "timing"})


def _head(about: About, rows: Sequence[Row]) -> tuple[str, str, str, str, int, int]:
    return (
        about["task"]["name"],
        about["model"]["name"],
        about["written"] or "bare",
        fingerprint(about),
        len(rows),
        about["task"]["samples"],
    )


def _timed(
    about: About, rows: Sequence[Row], bare: Sequence[Row], timing: About, timed: Sequence[Timed]
) -> list[Figure]:
    own, others = ({row.id: row.cost for row in each if row.cost} for each in (rows, bare))
    device, threads = timing["timing"]["device"], timing["timing"]["threads"]
    machine = f"{device}, {threads} thread{'s' * (threads > 1)}"
    return [
        Figure(*_head(about, rows), score, one.found, one.change, one.verdict, one.note or machine)
        for score, one in measured.timed(timed, own, others).items()
    ]


def _figures(about: About, rows: Sequence[Row], bare: Sequence[Row]) -> list[Figure]:
    name = about["task"]["name"]
    others = {row.id: row for row in bare}
    shared = sorted((row for row in rows if row.id in others), key=lambda row: row.id)
    pairs = [(row, others[row.id]) for row in shared]
    own = _scores(name, [row for row, _ in pairs]) if pairs else {}
    base = _scores(name, [other for _, other in pairs]) if pairs else {}
    figures = []
    for score, found in _scores(name, sorted(rows, key=lambda row: row.id)).items():
        change = difference(own[score], base[score]) if score in own and score in base else None
        if change and (math.isnan(change.value) or score == FLIPS):
            change = None
        told = verdict(score, change) if change else ""
        note = measured.refusal(rows) if score in COUNTED and math.isnan(found.value) else ""
        figures.append(Figure(*_head(about, rows), score, found, change, told, note))
    return figures


def verdict(score: str, change: Estimate) -> str:
    """In words, as far as an interval of 95% tells it, and the pictures that differ."""
    if score in (SECONDS, *COUNTED):
        return ""
    if change.count < LEAST or not (change.low > 0 or change.high < 0):
        return CANNOT_TELL
    if score in NEITHER:
        return "more" if change.low > 0 else "less"
    return "better" if (change.high < 0) == lower(score) else "worse"


def lower(score: str) -> bool:
    """Whether less of it is better."""
    return score in LOWER or " beside " in score


def _scores(name: str, rows: Sequence[Row]) -> Scores:
    """The task's own, and what an answer took."""
    said = [(row.sample, row.text) for row in rows]
    took = {row.id: row.tokens for row in rows}
    tokens = bootstrap(by_picture(said, lambda s, _: [took[s.id], 1]), lambda t: t[..., 0] / t[..., 1])
    seconds = Estimate(sum(row.seconds for row in rows) / len(rows), math.nan, math.nan, len(rows))
    return task(name).score(said) | {SECONDS: seconds, "tokens": tokens} | measured.counted(rows)


def _shown(e: Estimate, sign: str = "") -> str:
    if math.isnan(e.value):
        return "-"
    if math.isnan(e.low):
        return f"{e.value:{sign}.3f}"
    return f"{e.value:{sign}.3f} ({e.low:{sign}.3f} to {e.high:{sign}.3f})"
