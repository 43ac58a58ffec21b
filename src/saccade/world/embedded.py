"""The models that ship with the package: what there is, and loading them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from saccade.core.errors import InputError, nearest

MODELS = Path(__file__).parent / "models"
WEIGHTS = "model.safetensors"
CARD = "card.json"


def names() -> list[str]:
    return sorted(path.parent.name for path in MODELS.glob(f"*/{CARD}"))


def folder(name: str) -> Path:
    """Where a model lies, its weights being what its card says; transformers loads it from there too."""
    if name not in names():
        near = nearest(name, names())
        raise InputError(
            f"No embedded model is called {name!r}{f': {near}' if near else '.'}",
            f"load one of {', '.join(names())}"
            if names()
            else "train it (python -m saccade.world.train) and give its folder, for none ships with this release yet",
        )
    path = MODELS / name
    if checksum(path / WEIGHTS) != card(name)["sha256"]:
        raise InputError(
            f"The weights of world/{name} are damaged: their checksum differs.", "install saccade again"
        )
    return path


def card(name: str) -> dict[str, Any]:
    """Recipe, data, figures and known failures."""
    found: dict[str, Any] = json.loads((MODELS / name / CARD).read_text())
    return found


def load(name: str) -> tuple[Any, Any]:
    """A model in float32 and its processor: `load("vlm")`."""
    path = folder(name)
    import torch

    from saccade.loading import failure, quiet

    try:
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

        kinds = {"answers": AutoModelForImageTextToText, "writes": AutoModelForCausalLM, "embeds": AutoModel}
        with quiet():
            model = kinds[card(name)["does"]].from_pretrained(path, dtype=torch.float32, use_safetensors=True)
            return model.eval(), AutoProcessor.from_pretrained(path)
    except (ImportError, RuntimeError) as e:  # beside a torchvision of another torch
        raise failure(f"world/{name}", True, e) from e


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
