"""The catalogue: which systems there are, read from their source text.

Nothing is registered and nothing is imported to be listed. A file in a family's folder *is* the entry: its
name is the slug, its docstring the description, the `card = Card(...)` in its class what we know of it.
"""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property
from html import escape
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from saccade.core.card import Card
from saccade.core.errors import OptionError, SaccadeError, UnknownMethodError, nearest

ROOT = Path(__file__).parent
FAMILIES = ("reduction", "steering", "probes", "diffusion", "training", "gaze", "networks", "layers", "evals")
SHARED = "evals"  # where a file without a card is no system: it helps to score


class CardError(SaccadeError):
    """A file of the catalogue that does not say what it is."""


@dataclass(frozen=True)
class Option:
    """One option as its declaration reads, unevaluated."""

    name: str
    annotation: str
    default: str  # source text; empty when the option must be given
    doc: str
    limits: str
    owner: str  # the class that declares it


@dataclass(frozen=True)
class Entry:
    card: Card
    module: str
    class_name: str
    description: str  # the module's docstring
    path: Path
    root: Path

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """Inherited ones first; one that is declared again stands where it was declared last."""
        return tuple(_options(self.path, self.class_name, self.root).values())


class Cards(list[Card]):
    """Cards that read as a table at a prompt and in a notebook."""

    def __repr__(self) -> str:
        return table(self, shutil.get_terminal_size().columns) or "no method"

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td><code>{escape(c.slug)}</code></td><td>{escape(c.family)}</td>"
            f"<td>{escape(c.summary)}</td></tr>"
            for c in self
        )
        return f"<table><tr><th>slug</th><th>family</th><th>summary</th></tr>{''.join(rows)}</table>"


def table(cards: Iterable[Card], width: int, accent: Callable[[str], str] = str) -> str:
    """Slug, family and summary in columns; long summaries go on below themselves."""
    cards = list(cards)
    slugs = min(24, max((len(c.slug) for c in cards), default=0))
    families = max((len(c.family) for c in cards), default=0)
    indent = " " * (slugs + families + 4)
    rows = []
    for c in cards:
        head = f"{c.slug:<{slugs}}  {c.family:<{families}}  "
        room = max(width, len(head) + 20)
        row = textwrap.fill(head + c.summary, room, subsequent_indent=indent, break_on_hyphens=False)
        rows.append(accent(c.slug) + row[len(c.slug) :])
    return "\n".join(rows)


def entries(root: Path = ROOT) -> list[Entry]:
    """Every entry, family by family."""
    found = [_read(path, root) for path in _files(root).values()]
    owners: dict[str, Path] = {}
    for e in found:
        if (other := owners.setdefault(e.class_name, e.path)) != e.path:
            raise CardError(
                f"{e.path}: the class {e.class_name} is also in {other}.",
                f"Rename one of them: both would be saccade.{e.class_name}.",
            )
    return found


def cards(root: Path = ROOT) -> list[Card]:
    return [e.card for e in entries(root)]


def entry(slug: str, root: Path = ROOT) -> Entry:
    """The entry of one slug; reads that one file only."""
    files = _files(root)
    if slug not in files:
        raise UnknownMethodError(
            f"No method is called {slug!r}.",
            nearest(slug.lower(), files) or "`saccade methods` lists them, `saccade methods WORDS` searches.",
        )
    return _read(files[slug], root)


def load_class(slug: str, root: Path = ROOT) -> type:
    """Import what stands behind a slug."""
    e = entry(slug, root)
    return getattr(import_module(e.module), e.class_name)


def load_named(class_name: str, root: Path = ROOT) -> type:
    """Import what stands behind a class name; AttributeError when the catalogue has no such class."""
    names: set[str] = set()
    for slug, path in _files(root).items():
        defined = re.findall(r"^class (\w+)", path.read_text("utf-8"), re.MULTILINE)
        if class_name in defined and _read(path, root).class_name == class_name:
            return load_class(slug, root)
        names.update(defined)
    near = nearest(class_name, names)
    raise AttributeError(f"no {class_name!r} in the catalogue{f': {near}' if near else '.'}")


# ---- search

