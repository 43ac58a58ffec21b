"""The published figures, as they ship with the package. Reading them imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from saccade import catalog
from saccade.report.chart import Span, number

FILE = Path(__file__).with_name("results.json")
REMEDY = "`make results` measures again what is older"
Published = Mapping[str, Any]
HEAD = ("model", "setting", "task", "score", "value", "against bare")


@cache
def published(path: Path = FILE) -> Published:
    """Nothing where nothing has been published."""
    found: Published = json.loads(path.read_text("utf-8")) if path.exists() else {"figures": [], "code": {}}
    return found


def of(slug: str, held: Published | None = None) -> list[tuple[str, ...]]:
    """The figures of a method, as cells below `HEAD`."""
    held = published() if held is None else held
    return [
        (one["model"], one["stack"], one["task"], one["score"], shown(one), moved(one))
        for one in held["figures"]
        if one["method"] == slug
    ]


def shown(one: Mapping[str, Any]) -> str:
    return Span(*(_number(one[part]) for part in ("value", "low", "high"))).shown


def moved(one: Mapping[str, Any]) -> str:
    change = "" if one["change"] is None else number(one["change"], "+")
    return f"{change} {one['verdict']}".strip()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def outdated(held: Published | None = None) -> list[str]:
    """The methods whose figures are older than their code, or than what that imports."""
    from saccade.bench.fingerprint import of_code

    held = published() if held is None else held
    now = {entry.card.slug: entry.module for entry in catalog.entries()}
    return [slug for slug, code in held["code"].items() if slug not in now or of_code([now[slug]]) != code]
