"""Makes the catalogue and API pages from the code while the site is built."""

import inspect
from itertools import groupby

from mkdocs.structure.files import File

import saccade
from saccade import catalog

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
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def api() -> str:
    """The public names; the methods are in the catalogue."""
    objects = [getattr(saccade, name) for name in saccade.__all__]
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
    parts += ["## Code", f"::: {entry.module}.{entry.class_name}{SOURCE}"]
    return "\n\n".join(parts)


def table(head, rows) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
