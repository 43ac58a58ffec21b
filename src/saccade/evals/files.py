"""Official files. An entry knows the file and the place where it stands, and so does every error about it; its picture
is opened when it is asked for."""

from __future__ import annotations

import base64
import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from saccade.core.errors import InputError
from saccade.evals.task import Row, Sample, Scores

BRIEFLY = "Answer with one word or a short phrase."
BY_LETTER = "Answer with the letter of the right choice."
OFFICIAL = "take the official file, or mend it"

V = TypeVar("V")


@dataclass(frozen=True)
class Entry:
    file: Path
    place: str
    fields: Mapping[str, Any]

    def wrong(self, problem: str, remedy: str = OFFICIAL) -> InputError:
        return InputError(f"{self.file}, {self.place}: {problem}", remedy)

    def value(self, name: str, kind: type[V]) -> V:
        found = self.fields.get(name)
        if found is None:
            has = ", ".join(self.fields) or "nothing"
            raise self.wrong(f"there is no {name!r}.", f"{OFFICIAL}; there is {has}")
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.wrong(f"{name!r} is {found!r}, no {kind.__name__}.")
        return found

    def text(self, name: str) -> str:
        found = self.value(name, str).strip()
        if not found:
            raise self.wrong(f"{name!r} is empty.")
        return found

    def optional(self, name: str) -> str:
        return self.text(name) if str(self.fields.get(name) or "").strip() else ""

    def id(self, name: str) -> str:
        """Official ids are numbers here and texts there."""
        return str(self.value(name, int)) if isinstance(self.fields.get(name), int) else self.text(name)

    def yes_or_no(self, name: str) -> str:
        found = self.text(name).lower()
        if found not in ("yes", "no"):
            raise self.wrong(f"{name!r} is {self.fields[name]!r}, neither yes nor no.")
        return found

    def texts(self, name: str) -> list[str]:
        found = self.value(name, list)
        if not all(isinstance(one, str) for one in found):
            raise self.wrong(f"{name!r} has something that is no text.")
        return found

    def inside(self, name: str) -> Entry:
        return Entry(self.file, f"{self.place}, {name!r}", self.value(name, dict))

    def entries(self, name: str) -> list[Entry]:
        """Of a list."""
        found = self.value(name, list)
        if not found:
            raise self.wrong(f"{name!r} is empty.")
        return [_entry(self.file, f"{name}[{at}]", one) for at, one in enumerate(found)]

    def each(self) -> dict[str, Entry]:
        """Entries by their names."""
        return {name: _entry(self.file, f"entry {name!r}", one) for name, one in self.fields.items()}


def read_json(path: Path) -> Entry:
    return _entry(path, "at the top", _parsed(path, read_text(path)))


def read_lines(path: Path) -> list[Entry]:
    """An object of JSON in every line."""
    lines = enumerate(read_text(path).split("\n"), 1)
    found = [_entry(path, f"line {at}", _parsed(path, one, at)) for at, one in lines if one.strip()]
    return _some(path, found)


def read_table(path: Path) -> list[Entry]:
    """Cells between tabs, below their names; an empty cell is none."""
    found, text = [], read_text(path)
    limit = csv.field_size_limit(2**31 - 1)  # for pictures
    try:
        rows = csv.DictReader(io.StringIO(text), delimiter="\t")
        for row in rows:
            entry = Entry(path, f"line {rows.line_num}", {name: cell for name, cell in row.items() if cell})
            if None in row or None in row.values():
                raise entry.wrong("it has not as many cells as the first line.")
            found.append(entry)
    finally:
        csv.field_size_limit(limit)
    return _some(path, found)


def unique(entries: Iterable[Entry], name: str) -> dict[str, Entry]:
    """Entries by their ids."""
    found: dict[str, Entry] = {}
    for entry in entries:
        key = entry.id(name)
        if key in found:
            raise entry.wrong(f"{name!r} {key} is that of {found[key].place} too.")
        found[key] = entry
    return found


@dataclass(frozen=True)
class Picture(Sequence[Image.Image]):
    """The one of an entry: in a file, or in base64."""

    entry: Entry = field(repr=False)
    source: Path | str = field(repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, Path) and not self.source.is_file():
            raise self.entry.wrong(f"there is no picture {self.source}.", "give the folder that has them all")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, at: Any) -> Any:
        found = range(len(self))[at]
        return self._opened() if isinstance(found, int) else [self._opened() for _ in found]

    def _opened(self) -> Image.Image:
        try:
            stored = (
                self.source if isinstance(self.source, Path) else io.BytesIO(base64.b64decode(self.source))
            )
            with Image.open(stored) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as e:
            which = self.source if isinstance(self.source, Path) else "in base64"
            raise self.entry.wrong(f"the picture {which} cannot be read: {e}", "fetch it again") from e


def encoded(entry: Entry, rows: Mapping[str, Entry]) -> Picture:
    """The picture of a row of a table: what is the id of another row stands for that one's."""
    source = entry.text("image")
    return Picture(entry, rows[source].text("image") if source in rows else source)


def lettered(choices: Sequence[str]) -> dict[str, str]:
    return dict(zip(ascii_uppercase, choices))


def multiple_choice(hint: str, question: str, choices: Mapping[str, str]) -> str:
    lines = (f"{letter}. {choice}" for letter, choice in choices.items())
    return "\n".join([*([hint] if hint else []), question, *lines, BY_LETTER])


def some(pictures: Iterable[str], count: int, seed: int) -> set[str]:
    """So many of them, or all where there are no more."""
    if count < 1:
        raise InputError(f"{count} pictures are none.", "ask for one at least")
    every = list(dict.fromkeys(pictures))
    if count >= len(every):
        return set(every)
    return {every[i] for i in np.random.default_rng(seed).choice(len(every), count, replace=False)}


@dataclass(frozen=True)
class FileTask(ABC):
    """The questions of an official file about so many of its pictures, which the seed draws, in the file's order."""

    file: Path

    slug = ""
    max_new_tokens = 32

    @property
    def name(self) -> str:
        return f"{self.slug}:{self.file.name}"

    def samples(self, count: int, seed: int) -> list[Sample]:
        every = list(self.every())
        kept = some((sample.cluster for sample in every), count, seed)
        return [sample for sample in every if sample.cluster in kept]

    @abstractmethod
    def every(self) -> Iterator[Sample]: ...

    @abstractmethod
    def parse(self, text: str) -> Any: ...

    @abstractmethod
    def score(self, rows: Iterable[Row]) -> Scores: ...


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.", "give the path of the official file") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is no text in UTF-8.", "give the official file, unpacked") from e


def _parsed(path: Path, text: str, line: int = 0) -> Any:
    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            where = f"{path}, line {line}" if line else str(path)
            raise InputError(f"{where}: {twice!r} is there twice.", OFFICIAL)
        return found

    try:
        return json.loads(text, object_pairs_hook=of_pairs)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {line or e.lineno}: this is no JSON ({e.msg}).", OFFICIAL) from e


def _entry(path: Path, place: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise InputError(f"{path}, {place}: {value!r:.40} is no object with fields.", OFFICIAL)
    return Entry(path, place, value)


def _some(path: Path, found: list[Entry]) -> list[Entry]:
    if not found:
        raise InputError(f"{path} has no entries.", OFFICIAL)
    return found
