"""What can be reached in a model, and what each method of the catalogue would miss there.

Nothing is guessed from a family's name: sites are those that `attach` finds, an event is open where `attach`
takes it, a small pass tells which sites fire, and every method is tried.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from saccade import catalog
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import AttachError, SaccadeError, VersionError
from saccade.core.host import check_needs, is_pipeline
from saccade.core.method import Method
from saccade.core.runtime import Runtime, tracks
from saccade.core.samples import Inputs
from saccade.core.seams import private
from saccade.core.session import attach
from saccade.examining.anatomy import find_cache, find_heads, find_pictures, find_places, has_chat, watcher
from saccade.examining.diagnosis import Cached, Diagnosis, Fit, Version, told
from saccade.examining.trial import as_it_was, attempt, modules_of, without_sites
from saccade.loading import TORCHVISION_REMEDY, torchvision_problem
from saccade.stack import load

# The first version that we know, and the last where a newer one may have moved.
RANGES = {
    "torch": ("2.9", ""),
    "transformers": (private.KNOWN.split(" to ")[0], private.KNOWN.split(" to ")[1]),
    "diffusers": ("0.42", ""),
    "timm": ("1.0.15", ""),
}

PRIVATE = {"transformers": private.NAMES, "diffusers": private.DIFFUSERS}


def doctor(model: Any, processor: Any = None, inputs: Inputs | None = None, *, run: bool = True) -> Diagnosis:
    """What is reachable in a model or pipeline, and what each method of the catalogue would miss.

    A small pass is tried, on `inputs` or on made-up ones, unless `run` is False. The model stays as it was.

    >>> sc.doctor(model, processor)
    """
    model = getattr(model, "_orig_mod", model)
    about = _about(model)
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    try:
        host = Runtime.of(model).host
    except SaccadeError as e:
        if not (isinstance(model, nn.Module) or is_pipeline(model)):
            raise
        trial = without_sites(model, given) if run and isinstance(model, nn.Module) else None
        return Diagnosis(**about, trial=trial, problem=e.problem, remedy=e.remedy)
    except (ImportError, RuntimeError):
        if not (wrong := torchvision_problem()):
            raise
        problem = f"transformers does not import beside a torchvision that does not fit this torch ({wrong})"
        return Diagnosis(**about, problem=problem, remedy=TORCHVISION_REMEDY)
    if Runtime.of(model).sessions:
        raise AttachError(
            f"Methods are attached to this {type(model).__name__}: the bare model is what is examined.",
            "detach them first",
        )
    with as_it_was(host.modules(), host.transient()):
        seen = watcher(host)
        trial, out = attempt(host, processor, given, seen) if run else (None, None)
        cached = find_cache(host, out)
        return Diagnosis(
            **about,
            places=find_places(host, cached),
            heads=find_heads(host, seen),
            cached=cached,
            pictures=find_pictures(host, processor, run),
            chat_template=None if processor is None else has_chat(processor),
            trial=trial,
            methods=_methods(model, cached),
        )


def _about(model: Any) -> dict[str, Any]:
    modules = {id(module): module for _, module in modules_of(model)}
    parameters = list({id(p): p for m in modules.values() for p in m.parameters(recurse=False)}.values())
    first = next((p for p in parameters if p.is_floating_point()), None)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": "" if first is None else str(first.dtype).removeprefix("torch."),
        "device": "" if first is None else str(first.device),
        "versions": tuple(_versions()),
    }


# ---- versions --------------------------------------------------------------------------------------------


def _versions() -> Iterator[Version]:
    for library, (lowest, newest) in RANGES.items():
        version = _version(library)
        if not version:
            continue
        known = f"{lowest} to {newest}" if newest else f"{lowest} and newer"
        moved = _moved(library)
        if _numbers(version) < _numbers(lowest):
            moved = moved or "older than what is known"
        elif newest and _numbers(version)[:2] > _numbers(newest):
            moved = moved or "newer than what is known, but nothing that is leant on has moved"
        yield Version(library, version, known, moved)
    if importlib.util.find_spec("torchvision") is not None:
        wrong = torchvision_problem()
        problem = f"does not fit this torch ({wrong})" if wrong else ""
        yield Version("torchvision", _version("torchvision"), "the build for this torch", problem)


def _version(library: str) -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _moved(library: str) -> str:
    """What of a library's inside is not as we know it. One that is not loaded is not loaded for this."""
    problems = []
    for name in PRIVATE.get(library, ()) if library in sys.modules else ():
        try:
            private.check_names((name,), library)
        except VersionError as e:
            problems.append(e.problem)
        except RuntimeError:  # torchvision's, which is told by itself
            break
    return " ".join(problems)


# ---- methods ---------------------------------------------------------------------------------------------


def _methods(model: Any, cached: Cached | None) -> tuple[Fit, ...]:
    with attach(model):  # one discovery for all
        return tuple(_fit(model, card, cached) for card in catalog.cards())


def _fit(model: Any, card: Card, cached: Cached | None) -> Fit:
    """Whether a method attaches as it is written in a stack, its options at their defaults."""
    fit = functools.partial(Fit, card.slug, card.kind)
    if card.kind == "experiment":
        return fit(None, "runs on models of its own")
    name = ""
    try:
        (system,) = load(card.slug)
        name = type(system).__name__
        if isinstance(system, Driver):
            check_needs(system, Runtime.of(model).host)
            helpers = [f for f in dataclasses.fields(system) if f.metadata.get("helper")]
            wanting = [f for f in helpers if getattr(system, f.name) is None]
            return fit(True, f"give it {wanting[0].name}=" if wanting else "")
        assert isinstance(system, Method)
        attach(model, system).detach()
    except SaccadeError as e:
        missing = e.problem.removeprefix(f"{name} ").removeprefix(f"cannot serve {type(model).__name__}: ")
        return fit(False, " ".join(missing.split()).rstrip("."), e.remedy)
    except ImportError as e:
        return fit(False, told(e), f"pip install {e.name}" if e.name else "install it")
    if cached is not None and cached.refusal and tracks([system]):
        return fit(False, cached.refusal.rstrip("."), "use it on a model whose every layer keeps keys")
    calibrated = type(system).calibrate is not Method.calibrate
    return fit(True, "first measure the model, session.calibrate(method, samples)" if calibrated else "")
