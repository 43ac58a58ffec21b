"""The method that the guides write is one: it goes through the checks that it is promised."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from zoo import family

from saccade.core.method import Method, option

from .test_shared import ON_MODELS, ONCE, Entry, Trial, name_of

ROOT = Path(__file__).parents[2]
GUIDE, CONTRIBUTING = ROOT / "docs" / "write-a-method.md", ROOT / "CONTRIBUTING.md"


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The guide's two files, as if they stood where it says."""
    modules = []
    for name, source in zip(
        ("saccade.steering.image_gain", "methods.test_image_gain"), blocks(GUIDE), strict=True
    ):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, name, "exec"), vars(module))
        modules.append(module)
    cls = modules[0].ImageGain
    return Entry(cls.card, cls, modules[1])


def test_the_guides_test_passes(entry: Entry) -> None:
    entry.tests.test_image_tokens_weigh_gain_times_more()


@pytest.mark.parametrize("check", ON_MODELS["method"], ids=name_of)
def test_the_guides_method_goes_through_the_checks_on_models(
    entry: Entry, check: Callable[[Trial], None]
) -> None:
    check(Trial(entry, family("llava")))


@pytest.mark.parametrize("check", [c for c in ONCE["method"] if "notation" not in c.__name__], ids=name_of)
def test_the_guides_method_goes_through_the_checks_made_once(
    entry: Entry, check: Callable[[Entry], None]
) -> None:
    check(entry)


def test_the_method_in_ten_lines_is_the_guides(entry: Entry) -> None:
    names: dict[str, Any] = {"dataclass": dataclass, "option": option, "Method": Method, "math": math}
    (source,) = blocks(CONTRIBUTING)
    assert len(source.splitlines()) <= 10
    names["Card"] = lambda *_: entry.cls.card
    exec(compile(source, "CONTRIBUTING.md", "exec"), names)
    short = names["ImageGain"](gain=2.0)

    class Call:
        def columns(self, name: str) -> torch.Tensor:
            return torch.tensor([name == "image", False])

    assert_close(short.bias(Call()), entry.cls(gain=2.0).bias(Call()))
    assert_close(short.bias(Call()), torch.tensor([math.log(2.0), 0.0]))