_WEIGHTS = {"slug": 8, "name": 8, "tags": 5, "summary": 4, "paper": 3, "target": 2, "family": 2, "form": 2}
_ENDING = re.compile(
    r"(?<=\w{4})(?:ations?|at(?:e[sd]?|ing|ors?)|ions?|ings?|ers?|e[sd]|ies|ive|[esy])$|(?<=^\w{3})s$"
)
_WEAK = 0.3  # what scores below this share of the best is noise


def methods(words: str = "", family: str | None = None, root: Path = ROOT) -> Cards:
    """Search the catalogue, best first. Without words: all of it, family by family."""
    if family not in (None, *FAMILIES):
        remedy = nearest(str(family), FAMILIES) or f"the families are {', '.join(FAMILIES)}."
        raise OptionError(f"No family is called {family!r}.", remedy)
    pool = [e for e in entries(root) if family in (None, e.card.family)]
    wanted = set(_stems(words))
    if not wanted:
        return Cards(e.card for e in pool)
    scores = _scores(wanted, [_bag(e) for e in pool])
    floor = _WEAK * max(scores, default=0)
    order = sorted(range(len(pool)), key=lambda i: (-scores[i], pool[i].card.slug))
    return Cards(pool[i].card for i in order if scores[i] > 0 and scores[i] >= floor)


def _scores(wanted: set[str], bags: list[dict[str, float]]) -> list[float]:
    """BM25 without lengths: rare words count more, repetition saturates, and who answers to half of the
    words has half of the score."""
    vocabulary = set().union(*bags)
    totals, answered = [0.0] * len(bags), [0] * len(bags)
    for word in wanted:
        near = {term: c for term in vocabulary if (c := _closeness(word, term))}
        hits = [max((c * bag[term] for term, c in near.items() if term in bag), default=0.0) for bag in bags]
        count = sum(hit > 0 for hit in hits)
        rarity = log(1 + (len(bags) - count + 0.5) / (count + 0.5))
        for i, hit in enumerate(hits):
            totals[i] += rarity * hit / (hit + 4)
            answered[i] += hit > 0
    return [total * count / len(wanted) for total, count in zip(totals, answered)]


def _bag(e: Entry) -> dict[str, float]:
    bag: dict[str, float] = {}
    texts = [(_text(getattr(e.card, field)), weight) for field, weight in _WEIGHTS.items()]
    for text, weight in (*texts, (e.description, 1)):
        for stem in _stems(text):
            bag[stem] = bag.get(stem, 0) + weight
    return bag


