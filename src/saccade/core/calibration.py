"""What a method measured of a model: kept as safetensors, found again by the model's fingerprint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saccade.core.errors import InputError


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


def save(slug: str, model: nn.Module, tensors: dict[str, Tensor]) -> Path:
    path = folder() / f"{slug}-{fingerprint(model)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, path, {"slug": slug, "model": type(model).__name__}
    )
    return path


def load(slug: str, model: nn.Module) -> dict[str, Tensor]:
    path = folder() / f"{slug}-{fingerprint(model)}.safetensors"
    if not path.exists():
        raise InputError(
            f"{slug} has not been calibrated for this {type(model).__name__} ({path.name} is not there).",
            f"session.calibrate(method, samples) measures it and keeps it in {path.parent}",
        )
    return load_file(path)
