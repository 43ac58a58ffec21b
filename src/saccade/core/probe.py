"""Where in its input a vision tower's tokens come from, asked of the tower itself.

With its attention silenced a tower is local: exchanging chosen lines of its pixels tells which of them each
token was made of. What gathers from everywhere (a class token) or nowhere (newlines) has no place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import InputError
from saccade.core.seams.plain import PlainHost
from saccade.core.site import Site
from saccade.models.towers import CROSS_FEATURES

Test = Callable[[Tensor], tuple[Tensor, Tensor]]

MOVED = 0.01  # of the change that a whole new picture makes: more is no rounding, also in quantised models
PERIOD = 4  # the number of lines that are told apart at first; tokens that cover as many get more


def lines(shape: torch.Size, patch: tuple[int, int]) -> list[Tensor]:
    """For every axis of a tower's pixels the line of each element, in a shape that spreads over them all:
    tiles, rows and columns of patches, or patches in a row."""
    if len(shape) < 4:
        return [torch.arange(shape[:-1].numel()).view(*shape[:-1], 1)]
    tiles = torch.arange(shape[:-3].numel()).view(*shape[:-3], 1, 1, 1)
    return [tiles, (torch.arange(shape[-2]) // patch[0])[:, None], torch.arange(shape[-1]) // patch[1]]


def trace(
    read: Callable[[Tensor], list[Tensor]], old: Tensor, new: Tensor, axes: list[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """First and last line (tokens, axes) that each token comes from, and whether it comes from any place at
    all, for every list of tokens that `read` makes of pixels. `new` are other pixels than `old`."""
    before, after = read(old), read(new)
    change = _difference(before, after)
    local = change > MOVED * change.masked_fill(change == 0, torch.nan).nanmedian()
    enough = torch.where(local, MOVED * change, torch.inf)

    def test(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """With new pixels at some elements: which tokens moved, and which of them all the way."""
        now = read(torch.where(chosen.to(old.device), new, old))
        moved = _difference(before, now) > enough
        return moved, moved & (_difference(after, now) <= enough)

    ranges = [_covered(axis, test) for axis in axes]
    first, last = (torch.stack(part, -1) for part in zip(*ranges, strict=True))
    last = last.where(local[:, None], first)
    counts = [len(t) for t in before]
    return list(zip(first.split(counts), last.split(counts), local.split(counts), strict=True))


def _covered(lines: Tensor, test: Test) -> tuple[Tensor, Tensor]:
    """First and last line that each token comes from, its lines being neighbours.

    Every `period`-th line at once tells where in a period a token begins and how long it is. Then bits
    of the period's number: a token across two periods answers halfway where their bits differ.
    """
    count, period = int(lines.max()) + 1, PERIOD
    while True:
        period = min(period, count)
        hit = torch.stack([test(lines % period == line)[0] for line in range(period)], -1)
        if period == count:
            return hit.int().argmax(-1), period - 1 - hit.flip(-1).int().argmax(-1)
        if not bool(hit.all(-1).any()):
            break
        period *= 2
    start = (hit & ~hit.roll(1, -1)).int().argmax(-1)
    block, crossed = torch.zeros_like(start), torch.zeros_like(hit[:, 0])
    for bit in reversed(range((-(-count // period) - 1).bit_length())):
        moved, whole = test((lines // period >> bit) % 2 == 1)
        halfway = moved & ~whole  # of two neighbours the lower has 0 at the highest such bit, then ones
        block += (whole | (halfway & crossed)).long() << bit
        crossed |= halfway
    first = block * period + start
    return first, first + hit.sum(-1) - 1


def _difference(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The largest of every token, those of all lists in a row."""
    return torch.cat([(x - y).abs().amax(-1) for x, y in zip(a, b, strict=True)])


def _rows(states: Tensor) -> Tensor:
    return states.detach().reshape(-1, states.shape[-1]).float().cpu()


@contextlib.contextmanager
def silenced(host: PlainHost, site: Site | None, caught: list[Tensor]) -> Iterator[None]:
    """No attention, no dropout, and what comes to the site is caught."""
    modules = {id(s.module): s.module for s in host.sites if s.kind in ("self", "cross", "joint")}
    training = [module for module in host.model.modules() if module.training]
    with contextlib.ExitStack() as stack:
        for module in training:
            module.training = False
            stack.callback(setattr, module, "training", True)
        for module in modules.values():
            stack.callback(module.register_forward_hook(_nothing).remove)
        if site is not None:

            def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                caught.append(_rows(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))))

            stack.callback(site.module.register_forward_pre_hook(catch, with_kwargs=True).remove)
        yield


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def featurizer(host: PlainHost, kind: str) -> tuple[Callable[[dict[str, Any]], Tensor], set[str]]:
    """From the processor's output to features (features, dim), and the arguments that this needs."""
    base: Any = getattr(host, "base", None)
    tower, projector = (getattr(base, name, None) for name in CROSS_FEATURES)
    known: Any
    get: Callable[..., Any]
    if hasattr(base, f"get_{kind}_features"):
        known = getattr(base, f"get_{kind}_features")
        get = functools.partial(known, return_dict=True)
    elif kind == "image" and tower is not None and projector is not None:
        known = tower.forward

        def get(**inputs: Any) -> Any:
            return projector(tower(**inputs).last_hidden_state)

    else:
        raise InputError(
            f"{type(host.model).__name__} has no features of {kind}s that could have boxes.",
            f"pass a model of transformers that reads {kind}s",
        )
    parameters = inspect.signature(known).parameters.values()
    plain = {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}

    def features(inputs: dict[str, Any]) -> Tensor:
        out = get(**{name: value for name, value in inputs.items() if name in plain})
        parts = getattr(out, "pooler_output", out)
        return torch.cat([_rows(part) for part in ([parts] if isinstance(parts, Tensor) else parts)])

    return features, {name for name, required in plain.items() if required}


def patch_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the patches that the vision tower cuts."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size == module.stride:
            return module.kernel_size[-2], module.kernel_size[-1]
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if size is None:
        raise InputError(
            f"{type(model).__name__} does not say into which patches it cuts a picture.",
            "look at it without boxes: its vision tower is no transformer on patches",
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])
