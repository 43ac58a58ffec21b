"""The pages keep their word: their Python runs and prints what stands below it, and the method that they write
goes through the checks that it is promised."""

from __future__ import annotations

import contextlib
import io
import math
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from methods.test_shared import ON_MODELS, ONCE, Entry, Trial, name_of
from torch.testing import assert_close
from zoo import family

from saccade.core.method import EVENTS, Method, option

ROOT = Path(__file__).parents[1]
CONTRIBUTING, GUIDE = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "write-a-method.md"
EVERY = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = [page for page in EVERY if "```python" in page.read_text("utf-8")]
BLOCK = re.compile(
    r'^```python(?: title="(?P<file>[^"\n]+)")?\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """Code of a page. Where it has the name of a file it is a module of its own, as if it stood there."""

    file: str | None
    line: int
    code: str
    printed: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = [
        Block(m["file"], text.count("\n", 0, m.start("code")), m["code"], m["printed"] or "")
        for m in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```python"), "a block that does not begin as others do"
    assert sum(bool(b.printed) for b in found) == text.count("```text"), "a result below no code"
    return found


def module(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType(name)
    patch.setitem(sys.modules, name, made)
    return made


def run(page: Path, patch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Run the blocks of a page in one namespace, and compare what they print; by name, the modules it wrote."""
    own, written = module(page.stem, patch), {}
    for block in blocks(page):
        space = own
        if block.file:
            name = ".".join(Path(block.file).with_suffix("").parts[1:])
            space = written[name] = module(name, patch)
        code = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, vars(space))
        assert out.getvalue() == block.printed, f"{page.name}, line {block.line}"
    return written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_as_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("a page needs no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.random.fork_rng():
        run(page, monkeypatch)


def test_the_table_of_events_is_complete() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text("utf-8")
    rows = text.partition("| event |")[2].partition("\n\n")[0].splitlines()
    named = [name for row in rows for name in re.findall(r"`(\w+)\(", row.split("|")[1])]
    assert sorted(named) == sorted((*EVENTS, "begin", "end", "calibrate"))


# ---- the method that the guides write --------------------------------------------------------------------


@pytest.fixture(scope="module")
def entry() -> Iterator[Entry]:
    with pytest.MonkeyPatch.context() as patch:
        written = run(GUIDE, patch)
        cls = written["saccade.steering.image_gain"].ImageGain
        yield Entry(cls.card, cls, written["methods.test_image_gain"])


def test_the_guides_test_passes(entry: Entry) -> None:
    entry.tests.test_image_tokens_weigh_gain_times_more()


@pytest.mark.parametrize("check", ON_MODELS["method"], ids=name_of)
def test_the_guides_method_goes_through_the_checks_on_models(
    entry: Entry, check: Callable[[Trial], None]
) -> None:
    check(Trial(entry, family("llava")))


@pytest.mark.parametrize("check", [c for c in ONCE["method"] if "notation" not in c.__name__], ids=name_of)
def test_the_guides_method_goes_through_the_checks_made_once(
    entry: Entry, check: Callable[[Entry], None]
) -> None:
    check(entry)


def test_the_method_in_ten_lines_is_the_guides(entry: Entry) -> None:
    names: dict[str, Any] = {"dataclass": dataclass, "option": option, "Method": Method, "math": math}
    (short,) = blocks(CONTRIBUTING)
    assert len(short.code.splitlines()) <= 10
    names["Card"] = lambda *_: entry.cls.card
    exec(compile(short.code, "CONTRIBUTING.md", "exec"), names)
    method = names["ImageGain"](gain=2.0)

    class Call:
        def columns(self, name: str) -> torch.Tensor:
            return torch.tensor([name == "image", False])

    assert_close(method.bias(Call()), entry.cls(gain=2.0).bias(Call()))
    assert_close(method.bias(Call()), torch.tensor([math.log(2.0), 0.0]))
