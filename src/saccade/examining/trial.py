"""A small pass: bare, observed everywhere, detached."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade.core.errors import InputError
from saccade.core.samples import Inputs, made_up, of_first_layer
from saccade.core.seams.plain import PlainHost, restore
from saccade.core.session import attach
from saccade.core.site import Site
from saccade.examining.anatomy import Seen, pattern_of
from saccade.examining.diagnosis import PICTURE, Trial, told

PARTLY = "made-up inputs may not reach all of a model: processor= or inputs= say more"


def attempt(host: PlainHost, processor: Any, inputs: Inputs | None, seen: Seen) -> tuple[Trial, Any]:
    """The trial, and what the bare model gave."""
    given, bare, note = _working(host, processor, inputs)
    if given is None:
        return Trial({}, note=note), None
    listener = _Listener(
        modules_of(host.model), [site.module for site in host.sites if site.seam != "module"]
    )
    with listener:
        _run(host.model, given)
    trial = Trial(_described(given), unreached=listener.found, note=note)
    try:
        with attach(host.model, seen):
            observed = _run(host.model, given)
    except Exception as e:  # ours, or the model's that does not bear being watched
        return dataclasses.replace(trial, problem=f"observing everywhere fails: {told(e)}"), bare
    silent = [site for site in host.sites if site.name not in seen.fired]
    after = _run(host.model, given)
    return dataclasses.replace(
        trial,
        fired=len(seen.fired),
        silent=_patterns(silent, host.sites),
        note=trial.note or (PARTLY if silent and inputs is None else ""),
        observed=_difference(bare, observed),
        detached=_difference(bare, after),
    ), bare


def _working(host: PlainHost, processor: Any, inputs: Inputs | None) -> tuple[Inputs | None, Any, str]:
    """The first inputs that the model takes, what it gives for them, and why better ones do not go."""
    if inputs is not None:
        try:
            return inputs, _run(host.model, inputs), ""
        except Exception as e:
            raise InputError(
                f"These inputs do not go through {type(host.model).__name__}: {told(e)}.",
                "give what its forward takes, by name or in a tuple",
            ) from e
    problems: list[str] = []
    for make in made_up(host, processor, PICTURE):
        try:
            if given := make():
                note = f"what the processor makes fails: {problems[0]}" if processor and problems else ""
                return given, _run(host.model, given), note
        except Exception as e:  # processors and models raise whatever befalls them
            problems.append(told(e))
    why = f" ({problems[0]})" if problems else ""
    return None, None, f"not tried: no made-up inputs go through{why}; pass inputs= that do"


def _run(model: Any, inputs: Inputs) -> Any:
    """A forward, or a sampling; with the same chance every time."""
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        return model(*args, **kwargs)


def _difference(a: Any, b: Any) -> float:
    """The largest of all tensors of two outputs, relative to the largest number."""
    scale, worst = 0.0, 0.0
    for x, y in zip(_tensors(a), _tensors(b), strict=True):
        if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
            return 1.0
        x, y = x[x.isfinite()], y[y.isfinite()]
        if x.numel():
            scale, worst = max(scale, float(x.abs().max())), max(worst, float((x - y).abs().max()))
    return worst / (scale or 1.0)


def _tensors(out: Any) -> list[Tensor]:
    """Numbers of an output in their order; caches are no outputs of it."""
    if isinstance(out, Tensor):
        return [out.float()]
    if isinstance(out, Mapping):
        out = [out[name] for name in out if name != "past_key_values"]
    return [t for part in out for t in _tensors(part)] if isinstance(out, list | tuple) else []


def _patterns(sites: Sequence[Site], everything: Sequence[Site]) -> tuple[str, ...]:
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.tower, site.kind), []).append(site)
    return tuple(pattern_of(group, everything) for group in groups.values())


def _described(inputs: Inputs) -> dict[str, str]:
    named = inputs if isinstance(inputs, Mapping) else {f"argument {i}": v for i, v in enumerate(inputs)}
    return {
        name: " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else str(value)
        for name, value in named.items()
    }


class _Listener(TorchFunctionMode):
    """Hears every softmax over keys and every fused kernel, and says which of them no site covers."""

    KERNELS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
    SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], covered: Iterable[nn.Module]) -> None:
        super().__init__()
        self.modules, self.covered = list(modules), set(map(id, covered))
        self.running: list[tuple[str, nn.Module]] = []
        self.heard: dict[tuple[str, str], set[str]] = {}  # paths by their form and by the module's class
        self.hooks: list[Any] = []

    def __enter__(self) -> _Listener:
        for name, module in self.modules:
            began = functools.partial(self._began, name)
            self.hooks += [module.register_forward_pre_hook(began), module.register_forward_hook(self._ended)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _began(self, name: str, module: nn.Module, _: Any) -> None:
        self.running.append((name, module))

    def _ended(self, *_: Any) -> None:
        self.running.pop()

    @property
    def found(self) -> tuple[str, ...]:
        return tuple(
            f"{form} ({kind}{f', {len(paths)} of them' if len(paths) > 1 else ''})"
            for (form, kind), paths in self.heard.items()
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        scores = func in self.SOFTMAX and (out.ndim == 4 or (out.ndim == 3 and out.shape[1] == out.shape[2]))
        if (scores or func in self.KERNELS) and self.running:
            name, module = self.running[-1]
            if not any(id(m) in self.covered for _, m in self.running):
                form = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) or "the model itself"
                self.heard.setdefault((form, type(module).__name__), set()).add(name)
        return out


def without_sites(model: nn.Module, inputs: Inputs | None) -> Trial:
    """Where a model attends in which nothing can be attached."""
    given = of_first_layer(model) if inputs is None else inputs
    listener = _Listener(model.named_modules(), ())
    try:
        with listener, as_it_was(model.modules(), []):
            _run(model, given)
    except Exception as e:  # the made-up inputs may not fit
        return Trial(_described(given), note=f"a pass fails: {told(e)}")
    return Trial(_described(given), unreached=listener.found)


def modules_of(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """By path, a pipeline's parts included."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            yield from part.named_modules(prefix=name)


@contextlib.contextmanager
def as_it_was(modules: Iterable[nn.Module], saved: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Without dropout, and with what the model keeps between calls put back."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        restore(saved)
        for module in training:
            module.training = True
