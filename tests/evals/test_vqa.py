"""VQA's normalisation and soft accuracy, on cases worked out by hand from the official rule."""

from __future__ import annotations

import pytest

from saccade.evals import vqa
from saccade.evals.task import Sample


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A red cup.", "red cup"),
        ("the  Cup", "cup"),
        ("two", "2"),
        ("None", "0"),
        ("Ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("1,000 red-cups", "1000 redcups"),  # a comma that divides a number takes all marks with it
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t- shirt, t-shirt", "t shirt tshirt"),  # a mark that touches a space anywhere goes everywhere
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("Dont know", "don't know"),
        ("couldntve", "couldntve"),  # one apostrophe is put back, not two
        ("couldnt've", "couldn't've"),
        ("twas", "'twas"),
        ("its", "its"),
        ("what's this?", "what's this"),
        ("yes/no", "yes no"),
        (" red\ncup\t", "red cup"),
        ("?", ""),
        ("", ""),
        ("an", ""),
    ],
)
def test_an_answer_is_normalised_by_the_official_rule(text: str, normal: str) -> None:
    assert vqa.normalised(text) == normal


@pytest.mark.parametrize(
    ("text", "people", "credit"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["blue"] * 10, 0.0),
        ("Red.", ["red"] * 10, 0.0),  # where all agree nothing is normalised
        ("Red.", ["red"] * 9 + ["blue"], 1.0),
        ("blue", ["red"] * 9 + ["blue"], 0.3),  # nine see one other of three
        ("blue", ["red"] * 8 + ["blue"] * 2, 0.6),  # two see one, eight see two
        ("blue", ["red"] * 7 + ["blue"] * 3, 0.9),
        ("blue", ["red"] * 6 + ["blue"] * 4, 1.0),
        ("2", ["two"] * 5 + ["2"] * 5, 1.0),
        ("the two", ["two"] * 2 + ["three"] * 8, 0.6),
        ("", ["red"] * 9 + ["a"], 0.3),  # an article is nothing
        ("red", [" red", "red\n"] * 5, 1.0),
    ],
)
def test_soft_accuracy_by_hand(text: str, people: list[str], credit: float) -> None:
    assert vqa.soft_accuracy(text, people) == pytest.approx(credit)
    score = vqa.soft([(Sample("0", (), "", people), text)])["accuracy"]
    assert score.value == pytest.approx(credit)


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("red", "red", True),
        ("Red.", "red", True),
        (" two", "2", True),
        ("T A P", "tap", True),
        ("tp", "T A P", False),
        ("no , it is red", "No, it is red.", True),
        ("yes , it is red", "no , it is red", False),
        ("there is no cup", "there is no cup", True),
        ("left", "right", False),
        ("", "red", False),
        ("red red", "red", False),
        ("reds", "red", False),
    ],
)
def test_plain_equality(text: str, truth: str, right: bool) -> None:
    assert vqa.exact([(Sample("0", (), "", truth), text)])["accuracy"].value == right
