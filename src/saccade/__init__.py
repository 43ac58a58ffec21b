"""Saccade: see, steer and reduce attention in any transformer.

Names come on first use, so that importing this imports neither torch nor transformers. The class of every
method of the catalogue is a name here too: `saccade.VAR`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade import world
    from saccade.bench.calibrate import calibrate
    from saccade.bench.runner import bench
    from saccade.catalog import methods
    from saccade.core.call import AttentionCall
    from saccade.core.card import Card
    from saccade.core.cost import Count
    from saccade.core.driver import Driver, Experiment
    from saccade.core.errors import SaccadeError
    from saccade.core.heads import Heads
    from saccade.core.layout import Layout
    from saccade.core.method import Method, option
    from saccade.core.question import Answer, Question
    from saccade.core.record import Recording
    from saccade.core.recorder import Record
    from saccade.core.session import Session, attach
    from saccade.core.site import Site
    from saccade.examining.diagnosis import Diagnosis
    from saccade.examining.examination import doctor
    from saccade.looking import ask, look
    from saccade.stack import load

__all__ = [
    "Answer",
    "AttentionCall",
    "Card",
    "Count",
    "Diagnosis",
    "Driver",
    "Experiment",
    "Heads",
    "Layout",
    "Method",
    "Question",
    "Record",
    "Recording",
    "SaccadeError",
    "Session",
    "Site",
    "ask",
    "attach",
    "bench",
    "calibrate",
    "doctor",
    "load",
    "look",
    "methods",
    "option",
    "world",
]

_HOMES = {
    "Answer": "core.question",
    "AttentionCall": "core.call",
    "Card": "core.card",
    "Count": "core.cost",
    "Diagnosis": "examining.diagnosis",
    "Driver": "core.driver",
    "Experiment": "core.driver",
    "Heads": "core.heads",
    "Layout": "core.layout",
    "Method": "core.method",
    "Question": "core.question",
    "Record": "core.recorder",
    "Recording": "core.record",
    "SaccadeError": "core.errors",
    "Session": "core.session",
    "Site": "core.site",
    "ask": "looking",
    "attach": "core.session",
    "calibrate": "bench.calibrate",
    "doctor": "examining.examination",
    "load": "stack",
    "look": "looking",
    "methods": "catalog",
    "option": "core.method",
}


def __getattr__(name: str) -> Any:
    if home := _HOMES.get(name):
        value = getattr(import_module(f"saccade.{home}"), name)
    elif name in ("bench", "world"):
        value = import_module(f"saccade.{name}")
    elif name[:1].isupper():
        value = import_module("saccade.catalog").load_named(name)
    else:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    classes = (e.class_name for e in import_module("saccade.catalog").entries())
    return sorted({*globals(), *__all__, *classes})
