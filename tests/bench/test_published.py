"""What is published: written, read again, and told to be older than its code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from saccade import catalog, cli
from saccade.bench import figures, published, timing
from saccade.bench.fingerprint import of_code
from saccade.bench.published import Held, entries, publish, settings_of
from saccade.bench.results import Figure, Results
from saccade.evals.interval import Estimate


def figure(stack: str, score: str, value: float, change: Estimate | None = None, told: str = "") -> Figure:
    found = Estimate(value, value - 0.125, value + 0.125, 24)
    return Figure("world/t", "world/vlm", stack, stack, 24, 24, score, found, change, told)


@pytest.fixture
def held() -> Held:
    """A pipe stands in the notation, and in a table it would be a border."""
    stack = "vhr(sites=text.1.self|text.2.self)"
    moved = Estimate(-0.25, -0.375, -0.125, 9)
    return Held(
        200,
        Results(
            [
                *(
                    figure("bare", score, 0.5)
                    for score in ("chair_i", "recall", "words", "gflops", "seconds")
                ),
                figure(stack, "chair_i", 0.25, moved, "better"),
                figure(stack, "recall", 0.5, Estimate(0.0, 0.0, 0.0, 0), "cannot tell"),
                figure(stack, "gflops", math.nan),
            ]
        ),
        {stack: "vhr"},
        {"vhr": of_code(["saccade.steering.vhr"])},
        [("tgate", "world/vlm", "It takes no\n| denoising steps.")],
    )


def test_what_is_written_is_read_again(held: Held, tmp_path: Path) -> None:
    held.write(tmp_path)
    read = figures.published(tmp_path / figures.FILE.name)
    head = ("world/vlm", "vhr(sites=text.1.self|text.2.self)", "world/t")
    assert figures.of("vhr", read) == [
        (*head, "chair_i", "0.250 (0.125 to 0.375)", "−0.250 better"),
        (*head, "recall", "0.500 (0.375 to 0.625)", "+0.000 cannot tell"),
        (*head, "gflops", "-", ""),
    ]
    assert {one["score"] for one in read["figures"] if not one["method"]} == {
        "chair_i", "recall", "gflops", "seconds",
    }  # fmt: skip
    assert (read["scenes"], read["code"]) == (200, held.code)
    text = (tmp_path / "index.md").read_text("utf-8")
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [5] * 4 + [4] * 3
    assert "0.250 (0.125 to 0.375) −0.250 better" in text and "It takes no \\| denoising steps." in text
    assert "200 scenes" in text
    assert ElementTree.fromstring((tmp_path / "plot.svg").read_text("utf-8")).tag.endswith("svg")


def test_show_tells_what_was_measured(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cli.main(["show", "var"])
    without = capsys.readouterr().out
    held.write(tmp_path)
    read = figures.published(tmp_path / figures.FILE.name)
    monkeypatch.setattr(figures, "published", lambda: read)
    cli.main(["show", "var"])
    assert capsys.readouterr().out == without
    cli.main(["show", "vhr"])
    told = capsys.readouterr().out.partition("Measured\n")[2].splitlines()
    assert told == [
        "  vhr(sites=text.1.self|text.2.self) on world/vlm, world/t",
        "    chair_i  0.250 (0.125 to 0.375)  −0.250 better",
        "    recall  0.500 (0.375 to 0.625)  +0.000 cannot tell",
        "    gflops  -",
    ]


def test_figures_that_are_older_than_their_code_are_named(held: Held) -> None:
    assert figures.outdated({"code": held.code}) == []
    older = {**held.code, "var": of_code(["saccade.steering.vhr"]), "gone": "0"}
    assert figures.outdated({"code": older}) == ["var", "gone"]


def test_what_is_run() -> None:
    slugs = {one.card.slug for one in entries()}
    assert {"vhr", "fastervlm", "vicrop"} <= slugs and "attention_rollout" not in slugs
    assert [str(one) for one in settings_of("vhr", False)] == ["vhr"]
    several = [str(one) for one in settings_of("vhr", True)]
    assert several == [
        "vhr",
        "vhr(alpha=0.5)",
        "vhr(alpha=4.0)",
        "vhr(alpha=8.0)",
    ]  # but not 1, which is bare


@pytest.mark.slow
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One method is measured, one refuses, and one breaks, which is told and fails."""
    monkeypatch.setitem(published.TASKS, "answers", ("world/questions",))
    monkeypatch.setattr(timing, "ROUNDS", 1)
    load = published.load

    def broken(slug: str) -> Any:
        if slug == "var":
            raise ZeroDivisionError("by nought")
        return load(slug)

    monkeypatch.setattr(published, "load", broken)
    rows, to = tmp_path / "rows", tmp_path / "to"
    assert publish(1, False, ["fastervlm", "masactrl", "var"], rows, 1, to) == 1
    said = capsys.readouterr().out
    assert (
        "world/vlm: methods 1, settings 1, tasks 1, scenes 1." in said
        and "var broke on world/vlm: ZeroDivision" in said
    )
    read = json.loads((to / figures.FILE.name).read_text())
    assert [slug for slug, *_ in read["refused"]] == ["masactrl"] and [*read["code"]] == ["fastervlm"]
    assert {"accuracy", "gflops", "per token ms"} <= {one[3] for one in figures.of("fastervlm", read)}


def test_the_figures_that_ship_are_of_what_there_is() -> None:
    slugs = {card.slug for card in catalog.cards()}
    assert {one["method"] for one in figures.published()["figures"]} <= slugs | {""}
