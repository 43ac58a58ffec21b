"""What the tests of the core share: small methods, snapshots of a model, and the rule for numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import FAMILIES, run

from saccade.core.call import AttentionCall
from saccade.core.method import Method
from saccade.core.seams.discovery import discover

MHA = {"siglip", "siglip_vision", "siglip2", "torch_mha", "torch_encoder"}
"""Families with an `nn.MultiheadAttention`: observing it is exact to rounding only."""

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@cache
def shared(name: str, dtype: torch.dtype = torch.float32, implementation: str | None = None) -> Any:
    """A model of the zoo that no test may change."""
    options = {"attn_implementation": implementation} if implementation else {}
    model: Any = FAMILIES[name].build(**options).to(dtype)
    if dtype == torch.float64 and "moe" in FAMILIES[name].tags:
        model.set_experts_implementation("eager")  # the fused product has no float64
    return model


def outcome(model: nn.Module, inputs: Any) -> Tensor:
    """What a forward gives, as one row of numbers: both towers of a pair, for its logits are too few."""
    with torch.no_grad():
        out: Any = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    names = () if isinstance(out, Tensor) else ("text_model_output", "vision_model_output")
    towers = [out[name].last_hidden_state for name in names if name in out]
    flat = torch.cat([t.flatten() for t in towers]) if towers else run(model, inputs).flatten()
    return flat.masked_fill(flat < -1e30, 0)  # words that a model forbids


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Inputs whose numbers are of that type; ids and masks stay."""
    if isinstance(inputs, dict):
        return {name: cast(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(cast(value, dtype) for value in inputs)
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def attention_sites(model: nn.Module) -> list[str]:
    return [site.name for site in discover(model) if site.seam != "module"]


def everywhere(model: nn.Module) -> str:
    return "|".join(attention_sites(model))


MIXED = {F.grid_sample, torch.matmul, Tensor.matmul, Tensor.__matmul__}
"""Where a model of float64 meets float32 that its code made, and torch does not promote."""


class Exact(TorchFunctionMode):
    """Let a float64 model stay in float64 where its code asks for float32: norms, rotations, the softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MIXED and any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
            args = tuple(cast(arg, torch.float64) if isinstance(arg, Tensor) else arg for arg in args)
        if isinstance(args[0] if args else None, Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def assert_as_good_as(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of the plain computation in the same precision."""
    assert got.shape == plain.shape == exact.shape
    assert got.isfinite().all()
    ours, theirs = rms(got.double() - exact), rms(plain.double() - exact)
    floor = 0.1 * torch.finfo(plain.dtype).eps * rms(exact)  # where the plain one happens to be exact
    assert ours <= 2 * theirs + floor, f"error {ours:.2e}, of the plain computation {theirs:.2e}"


@dataclass(eq=False)
class Look(Method):
    """Keep what a function says of every call."""

    tell: Callable[[AttentionCall], Any] = lambda call: call.weights("last")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[str, str, Any]] = []  # site, phase, what was told

    def observe(self, call: AttentionCall) -> None:
        self.seen.append((call.site.name, call.phase, self.tell(call)))

    def at(self, site: str) -> list[Any]:
        return [told for name, _, told in self.seen if name == site]

    @property
    def phases_seen(self) -> list[str]:
        """Of the passes, at the first site that was seen."""
        return [phase for name, phase, _ in self.seen if name == self.seen[0][0]]


def method(**events: Callable[..., Any]) -> type[Method]:
    """A method class that overrides these events with functions of (call, ...)."""

    def without_self(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: function(*args)

    return dataclass(eq=False)(
        type("Edit", (Method,), {name: without_self(function) for name, function in events.items()})
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail where the block leaves a trace in the model, its classes, its configurations or in torch."""
    before = _traces(model)
    values = copy.deepcopy(model.state_dict())
    yield
    after = _traces(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value == after[key], key
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def _traces(model: nn.Module) -> dict[str, Any]:
    traces: dict[str, Any] = {
        "sdpa": F.scaled_dot_product_attention,
        "softmax": (torch.softmax, F.softmax),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
    }
    for path, module in model.named_modules():
        traces[f"{path}.__dict__"] = list(module.__dict__)
        traces[f"{path} hooks"] = {
            name: {key: id(hook) for key, hook in value.items()}
            for name, value in module.__dict__.items()
            if name.endswith("_hooks") and value is not None
        }
        traces[f"{path} class"] = (type(module), dict(vars(type(module))))
        if "config" in module.__dict__:
            config = module.__dict__["config"]
            traces[f"{path}.config"] = (
                id(config),
                repr(config),
                getattr(config, "_attn_implementation", None),
            )
    return traces


def heads_input(model: nn.Module, name: str, forward: Callable[[], Any]) -> list[Tensor]:
    """What the module called `name` is given, a test's own hook."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        forward()
    finally:
        hook.remove()
    return seen


def outputs_of(model: nn.Module, forward: Callable[[], Any]) -> list[tuple[str, Tensor]]:
    """Every module that returns and the first tensor of it, in order, by the test's own hooks."""
    seen: list[tuple[str, Tensor]] = []

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor):
                seen.append((path, first.detach()))

        return hook

    hooks = [m.register_forward_hook(note(path)) for path, m in model.named_modules() if path]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def skip_blind_chunks(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    if "prefill_chunk_size" in options and "pixel_values" in inputs and VERSION < (5, 23):
        pytest.skip("before 5.23 transformers reads the chunks of a prompt without its pictures; we refuse")


def greedy(model: Any, inputs: dict[str, Any], tokens: int = 5, **options: Any) -> Tensor:
    """Ids of a generation that does not end early."""
    skip_blind_chunks(inputs, options)
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
