"""What is found in a model, as data and in words."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from saccade.core.errors import SaccadeError

PICTURE = (96, 64)  # width and height of what the processor is given
ROUNDING = 1e-5  # of the largest output: what a fused path that is off while we look may differ by


# ---- what is found ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    library: str
    version: str
    known: str
    problem: str = ""


@dataclass(frozen=True)
class Places:
    """Sites of one tower and kind that take the same events."""

    sites: str  # a pattern that names them
    count: int
    tower: str
    kind: str
    seam: str
    events: tuple[str, ...]
    modules: tuple[str, ...]  # their classes


@dataclass(frozen=True)
class Heads:
    """Attention of one shape. `dim` is 0 where only scores are reached."""

    sites: str
    heads: int
    key_heads: int
    dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    reuses: str = ""  # the site whose keys these are


@dataclass(frozen=True)
class Cached:
    """Of the main tower: the cache's layers by type, layers without attention, why no token can leave."""

    layers: dict[str, str]
    elsewhere: dict[str, str]  # what mixes tokens there instead
    refusal: str = ""


@dataclass(frozen=True)
class Pictures:
    placeholders: dict[str, int]
    features: dict[str, str]  # by kind, who makes them
    read: str  # placeholders, cross-attention, or nothing
    layer: int | None  # of the vision tower, whose output becomes features
    tokens: int | None = None  # features of a small picture
    boxed: int | None = None  # and how many have a box in it
    problem: str = ""  # why there are no boxes


@dataclass(frozen=True)
class Trial:
    """A small pass: bare, observed everywhere, detached. Differences are shares of the largest number."""

    inputs: dict[str, str]
    fired: int = 0
    silent: tuple[str, ...] = ()  # patterns of sites that never fire
    unreached: tuple[str, ...] = ()  # modules that attend and are no site
    observed: float | None = None
    detached: float | None = None
    note: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Fit:
    slug: str
    kind: str
    fits: bool | None  # None: it brings models of its own
    missing: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    model: str
    parameters: int
    dtype: str
    device: str
    versions: tuple[Version, ...]
    places: tuple[Places, ...] = ()
    heads: tuple[Heads, ...] = ()
    cached: Cached | None = None
    pictures: Pictures | None = None
    chat_template: bool | None = None  # None without a processor
    trial: Trial | None = None
    methods: tuple[Fit, ...] = ()
    problem: str = ""  # why nothing can be attached
    remedy: str = ""

    @property
    def healthy(self) -> bool:
        """Something can be attached, and where a pass was tried, observing and detaching change nothing."""
        trial = self.trial
        if self.problem or trial is None:
            return not self.problem
        return not trial.problem and not trial.detached and (trial.observed or 0) <= ROUNDING

    def as_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **dataclasses.asdict(self)}

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def plain(self, width: int = 80) -> str:
        """The whole diagnosis in columns."""
        return "\n".join(_written(self, width))

    def __repr__(self) -> str:
        return self.plain()

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{escape(p.sites)}</code></td><td>{p.seam}</td><td>{' '.join(p.events)}</td></tr>"
            for p in self.places
        )
        yes = ", ".join(escape(f.slug) for f in self.methods if f.fits)
        no = "".join(
            f"<li><code>{f.slug}</code> {escape(f.missing)}</li>" for f in self.methods if f.fits is False
        )
        return (
            f"<b>{escape(self.model)}</b> {escape(self.problem)}<table>{rows}</table>"
            f"<details><summary>methods: {yes or 'none'}</summary><ul>{no}</ul></details>"
        )


# ---- in words --------------------------------------------------------------------------------------------


def _written(d: Diagnosis, width: int) -> Iterator[str]:
    place = f", {d.dtype} on {d.device}" if d.dtype else ""
    yield f"{d.model}  {d.parameters:,} parameters{place}"
    said = ((v.library, v.version, f"! {v.problem}" if v.problem else f"({v.known})") for v in d.versions)
    yield from _table(((library, f"{version}  {about}") for library, version, about in said), width)
    if d.problem:
        yield "\nNothing can be attached"
        yield from _table([("why", d.problem), ("way out", d.remedy)], width)
    if d.places:
        yield "\nSites"
        yield from _table([(p.sites, f"{p.seam:<9}  {' '.join(p.events)}") for p in d.places], width, 35)
    if d.heads or d.cached:
        yield "\nHeads and cache"
        leaves = any("evict" in p.events for p in d.places)
        yield from _table([*((h.sites, _shape(h)) for h in d.heads), *_cache_rows(d.cached, leaves)], width)
    if d.pictures:
        yield "\nPictures"
        yield from _table(_picture_rows(d.pictures, d.chat_template), width)
    if d.trial:
        yield "\nA small pass"
        yield from _table(_trial_rows(d.trial), width)
    if d.methods:
        yield f"\nMethods: {sum(fit.fits is True for fit in d.methods)} of {len(d.methods)}"
        yield from _table(_method_rows(d), width)


