"""Makes the catalogue, API and benchmark pages from the code and its results while the site is built."""

import ast
import inspect
import io
from functools import cache
from itertools import groupby
from pathlib import Path

from mkdocs.structure.files import File

import saccade
from saccade import catalog
from saccade.bench import figures
from saccade.bench.runner import bench
from saccade.core import errors
from saccade.report.markdown import table
from saccade.world import embedded
from saccade.world.sheet import sheet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = "results/index.md"
SOURCE = """
    options:
      show_root_toc_entry: false
      show_root_heading: false
      show_source: true
      members: false
"""


def on_files(files, config):
    entries = catalog.entries()
    pages = {"api.md": api(), "catalogue.md": overview([e.card for e in entries])}
    pages |= {f"catalogue/{e.card.slug}.md": page(e) for e in entries}
    pages["benchmarks.md"] = benchmarks()
    if files.get_file_from_path(RESULTS) is None:
        pages[RESULTS] = "# Results\n\nNothing has been published yet: `make results` does."
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for plot in BENCHMARKS.glob("results/*.svg"):
        files.append(File.generated(config, plot.name, content=plot.read_text()))
    scenes = io.BytesIO()
    sheet(8).save(scenes, "PNG")
    files.append(File.generated(config, "scenes.png", content=scenes.getvalue()))
    return files


def on_page_markdown(markdown, page, **_):
    if page.file.src_uri == RESULTS:
        title, found = markdown.split("\n", 1)
        return "\n\n".join([title, *older(*outdated()), found])
    return markdown.replace("<!-- errors -->", kinds_of_errors()).replace("<!-- cards -->", cards())


def kinds_of_errors() -> str:
    kinds = errors.SaccadeError.__subclasses__()
    return table(("error", "of what"), [(f"`{kind.__name__}`", inspect.getdoc(kind)) for kind in kinds])


def cards() -> str:
    """What is known of every embedded model."""
    parts = []
    for name in embedded.names():
        card = embedded.card(name)
        facts = {key: str(card[key]) for key in ("parameters", "steps", "seed", "device", "minutes", "torch")}
        parts += [f"### `world/{name}`", card["recipe"], table(facts, [facts.values()])]
        figures = card["figures"]
        splits = [split for split in figures if isinstance(figures[split], dict)]
        rows = [
            (task, measured, *(_interval(figures[split][task].get(measured)) for split in splits))
            for task in figures[splits[0]]
            for measured in figures[splits[0]][task]
        ]
        parts += [f"On {figures['scenes']} scenes of each split, with 95% intervals:"]
        parts += [table(("task", "figure", *splits), rows)]
        parts += ["Known failures:", "\n".join(f"- {failure}" for failure in card["failures"])]
    return "\n\n".join(parts)


def _interval(estimate) -> str:
    if estimate is None or estimate["value"] is None:
        return ""
    ends = (estimate["low"], estimate["high"])
    return f"{estimate['value']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if None not in ends else "")


def api() -> str:
    """The public names; the methods are in the catalogue."""
    objects = [bench if name == "bench" else getattr(saccade, name) for name in saccade.__all__]
    shown = [o for o in objects if inspect.isfunction(o) or inspect.isclass(o)]
    return "\n\n".join(
        [
            "# API",
            "All of these are names of `saccade`.",
            *(f"::: {o.__module__}.{o.__qualname__}" for o in shown),
        ]
    )


def overview(cards) -> str:
    parts = ["# Catalogue", f"{len(cards)} systems. `saccade methods WORDS` searches them."]
    for family, members in groupby(cards, lambda card: card.family):
        rows = [
            (f"[`{c.slug}`](catalogue/{c.slug}.md)", c.name, c.target, c.trains, c.summary) for c in members
        ]
        parts += [f"## {family.capitalize()}", table(("slug", "name", "target", "trains", "what"), rows)]
    return "\n\n".join(parts)


def page(entry) -> str:
    card = entry.card
    facts = {
        "paper": card.paper,
        "code": f"<{card.code}>" if card.code else "",
        "the paper's figure": card.headline,
        "algorithm": {"known": "as published", "abstract": "partly reconstructed"}[card.sure],
        "kind": f"{card.kind}, {card.form}",
        "target": card.target,
        "needs": ", ".join(card.needs),
        "trains": card.trains,
        "neutral": ", ".join(f"`{name}={value!r}`" for name, value in card.neutral.items()),
        "tags": ", ".join(card.tags),
    }
    options = [(f"`{o.name}`", f"`{o.default}`", o.doc, o.limits) for o in entry.options]
    parts = [f"# {card.name}", entry.description, table(("", ""), [f for f in facts.items() if f[1]])]
    if card.choices:
        parts += ["## Choices", "\n".join(f"- {choice}" for choice in card.choices)]
    parts += ["## Options", table(("option", "default", "meaning", "allowed"), options)]
    parts += measured(card.slug)
    parts += ["## Code", f"::: {entry.module}.{entry.class_name}{SOURCE}"]
    return "\n\n".join(parts)


def measured(slug) -> list[str]:
    """What `make results` found of a method."""
    if not (rows := figures.of(slug)):
        return []
    told = f"On {figures.published()['scenes']:,} scenes, beside the [others](../results/index.md)."
    return ["## Measured", told, *older(slug), table(figures.HEAD, rows)]


@cache
def outdated() -> list[str]:
    return figures.outdated()


def older(*slugs) -> list[str]:
    """What must be said of figures that are older than their code."""
    found = ", ".join(f"`{slug}`" for slug in outdated() if slug in slugs)
    told = f"!!! note\n    Older than their code: the figures of {found}. {figures.REMEDY}."
    return [told] if found else []


def benchmarks() -> str:
    """What every command says of itself, and what it found."""
    parts = [
        "# Benchmarks",
        "Each section is the result of one command on one machine. A ratio is the median over rounds of a variant's "
        "time over that of the first variant in the same round; dots are medians, lines go from quartile to "
        "quartile. On one thread the clock is the CPU time of the process: on a machine that does nothing else "
        "it is the wall time, and on any other it leaves out the neighbours.",
    ]
    for result in sorted(BENCHMARKS.glob("results/*.md")):
        title, found = result.read_text().split("\n", 1)
        told = ast.get_docstring(ast.parse((BENCHMARKS / f"{result.stem}.py").read_text()))
        parts += [f"#{title}", told, found]
    return "\n\n".join(parts)
