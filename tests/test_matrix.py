"""The page of what works where says what its command finds."""

from __future__ import annotations

import pytest
from matrix import EVENTS, PAGE, Row, line_of, measure, page, versions
from zoo import FAMILIES, Family


def test_the_page_has_every_family_and_nothing_fails() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == sorted(FAMILIES)
    assert len(lines) >= 60
    assert not [line for line in lines if "✗" in line]


def test_a_page_says_why_not() -> None:
    good, bad = (
        Row("b", "1 text self", {}),
        Row("a", "1 text self", {}, ["bias at `text.0.self`: it was not called"]),
    )
    for row in (good, bad):
        row.cells = dict.fromkeys(("observed", "detached", *EVENTS), "✓")
    bad.cells["bias"] = "✗"
    text = page([good, bad, Row("c", skipped="c needs timm")])
    assert text.index("| `a` |") < text.index("| `b` |")
    assert "1 of 2 families" in text
    assert "- `a`, bias at `text.0.self`: it was not called" in text
    assert "- c needs timm" in text


@pytest.mark.slow
@pytest.mark.parametrize("f", FAMILIES.values(), ids=list(FAMILIES))
def test_every_event_that_a_seam_gives_changes_the_output(f: Family) -> None:
    row = measure(f)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.complete, row.notes
    written = PAGE.read_text(encoding="utf-8")
    if versions() in written:  # else the page tells of others
        assert line_of(row) in written
