"""What the catalogue knows of a system. Imports nothing heavy: cards are read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["method", "driver", "experiment"]


@dataclass(frozen=True)
class Card:
    """One system. Written in literals, so that the catalogue reads it from the source text."""

    slug: str
    name: str
    kind: Kind
    family: str  # the folder: reduction, steering, probes, diffusion, training, gaze, ...
    form: str  # method, layer, backbone, model, loss, tuning, conversion, probe, metric, ...
    target: str  # what it applies to, in the ledger's words
    paper: str  # title, authors, year
    summary: str  # one line for the lists
    needs: tuple[str, ...] = ()  # image, vision_cls, first_token, ...
    neutral: Mapping[str, Any] = field(default_factory=dict)  # the options at which nothing changes
    trains: Literal["no", "light", "full"] = "no"
    code: str = ""  # public repository
    sure: Literal["known", "abstract"] = "known"
    choices: tuple[str, ...] = ()  # where paper, code and this implementation differ, and why
    headline: str = ""  # the paper's own figure
    tags: tuple[str, ...] = ()
