"""What a method measured of a model: kept as safetensors, found again by the model's fingerprint."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.core.errors import InputError, OptionError


def folder() -> Path:
    """`SACCADE_HOME`, or a folder of the user's cache."""
    return Path(os.environ.get("SACCADE_HOME") or Path.home() / ".cache" / "saccade") / "calibrations"


def fingerprint(model: nn.Module) -> str:
    """The same for equal weights: names, shapes, and the values at both ends of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        ends = [*flat[:8].float().tolist(), *flat[-8:].float().tolist()]
        digest.update(repr((name, tuple(parameter.shape), ends)).encode())
    return digest.hexdigest()[:16]


def save(name: str, model: nn.Module, tensors: dict[str, Tensor]) -> Path:
    mark = fingerprint(model)
    path = _path(name, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"name": name, "model": type(model).__name__, "weights": mark}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, about)
    return path


def load(name: str, model: nn.Module) -> dict[str, Tensor]:
    mark = fingerprint(model)
    path = _path(name, mark)
    remedy = f"session.calibrate(method, samples) measures it and keeps it in {path.parent}"
    if not path.exists():
        others = [*path.parent.glob(f"{name}-{'?' * len(mark)}.safetensors")]
        known = "only been calibrated for other models, not for" if others else "not been calibrated for"
        raise InputError(
            f"{name} has {known} this {type(model).__name__} ({path.name} is not there).", remedy
        )
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if about.get("weights") != mark:
        raise InputError(
            f"{path.name} was made for another model, a {about.get('model')} with other weights.", remedy
        )
    return load_file(path)


def _path(name: str, mark: str) -> Path:
    if not re.fullmatch(r"[\w.-]+", name):
        raise OptionError(f"No calibration can be called {name!r}.", "use letters, digits, -, _ and dots")
    return folder() / f"{name}-{mark}.safetensors"
