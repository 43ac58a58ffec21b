"""Choosing a constant: what is tried, on which split, and which value is the best."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from saccade import cli, world
from saccade.bench import calibrate as module
from saccade.bench.calibrate import Choice, calibrate, choose, grid, strength
from saccade.bench.results import Figure, verdict
from saccade.core.card import Card
from saccade.core.errors import InputError, OptionError
from saccade.core.method import Method, option
from saccade.evals import world as tasks
from saccade.evals.interval import Estimate, difference, share
from saccade.evals.registry import embedded, for_choosing, task
from saccade.stack import load


@dataclass(eq=False)
class Many(Method):
    part: float = option(0.6, "between bounds", low=0, high=1)
    factor: float = option(3.0, "without an upper bound", low=1)
    count: int = option(6, "whole", low=1, high=9)
    large: int = option(1024, "and not rounded", low=1)
    form: str = option("a", "chosen", choices=("a", "b"))
    sure: bool = option(True, "or not")
    none: float = option(0.0, "of which no grid follows")
    text: str = option("a", "nor of this")

    card = Card(
        slug="many", name="", kind="method", family="steering", form="method", target="vlm", paper="", summary="",
        neutral={"part": 1.0, "factor": 1.0},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("part", [0.25, 0.5, 0.6, 0.75, 1.0]),
        ("factor", [1.0, 1.5, 3.0, 6.0, 12.0]),  # a quarter is below the bound, and 1 is neutral
        ("count", [3, 5, 6, 7]),
        ("large", [256, 512, 1024, 2048, 4096]),
        ("form", ["a", "b"]),
        ("sure", [False, True]),
        ("none", None),
        ("text", None),
    ],
)
def test_a_grid_follows_from_bounds_default_and_neutral(name: str, values: list[Any] | None) -> None:
    field = next(one for one in dataclasses.fields(Many) if one.name == name)
    if values is None:
        with pytest.raises(OptionError, match="No grid"):
            grid(Many(), field)
    else:
        assert grid(Many(), field) == values


def test_the_strength_is_the_first_that_can_be_neutral() -> None:
    assert strength(load("vista"))[1].name == "lam"
    at, field = strength(load("fastervlm+vhr(alpha=3)"), "keep")
    assert (at, field.name) == (0, "keep")
    for stack, name, told in (("fastervlm+vhr", None, "several"), ("vhr", "keep", "no option 'keep'")):
        with pytest.raises(OptionError, match=told):
            strength(load(stack), name)


# ---- the split


def test_only_the_calibration_split_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("captions", "questions", "pope-adversarial"):
        expected = f"world/calibration/{name}"
        assert {for_choosing(f"world/{part}{name}") for part in ("", "broken/", "calibration/")} == {expected}
        assert expected in embedded()
    asked: list[str] = []

    def bench(models: Any, stacks: Any, name: str, *_: Any) -> None:
        asked.append(name)
        raise InputError("It has been asked.", "stop")

    monkeypatch.setattr(module, "bench", bench)
    with pytest.raises(InputError, match="has been asked"):
        calibrate("vhr", {"m": (None, None)}, "world/broken/captions")
    for name in ("world/copying", "world/needle in 512"):
        with pytest.raises(InputError, match="no split to choose on"):
            calibrate("vhr", {"m": (None, None)}, name)
    assert asked == ["world/calibration/captions"]


def test_its_pictures_and_habits_are_those_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    read, own = set(), tasks._scenes

    def scenes(count: int, split: str) -> Any:
        read.add(split)
        return own(count, split)

    monkeypatch.setattr(tasks, "_scenes", scenes)
    (first, *_) = task("world/calibration/pope-popular").samples(3, 0)
    assert read == {"calibration"}
    seen = world.scene(int(first.picture), "calibration").picture()
    assert first.images[0].tobytes() == seen.tobytes()


# ---- the choice


def found(values: Mapping[str, list[int]], score: str, other: Mapping[str, str], guard: str) -> Any:
    """Figures by stack, from right and wrong of pictures; `other` has the guard's verdicts."""
    bare = share(np.array(values["bare"]), np.ones(12))
    by_stack = {}
    for value, hits in values.items():
        stack = "" if value == "bare" else str(load(f"vhr(alpha={value})"))
        one = share(np.array(hits), np.ones(12))
        change = difference(one, bare)
        head = ("world/calibration/t", "m", stack or "bare", "run", 12, 12)
        by_stack[stack] = {
            score: Figure(*head, score, one, change, verdict(score, change)),
            guard: Figure(*head, guard, Estimate(0.5, 0.4, 0.6, 12), None, other.get(value, "")),
            "yes": Figure(*head, "yes", one),
            "seconds": Figure(*head, "seconds", one),
        }
    return by_stack


