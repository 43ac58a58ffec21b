"""Every family of the zoo against every event: `python -m tests.matrix [FAMILY ...]` writes docs/matrix.md.

With names of families it prints their rows and writes nothing.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(ROOT / "tests"), str(ROOT / "src")) if path not in sys.path]

from helpers import MHA, Look, discover, everywhere, method, outputs_of, shared, unchanged  # noqa: E402
from zoo import FAMILIES, Family  # noqa: E402

import saccade as sc  # noqa: E402
from saccade.core.errors import SaccadeError  # noqa: E402
from saccade.core.plan import reach, rigid  # noqa: E402
from saccade.core.site import Site  # noqa: E402
from saccade.core.tokens import Tokens  # noqa: E402

PAGE = ROOT / "docs" / "matrix.md"
PACKAGES = ("torch", "transformers", "diffusers", "timm")
DONE, NOT_GIVEN, REFUSED, FAILED = "✓", "", "refused", "✗"
EDITS: dict[str, Callable[..., Any]] = {
    "inputs": lambda call, q, k, v: (q * 1.5, k, v),
    "bias": lambda call: torch.linspace(0, 2, call.k.shape[2]),
    "scores": lambda call, s: s * 1.5,
    "weights": lambda call, w: w * 0.5,
    "replace": lambda call: call.native(q=call.q * 1.5),
    "output": lambda call, o: o * 0.5,
    "hidden": lambda call, h: h * 0.5,
    "tokens": lambda call: Tokens(torch.arange(call.h.shape[1]) % 4 < 3),
    "evict": lambda call, cache: torch.arange(2, n) if (n := cache.keys.shape[2]) > 3 else None,
    "context": lambda site, states: states * 0.5,
}
EVENTS = (*EDITS, "skip")


@dataclass
class Row:
    """What one family showed. The notes say why a cell is no tick."""

    name: str
    sites: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def complete(self) -> bool:
        """Exact, and every event that a seam gives has changed the output in the right place."""
        return not self.skipped and FAILED not in self.cells.values()


def measure(f: Family) -> Row:
    row = Row(f.name)
    try:
        subject = Subject(f, row)
    except pytest.skip.Exception as skipped:
        row.skipped = str(skipped)
        return row
    row.sites = subject.described()
    row.cells["observed"], row.cells["detached"] = subject.exactness()
    for event in EVENTS:
        places = [sites[len(sites) // 2] for sites in subject.grouped(event).values()]
        found = [subject.show(event, site) for site in places]
        worst = (FAILED, DONE, REFUSED)  # what is refused in one tower only has a note
        row.cells[event] = next((cell for cell in worst if cell in found), NOT_GIVEN)
    return row


class Subject:
    """A family's model, and what it does alone."""

    def __init__(self, f: Family, row: Row) -> None:
        self.f, self.row = f, row
        self.model, self.inputs = shared(f.name), f.inputs()
        self.sites = discover(self.model)
        self.modules, self.out = self.forward()
        ran = {path for path, _ in self.modules}
        self.ran = {site.path for site in self.sites if site.path in ran and self.matters(site)}
        self.generates = "generates" in f.tags

    def forward(self) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """What every module gives, also those of torch that can do without their parts, and the outcome."""
        out: list[Tensor] = []
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            modules = outputs_of(self.model, lambda: out.append(self.outcome()))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        return modules, out[0]

    def outcome(self) -> Tensor:
        """All numbers of an answer in one row."""
        with torch.no_grad():
            out = self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(*self.inputs)
        return torch.cat([t.flatten().float() for t in numbers(out)])

    def matters(self, site: Site) -> bool:
        """Whether anything reads what it gives: asked by a hook of torch's own."""
        hook = site.module.register_forward_hook(lambda module, args, out: halved(out))
        try:
            return not torch.equal(self.forward()[1], self.out)
        finally:
            hook.remove()

    def generate(self) -> list[Tensor]:
        """Logits of every step."""
        out = self.model.generate(
            **self.inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return list(out.logits)

    def described(self) -> str:
        """How many sites of each kind a tower has, by seam."""
        attention = [site for site in self.sites if site.seam != "module"]
        counts = Counter((site.seam, f"{site.tower} {site.kind}") for site in attention)
        seams: dict[str, list[str]] = {}
        for (seam, place), count in counts.items():
            seams.setdefault(seam, []).append(f"{count} {place}")
        idle = sum(site.path not in self.ran for site in attention)
        text = "; ".join(f"{seam}: {', '.join(places)}" for seam, places in seams.items())
        return text + (f" ({idle} idle)" if idle else "")

    def exactness(self) -> tuple[str, str]:
        """While it is observed everywhere, and after."""
        bare, look = self.outcome(), Look(sites=everywhere(self.model))
        try:
            with unchanged(self.model):
                with sc.attach(self.model, look):
                    seen = self.outcome()
                after = self.outcome()
        except (AssertionError, SaccadeError) as error:
            self.note("observe", first_line(error))
            return FAILED, FAILED
        if not look.seen:
            self.note("observe", "no site was called")
            return FAILED, FAILED
        rounded = self.f.name in MHA and torch.allclose(seen, bare, atol=2e-6, rtol=2e-6)
        observed = DONE if torch.equal(seen, bare) else "rounded" if rounded else FAILED
        return observed, DONE if torch.equal(after, bare) else FAILED

    def grouped(self, event: str) -> dict[tuple[str, str, str], list[Site]]:
        """Sites that are given the event and run, by tower, kind and seam."""
        found: dict[tuple[str, str, str], list[Site]] = {}
        for site in self.sites:
            given = event in reach(site) and site.path in self.ran and site.kind != "embed"
            if event in ("context", "skip"):
                given = given and hasattr(site.module, "to_q")
            if event == "context":
                given = given and site.kind != "self" and "single" not in site.path
            if event == "evict":
                given = given and site.tower == "text" and self.generates
                given = given and not getattr(site.module, "is_kv_shared_layer", False)  # its owner is
            if event == "tokens":
                given = given and not rigid(site, self.sites)
            if given:
                found.setdefault((site.tower, site.kind, site.seam), []).append(site)
        return found

    def show(self, event: str, site: Site) -> str:
        """Whether the event changes the output of the site and of the model, and nothing before it."""
        calls: list[Any] = []
        edit = EDITS.get(event)
        if edit is None:  # skip
            kept: list[Any] = []
            hook = site.module.register_forward_hook(lambda module, args, out: kept.append(out))
            self.outcome()
            hook.remove()
            answer = halved(kept[0])
            edit = lambda site, p: answer  # noqa: E731

        def counting(*args: Any) -> Any:
            calls.append(args[0])
            return edit(*args)

        bare = self.generate() if event == "evict" else []
        try:
            with sc.attach(self.model, method(**{event: counting})(sites=site.name)):
                why = self.later(bare) if event == "evict" else self.here(site)
        except SaccadeError as error:
            self.note(event, f"refused: {first_line(error)}", site)
            return REFUSED
        except Exception as error:
            self.note(event, f"{type(error).__name__}: {first_line(error)}", site)
            return FAILED
        why = why if calls else "it was not called"
        if why:
            self.note(event, why, site)
        return FAILED if why else DONE

    def here(self, site: Site) -> str:
        """What is wrong with a change at the site; empty where nothing is."""
        inside = (site.path, f"{site.path}.")
        at = next(
            i for i, (path, _) in enumerate(self.modules) if path == inside[0] or path.startswith(inside[1])
        )
        modules, out = self.forward()
        if not all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(self.modules[:at], modules)):
            return "something before it changed"
        was, now = (
            next((t for path, t in given if path == site.path), None) for given in (self.modules, modules)
        )
        if was is not None and now is not None and torch.equal(was, now):
            return "its output did not change"
        if not out.isfinite().all():
            return "the model's output is not finite"
        return "the model's output did not change" if torch.equal(out, self.out) else ""

    def later(self, bare: list[Tensor]) -> str:
        """What is wrong with a change of the cache, which the first token does not see."""
        got = self.generate()
        if not torch.equal(got[0], bare[0]):
            return "the step before it changed"
        return "no later step changed" if all(map(torch.equal, got, bare)) else ""

    def note(self, event: str, text: str, site: Site | None = None) -> None:
        where = "" if site is None else f" at `{site.name}`"
        self.row.notes.append(f"{event}{where}: {text}")


