"""Stacks: methods written in one line, `fastervlm(keep=0.25)+var`.

    stack   = method { "+" method }                        in a file a new line does as well as "+"
    method  = slug [ "(" [ option { "," option } ] ")" ]   option = name "=" value
    value   = number | true | false | none | word | "text" | 'text' | [value, ...] | {key: value, ...}

A word is what site patterns are made of, `vision.-2.self|text.25%:75%.self`. `#` begins a comment. The text
is parsed, never evaluated, and every error points at the character.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from saccade.catalog import ROOT, load_class
from saccade.core.driver import crowded
from saccade.core.errors import OptionError, SaccadeError, StackError, UnknownMethodError, nearest
from saccade.core.system import System, check_option

CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
NUMBER = re.compile(
    r"[+-]?(?:inf|(?:[0-9]{1,99}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)(?=[\s,)\]}#]|\Z)"
)
WORD = re.compile(r"[\w.:*%|/-]+")
NAME = re.compile(r"[^\W\d]\w*")
TEXT = re.compile(r'"(?:[^"\\]|\\.)*"' r"|'(?:[^'\\]|\\.)*'", re.DOTALL)
DEEPEST = 8


class Stack(tuple[System, ...]):
    """Methods in the order in which they act, and at most one driver. Equal when made of equal ones
    with equal options."""

    def __str__(self) -> str:
        return "+".join(map(written, self))

    def __repr__(self) -> str:
        return f"<Stack {self}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and [*map(_identity, self)] == [*map(_identity, other)]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(map(type, self)))

    def save(self, path: str | os.PathLike[str], root: Path = ROOT) -> None:
        """Write the stack for `load`; refused when it would not come back the same."""
        text = "\n".join(map(written, self)) + "\n"
        try:
            same = _parse(text, root) == self
        except SaccadeError as e:
            raise StackError(f"This stack cannot be saved: {e.problem}", e.remedy) from e
        if not same:
            raise StackError(f"{self} cannot be saved: it reads as another stack.", "Build it in Python.")
        Path(path).write_text(text, "utf-8")


def load(text_or_path: str | os.PathLike[str], root: Path = ROOT) -> Stack:
    """Read a stack, from its notation or, given a path or a name that ends in `.stack`, from a file."""
    if isinstance(text_or_path, str) and not text_or_path.endswith(".stack"):
        return _parse(text_or_path, root)
    try:
        text = Path(text_or_path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise StackError(f"{text_or_path}: {e}.", "Give the path of a text file that holds a stack.") from e
    return _parse(text, root, f"{text_or_path}")


def written(method: System) -> str:
    """The notation of one method: the options that differ from their defaults."""
    given = []
    for field in _init_fields(type(method)).values():
        value = getattr(method, field.name)
        if value != _default(field):
            given.append(f"{field.name}={written_value(value)}")
    return method.card.slug + (f"({', '.join(given)})" if given else "")


def written_value(value: Any) -> str:
    """The notation of one value. What the notation cannot say is `<shown>`, which does not parse."""
    match value:
        case bool() | None:
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            bare = WORD.fullmatch(value) and not NUMBER.fullmatch(value) and value not in CONSTANTS
            return value if bare else _quoted(value)
        case list() | tuple():
            return f"[{', '.join(map(written_value, value))}]"
        case Mapping():
            return f"{{{', '.join(f'{_written_key(k)}: {written_value(v)}' for k, v in value.items())}}}"
    return f"<{type(value).__name__}>"


def _written_key(key: Any) -> str:
    if not isinstance(key, str):
        return written_value(key)
    return key if NAME.fullmatch(key) and key not in CONSTANTS else _quoted(key)


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    for letter, char in ESCAPES.items():
        text = text.replace(char, f"\\{letter}")
    return f'"{text}"'


# ---- reading


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


@dataclass(frozen=True)
class _Written:
    """A method as it was written, and where."""

    slug: str
    span: _Span
    options: dict[str, tuple[Any, _Span, _Span]]  # value, span of the name, span of the value


class _Reader:
    """A cursor over the text that can point at what it has read."""

    def __init__(self, text: str, source: str = "") -> None:
        self.text = text
        self.source = source
        self.at = 0

    def error(
        self, kind: type[SaccadeError], problem: str, remedy: str, span: _Span | None = None
    ) -> SaccadeError:
        """The problem, the line, and a caret under the place; here if no span is given."""
        start, end = (span.start, span.end) if span else (self.at, self.at + 1)
        first = self.text.rfind("\n", 0, start) + 1
        line = self.text[first:].partition("\n")[0]
        margin = re.sub(r"[^\t]", " ", line[: start - first])
        carets = "^" * max(1, min(end - start, len(line) - len(margin)))
        place = f"{self.source}, line {self.text.count(chr(10), 0, start) + 1}: " if self.source else ""
        return kind(f"{place}{problem}\n    {line}\n    {margin}{carets}", remedy)

    def wanted(self, what: str) -> SaccadeError:
        found = "the stack ends" if self.at >= len(self.text) else f"there is {self.text[self.at]!r}"
        return self.error(
            StackError, f"{what} is wanted here, but {found}.", "As in: fastervlm(keep=0.5)+var"
        )

    def skip(self) -> bool:
        """Past blanks and comments; true when a line ended among them."""
        start = self.at
        self.at += len(re.match(r"(?:\s|#[^\n]*)*", self.text[start:]).group())  # type: ignore[union-attr]
        return "\n" in self.text[start : self.at]

    def take(self, char: str) -> bool:
        self.skip()
        found = self.text.startswith(char, self.at)
        self.at += found
        return found

    def expect(self, char: str, *others: str) -> None:
        if not self.take(char):
            raise self.wanted(" or ".join(f"'{c}'" for c in (char, *others)))

    def token(self, pattern: re.Pattern[str]) -> tuple[str, _Span] | None:
        self.skip()
        found = pattern.match(self.text, self.at)
        if not found:
            return None
        self.at = found.end()
        return found.group(), _Span(*found.span())

    def stack(self) -> list[_Written]:
        found = [self.method()]
        while True:
            new_line = self.skip()
            if self.at == len(self.text):
                return found
            if not self.take("+") and not new_line:
                raise self.wanted("'+'")
            found.append(self.method())

    def method(self) -> _Written:
        name = self.token(NAME)
        if not name:
            raise self.wanted("The name of a method")
        options: dict[str, tuple[Any, _Span, _Span]] = {}
        at = self.at
        if not self.take("("):
            self.at = at  # a new line after a bare name still counts
        elif not self.take(")"):
            self.option(options)
            while self.take(","):
                self.option(options)
            self.expect(")", ",")
        return _Written(*name, options)

    def option(self, options: dict[str, tuple[Any, _Span, _Span]]) -> None:
        token = self.token(NAME)
        if not token:
            raise self.wanted("The name of an option")
        name, span = token
        if name in options:
            raise self.error(StackError, f"{name} is given twice.", "Keep one of them.", span)
        self.expect("=")
        self.skip()
        start = self.at
        value = self.value()
        options[name] = value, span, _Span(start, self.at)

    def value(self, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise self.error(StackError, "This is nested too deeply.", f"At most {DEEPEST} levels are read.")
        if self.take("["):
            return self.sequence(depth)
        if self.take("{"):
            return self.mapping(depth)
        if number := self.token(NUMBER):
            text = number[0].lower()
            return float(text) if re.search(r"[.ei]", text) else int(text)
        return self.string("A value")

    def string(self, what: str) -> Any:
        """A quoted text, or a bare word, which may be a constant."""
        if text := self.token(TEXT):
            return re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[1]), text[0][1:-1], flags=re.DOTALL)
        if word := self.token(WORD):
            return CONSTANTS.get(word[0], word[0])
        if self.text[self.at : self.at + 1] in ("'", '"'):
            raise self.error(StackError, "This text does not end.", "Close the quotes.")
        raise self.wanted(what)

    def sequence(self, depth: int) -> tuple[Any, ...]:
        if self.take("]"):
            return ()
        found = [self.value(depth + 1)]
        while self.take(","):
            found.append(self.value(depth + 1))
        self.expect("]", ",")
        return tuple(found)

    def mapping(self, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        if self.take("}"):
            return found
        while True:
            self.skip()
            start = self.at
            key, span = self.key(), _Span(start, self.at)
            if key in found:
                raise self.error(StackError, f"{key} is given twice.", "Keep one of them.", span)
            self.expect(":")
            found[key] = self.value(depth + 1)
            if not self.take(","):
                self.expect("}", ",")
                return found

    def key(self) -> Any:
        """Not a word: those may hold the ':' that ends a key."""
        if number := self.token(re.compile(r"-?[0-9]{1,99}(?=\s*:)")):
            return int(number[0])
        if name := self.token(NAME):
            return CONSTANTS.get(name[0], name[0])
        if self.text[self.at : self.at + 1] in ("'", '"'):
            return self.string("A key")
        raise self.wanted("A key")


# ---- building


def _parse(text: str, root: Path, source: str = "") -> Stack:
    reader = _Reader(text, source)
    methods = reader.stack()
    stack = Stack(_build(reader, method, root) for method in methods)
    if wrong := crowded(stack):
        at, error = wrong
        raise reader.error(StackError, error.problem, error.remedy, methods[at].span)
    return stack


def _build(reader: _Reader, method: _Written, root: Path) -> System:
    slug, span = method.slug, method.span
    try:
        cls = load_class(slug, root)
    except UnknownMethodError as e:
        raise reader.error(UnknownMethodError, e.problem, e.remedy, span) from None
    if not issubclass(cls, System):
        remedy = f"Build it in Python: saccade.{cls.__name__}"
        raise reader.error(StackError, f"{slug} is not a thing to attach.", remedy, span)
    known = _init_fields(cls)
    options = {}
    for name, (value, name_span, value_span) in method.options.items():
        if name not in known:
            there = ", ".join(known)
            remedy = " ".join(filter(None, [nearest(name, known), f"The options of {slug} are {there}."]))
            raise reader.error(OptionError, f"{slug} has no option {name!r}.", remedy, name_span)
        field = known[name]
        try:
            options[name] = _coerced(value, _hint(cls, name))
            check_option(cls, field, options[name])
        except _Misfit:
            problem = f"{slug}: {written_value(value)} is not what {name} takes: {_shown(field.type)}."
            remedy = f"{name}: {field.metadata.get('doc') or f'`saccade show {slug}` tells more.'}"
            raise reader.error(OptionError, problem, remedy, value_span) from None
        except OptionError as e:
            raise reader.error(OptionError, e.problem, e.remedy, value_span) from None
    for name, field in known.items():
        if name not in options and _default(field) is dataclasses.MISSING:
            raise reader.error(OptionError, f"{slug} needs {name}.", f"As in: {slug}({name}=...)", span)
    try:
        return cls(**options)
    except OptionError as e:  # options that do not go together
        raise reader.error(OptionError, e.problem, e.remedy, span) from None


class _Misfit(Exception):
    """A value that an annotation does not take."""


def _coerced(value: Any, hint: Any) -> Any:
    """The value as its annotation wants it, with only the changes that lose nothing."""
    origin, args = get_origin(hint), get_args(hint)
    kind = origin or hint
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerced_union(value, args)
    if origin is Literal:
        fits = [a for a in args if a == value and type(a) is type(value)]
    elif hint is float:
        fits = [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []
    elif hint is int:
        fits = [value] if isinstance(value, int) and not isinstance(value, bool) else []
    elif not isinstance(kind, type):
        fits = []
    elif isinstance(value, dict) and issubclass(dict, kind):
        key, item = args or (Any, Any)
        fits = [{_coerced(k, key): _coerced(v, item) for k, v in value.items()}]
    elif isinstance(value, tuple) and kind in (tuple, list, Sequence):
        fits = [_coerced_sequence(value, kind, args)]
    else:
        fits = [value] if type(value) is kind else []
    if not fits:
        raise _Misfit
    return fits[0]


def _coerced_union(value: Any, members: Iterable[Any]) -> Any:
    """As the member that leaves the value as it is, or else as the first that takes it."""
    taken = []
    for member in members:
        try:
            taken.append(_coerced(value, member))
        except _Misfit:
            continue
    if not taken:
        raise _Misfit
    return next((t for t in taken if type(t) is type(value)), taken[0])


def _coerced_sequence(value: tuple[Any, ...], kind: type, args: tuple[Any, ...]) -> Any:
    if not args:
        hints: list[Any] = [Any] * len(value)
    elif kind is tuple and args[-1] is not Ellipsis:
        hints = list(args)
    else:
        hints = [args[0]] * len(value)
    if len(hints) != len(value):
        raise _Misfit
    items = [_coerced(v, h) for v, h in zip(value, hints)]
    return items if kind is list else tuple(items)


def _hint(cls: type, name: str) -> Any:
    """The annotation of one option, or Any where it names what only a type checker imports."""
    for owner in cls.__mro__:
        own = inspect.get_annotations(owner)
        if name in own:
            alone = type("alone", (), {"__annotations__": {name: own[name]}, "__module__": owner.__module__})
            try:
                return get_type_hints(alone)[name]
            except NameError:
                return Any
    return Any


def _shown(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _init_fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _identity(method: System) -> tuple[type, dict[str, Any]]:
    return type(method), {name: getattr(method, name) for name in _init_fields(type(method))}