def _table(rows: Iterable[tuple[str, str]], width: int, indent: int = 0) -> Iterator[str]:
    """Names and beside them what is said of them, which goes on below itself or `indent` columns in."""
    rows = list(rows)
    column = min(22, max((len(name) for name, _ in rows), default=0))
    for name, text in rows:
        rest = " " * max(indent, column + 4)
        if len(name) > column:
            yield textwrap.fill(name.replace("|", "| "), width, initial_indent="  ", subsequent_indent="  ")
            name = ""
        head = f"  {name:<{column}}  "
        yield textwrap.fill(
            text,
            width,
            initial_indent=head,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )


def _shape(h: Heads) -> str:
    said = [f"{h.heads} heads" + (f" of {h.dim}" if h.dim else "")]
    said += [f"{h.key_heads} key heads"] if h.key_heads != h.heads else []
    said += [f"window {h.window}"] if h.window else []
    said += [f"softcap {h.softcap:g}"] if h.softcap else []
    said += ["sinks"] if h.sinks else []
    said += [f"the keys are those of {h.reuses}"] if h.reuses else []
    return ", ".join(said)


def _cache_rows(cached: Cached | None, leaves: bool) -> Iterator[tuple[str, str]]:
    if cached is not None:
        yield from (("cache", f"{kind} in {where}") for kind, where in cached.layers.items())
        yield from (("without attention", f"{where} ({what})") for what, where in cached.elsewhere.items())
        able = "entries can leave it, but not a static, quantised or offloaded one"
        yield "", cached.refusal or (able if leaves else "no entry can leave it, for no site takes evict")


def _picture_rows(pictures: Pictures, chat: bool | None) -> Iterator[tuple[str, str]]:
    if pictures.placeholders:
        yield "placeholders", ", ".join(f"{kind} {i}" for kind, i in pictures.placeholders.items())
    for kind, owner in pictures.features.items():
        yield f"{kind}s", owner
    after = "" if pictures.layer is None else f", as they are after vision layer {pictures.layer}"
    yield "reach the text", f"through {pictures.read}{after}" if pictures.read != "nothing" else "no"
    if pictures.tokens is not None:
        size = " x ".join(map(str, PICTURE))
        yield "boxes", f"{pictures.boxed} of the {pictures.tokens} features of a picture of {size}"
    elif pictures.problem:
        yield "boxes", pictures.problem
    if chat is not None:
        yield "chat template", "yes" if chat else "no"


def _trial_rows(trial: Trial) -> Iterator[tuple[str, str]]:
    if trial.inputs:
        yield "inputs", ", ".join(f"{name} {shape}" for name, shape in trial.inputs.items())
    if trial.note:
        yield "note", trial.note
    if trial.problem:
        yield "!", trial.problem
    if trial.observed is not None and trial.detached is not None:
        fired = f"{trial.fired} sites, never {', '.join(trial.silent)}"
        yield "fired", fired if trial.silent else f"all {trial.fired} sites"
        yield "observing", _exactness(trial.observed)
        yield "detaching", _exactness(trial.detached)
    if trial.unreached:
        yield "out of reach", ", ".join(trial.unreached)


def _method_rows(d: Diagnosis) -> Iterator[tuple[str, str]]:
    """Methods in groups: those that attach, and those that miss the same thing."""
    groups: dict[tuple[bool | None, str], list[str]] = {}
    for fit in sorted(d.methods, key=lambda fit: (fit.fits is not True, bool(fit.missing))):
        groups.setdefault((fit.fits, fit.missing), []).append(fit.slug)
    for (fits, missing), slugs in groups.items():
        names = ", ".join(slugs)
        yield {True: "yes", False: "no", None: "apart"}[fits], f"{names}: {missing}" if missing else names


def _exactness(difference: float) -> str:
    if difference == 0:
        return "exact to the bit"
    return f"{'exact to rounding' if difference <= ROUNDING else '! changes the output'} ({difference:.0e})"


def told(error: Exception) -> str:
    if isinstance(error, SaccadeError):
        return error.problem
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
