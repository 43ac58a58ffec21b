"""What a family of tiny models is, how it is registered, and what all groups share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Inputs = dict[str, Any] | tuple[Any, ...]

HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4}
TOWER = {"hidden_size": 32, "intermediate_size": 64, **HEADS}
"""A tiny vision tower or encoder; its picture and patch sizes are the family's own."""
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A tiny decoder with grouped keys."""


@dataclass(frozen=True)
class Family:
    """One architecture: `build()` makes it, `inputs()` makes what its forward takes.

    `inputs` takes `batch=` everywhere but in "vlm" families, where it takes `images=(1, 1)`, the number of
    pictures of each sample, and `side=`, the padding side. `prompt(n_images, question, videos=0)` gives text
    for `processor()`. `build(attn_implementation="eager")` chooses for models of transformers. What lacks a
    package skips the running test.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[..., Inputs]
    tags: frozenset[str]
    processor: Callable[[], Any] | None = None
    prompt: Callable[..., str] | None = None
    video: Callable[[int], dict[str, Any]] | None = None
    slow: bool = False
    needs: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}


def register(
    name: str,
    *tags: str,
    inputs: Callable[..., Inputs],
    needs: tuple[str, ...] = (),
    processor: Callable[[], Any] | None = None,
    processor_needs: tuple[str, ...] = (),
    prompt: Callable[..., str] | None = None,
    video: Callable[[int], dict[str, Any]] | None = None,
    slow: bool = False,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that returns a module, or a class and a configuration of transformers."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        def build(**options: Any) -> nn.Module:
            require(name, needs)
            made = make()
            if isinstance(made, tuple):
                kind, config = made
                made = kind._from_config(config, **options)
            elif options:
                raise TypeError(f"{name} has no choice of {', '.join(options)}")
            return enliven(made).float().eval()

        def process() -> Any:
            assert processor is not None
            require(name, (*needs, *processor_needs))
            return processor()

        given = frozenset(tags) | {tag for tag, has in (("processor", processor), ("video", video)) if has}
        made_of = process if processor else None
        FAMILIES[name] = Family(name, build, inputs, given, made_of, prompt, video, slow, needs)
        return make

    return add


def require(name: str, packages: Iterable[str]) -> None:
    """Skip the running test where a package that the family needs does not import."""
    for package in packages:
        if not _imports(package):
            pytest.skip(f"{name} needs {package}")


@cache
def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):  # torchvision beside another build of torch raises RuntimeError
        return False
    return True


def family(name: str) -> Family:
    return FAMILIES[name]


def select(*tags: str) -> list[Any]:
    """The families that bear all the tags, as parameters for `pytest.mark.parametrize`."""
    chosen = (f for f in FAMILIES.values() if f.tags.issuperset(tags))
    return [pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.slow else []) for f in chosen]


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The main output of one forward, without gradients."""
    with torch.no_grad():
        out = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
    if isinstance(out, Tensor):
        return out
    for key in ("logits", "logits_per_image", "last_hidden_state", "sample"):
        if isinstance(out.get(key), Tensor):
            return out[key]
    return out[0]


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with seeded noise of a scale at which attention is neither flat nor one-hot.

    The libraries' own initialisation leaves gates at zero, some memory unset, and tiny models near constant.
    """
    noise = generator(seed)
    norms = {
        id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(False)
    }
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=noise)
            if id(parameter) in norms:
                parameter.add_(0.1 * drawn)
            elif parameter.numel() == 1:
                parameter.fill_(0.5)
            elif parameter.ndim < 2:
                parameter.copy_(0.2 * drawn)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]
                parameter.copy_(drawn * fan_in**-0.5)
    return model


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def words(batch: int, length: int, seed: int = 1) -> Tensor:
    """Ids of ordinary tokens: above every family's special ones."""
    return torch.randint(100, 300, (batch, length), generator=generator(seed))


def pad(samples: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of ids with their mask, padded with token 0."""

    def rows(parts: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_side=side)

    return {"input_ids": rows(samples), "attention_mask": rows([torch.ones_like(s) for s in samples])}
