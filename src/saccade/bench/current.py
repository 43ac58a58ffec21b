"""Which rows of a folder are those of a run as it would be now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saccade.bench.fingerprint import ASKING, fingerprint, of_code, of_model
from saccade.bench.rows import About, read_all
from saccade.stack import Stack


def current(
    out: Path,
    models: Mapping[str, tuple[Any, Any]],
    stacks: Iterable[Stack],
    tasks: Iterable[str],
    limit: int,
    seed: int,
) -> dict[str, About]:
    """What they are made of, by run: these settings, these weights, and the code as it stands."""
    known = [of_model(name, model) for name, (model, _) in models.items()]
    wanted = [(task, limit, seed) for task in tasks]
    asking = of_code(ASKING)
    code = {
        str(stack): of_code(sorted({type(part).__module__ for part in stack})) for stack in (Stack(), *stacks)
    }
    return {
        fingerprint(about): about
        for about, _ in read_all(out)
        if about["model"] in known
        and tuple(about["task"][part] for part in ("name", "limit", "seed")) in wanted
        and (about["code"]["asking"], about["code"]["stack"]) == (asking, code.get(about["written"]))
    }
