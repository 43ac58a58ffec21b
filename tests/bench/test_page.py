"""The page of results: what it tells, that nothing escapes it, and that its plots are drawn to scale."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from saccade import cli
from saccade.bench.page import blocks, page, plots
from saccade.bench.results import Figure, Results
from saccade.evals.interval import Estimate
from saccade.report.chart import Axis, Point, Scale, Span, alone, curve, front, number, scatter, strip

EVIL = '"><script>alert(1)</script>&amp;<img src=http://x onerror=y>'


def figure(
    stack: str, score: str, value: float, change: float | None = None, told: str = "", **other: Any
) -> Figure:
    """With an interval of 0.1 to both sides; so has the change."""
    moved = None if change is None else Estimate(change, change - 0.1, change + 0.1, 9)
    given = {"task": "world/t", "model": "m", "run": stack, "samples": 24, "of": 24} | other
    return Figure(
        stack=stack,
        score=score,
        found=Estimate(value, value - 0.1, value + 0.1, 24),
        change=moved,
        verdict=told,
        **given,
    )


def results() -> Results:
    return Results(
        [
            figure("bare", "accuracy", 0.5),
            figure("bare", "seconds", 2.0),
            figure("good", "accuracy", 0.75, 0.25, "better"),
            figure("good", "seconds", 1.0, -1.0),
            figure("even", "accuracy", 0.6, 0.1, "cannot tell", samples=6),
            figure("bad", "accuracy", 0.25, -0.25, "worse"),
            figure("bad", "seconds", 4.0, 2.0),
        ]
    )


class Reader(HTMLParser):
    """Tags with what they have, and the cells of every row as texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_a_row_tells_value_interval_change_and_verdict() -> None:
    read = Reader(page(results()))
    head, bare, good, even, bad = read.rows[:5]
    assert [cell.split("−")[0] for cell in head] == ["stack", "accuracy", "change", "seconds"]
    assert bare[:3] == ["bare", "0.5000.400 to 0.600", ""]
    assert good[1] == "0.7500.650 to 0.850✓ +0.250 better"
    assert good[3].endswith("−50%") and bad[3].endswith("+100%")
    assert bad[1].endswith("✗ −0.250 worse")
    assert even[0] == "even6 answers so far" and even[1].endswith("○ +0.100 cannot tell") and even[3] == ""
    told = {attrs["class"] for tag, attrs in read.tags if (attrs.get("class") or "").startswith("verdict ")}
    assert {"verdict better", "verdict worse", "verdict cannot"} <= told


def test_nothing_escapes_and_nothing_is_fetched() -> None:
    made = Results(
        [
            figure(stack, score, 0.5, None, task=EVIL, model=EVIL, note=EVIL)
            for stack in (EVIL, "b")
            for score in ("accuracy", "seconds", EVIL)
        ]
    )
    text = page(made)
    read = Reader(text)
    assert any(EVIL in cell for row in read.rows for cell in row)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    names = {name for _, attrs in read.tags for name in attrs}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "srcset", "data"}
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in read.tags)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text