def _text(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _stems(text: str) -> Iterator[str]:
    return (_ENDING.sub("", word) for word in re.findall(r"[^\W_]+", text.lower()))


def _closeness(word: str, term: str) -> float:
    if word == term:
        return 1
    typed = len(word) >= 3 and term.startswith(word)  # the beginning of a word, while it is being typed
    inflected = word.startswith(term) and len(term) >= max(4, 0.7 * len(word))
    return 0.5 if typed or inflected else 0


# ---- reading

_CARD = re.compile(r"^    card\b.*= Card\(", re.MULTILINE)
_CARD_WHOLE = re.compile(r"^    card\b.*?^    \)$", re.MULTILINE | re.DOTALL)


def _files(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for family in FAMILIES:
        for path in sorted((root / family).glob("[!_]*.py")):
            if family == SHARED and not _CARD.search(path.read_text("utf-8")):
                continue
            if path.stem in found:
                raise CardError(f"{path}: the slug is taken by {found[path.stem]}.", "Rename one of them.")
            found[path.stem] = path
    return found


@cache
def _read(path: Path, root: Path) -> Entry:
    text = path.read_text("utf-8")
    count = len(_CARD.findall(text))
    if count != 1:
        raise CardError(
            f"{path}: {count or 'no'} cards, but a file here is one system.",
            "Write one `card = Card(slug=..., ...)` in its class; shared code goes to a _file.py.",
        )
    tree = _head(text, path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (call := _card_call(node)):
            card = _card(call, path)
            module = f"{root.name}.{card.family}.{card.slug}"
            return Entry(card, module, node.name, ast.get_docstring(tree) or "", path, root)
    raise CardError(f"{path}: the card is not in a class.", "Write it in the body of the class.")


def _head(text: str, path: Path) -> ast.Module:
    """The file up to the end of its card, a module by itself: the rest is most of the parsing time."""
    if whole := _CARD_WHOLE.search(text):
        try:
            return ast.parse(text[: whole.end()])
        except SyntaxError:
            pass  # a card laid out in another way
    return _parse(text, path)


def _parse(text: str, path: Path) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as e:
        raise CardError(f"{path}:{e.lineno}: {e.msg}.", "The catalogue reads only what Python can.") from e


def _card_call(node: ast.ClassDef) -> ast.Call | None:
    for line in node.body:
        match line:
            case (
                ast.Assign(targets=[ast.Name("card")], value=ast.Call(func=ast.Name("Card")) as call)
                | ast.AnnAssign(target=ast.Name("card"), value=ast.Call(func=ast.Name("Card")) as call)
            ):
                return call
    return None


def _card(call: ast.Call, path: Path) -> Card:
    where = f"{path}:{call.lineno}"
    try:
        if call.args:
            raise TypeError("a card takes keywords only")
        card = Card(**{str(k.arg): _literal(k) for k in call.keywords})
    except (TypeError, ValueError) as e:
        raise CardError(f"{where}: {e}.", f"A card has {', '.join(f.name for f in fields(Card))}.") from e
    for name, hint in get_type_hints(Card).items():
        if not _fits(getattr(card, name), hint):
            wanted = f"{hint}".replace("typing.", "")
            raise CardError(f"{where}: {name}={getattr(card, name)!r}.", f"{name} is {wanted}.")
    for name, wanted in (("slug", path.stem), ("family", path.parent.name)):
        if getattr(card, name) != wanted:
            raise CardError(
                f"{where}: {name}={getattr(card, name)!r}, but the file says {wanted!r}.",
                "The folder is the family and the file's name is the slug: rename one or the other.",
            )
    return card


def _literal(keyword: ast.keyword) -> Any:
    try:
        return ast.literal_eval(keyword.value)
    except ValueError:
        raise ValueError(f"{keyword.arg}={ast.unparse(keyword.value)} is not a literal") from None


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    return isinstance(value, get_origin(hint) or hint)


def _options(path: Path, class_name: str, root: Path) -> dict[str, Option]:
    """Follows base classes through the text, as far as it is ours."""
    tree = _parse(path.read_text("utf-8"), path)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found: dict[str, Option] = {}
    if class_name not in classes:
        return found
    for base in reversed(classes[class_name].bases):
        name = ast.unparse(base)
        if name in classes:
            found |= _options(path, name, root)
        elif name in imports:
            module, original = imports[name]
            top, _, rest = module.partition(".")
            home = {"saccade": ROOT, root.name: root}.get(top)
            file = home / f"{rest.replace('.', '/')}.py" if home else None
            if file and file.is_file():
                found |= _options(file, original, root)
    for line in classes[class_name].body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            annotation = ast.unparse(line.annotation)
            if not annotation.startswith(("ClassVar", "typing.ClassVar")):
                name = line.target.id
                found.pop(name, None)
                found[name] = _option(name, annotation, line.value, class_name)
    return found


def _option(name: str, annotation: str, value: ast.expr | None, owner: str) -> Option:
    doc = limits = ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("option", "field"):
        given = dict(zip(("default", "doc"), value.args)) | {str(k.arg): k.value for k in value.keywords}
        doc = _told(given.get("doc"))
        limits = _limits(*(given.get(key) for key in ("low", "high", "choices")))
        value = given.get("default")
        if "default_factory" in given:
            value = ast.Call(func=given["default_factory"], args=[], keywords=[])
    return Option(name, annotation, ast.unparse(value) if value else "", doc, limits, owner)


def _told(doc: ast.expr | None) -> str:
    """The doc's own words: a string literal, or its source where it is put together."""
    if doc is None:
        return ""
    return str(doc.value) if isinstance(doc, ast.Constant) else ast.unparse(doc)


def _limits(low: ast.expr | None, high: ast.expr | None, choices: ast.expr | None) -> str:
    if choices:
        return f"one of {ast.unparse(choices).strip('()')}"
    if low and high:
        return f"{ast.unparse(low)} to {ast.unparse(high)}"
    if low:
        return f"at least {ast.unparse(low)}"
    return f"at most {ast.unparse(high)}" if high else ""
