"""MME, ScienceQA and MMBench, from small files in the official formats, with scores worked out by hand."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from saccade.bench.fingerprint import plain
from saccade.core.errors import InputError
from saccade.evals import mmbench, mme, scienceqa
from saccade.evals.files import BY_LETTER, FileTask
from saccade.evals.mmbench import MmBench
from saccade.evals.mme import KINDS, Mme
from saccade.evals.scienceqa import ScienceQa
from saccade.evals.task import Sample


def scored(task: FileTask, says: Callable[[Sample], str]) -> dict[str, float]:
    """From rows as they are stored."""
    samples = task.samples(999, seed=0)
    rows = [(replace(sample, images=(), truth=plain(sample.truth)), says(sample)) for sample in samples]
    return {name: estimate.value for name, estimate in task.score(rows).items()}


def encoded(colour: str) -> str:
    stored = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(stored, "PNG")
    return base64.b64encode(stored.getvalue()).decode()


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- MME


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("  No", "no"),
        ("Not", "no"),
        ("I know", "other"),
        ("It is. Yes", "other"),
        ("", "other"),
    ],
)
def test_an_answer_of_mme_is_in_the_first_four_letters(text: str, answer: str) -> None:
    assert mme.parse(text) == answer


def mme_folder(folder: Path, *tasks: str) -> Mme:
    """Two pictures of every task, some beside their texts and some apart."""
    for task in tasks:
        apart = task in ("scene", "posters")
        texts = folder / task / ("questions_answers_YN" if apart else ".")
        pictures = folder / task / ("images" if apart else ".")
        for name, suffix in (("1", "jpg"), ("2", "png")):
            texts.mkdir(parents=True, exist_ok=True)
            pictures.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(pictures / f"{name}.{suffix}")
            (texts / f"{name}.txt").write_text("Is it so? Answer yes or no.\tYes\nOr so?\tNo\n\n")
    return Mme(folder)


def test_mme(tmp_path: Path) -> None:
    """Who says yes to all is right half the time and never both times; in count the second picture is answered
    rightly, so that 3 of 4 questions and 1 of 2 pictures are."""
    task = mme_folder(tmp_path, *KINDS["perception"], "code_reasoning")
    found = scored(task, lambda s: s.truth if s.picture == "count/2" else "Yes")
    assert found.pop("perception") == pytest.approx(9 * 50 + 75 + 50)
    assert "cognition" not in found  # of which there is one task of four
    assert found.pop("count accuracy") == 0.75 and found.pop("count accuracy+") == 0.5
    assert found.pop("accuracy") == pytest.approx(23 / 44) and found.pop("accuracy+") == pytest.approx(1 / 22)
    assert len(found) == 20 and {found[name] for name in found if name.endswith("accuracy")} == {0.5}
    assert {found[name] for name in found if name.endswith("+")} == {0.0}


def test_the_interval_of_a_sum_is_about_it(tmp_path: Path) -> None:
    task = mme_folder(tmp_path, *KINDS["cognition"])
    rows = [(s, s.truth if s.picture.endswith("2") else "no") for s in task.samples(999, 0)]
    found = task.score(rows)["cognition"]
    assert found.value == pytest.approx(4 * (75 + 50)) and found.low < found.value < found.high
    assert found.count == 8


def mme_rows() -> list[dict[str, Any]]:
    shared = {"category": "OCR", "image_path": "OCR/1.jpg"}
    return [
        {"index": 0, **shared, "image": encoded("red"), "question": "Is it so?", "answer": "Yes"},
        {"index": 1, **shared, "image": "0", "question": "Or so?", "answer": "No"},
    ]


def test_a_table_of_mme(tmp_path: Path) -> None:
    task = Mme(table(tmp_path / "MME.tsv", mme_rows()))
    assert [s.images[0].getpixel((0, 0)) for s in task.samples(9, 0)] == [(255, 0, 0)] * 2
    found = scored(task, lambda s: s.truth)
    assert found == {"accuracy": 1, "accuracy+": 1, "OCR accuracy": 1, "OCR accuracy+": 1}


def test_wrong_files_of_mme_are_refused(tmp_path: Path) -> None:
    task, (first, second) = mme_folder(tmp_path, "OCR"), mme_rows()
    path = tmp_path / "OCR/2.txt"
    path.write_text("So?\tYes\nOr so?\tPerhaps\n")
    with pytest.raises(InputError, match=r"2\.txt, line 2: 'answer' is 'Perhaps', neither"):
        task.samples(9, 0)
    path.write_text("So?\tYes\n")
    with pytest.raises(InputError, match=r"OCR/2 has one question only"):
        task.samples(9, 0)
    path.write_text("So?\tYes\nOr so?\tNo\nOr?\tNo\n")
    with pytest.raises(InputError, match=r"2\.txt, line 3: OCR/2 has a third question"):
        task.samples(9, 0)
    path.write_text("So?\tYes\nOr so?\tNo\n")
    (tmp_path / "OCR/2.png").unlink()
    with pytest.raises(InputError, match=r"2\.txt, line 1: there is no picture .*2\.jpg"):
        task.samples(9, 0)
    with pytest.raises(InputError, match="has no folder of a task"):
        Mme(tmp_path / "OCR").samples(9, 0)
    with pytest.raises(InputError, match=r"MME\.tsv, line 3: 'category' is 'taste', no task"):
        Mme(table(tmp_path / "MME.tsv", [first, second | {"category": "taste"}])).samples(9, 0)


# ---- ScienceQA


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("B. a cup", "B"),
        ("B\nFor it is", "B"),
        ("The answer is B.", "B"),
        ("Because. The answer is B", "B"),
        ("The answer is Berlin", ""),
        ("A cup", ""),
        ("(B)", ""),
        ("b", ""),
        ("", ""),
    ],
)
def test_a_letter_is_read_from_an_answer(text: str, letter: str) -> None:
    assert scienceqa.parse(text) == letter


def problem(answer: int, subject: str, image: str | None = "image.png", hint: str = "") -> dict[str, Any]:
    shared = {"question": "Which?", "choices": ["ice", "salt", "tin"], "hint": hint}
    return shared | {"answer": answer, "subject": subject, "image": image}


PROBLEMS = {
    "3": problem(0, "social science"),
    "5": problem(2, "natural science", hint="Look."),
    "7": problem(1, "natural science"),
    "8": problem(1, "natural science", None),
    "9": problem(1, "natural science"),
}


def science(folder: Path, problems: Mapping[str, Any], split: str = "test") -> ScienceQa:
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["3", "5", "7", "8"], "train": ["9"]}))
    for number in ("3", "5", "7"):
        (folder / "images" / number).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / "images" / number / "image.png")
    return ScienceQa(folder, folder / "images", split)


def test_scienceqa(tmp_path: Path) -> None:
    """Without a picture a question is not asked, nor of another split."""
    task = science(tmp_path, PROBLEMS)
    samples = {sample.id: sample for sample in task.samples(9, 0)}
    assert samples["5"].question == f"Look.\nWhich?\nA. ice\nB. salt\nC. tin\n{BY_LETTER}"
    said = {"3": "B", "5": "The answer is C.", "7": "salt"}
    assert {*said} == {*samples}
    found = scored(task, lambda sample: said[sample.id])
    assert found == pytest.approx({"accuracy": 1 / 3, "social science": 0.0, "natural science": 0.5})


def test_wrong_files_of_scienceqa_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"problems\.json, entry '5': 'answer' is 3, and there are 3 choices"
    ):
        science(tmp_path, PROBLEMS | {"5": problem(3, "x")}).samples(9, 0)
    with pytest.raises(InputError, match=r"pid_splits\.json, at the top: problem 5 of 'test' is not in"):
        science(tmp_path, {"3": PROBLEMS["3"]}).samples(9, 0)
    with pytest.raises(InputError, match=r"(?s)pid_splits\.json, at the top: there is no 'dev'.*test, train"):
        science(tmp_path, PROBLEMS, "dev").samples(9, 0)


# ---- MMBench

CHOICES = {"A": "a red cup", "B": "a dog", "C": "the sea"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The answer is B.", "B"),
        ("a dog", "B"),
        ("It is THE SEA", "C"),
        ("It is A DOG", "A"),  # the letter comes first
        ("A or B", ""),
        ("a dog in a red cup", ""),
        ("b", ""),
        ("D", ""),
        ("B is what I see in it here", ""),  # not among the last four words
        ("there is a dog that sits and waits for its master", ""),  # longer than twice the choices
        ("", ""),
    ],
)
def test_a_choice_is_read_from_an_answer(text: str, letter: str) -> None:
    assert mmbench.chosen(text, CHOICES) == letter


def turned(index: int, by: int, category: str, image: str, *choices: str) -> dict[str, Any]:
    """The first choice is the right one, before it is turned."""
    order = [*choices[by:], *choices[:by]]
    cells = {"index": by * 1_000_000 + index, "question": "What?", "hint": "", "category": category}
    cells |= dict(zip("ABC", [*order, "", ""]))
    return cells | {"answer": "ABC"[order.index(choices[0])], "image": image}


def mmbench_rows() -> list[dict[str, Any]]:
    return [
        *(turned(3, by, "ocr", "3" if by else encoded("blue"), "sea", "sky", "tin") for by in range(3)),
        *(turned(4, by, "ocr", encoded("red"), "yes", "no") for by in range(2)),
        turned(5, 0, "logic", encoded("red"), "up", "down"),
    ]


def test_mmbench(tmp_path: Path) -> None:
    """3 is answered rightly in every order, by its words; 4 in one of two; 5 has one order only."""
    task = MmBench(table(tmp_path / "a.tsv", mmbench_rows()))
    samples = {sample.id: sample for sample in task.samples(9, 0)}
    assert samples["1000003"].question == f"What?\nA. sky\nB. tin\nC. sea\n{BY_LETTER}"
    assert samples["1000003"].images[0].getpixel((0, 0)) == (0, 0, 255) and samples["4"].truth.letter == "A"
    says = {"3": "sea", "4": "A", "5": "A"}
    found = scored(task, lambda sample: says[sample.picture])
    assert found == pytest.approx({"accuracy": 2 / 3, "ocr": 0.5, "logic": 1.0})
    for seed in range(9):  # a question is drawn with all its turns
        first, *turns = task.samples(1, seed)
        assert len(turns) + 1 == {"3": 3, "4": 2, "5": 1}[first.id]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"answer": "C"}, "line 5: 'answer' is 'C', and the choices are A, B."),
        ({"answer": ""}, "line 5: there is no 'answer'."),
        ({"index": 3}, "line 5: 'index' 3 is that of line 2 too."),
        ({"index": "four"}, "line 5: 'index' is 'four', no number."),
        ({"index": 2_000_006}, "line 5: row 6, of which it is a turn, is not there."),
    ],
)
def test_a_wrong_row_of_mmbench_is_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    rows = mmbench_rows()[:4]
    with pytest.raises(InputError) as e:
        MmBench(table(tmp_path / "a.tsv", [*rows[:3], rows[3] | changed])).samples(9, 0)
    assert f"a.tsv, {told}" in str(e.value)