def test_blocks_keep_runs_apart_and_have_what_there_is() -> None:
    one, other = (figure("good", "accuracy", 0.5, run=run) for run in ("aaaaaaaa", "bbbbbbbb"))
    (block,) = blocks(Results([figure("bare", "accuracy", 0.5), one, other]))
    assert [*block.stacks] == ["bare", "good, run aaaaaa", "good, run bbbbbb"]
    assert (block.main, block.scores, block.costs) == ("accuracy", ["accuracy"], [])
    assert plots(block) == [""]
    captions = [
        figure("bare", name, 0.5) for name in ("chair_i", "recall", "words", "gflops", "per token ms")
    ]
    (block,) = blocks(Results(captions))
    assert block.headline == ["chair_i", "recall"] and block.costs == ["gflops", "per token ms"]
    assert len(plots(block)) == 3 and "recall →" in plots(block)[0]


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Results, "read", classmethod(lambda cls, out: results()))
    out = tmp_path / "page.html"
    assert cli.main(["results", "runs", "--html", str(out)]) == 0
    assert out.read_text("utf-8") == page(results())
    assert cli.main(["results", "runs", "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- drawing


def circles(svg: str) -> np.ndarray:
    found = ElementTree.fromstring(svg).iter("circle")
    return np.array([[float(one.get("cx", "nan")), float(one.get("cy", "nan"))] for one in found])


def test_points_and_intervals_are_drawn_to_scale() -> None:
    x, y = np.array([1.0, 2.0, 5.0]), np.array([0.2, 0.9, 0.4])
    points = [Point(str(i), Span(a), Span(b, b - 0.1, b + 0.2)) for i, (a, b) in enumerate(zip(x, y))]
    svg = scatter([*points, Point("nothing", Span(math.nan), Span(0.5))], Axis("cost", True), Axis("score"))
    drawn = circles(svg)
    assert len(drawn) == 3
    np.testing.assert_allclose(np.diff(drawn[:, 0]) / np.diff(x), [np.ptp(drawn[:, 0]) / 4] * 2, atol=0.2)
    per = (drawn[0, 1] - drawn[1, 1]) / 0.7  # pixels upwards
    assert per > 0
    assert drawn[2, 1] == pytest.approx(drawn[0, 1] - 0.2 * per, abs=0.2)
    ends = [one for one in ElementTree.fromstring(svg).iter("line") if one.get("class") == "ends"]
    assert len(ends) == 3  # no interval across, which none is known of
    assert float(ends[0].get("y1", 0)) == pytest.approx(drawn[0, 1] + 0.1 * per, abs=0.2)
    assert float(ends[0].get("y2", 0)) == pytest.approx(drawn[0, 1] - 0.2 * per, abs=0.2)
    assert "cost ←" in svg and "score ↑" in svg
    assert scatter([], Axis("cost"), Axis("score")) == ""


@pytest.mark.parametrize(("x_lower", "y_lower"), list(product((False, True), repeat=2)))
def test_the_front_is_what_no_other_betters(x_lower: bool, y_lower: bool) -> None:
    rng = np.random.default_rng(0)
    at = rng.permutation(20)[:, None] * [1.0, 0.0] + rng.permutation(20)[:, None] * [0.0, 1.0]
    points = [Point(str(i), Span(a), Span(b)) for i, (a, b) in enumerate(at)]
    worth = at * [-1 if x_lower else 1, -1 if y_lower else 1]
    expected = {str(i) for i, one in enumerate(worth) if not (worth > one).all(1).any()}
    found = front(points, Axis("x", x_lower), Axis("y", y_lower))
    assert {point.name for point in found} == expected


def test_a_strip_has_its_zero_and_no_interval_that_is_not_known() -> None:
    scale = Scale(-1, 1, 10, 110)
    assert (scale(-1), scale(0), scale(0.5)) == (10, 60, 85)
    assert 'cx="85.0"' in strip(Span(0.5, 0.25, 1), scale, "better")
    assert 'x1="72.5" x2="110.0"' in strip(Span(0.5, 0.25, 1), scale, "better")
    assert "ends" not in strip(Span(0.5), scale, "better")


def test_a_curve_rings_the_chosen_value() -> None:
    found = [Span(0.1, 0.0, 0.2), Span(0.5, 0.4, 0.6), Span(0.3, 0.2, 0.4)]
    svg = curve(["1", "2", "<4>"], found, 1, Span(0.2, 0.1, 0.3), "x", "y", ruled="bare")
    drawn = circles(svg)
    assert len(drawn) == 4 and (drawn[3] == drawn[1]).all()
    assert "&lt;4&gt;" in svg
    whole = ElementTree.fromstring(alone(svg))
    assert whole.tag == "{http://www.w3.org/2000/svg}svg"


def test_numbers_and_ticks() -> None:
    shown = [number(v) for v in (0.12345, 1.0, -1.234, 12.34, 1234.5, math.nan)]
    assert shown == ["0.123", "1.000", "−1.23", "12.3", "1,234", "-"] and number(0.5, "+") == "+0.500"
    np.testing.assert_allclose(Scale(0.03, 0.98, 0, 1).ticks(), [0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(Scale(-13, 12, 0, 1).ticks(), [-10, -5, 0, 5, 10])
