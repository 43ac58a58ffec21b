"""What is wrong with a file is told with the file, the place and the way out; pictures are opened late."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from saccade.core.errors import InputError
from saccade.evals import files
from saccade.evals.files import Entry, Picture


def test_a_table_has_long_cells_quotes_and_lines_in_them(tmp_path: Path) -> None:
    path, limit = tmp_path / "a.tsv", csv.field_size_limit()
    path.write_text(f'index\timage\tquestion\thint\n1\t{"x" * 200_000}\t"a ""b""\nc"\t\n2\ty\tz\tw\n')
    first, second = files.read_table(path)
    assert len(first.text("image")) == 200_000 and first.text("question") == 'a "b"\nc'
    assert (first.place, second.place) == ("line 3", "line 4")
    assert (first.optional("hint"), second.optional("hint")) == ("", "w")
    assert csv.field_size_limit() == limit


def test_ids_may_be_numbers_or_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"id": 7}\n\n{"id": "x7"}\n')
    assert list(files.unique(files.read_lines(path), "id")) == ["7", "x7"]


READ = {"json": files.read_json, "lines": files.read_lines, "table": files.read_table}


@pytest.mark.parametrize(
    ("read", "text", "told"),
    [
        ("json", '{"a": 1,\n "b": }', "a.txt, line 2: this is no JSON"),
        ("json", '{"a": {"q1": 1, "q1": 2}}', "a.txt: 'q1' is there twice"),
        ("json", "[1]", "a.txt, at the top: [1] is no object"),
        ("lines", '{"a": 1}\n{"a": ', "a.txt, line 2: this is no JSON"),
        ("lines", '{"a": 1}\n{"a": 1, "a": 2}', "a.txt, line 2: 'a' is there twice"),
        ("lines", '{"a": 1}\n3', "a.txt, line 2: 3 is no object"),
        ("lines", "\n", "a.txt has no entries"),
        ("table", "a\tb\n", "a.txt has no entries"),
        ("table", "a\tb\n1\t2\n1\n", "a.txt, line 3: it has not as many cells"),
        ("table", "a\tb\n1\t2\t3\n", "a.txt, line 2: it has not as many cells"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, read: str, text: str, told: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError) as e:
        READ[read](tmp_path / "a.txt")
    assert told in str(e.value) and e.value.remedy


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json cannot be read: No such file"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a\.json is no text in UTF-8"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda entry: entry.text("label"), "there is no 'label'."),
        (lambda entry: entry.text("null"), "there is no 'null'."),
        (lambda entry: entry.text("empty"), "'empty' is empty."),
        (lambda entry: entry.text("number"), "'number' is 3, no str."),
        (lambda entry: entry.value("truth", int), "'truth' is True, no int."),
        (lambda entry: entry.id("list"), "'list' is [1], no str."),
        (lambda entry: entry.yes_or_no("word"), "'word' is 'Maybe', neither yes nor no."),
        (lambda entry: entry.texts("list"), "'list' has something that is no text."),
        (lambda entry: entry.entries("none"), "'none' is empty."),
        (lambda entry: files.unique([entry, entry], "number"), "'number' 3 is that of line 5 too."),
    ],
)
def test_a_field_that_is_wrong_is_told_with_its_place(ask: Callable[[Entry], object], told: str) -> None:
    values = {
        "null": None,
        "empty": " ",
        "number": 3,
        "truth": True,
        "list": [1],
        "word": "Maybe",
        "none": [],
    }
    with pytest.raises(InputError) as e:
        ask(Entry(Path("pope.json"), "line 5", values))
    assert str(e.value).startswith(f"pope.json, line 5: {told}") and "official file" in e.value.remedy


def test_a_picture_is_opened_when_it_is_asked_for(tmp_path: Path) -> None:
    path, entry = tmp_path / "a.png", Entry(tmp_path / "a.json", "line 1", {})
    Image.new("L", (3, 2), 7).save(path)
    pictures = Picture(entry, path)
    assert [one.mode for one in pictures] == ["RGB"] and len(pictures) == 1
    assert pictures[0].size == (3, 2) and pictures[0].getpixel((0, 0)) == (7, 7, 7)
    inside = Picture(entry, base64.b64encode(path.read_bytes()).decode())
    assert inside[0].tobytes() == pictures[0].tobytes()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"a\.json, line 1: the picture .*a\.png cannot be read"):
        pictures[0]
    with pytest.raises(InputError, match=r"a\.json, line 1: the picture in base64 cannot be read"):
        Picture(entry, "abcd")[0]
    with pytest.raises(InputError, match=r"a\.json, line 1: there is no picture .*b\.png"):
        Picture(entry, tmp_path / "b.png")


def test_so_many_pictures_are_drawn() -> None:
    names = [str(i // 2) for i in range(40)]
    assert files.some(names, 20, 0) == files.some(names, 99, 1) == set(names)
    drawn = [files.some(names, 5, seed) for seed in range(8)]
    assert {len(one) for one in drawn} == {5} and len({*map(frozenset, drawn)}) == 8
    assert files.some(names, 5, 0) == drawn[0]
    with pytest.raises(InputError, match="0 pictures are none"):
        files.some(names, 0, 0)
