"""What knows a model, and whether it has what a method needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from saccade.core.errors import AttachError
from saccade.core.method import SAMPLING_EVENTS, Method
from saccade.core.seams.plain import PlainHost

if TYPE_CHECKING:
    from saccade.core.system import System

# What a card may ask for, and where to find it.
NEEDS = {
    "image": "use a vision-language model whose pictures become tokens of the text, such as LLaVA or Qwen-VL",
    "sampling": "attach to a pipeline of diffusers, not to its denoiser",
    "first_token": "use a model with a causal text tower",
}


def unwrapped(model: Any) -> Any:
    """The model inside of what compiles it, or puts adapters into it."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def is_pipeline(model: Any) -> bool:
    """Told without importing diffusers."""
    names = [(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__]
    return ("diffusers", "DiffusionPipeline") in names


def host_of(model: Any) -> PlainHost:
    """What knows this kind of model."""
    if is_pipeline(model):
        from saccade.core.seams.diffusers import PipelineHost

        return PipelineHost(model)
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"A {type(model).__name__} is no torch module.",
            "pass the model itself, such as a PreTrainedModel",
        )
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        from saccade.core.seams.transformers import TransformersHost

        return TransformersHost(model)
    return PlainHost(model)


def check_needs(method: System, host: PlainHost) -> None:
    card = getattr(method, "card", None)
    for need in card.needs if card else ():
        lack = host.lack(need)
        if lack:
            raise AttachError(
                f"{type(method).__name__} cannot serve {type(host.model).__name__}: {lack}.", NEEDS[need]
            )


def check_events(method: Method, host: PlainHost) -> None:
    if "branches" in type(method).events() and (lack := host.lack("branches")):
        raise AttachError(
            f"{type(method).__name__} follows branches, which {type(host.model).__name__} cannot: {lack}.",
            "use a decoder that reads all it is given as one sequence",
        )
    if "features" in type(method).events() and (lack := host.lack("features")):
        raise AttachError(
            f"{type(method).__name__} chooses among features, which {type(host.model).__name__} does not give: {lack}.",
            NEEDS["image"],
        )
    wanted = [event for event in SAMPLING_EVENTS if event in type(method).events()]
    if wanted and not host.samples:
        raise AttachError(
            f"{type(method).__name__} needs {wanted[0]!r}: {type(host.model).__name__} takes no denoising steps.",
            "attach to a pipeline of diffusers, not to its denoiser",
        )
