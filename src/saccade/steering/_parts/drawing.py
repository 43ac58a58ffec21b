"""From words to a picture: a function of the user's, a pipeline of the hub, or the world's own hand."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from PIL import Image

from saccade.core.errors import InputError
from saccade.loading import load_model

WORLD = "world"


class Drawer(Protocol):
    def __call__(self, text: str) -> Image.Image: ...


@dataclass(frozen=True)
class PipelineDrawer:
    """A text-to-image pipeline of diffusers, the same picture every time."""

    pipe: Any
    seed: int = 0

    def __call__(self, text: str) -> Image.Image:
        return self.pipe(text, generator=torch.Generator().manual_seed(self.seed)).images[0]


def drawer(draw: str | Drawer) -> Drawer:
    if not isinstance(draw, str):
        return draw
    return _world if draw == WORLD else _pipeline(draw)


def _world(text: str) -> Image.Image:
    return importlib.import_module("saccade.world").illustrate(text).picture()


@cache
def _pipeline(name: str) -> PipelineDrawer:
    pipe, _ = load_model(name, any_kind=True)
    if isinstance(pipe, torch.nn.Module):
        raise InputError(
            f"{name} is a {type(pipe).__name__}, which draws nothing.",
            "give a text-to-image pipeline, such as stabilityai/stable-diffusion-xl-base-1.0",
        )
    return PipelineDrawer(pipe)
