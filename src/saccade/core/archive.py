"""Tensors and what is told of them, in one safetensors file with JSON in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saccade.core.errors import InputError

Path = str | os.PathLike[str]
TENSOR = "tensor"
Made = TypeVar("Made")


def write(path: Path, kind: str, version: str, data: dict[str, Any]) -> None:
    """Dataclasses, lists and dictionaries of what JSON knows, and tensors anywhere in them, each kept once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            name = names.setdefault(id(thing), f"t{len(names)}")
            if name not in tensors:
                tensors[name] = thing.detach().cpu().clone().contiguous()
            return {TENSOR: name}
        if dataclasses.is_dataclass(thing):
            return {field.name: plain(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
        if isinstance(thing, dict):
            return {key: plain(value) for key, value in thing.items()}
        if isinstance(thing, list | tuple):
            return [plain(one) for one in thing]
        return thing

    text = json.dumps(plain(data))
    try:
        save_file(tensors, path, {"format": f"saccade.{kind}", "version": version, "data": text})
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} cannot be written: {e}.", "give a path in a folder of yours") from e


def read(path: Path, kind: str, version: str, build: Callable[[dict[str, Any]], Made]) -> Made:
    """What is built of what `write` was given, with dictionaries for dataclasses and lists for tuples."""
    remedy = f"give a file that {kind}.save(path) wrote"
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} cannot be read: {e}.", remedy) from e
    if about.get("format") != f"saccade.{kind}":
        raise InputError(f"{path} is no {kind} of saccade.", remedy)
    if about.get("version") != version:
        raise InputError(
            f"{path} is a {kind} of version {about.get('version')}, and this library reads {version}.",
            "make it again, or read it with the version of saccade that wrote it",
        )

    def whole(thing: dict[str, Any]) -> Any:
        return tensors[thing[TENSOR]] if thing.keys() == {TENSOR} else thing

    try:
        return build(json.loads(about["data"], object_hook=whole))
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path} is damaged: {e!r}.", remedy) from e