def halved(out: Any) -> Any:
    if isinstance(out, tuple | list):
        return type(out)(halved(part) for part in out)
    if isinstance(out, dict):
        return type(out)(**{name: halved(part) for name, part in out.items()})
    return out * 0.5 if isinstance(out, Tensor) and out.is_floating_point() else out


def numbers(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return (
            [out.masked_fill(out < -1e30, 0)] if out.is_floating_point() else []
        )  # words that a model forbids
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, tuple | list) else ()
    return [t for part in parts for t in numbers(part)]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---- the page ---------------------------------------------------------------------------------------------

HEAD = """# What works with which model

{complete} of {families} families are observed and detached exactly, and every event that their seams give \
has changed the output: of the site, of the model, and of nothing before the site; in {whole} no event is \
refused anywhere. All are tiny random models of the real architectures.

- **✓** shown, at one site of every tower, kind and seam that gives it.
- An empty cell: no seam of this model gives the event, or nothing in it could take it.
- **refused**: an error that names the reason, listed below.
- **rounded**: equal to rounding, not to the bit (`nn.MultiheadAttention` has a kernel of its own).
- **✗** not shown, with the reason below.

*idle* are sites that the inputs of the test do not reach, such as a tower of sound beside a picture, or whose \
output the model itself leaves unread.

This page is written by `python -m tests.matrix`, with {versions}.
"""


COLUMNS = ("observed", "detached", *EVENTS)


def page(rows: Iterable[Row]) -> str:
    rows = sorted(rows, key=lambda row: row.name)
    shown = [row for row in rows if not row.skipped]
    complete = sum(row.complete for row in shown)
    whole = sum(row.complete and not row.notes for row in shown)
    head = HEAD.format(complete=complete, families=len(shown), whole=whole, versions=versions())
    table = [line(("family", "sites", *COLUMNS)), line(("---",) * 2 + (":---:",) * len(COLUMNS))]
    parts = [head, "\n".join([*table, *map(line_of, shown)])]
    if notes := [f"- `{row.name}`, {note}" for row in shown for note in row.notes]:
        parts += ["## Why not", "\n".join(notes)]
    if gone := [f"- {row.skipped}" for row in rows if row.skipped]:
        parts += ["## Not here", "\n".join(gone)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def line_of(row: Row) -> str:
    return line((f"`{row.name}`", row.sites, *(row.cells[column] for column in COLUMNS)))


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def versions() -> str:
    found = [(name, importlib.import_module(name).__version__.split("+")[0]) for name in PACKAGES]
    return ", ".join(f"{name} {version}" for name, version in found)


def main(names: Sequence[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for name in names or sorted(FAMILIES):
        rows.append(row := measure(FAMILIES[name]))
        marks = " ".join(f"{event}={cell}" for event, cell in row.cells.items() if cell)
        print(f"{name}: {row.skipped or marks}", *row.notes, sep="\n    ", flush=True)
        shared.cache_clear()
    if not names:
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)}: {sum(row.complete for row in rows)} of {len(rows)} complete")
    return 0 if all(row.complete or row.skipped for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
