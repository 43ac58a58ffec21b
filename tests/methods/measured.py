"""Calibrations that the shared checks find: drawn, and kept for the models that they try a method on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from helpers import shared
from torch import Tensor
from zoo.base import generator

from saccade.core import calibration

Draw = Callable[..., Tensor]


def keep(name: str, models: tuple[str, ...], make: Callable[[Any, Draw], dict[str, Tensor]]) -> str:
    """`make` is given a model, and draws normal numbers; float64 has the weights of float32."""
    for model in models:
        for dtype in (torch.float32, torch.bfloat16):
            noise = generator(0)
            tensors = make(
                shared(model, dtype), lambda *shape, noise=noise: torch.randn(*shape, generator=noise)
            )
            calibration.save(name, shared(model, dtype), tensors)
    return name


@contextmanager
def home() -> Iterator[None]:
    """An empty folder of calibrations."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, SACCADE_HOME=folder):
        yield
