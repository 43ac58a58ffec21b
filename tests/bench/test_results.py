"""Figures from rows, against rows that are worked by hand."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saccade import cli
from saccade.bench import fingerprint
from saccade.bench.results import CANNOT_TELL, Results, verdict
from saccade.bench.rows import Row, Writer
from saccade.bench.runner import bench
from saccade.core.errors import InputError
from saccade.evals.interval import Estimate, difference, share
from saccade.evals.registry import embedded, task

NAME = "world/pope-random"


def about(stack: str, code: str = "a") -> dict[str, Any]:
    written = [{"slug": stack}] if stack else []
    return {
        "model": {"name": "tiny"},
        "stack": written,
        "written": stack,
        "task": {"name": NAME, "samples": 24},
        "code": {"asking": code, "stack": stack},
    }


def rows(texts: list[str], seconds: float = 0.5) -> list[Row]:
    """Two questions about each picture, all with yes for their truth."""
    return [
        Row(f"{i:02}", "?", "yes", "", str(i // 2), text, seconds * (1 + i % 3), 2, {})
        for i, text in enumerate(texts)
    ]


def write(out: Path, about: dict[str, Any], made: list[Row]) -> None:
    with Writer(out, about) as writer:
        writer.add(made)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Of twelve pictures, one is right bare, nine with `good`, and `even` is bare with two changed."""
    out = tmp_path / "runs"
    out.mkdir()
    bare = ["yes", "yes"] + ["no"] * 22
    write(out, about(""), rows(bare))
    write(out, about("good"), rows(["yes"] * 18 + ["no"] * 6, seconds=0.25))
    write(out, about("even"), rows([*bare[:20], "yes", "no", "yes", "no"]))
    return out


def of(found: Results, stack: str, score: str) -> Any:
    return next(one for one in found if one.stack == stack and one.score == score)


def test_what_a_stack_changes(runs: Path) -> None:
    found = Results.read(runs)
    bare, good, even = (of(found, stack, "accuracy") for stack in ("bare", "good", "even"))
    assert (bare.found.value, bare.change, bare.verdict) == (2 / 24, None, "")
    assert good.change.value == pytest.approx(16 / 24) and good.verdict == "better"
    # eight of twelve pictures gain both answers: so many of twelve draws
    likely = [math.comb(12, k) * (8 / 12) ** k * (4 / 12) ** (12 - k) for k in range(13)]
    low = next(k for k in range(13) if sum(likely[: k + 1]) > 0.025) / 12
    high = next(k for k in range(13) if sum(likely[: k + 1]) > 0.975) / 12
    assert (good.change.low, good.change.high) == (pytest.approx(low), pytest.approx(high))
    assert even.verdict == CANNOT_TELL and even.change.value == pytest.approx(2 / 24)
    assert of(found, "good", "yes").verdict == "more"
    assert of(found, "good", "seconds").verdict == ""
    assert of(found, "good", "tokens").verdict == CANNOT_TELL
    assert of(found, "good", "seconds").change.value == pytest.approx(-0.5)


def test_the_interval_of_a_difference_is_that_of_paired_draws() -> None:
    """Against all ways to draw four pictures of four."""
    one, other = np.array([1, 0, 1, 1]), np.array([0, 0, 1, 0])
    every = [np.mean((one - other)[list(draw)]) for draw in itertools.product(range(4), repeat=4)]
    low, high = np.percentile(every, (2.5, 97.5))
    found = difference(share(one, np.ones(4)), share(other, np.ones(4)))
    assert (found.value, found.low, found.high, found.count) == (0.5, low, high, 2)
    same = difference(share(one, np.ones(4)), share(one, np.ones(4)))
    assert (same.value, same.low, same.high, same.count) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("score", "low", "high", "pictures", "told"),
    [
        ("accuracy", 0.1, 0.2, 6, "better"),
        ("accuracy", 0.1, 0.2, 5, CANNOT_TELL),
        ("accuracy", 0.0, 0.2, 99, CANNOT_TELL),
        ("accuracy", -0.2, -0.1, 6, "worse"),
        ("chair_i", -0.2, -0.1, 6, "better"),
        ("cup beside table", 0.1, 0.2, 6, "worse"),
        ("words", -0.2, -0.1, 6, "less"),
        ("accuracy", math.nan, math.nan, 99, CANNOT_TELL),
    ],
)
def test_verdicts(score: str, low: float, high: float, pictures: int, told: str) -> None:
    assert verdict(score, Estimate(0.0, low, high, pictures)) == told


