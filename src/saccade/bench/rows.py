"""What was said and what was timed, as JSON lines: a file for every combination, which its first line describes, and
a line for every sample. Lines are only ever added, so that a run that dies leaves all that it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from saccade.bench.fingerprint import fingerprint
from saccade.core.errors import InputError
from saccade.evals.task import Sample

FORMAT = 2
LOCK = "lock"
About = dict[
    str, Any
]  # what a combination is made of: model, stack, task and code; "timing" where it was timed


@dataclass(frozen=True)
class Row:
    """A sample without its pictures, the answer, and what that took."""

    id: str
    question: str
    truth: Any
    group: str
    picture: str
    text: str
    seconds: float  # of the batch, shared equally
    tokens: int  # that were generated
    made: dict[str, Any]  # with which versions
    cost: dict[str, Any] | None = None  # of the few that are counted: what was, or why it was not
    alone: str | None = None  # what is said without a batch, of those and perhaps more

    @property
    def sample(self) -> Sample:
        return Sample(self.id, (), self.question, self.truth, self.group, self.picture)


@dataclass(frozen=True)
class Timed:
    """A sample that was asked alone, again and again, in turn by the `bare` model, under the `stack`, and, where that
    reduces the picture, by the `oracle`."""

    id: str
    tokens: int  # that each says, but for a driver
    seconds: dict[str, list[float]]  # by who was asked, in the order of the rounds
    first: dict[str, list[float]]  # until the first token
    peak: dict[str, int]  # bytes by which memory grew at most
    refused: dict[str, str]  # what could not be measured, and why
    roofline: dict[str, float]  # FLOPs and bytes in a second, of this machine
    made: dict[str, Any]  # with which versions


def path_of(out: Path, about: About) -> Path:
    return out / f"{fingerprint(about)}.jsonl"


def read(path: Path) -> tuple[About | None, list[Any]]:
    """What a file holds up to a torn last line; nothing but that is None."""
    try:
        whole = path.read_bytes().split(b"\n")[:-1]
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}.", "give a folder of yours") from e
    if not whole:
        return None, []
    about, *rows = (_parsed(line, path, number) for number, line in enumerate(whole, 1))
    if about.get("format") != FORMAT:
        raise InputError(
            f"{path} is of format {about.get('format', 'unknown')}, and this version knows {FORMAT}.",
            "give an empty folder, or read it with the version that wrote it",
        )
    try:
        kind = Timed if "timing" in about["about"] else Row
        return about["about"], [kind(**row) for row in rows]
    except (KeyError, TypeError) as e:
        raise InputError(f"{path} holds lines that are no rows: {e}.", "move the file away") from e


def read_all(out: Path) -> list[tuple[About, list[Row]]]:
    """What was said."""
    return [(about, rows) for about, rows in _all(out) if "timing" not in about]


def read_timed(out: Path) -> list[tuple[About, list[Timed]]]:
    """What was timed, the newest last."""
    return [(about, rows) for about, rows in _all(out) if "timing" in about]


def _all(out: Path) -> Iterator[tuple[About, list[Any]]]:
    paths = sorted(out.glob("*.jsonl"), key=lambda path: (path.stat().st_mtime, path))
    return ((about, rows) for about, rows in map(read, paths) if about)


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"{path}, line {number}, is damaged.", "delete the line, and the same command asks it again"
        )
    return found


class Writer:
    """Adds rows to the file of a combination, behind those that it has, and nobody else does meanwhile."""

    def __init__(self, out: Path, about: About) -> None:
        self.path = path_of(out, about)
        try:
            self.file = self.path.open("ab", buffering=0)
            _lock(self.file, out)
            whole = self.path.read_bytes().rfind(b"\n") + 1
            self.done = {row.id for row in read(self.path)[1]}
            self.file.truncate(whole)
        except OSError as e:
            raise _unwritten(self.path, e) from e
        if not whole:
            self._add([{"format": FORMAT, "about": about}])

    def add(self, rows: Iterable[Row | Timed]) -> None:
        """All of them are on the disk when this returns."""
        rows = list(rows)
        self._add([dataclasses.asdict(row) for row in rows])
        self.done |= {row.id for row in rows}

    def _add(self, lines: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(self.file.fileno(), data) :]
            os.fsync(self.file.fileno())
        except OSError as e:
            raise _unwritten(self.path, e) from e

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def _unwritten(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written: {error.strerror}.",
        "put that right and run the same command: what is written is kept, and the rest is asked",
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """No other run writes into the folder meanwhile. The lock is the process's, and ends with it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("ab")
    except OSError as e:
        raise _unwritten(out, e) from e
    with file:
        _lock(file, out)
        yield


def _lock(file: IO[bytes], out: Path) -> None:
    import fcntl  # what reads results does without, where there is none

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"Another run is writing into {out}.", "wait until it ends, or give another folder"
        ) from None
