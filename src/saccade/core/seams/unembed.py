"""From hidden states to words: what a model does between its last layer and its logits.

Nobody names it alike, so one small forward shows it: the modules that run behind the last layer, each
fed with what the one before gave, and the factors around the head. What was found must give the forward's
own logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from saccade.core.errors import AttachError
from saccade.core.seams.plain import PlainHost
from saccade.models.towers import LOGIT_CAPS

WORDS = 4  # of the probing prompt


@dataclass(frozen=True)
class Head:
    """`head(factor * modules(h))`, then a factor and a soft cap on the logits."""

    modules: tuple[nn.Module, ...]
    head: nn.Module
    factor: float = 1.0
    logit_factor: float = 1.0
    cap: float | None = None

    def __call__(self, h: Tensor, *, norm: bool = True) -> Tensor:
        h = self.before(h, norm=norm)
        return self.after(self.head(h if self.factor == 1 else h * self.factor))

    def before(self, h: Tensor, *, norm: bool = True) -> Tensor:
        for module in self.modules:
            if norm or not is_norm(module):
                h = module(h)
        return h

    def after(self, logits: Tensor) -> Tensor:
        logits = logits if self.logit_factor == 1 else logits * self.logit_factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def find(host: PlainHost, forward: Callable[[dict[str, Any]], Any]) -> Head:
    """The head of the main tower. `forward` runs the model on these inputs, beside everything else."""
    model: Any = host.model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = {id(s.module): s for s in host.sites if s.kind == "layer" and s.tower == host.main_tower}
    if head is None or not layers:
        raise _refused(model, "it has no output embeddings" if layers else "it has no layers to read from")
    inner = {id(m) for site in layers.values() for m in site.module.modules()}
    seen: list[list[Any]] = []  # module, what went in, what came out, in the order in which they began
    states: list[Tensor] = []

    def began(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if states and given is not None:
            seen.append([module, given, None])

    def ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if id(module) in layers:
            states.append(output)
        for entry in reversed(seen):
            if entry[0] is module and entry[2] is None:
                entry[2] = output
                break

    hooks = []
    for module in model.modules():
        if id(module) in layers or id(module) not in inner:
            hooks.append(module.register_forward_hook(ended))
        if id(module) not in inner:
            hooks.append(module.register_forward_pre_hook(began, with_kwargs=True))
    try:
        with torch.no_grad():
            logits = forward(prompt(host, head)).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as e:
        raise _refused(model, f"a forward of words alone fails ({type(e).__name__}: {e})") from e
    finally:
        for hook in hooks:
            hook.remove()
    return _read(host, head, states[-1], seen, logits)


def _read(host: PlainHost, head: nn.Module, h: Tensor, seen: list[list[Any]], logits: Tensor) -> Head:
    around = {id(m) for m in host.model.modules() if any(inner is head for inner in m.modules())}
    modules, current = [], h
    for module, given, output in seen:
        if id(module) not in around and isinstance(output, Tensor) and _same(given, current):
            modules.append(module)
            current = output
    into, raw = next(((given, out) for module, given, out in seen if module is head), (None, None))
    factor = None if into is None else _ratio(into, current)
    if factor is not None and raw is not None:
        caps = (getattr(getattr(host, "text_config", None), name, None) for name in LOGIT_CAPS)
        for cap in (None, *filter(None, caps)):
            scaled = (_ratio(logits, raw) or 1.0) if cap is None else 1.0
            found = Head(tuple(modules), head, factor, scaled, cap)
            with torch.no_grad():
                if close(found(h), logits):
                    return found
    raise _refused(host.model, "what it does between its last layer and its logits is not understood")


def prompt(host: PlainHost, head: nn.Module) -> dict[str, Any]:
    """A few words; for the decoder alone where there is an encoder. The head, or the embeddings, are as wide as it."""
    model: Any = host.model
    taken = set(host.vocabulary.special) | set(host.vocabulary.placeholders.values())
    words = [i for i in range(model.get_input_embeddings().weight.shape[0]) if i not in taken][:WORDS]
    weight = next(head.parameters())
    ids = torch.tensor([words], device=weight.device)
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids}
    read = torch.zeros(1, WORDS, weight.shape[-1], dtype=model.dtype, device=ids.device)
    return {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=read)}


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _ratio(a: Tensor, b: Tensor) -> float | None:
    """The number by which all of `b` must be multiplied to give `a`."""
    if a.shape != b.shape:
        return None
    if torch.equal(a, b):
        return 1.0
    x, y = a.double().flatten(), b.double().flatten()
    ratio = float(x @ y / (y @ y))
    return ratio if close(y * ratio, x, a.dtype) else None


def close(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    allowed = 100 * torch.finfo(dtype or b.dtype).eps * float(b.abs().max())
    return a.shape == b.shape and float((a.double() - b.double()).abs().max()) <= allowed


def _refused(model: nn.Module, why: str) -> AttachError:
    return AttachError(
        f"{type(model).__name__} cannot turn hidden states into words: {why}.",
        "use a model with a language model's head, such as a ...ForCausalLM",
    )