def test_only_samples_that_both_have_answered_are_compared(tmp_path: Path) -> None:
    write(tmp_path, about(""), rows(["no"] * 24))
    write(tmp_path, about("good"), rows(["yes"] * 6 + ["no"] * 6)[:12])
    good = of(Results.read(tmp_path), "good", "accuracy")
    assert (good.samples, good.of) == (12, 24)
    assert good.change.value == good.found.value == 0.5


def test_other_code_is_no_partner(tmp_path: Path) -> None:
    write(tmp_path, about("", code="older"), rows(["no"] * 24))
    write(tmp_path, about("good"), rows(["yes"] * 24))
    assert of(Results.read(tmp_path), "good", "accuracy").change is None


@pytest.mark.parametrize("name", [name for name in embedded() if "caption" in name or "questions" in name])
def test_what_is_scored_from_rows_is_what_the_task_scores(name: str) -> None:
    found = task(name)
    samples = found.samples(6, 0)
    texts = ["a cup on a table , a dog and a cat ." if i % 2 else str(s.truth) for i, s in enumerate(samples)]
    direct = found.score(list(zip(samples, texts)))
    kept = [json.loads(json.dumps(fingerprint.plain(s.truth))) for s in samples]
    made = [
        Row(s.id, s.question, truth, s.group, s.picture, text, 0.1, 1, {})
        for s, truth, text in zip(samples, kept, texts)
    ]
    again = found.score([(row.sample, row.text) for row in made])
    assert direct.keys() == again.keys()
    np.testing.assert_equal([e.value for e in direct.values()], [e.value for e in again.values()])


def test_forms(runs: Path, capsys: Any) -> None:
    assert cli.main(["results", str(runs)]) == 0
    plain = capsys.readouterr().out
    assert "better" in plain and f"{NAME}  tiny  good  (24 answers" in plain
    cli.main(["results", str(runs), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1 and set(lines[1]) <= set("|- ")
    cli.main(["results", str(runs), "--csv"])
    written = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    cli.main(["results", str(runs), "--json"])
    held = json.loads(capsys.readouterr().out)
    assert [(one["stack"], one["score"], one["verdict"]) for one in held] == [
        (one["stack"], one["score"], one["verdict"]) for one in written
    ]
    assert next(one for one in held if one["stack"] == "bare")["change"] is None


def test_a_folder_without_rows(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["results", str(tmp_path)]) == 1
    with pytest.raises(InputError, match="no folder"):
        Results.read(tmp_path / "no")


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    config, out = tmp_path / "bench.yaml", tmp_path / "out"
    config.write_text(f"model: world/vlm\nwith: [fastervlm(keep=0.5)]\ntask: {NAME}\nlimit: 5\nbatch: 4\n")
    assert cli.main(["bench", "--config", str(config), "--out", str(out), "--limit", "1", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    count = len(task(NAME).samples(1, 0))
    assert {(one["stack"], one["samples"]) for one in held} == {
        ("bare", count),
        ("fastervlm(keep=0.5)", count),
    }


def test_every_option_of_the_command_is_one_of_the_function() -> None:
    named = set(cli.BENCH) - {"model", "with", "task"} | {"models", "stacks", "tasks"}
    assert named | {"trust_remote_code"} == set(signature(bench).parameters)


def test_what_is_given_twice_is_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def bench(models: Any, stacks: Any, tasks: Any, *_: Any, **__: Any) -> Results:
        asked.extend([stacks, tasks])
        return Results()

    monkeypatch.setattr("saccade.bench.runner.bench", bench)
    stacks = ["--with", "var", "paint", "--with", "vhr"]
    asking = ["bench", "--model", "world/vlm", *stacks, "--task", "world/questions"]
    assert cli.main([*asking, "--out", str(tmp_path)]) == 0
    assert asked == [["var", "paint", "vhr"], ["world/questions"]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modle: a", "did you mean model"),
        ("limit: ten", "limit is 'ten'"),
        ("timing: 3", "timing is 3"),
        ("- a", "no options"),
        ("a: [", "read"),
    ],
)
def test_a_wrong_config(tmp_path: Path, text: str, told: str, capsys: Any) -> None:
    config = tmp_path / "bench.yaml"
    config.write_text(text)
    assert cli.main(["bench", "--config", str(config), "--out", "x"]) == 2
    assert told in capsys.readouterr().err
    assert cli.main(["bench", "--out", "x"]) == 2
    assert "--model" in capsys.readouterr().err
