"""What rows may stand together: those of one model, stack, task and code, down to the last setting."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from saccade.core import calibration
from saccade.core.errors import InputError
from saccade.core.system import System
from saccade.evals.task import Sample, Task

ASKING = ("saccade.evals.asking", "saccade.bench.costs")
ELSEWHERE = {"_name_or_path", "transformers_version"}  # of a configuration, but not of what the model does


def fingerprint(value: Any) -> str:
    """The same for equal settings, in whatever order they are held."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """As JSON holds it; sets are sorted."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    raise InputError(
        f"A {type(value).__name__} cannot be written down, and so rows could mix.",
        "use numbers, words, and lists or mappings of them",
    )


def of_model(name: str, model: Any) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {
        "name": name,
        "weights": calibration.fingerprint(model),
        "config": fingerprint(_kept(config)),
        "generation": fingerprint(_kept(json.loads(model.generation_config.to_json_string()))),
        "dtype": str(model.dtype),
        "device": model.device.type,  # of which the times are
    }


def _kept(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _kept(value) for key, value in config.items() if key not in ELSEWHERE}
    return config


def of_stack(stack: Iterable[System], weights: str) -> list[dict[str, Any]]:
    """Methods with all their options, and what they have measured of the model."""
    found = []
    for part in stack:
        slug = part.card.slug
        options = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
        measured = calibration.folder() / f"{slug}-{weights}.safetensors"
        kept = hashlib.sha256(measured.read_bytes()).hexdigest()[:16] if measured.exists() else None
        found.append({"slug": slug, "options": plain(options), "calibration": kept})
    return found


def of_task(name: str, task: Task, samples: Sequence[Sample], limit: int, seed: int) -> dict[str, Any]:
    """With all that is asked and shown."""
    digest, shown = hashlib.sha256(), set[tuple[str, int]]()
    for one in samples:
        asked = (one.id, one.question, plain(one.truth), one.group, one.picture, one.earlier)
        digest.update(json.dumps(asked).encode())
        if (one.cluster, len(one.images)) in shown:
            continue  # for to open a picture takes time
        shown.add((one.cluster, len(one.images)))
        for image in one.images:
            pixels = image.convert("RGB")
            digest.update(repr(pixels.size).encode() + pixels.tobytes())
    return {
        "name": name,
        "limit": limit,
        "seed": seed,
        "samples": len(samples),
        "content": digest.hexdigest()[:16],
        "max_new_tokens": task.max_new_tokens,
    }


# ---- code ----------------------------------------------------------------------------------------------


def of_code(modules: Iterable[str]) -> str:
    """Of modules and of all that they import from saccade and from their own packages, as it runs: comments,
    docstrings and imports for types change nothing."""
    due = list(modules)
    for name in due:
        if _path(name) is None:
            raise InputError(
                f"The code of {name} is in no file, and so rows could mix.", "put it into a module"
            )
    ours = {"saccade", *(name.partition(".")[0] for name in due)}
    seen: dict[str, str] = {}
    while due:
        name = due.pop()
        path = _path(name)
        if name in seen or path is None:
            continue
        seen[name], imported = _read(path.read_text("utf-8"), name, path.name == "__init__.py")
        for module, part in imported:
            if module.partition(".")[0] in ours:
                whole = f"{module}.{part}"
                due.append(whole if part and _path(whole) else module)
    return fingerprint(seen)


def _path(name: str) -> Path | None:
    """The file of a module, which is not imported for it."""
    top, _, rest = name.partition(".")
    package: Any = sys.modules.get(top)
    if not hasattr(package, "__path__"):
        file = getattr(package, "__file__", None)
        return Path(file) if file and not rest else None
    place = Path(next(iter(package.__path__)), *filter(None, rest.split(".")))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


@lru_cache(None)
def _read(text: str, name: str, is_package: bool) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The syntax of a module, and what it imports: modules, each with a part of it or none."""
    tree = _Bare().visit(ast.parse(text))
    here = name.split(".") if is_package else name.split(".")[:-1]
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) + 1 - node.level] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            imported += [(module, alias.name) for alias in node.names]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), tuple(imported)


class _Bare(ast.NodeTransformer):
    """Takes away what does not run."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest
        return node

    def visit_If(self, node: ast.If) -> Any:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [self.visit(line) for line in node.orelse]
        return self.generic_visit(node)