HALF, ALL, NONE = [0, 1] * 6, [1] * 12, [0] * 12
SOME = {"bare": HALF, "1.5": HALF, "3.0": ALL, "4.0": NONE}
STACKS = {value: load(f"vhr(alpha={value})") for value in ("1.5", "3.0", "4.0")}


def test_more_is_better_but_of_chair_less_is() -> None:
    chosen = choose("vhr", "alpha", STACKS, found(SOME, "accuracy", {}, "f1"))
    assert (chosen.value, str(chosen.stack)) == ("3.0", "vhr(alpha=3.0)")
    assert chosen.alike == []
    by_chair = choose("vhr", "alpha", STACKS, found(SOME, "chair_i", {}, "recall"))
    assert by_chair.value == "4.0"


def test_who_names_less_does_not_win_by_it() -> None:
    guarded = choose("vhr", "alpha", STACKS, found(SOME, "chair_i", {"4.0": "worse"}, "recall"))
    assert guarded.value == "1.5"
    every = dict.fromkeys(STACKS, "worse")
    with pytest.raises(InputError, match="each makes recall worse"):
        choose("vhr", "alpha", STACKS, found(SOME, "chair_i", every, "recall"))


def test_values_that_cannot_be_told_from_the_chosen_one_are_named() -> None:
    near = SOME | {"4.0": [*ALL[:11], 0]}
    chosen = choose("vhr", "alpha", STACKS, found(near, "accuracy", {}, "f1"))
    assert (chosen.value, chosen.alike) == ("3.0", ["4.0"])
    assert "Cannot be told from 3.0: 4.0." in repr(chosen) and "* alpha=3.0" in repr(chosen)


@pytest.mark.parametrize("score", ["yes", "seconds", "nonsense"])
def test_only_what_has_a_better_chooses(score: str) -> None:
    with pytest.raises(InputError, match="no better"):
        choose("vhr", "alpha", STACKS, found(SOME, "accuracy", {}, "f1"), score)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: dict[str, Any] = {}

    def chosen(**given: Any) -> Choice:
        asked.update(given)
        return choose("vhr", "alpha", STACKS, found(SOME, "accuracy", {}, "f1"))

    monkeypatch.setattr(module, "calibrate", chosen)
    line = ["vhr", "--task", "world/captions", "--values", "1", "2", "--limit", "5", "--out", "runs"]
    assert cli.main(["calibrate", *line]) == 0
    given = {"stack": "vhr", "task": "world/captions", "values": ["1", "2"], "limit": 5, "out": "runs"}
    assert given.items() <= asked.items() and asked["model"] == "world/vlm" and asked["option"] is None
    said = capsys.readouterr().out
    assert "--with 'vhr(alpha=3.0)'" in said and "runs/vhr-alpha.stack" in said


def test_a_choice_is_kept_and_loaded_by_name(tmp_path: Path) -> None:
    models = {"world/vlm": world.load("vlm")}
    given = ("fastervlm", models, "world/pope-random", "keep", ["0.1", 1.0])
    chosen = calibrate(*given, out=tmp_path, limit=1)
    held = json.loads((tmp_path / "fastervlm-keep.json").read_text())
    assert [*held["figures"]] == ["bare", "0.1", "1.0"] == ["bare", *chosen.figures]
    assert held["task"]["name"] == "world/calibration/pope-random" and held["model"]["name"] == "world/vlm"
    assert held["value"] == chosen.value and held["figures"]["1.0"]["verdict"] == "cannot tell"
    assert load(tmp_path / "fastervlm-keep.stack") == chosen.stack == load(held["stack"])
    assert ElementTree.fromstring((tmp_path / "fastervlm-keep.svg").read_text()).tag.endswith("svg")
