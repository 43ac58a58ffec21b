"""Pipelines of diffusers as hosts: their denoisers, and what the tokens of a denoiser are."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError
from saccade.core.layout import Layout
from saccade.core.passes import Denoising, Run
from saccade.core.seams import private, sdpa
from saccade.core.seams.discovery import discover
from saccade.core.seams.plain import PlainHost
from saccade.core.seams.sampling import Sampling
from saccade.core.site import Site
from saccade.models.towers import DENOISERS, LATENT_INPUTS

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime


class PipelineHost(PlainHost):
    """What a `DiffusionPipeline` says of itself. Its sites are those of its denoisers."""

    samples = True

    def __init__(self, pipe: Any) -> None:
        private.check_diffusers()
        self.model = pipe
        self.denoisers: dict[str, Any] = {}
        self.sites: list[Site] = []
        self._local = threading.local()
        self._find()
        if not self.sites:
            raise AttachError(
                f"{type(pipe).__name__} has no denoiser with attention.",
                f"use a pipeline with one of {', '.join(name for name, _ in DENOISERS)}",
            )
        self.main_tower = self.sites[0].tower
        self.check()

    def _find(self) -> bool:
        """Look for the denoisers; whether they are others than before."""
        found = {}
        for name, tower in DENOISERS:
            module = getattr(self.model, name, None)
            if isinstance(module, nn.Module):
                found[tower] = getattr(module, "_orig_mod", module)
        if {tower: id(m) for tower, m in found.items()} == {
            tower: id(m) for tower, m in self.denoisers.items()
        }:
            return False
        self.denoisers = found
        self.sites = [site for tower, module in found.items() for site in _sites(module, tower)]
        return True

    # ---- what a host is asked ---------------------------------------------------------------------------

    def modules(self) -> Iterable[nn.Module]:
        return (m for module in self.denoisers.values() for m in module.modules())

    def roots(self) -> dict[str, nn.Module]:
        return {}

    def check(self) -> None:
        for module in self.denoisers.values():
            if getattr(module, "is_cache_enabled", False):
                raise AttachError(
                    f"A cache is enabled on {type(module).__name__}: it leaves out some attention.",
                    "call disable_cache() on it first",
                )

    def lack(self, need: str) -> str:
        return "" if need in ("sampling", "branches") else super().lack(need)

    @property
    def sampling(self) -> Sampling | None:
        """What runs in this thread."""
        return getattr(self._local, "sampling", None)

    def sample(self, runtime: Runtime, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of the pipeline."""
        if self._find():
            runtime.rediscover()
        self.check()
        for site in runtime.plans:
            if hasattr(site.module, "processor"):
                sdpa.check_processor(site)
        inputs = dict(
            inspect.signature(type(self.model).__call__).bind(self.model, *args, **kwargs).arguments
        )
        inputs.pop("self", None)
        run = Run(runtime, inputs, runtime.methods, runtime.plans)
        run.sampling = sampling = Sampling(self, run)
        with self._in(sampling), runtime.sampling(run), sampling.standing():
            return native(*args, **kwargs)

    @contextlib.contextmanager
    def _in(self, sampling: Sampling) -> Iterator[None]:
        before, self._local.sampling = self.sampling, sampling
        try:
            yield
        finally:
            self._local.sampling = before

    def call(self, inputs: Mapping[str, Any], run: Run) -> Tensor:
        """One call of the denoiser: of the one that runs, or of the first."""
        return (self.sampling or Sampling(self, run)).forward(inputs, run)

    def project(self, call: AttentionCall, states: Tensor) -> tuple[Tensor, Tensor]:
        return project(call, states)

    # ---- tokens -----------------------------------------------------------------------------------------

    def denoising_layouts(self, pass_: Denoising, call: AttentionCall) -> tuple[Layout, Layout]:
        """Of queries and keys. Text and image stand in one sequence, or the text is another space."""
        queries, keys = call.q.shape[2], call.k.shape[2]
        if call.site.kind == "cross":
            return self._image(pass_, call, queries), self._context(pass_, call, keys)
        if call.site.kind != "joint":
            both = self._image(pass_, call, queries)
            return both, both
        text_first = self.text_first(call)
        if text_first is None or not 0 < pass_.text < queries:
            unknown = replace(self._image(pass_, call, queries), named=False, box=None)
            return unknown, unknown
        text, image = self._text(pass_, call), self._image(pass_, call, queries - pass_.text)
        first, second = (text, image) if text_first else (image, text)
        both = replace(
            first.followed_by(second), words=_shifted(text.words, 0 if text_first else queries - pass_.text)
        )
        return both, both

    def text_first(self, call: AttentionCall) -> bool | None:
        """Whether the text stands before the image, told from the values, for they are not turned;
        None where it cannot be told. A tower has one order."""
        known = {} if self.sampling is None else self.sampling.text_first
        tower = call.site.tower
        if tower not in known:
            found = _order(call)
            if found is None:
                return None
            known[tower] = found
        return known[tower]

    def _context(self, pass_: Denoising, call: AttentionCall, keys: int) -> Layout:
        """What cross-attention reads: the text, or a picture's tokens that came with it."""
        if keys == pass_.text:
            return self._text(pass_, call)
        layout = Layout.of_kind("image", call.k.shape[0], keys, call.k.device)
        return replace(
            layout, sample=self._samples(pass_, call), named=keys in _beside(call.context, pass_.text)
        )

    def _text(self, pass_: Denoising, call: AttentionCall) -> Layout:
        layout = Layout.of_kind("text", call.q.shape[0], pass_.text, call.q.device)
        return replace(layout, sample=self._samples(pass_, call), words=self._words(pass_, call))

    def _words(self, pass_: Denoising, call: AttentionCall) -> Callable[[str], list[list[int]]] | None:
        context, sampling = pass_.context, self.sampling
        if context is None or sampling is None or not sampling.reads or call.q.shape[0] != context.shape[0]:
            return None
        return lambda phrase: sampling.columns(phrase, context, pass_.rows)

    def _image(self, pass_: Denoising, call: AttentionCall, tokens: int) -> Layout:
        grid = self.grid(pass_, tokens)
        kind = "video" if grid is not None and len(grid) == 3 else "image"
        layout = Layout.of_kind(kind, call.q.shape[0], tokens, call.q.device)
        box = (
            None
            if grid is None
            else self._boxes(pass_, grid).to(call.q.device).expand(call.q.shape[0], -1, -1)
        )
        return replace(layout, sample=self._samples(pass_, call), box=box)

    def _samples(self, pass_: Denoising, call: AttentionCall) -> Tensor:
        """The latents that each row belongs to."""
        rows, batch = call.q.shape[0], sum(len(r) for r in pass_.rows.values())
        sample = torch.zeros(batch, dtype=torch.long)
        for index in pass_.rows.values():
            sample[index.cpu()] = torch.arange(len(index))
        return sample.repeat_interleave(max(1, rows // batch))[:rows].to(call.q.device)

    def grid(self, pass_: Denoising, tokens: int) -> tuple[int, ...] | None:
        inputs = pass_.inputs
        ids = inputs.get("img_ids")
        if isinstance(ids, Tensor):
            last = ids.reshape(-1, ids.shape[-1])[:, -2:].amax(0)
            grid: tuple[int, ...] = (int(last[0]) + 1, int(last[1]) + 1)
            return grid if prod(grid) == tokens else None
        x = latents_of(inputs)
        if x is None or x.ndim < 4:
            return None
        config: Any = pass_.module.config
        denoiser = getattr(pass_.module, "_orig_mod", pass_.module)
        if denoiser is self.denoisers.get("unet"):
            side = (x.shape[-2], x.shape[-1])
            while prod(side) > tokens and max(side) > 1:
                side = (-(-side[0] // 2), -(-side[1] // 2))
            return side if prod(side) == tokens else None
        patch = getattr(config, "patch_size", 1)
        time, *sides = (
            patch
            if isinstance(patch, list | tuple)
            else (getattr(config, "patch_size_t", None) or 1, patch, patch)
        )
        frames = () if x.ndim == 4 else (x.shape[2] if x.shape[1] == config.in_channels else x.shape[1],)
        grid = (*(f // time for f in frames), x.shape[-2] // sides[0], x.shape[-1] // sides[1])
        return grid if prod(grid) == tokens else None

    def _boxes(self, pass_: Denoising, grid: tuple[int, ...]) -> Tensor:
        """(tokens, 4) in pixels of the picture that is made."""
        height, width = self._size(pass_, grid)
        rows, columns = torch.meshgrid(torch.arange(grid[-2]), torch.arange(grid[-1]), indexing="ij")
        y, x = rows.flatten() * height / grid[-2], columns.flatten() * width / grid[-1]
        box = torch.stack([x, y, x + width / grid[-1], y + height / grid[-2]], -1)
        return box.repeat(prod(grid[:-2]), 1)

    def _size(self, pass_: Denoising, grid: tuple[int, ...]) -> tuple[float, float]:
        pipe: Any = self.model
        scale: Any = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_scale_factor", 1)
        x = latents_of(pass_.inputs)
        if x is not None and x.ndim >= 4:
            return x.shape[-2] * scale, x.shape[-1] * scale
        asked = [pass_.run.inputs.get(name) for name in ("height", "width")]
        default: Any = getattr(pipe, "default_sample_size", None) or float("nan")
        height, width = (default * scale if a is None else a for a in asked)
        return height, width


def latents_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """What a denoiser is given of the latents."""
    return next((inputs[n] for n in LATENT_INPUTS if isinstance(inputs.get(n), Tensor)), None)


def project(call: AttentionCall, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of other context states, through the site's own matrices and norms."""
    module: Any = call.site.module
    added = call.site.kind == "joint" and getattr(module, "add_k_proj", None) is not None
    if not added and getattr(module, "norm_cross", None):
        states = module.norm_encoder_hidden_states(states)
    k = (module.add_k_proj if added else module.to_k)(states)
    v = (module.add_v_proj if added else module.to_v)(states)
    norm = getattr(module, "norm_added_k" if added else "norm_k", None)
    dim = call.k.shape[-1]
    if norm is not None:  # by head, or across heads before they are split
        weight = getattr(norm, "weight", None)
        across = weight is not None and weight.shape[0] == k.shape[-1] != dim
        k = norm(k) if across else norm(k.unflatten(-1, (-1, dim))).flatten(-2)
    k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (k, v))
    return k, v


def _sites(module: nn.Module, tower: str) -> list[Site]:
    """Of a second denoiser the tower's name is another."""
    found = discover(module)
    if not found or tower in ("unet", found[0].tower):
        return found
    return [replace(site, tower=tower, name=tower + site.name.removeprefix(site.tower)) for site in found]


def _order(call: AttentionCall) -> bool | None:
    module: Any = call.site.module
    context, v = call.context, call.given[2]
    if not isinstance(context, Tensor) or context.ndim != 3 or context.shape[0] != v.shape[0]:
        return None
    projection = getattr(module, "add_v_proj", None) or module.to_v
    with torch.no_grad():
        own = projection(context).unflatten(-1, (-1, v.shape[-1])).transpose(1, 2)
    tokens = own.shape[2]
    ends = [v[:, :, :tokens], v[:, :, v.shape[2] - tokens :]]
    first, last = (bool((own - end).abs().mean() < 0.01 * own.abs().mean()) for end in ends)
    return first if first != last else None


def _beside(context: Any, text: int) -> set[int]:
    """Numbers of tokens that a module is given beside the text."""
    if isinstance(context, Tensor):
        return {context.shape[1] - text}
    if isinstance(context, list | tuple):
        return {
            t.shape[-2] for part in context[1:] for t in (part if isinstance(part, list | tuple) else [part])
        }
    return set()


def _shifted(
    words: Callable[[str], list[list[int]]] | None, by: int
) -> Callable[[str], list[list[int]]] | None:
    if words is None or not by:
        return words
    return lambda phrase: [[column + by for column in row] for row in words(phrase)]
