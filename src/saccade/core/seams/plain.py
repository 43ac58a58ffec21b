"""Any torch module as a host: timm, torch, and what is common to all."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.errors import AttachError
from saccade.core.layout import KINDS, Layout
from saccade.core.seams.discovery import discover
from saccade.core.state import Sequence, Vocabulary

if TYPE_CHECKING:
    from saccade.core.call import AttentionCall
    from saccade.core.passes import Denoising, Pass, Run
    from saccade.core.runtime import Runtime


class PlainHost:
    """What the runtime asks of a model. A library's host says more than a plain module can."""

    vocabulary = Vocabulary({}, frozenset())
    by_sample = False  # features come as one tensor for all pictures of a sample
    samples = False  # it takes denoising steps

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = discover(model)
        if not any(site.seam != "module" for site in self.sites):
            raise AttachError(
                f"{type(model).__name__} has no attention that can be reached.",
                "pass a model that attends through transformers' interface, F.scaled_dot_product_attention, "
                "nn.MultiheadAttention, or a softmax in a module named like attention",
            )
        towers = list(dict.fromkeys(site.tower for site in self.sites))
        self.main_tower = "text" if "text" in towers else towers[0]
        self.parameters = tuple(inspect.signature(model.forward).parameters)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The forward's arguments by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else dict(kwargs)

    def roots(self) -> dict[str, nn.Module]:
        """The module of every tower: the highest below the model that holds its sites alone."""
        paths: dict[str, list[str]] = {}
        for site in self.sites:
            paths.setdefault(site.tower, []).append(site.path)
        found = {}
        for tower, own in paths.items():
            others = [p for other, theirs in paths.items() if other != tower for p in theirs]
            parts = own[0].split(".")
            for depth in range(1, len(parts)):
                prefix = ".".join(parts[:depth]) + "."
                if not any(p.startswith(prefix) for p in others) and all(p.startswith(prefix) for p in own):
                    found[tower] = self.model.get_submodule(prefix[:-1])
                    break
        return found

    def lack(self, need: str) -> str:
        """Why the model cannot give what a method needs; empty where it can."""
        if need == "first_token" and self.main_tower == "text":
            return ""
        if need == "sampling":
            return "it takes no denoising steps"
        if need == "branches":
            return ""
        if need in ("image", "features"):
            return "it takes no pictures among its words"
        return f"it does not give {need.replace('_', ' ')}s"

    # ---- what a plain module does not know; a library's host answers these ------------------------------

    def modules(self) -> Iterable[nn.Module]:
        return self.model.modules()

    def check(self) -> None:
        return None

    def in_pieces(self, given: Mapping[str, Any]) -> bool:
        return False

    def call(self, inputs: Mapping[str, Any], run: Run) -> Any:
        """A forward of the model, beside whatever else it does."""
        return self.model(**inputs)

    def sample(self, runtime: Runtime, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def project(self, call: AttentionCall, states: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(call.site.module, "to_k"):
            raise AttachError(
                f"{call.site.name} ({type(call.site.module).__name__}) does not say where its keys come from.",
                "use a denoiser of diffusers",
            )
        from saccade.core.seams.diffusers import project

        return project(call, states)

    def grid(self, pass_: Denoising, tokens: int) -> tuple[int, ...] | None:
        return None

    def denoising_layouts(self, pass_: Denoising, call: AttentionCall) -> tuple[Layout, Layout]:
        raise NotImplementedError

    def wraps(self) -> list[tuple[Any, str, str]]:
        return (
            [(self.model, "forward_features", "forward")] if hasattr(self.model, "forward_features") else []
        )

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(inputs)

    def ids(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, tuple[int, int] | None]:
        return None, None

    def mask(self, inputs: Mapping[str, Any], columns: int) -> Tensor | None:
        return None

    def cache(self, inputs: Mapping[str, Any]) -> Any:
        return None

    def cached_tokens(self, cache: Any) -> int:
        return 0

    def cache_of_output(self, output: Any) -> Any:
        return None

    def sequence_of(self, cache: Any) -> Sequence | None:
        return None

    def follow(self, cache: Any, sequence: Sequence, branches: Any = ()) -> None:
        return None

    def track_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def cache_layers(self, cache: Any, kind: str = "self") -> list[Any]:
        return []

    def attended(self, cache: Any, tracked: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rotaries(self) -> list[nn.Module]:
        return []

    def unpack(self, output: Any) -> list[Tensor]:
        return []

    def pack(self, output: Any, parts: list[Tensor]) -> Any:
        return output

    def extra(self, inputs: Mapping[str, Any], last_only: bool) -> dict[str, Any]:
        """Inputs of a forward that stands beside the running one."""
        return dict(inputs)

    def transient(self) -> list[tuple[Any, str, Any]]:
        return []

    def without_images(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        raise AttachError(
            f"{type(self.model).__name__} does not say which of its inputs are pictures.",
            "use a vision-language model of transformers",
        )

    def shortened(self, inputs: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
        return self.without_images(inputs)

    def beside(self, inputs: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        return self.without_images(inputs)

    def with_rows(self, inputs: Mapping[str, Any], branches: Any, pass_: Pass, moved: int) -> dict[str, Any]:
        return self.without_images(inputs)

    def positioned(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return inputs

    def last_position(self, run: Any) -> Tensor:
        raise NotImplementedError

    def feature_layer(self) -> int:
        return max(
            (site.index for site in self.sites if site.tower == "vision" and site.index is not None),
            default=0,
        )

    # ---- spaces -----------------------------------------------------------------------------------------

    def space(self, name: str, states: Tensor, pass_: Pass) -> Layout:
        """A tower's tokens: patches behind class and register tokens, or all of one kind."""
        batch, tokens = states.shape[0], states.shape[2]
        kind = self.kind_of(name, pass_)
        layout = Layout.of_kind(kind, batch, tokens, states.device)
        patches = self._patches(name, pass_) if kind == "image" else None
        if patches is not None and patches < tokens:
            layout.kind[:, : tokens - patches] = KINDS.index("special")
            layout.item[:, : tokens - patches] = -1
        return layout

    def kind_of(self, name: str, pass_: Pass) -> str:
        pictures = ("vision", "codes", "projector", "unet", "dit")
        return "image" if name in pictures else name if name in ("audio", "video") else "text"

    def _patches(self, name: str, pass_: Pass) -> int | None:
        """How many patches the tower cuts its pictures into, where it cuts them with a convolution."""
        given = (*pass_.tower_inputs.get(name, {}).values(), *pass_.inputs.values())
        pixels = next(
            (v for v in given if isinstance(v, Tensor) and v.ndim == 4 and v.is_floating_point()), None
        )
        if pixels is None:
            return None
        owners = (self.roots().get(name, self.model), self.model)  # the cut may stand beside the layers
        cuts = [
            m for o in owners for m in o.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride
        ]
        if not cuts:
            return None
        height, width = (
            int(s) // k for s, k in zip(pixels.shape[-2:], _pair(cuts[0].kernel_size), strict=True)
        )
        return height * width


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[1]


def restore(saved: list[tuple[Any, str, Any]]) -> None:
    for module, name, value in saved:
        setattr(module, name, value)


def device_of(inputs: Mapping[str, Any]) -> torch.device:
    return next((v.device for v in inputs.values() if isinstance(v, Tensor)), torch.device("cpu"))
