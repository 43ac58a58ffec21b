"""The demonstration, on the model that ships, with few scenes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from saccade import demonstration, world
from saccade.core.errors import InputError
from saccade.demonstration import STACKS, demo, measure
from saccade.evals.asking import answers
from saccade.evals.world import BROKEN, Captions


def test_it_shows_asks_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    demo(scenes=3)
    said = capsys.readouterr().out
    assert "┌" in said and all(f"\n{title}" in said for title in STACKS)
    assert said.rstrip().splitlines()[-1].strip() == demonstration.TRY[-1]
    page = Path("demo.html").read_text()
    assert "http" not in page and len(page) < 2_000_000
    told = re.findall(r"<button[^>]*>([^<]*)</button>", page)
    assert "this" in told and len(told) > 5
    assert page.count("<tr>") == 1 + len(STACKS)


def test_what_it_measures() -> None:
    model, processor = world.load("vlm")
    bare = measure(model, processor, "bare", "", 3)
    fewer = measure(model, processor, "fewer", "fastervlm(keep=0.25)", 3)
    assert (bare.tokens, fewer.tokens) == (144, 36)
    task = Captions(BROKEN)
    samples = task.samples(3, 0)
    said = answers(model, processor, samples, max_new_tokens=task.max_new_tokens)
    assert bare.chair == task.score(zip(samples, said, strict=True))["chair_i"]
    assert bare.accuracy.count == 3


def test_what_it_looked_at_is_kept_when_measuring_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demonstration, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        demo()
    assert "<button" in Path("demo.html").read_text()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        demo(str(tmp_path / "no" / "demo.html"))
