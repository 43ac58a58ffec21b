"""Where in its input a vision tower's tokens come from, asked of the tower itself.

With its attention silenced, and convolutions kept to what lies below each of their outputs, a tower is local:
exchanging chosen lines of its pixels tells which of them each token was made of. What gathers from everywhere (a
class token, a mean) or nowhere (newlines) has no place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.errors import InputError
from saccade.core.seams.plain import PlainHost
from saccade.core.site import Site
from saccade.models.towers import CODES, CROSS_FEATURES, EMBEDDER, OVER_CHANNELS, OWN_RESIDUAL

Test = Callable[[Tensor], tuple[Tensor, Tensor]]

MOVED = 0.01  # of the change that a whole new picture makes: more is no rounding, also in quantised models
PERIOD = 4  # the number of lines that are told apart at first; tokens that cover as many get more
TRIED = 0.25  # of all cells are exchanged at once to see whether tokens come from where they seem to


def lines(shape: torch.Size, patch: tuple[int, int]) -> list[Tensor]:
    """For every axis of a tower's pixels the line of each element, in a shape that spreads over them all:
    tiles, rows and columns of patches, or patches in a row."""
    if len(shape) < 4:
        return [torch.arange(shape[:-1].numel()).view(*shape[:-1], 1)]
    tiles = torch.arange(shape[:-3].numel()).view(*shape[:-3], 1, 1, 1)
    return [tiles, (torch.arange(shape[-2]) // patch[0])[:, None], torch.arange(shape[-1]) // patch[1]]


def patch_lines(places: Tensor, view: Tensor) -> list[Tensor]:
    """The same for patches that stand in rows, from the places (tiles, patches, 2) of their columns and rows, one
    apart in every view and NaN for padding. Tiles of the same `view` (tiles,) share its lines."""
    axes = [view[:, None, None]]
    for axis in (1, 0):
        line = torch.zeros(places.shape[:2], dtype=torch.long)
        for one in view.unique():
            line[view == one] = _ranks(places[view == one, :, axis])
        axes.append(line[..., None])
    return axes


def _ranks(places: Tensor) -> Tensor:
    """The number of each among all, those being one that lie close together."""
    known = ~places.isnan()
    ordered, order = places[known].sort()
    steps = ordered.diff(prepend=ordered[:1]) > 0.5
    ranks = torch.zeros_like(order).scatter(0, order, steps.cumsum(0))
    return torch.zeros(places.shape, dtype=torch.long).masked_scatter(known, ranks)


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
    counts, ends = [len(t) for t in before], torch.tensor([int(axis.max()) for axis in axes])
    if ends.any():
        alone = torch.tensor([count == 1 for count in counts]).repeat_interleave(torch.tensor(counts))
        local &= alone | ~((first == 0) & (last == ends)).all(-1)
    last = last.where(local[:, None], first)
    chosen = torch.rand(*(ends + 1).tolist(), generator=torch.Generator().manual_seed(0)) < TRIED
    inside = torch.zeros_like(local)
    for step in itertools.product(*(range(n + 1) for n in (last - first).amax(0).tolist())):
        at = torch.minimum(first + torch.tensor(step), last).clamp(min=torch.zeros_like(ends), max=ends)
        inside |= chosen[tuple(at.T)]
    outside = ((last < first) | (last > ends)).any(-1)
    stray = local & (outside | test(chosen[torch.broadcast_tensors(*axes)])[0] & ~inside)
    if stray.any():
        raise InputError(
            f"{int(stray.sum())} of {len(stray)} tokens change with patches that are no neighbours of those that "
            "they seem to be made of.",
            "look at this model without boxes: nobody knows in which order it takes its patches",
        )
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
    """No attention but that of a projector, which pools patches; nothing else that mixes places, no dropout; and
    what comes to the site is caught."""
    mixers: dict[nn.Module, Callable[..., Any]] = {}
    for s in host.sites:
        if s.kind in ("self", "cross", "joint") and s.tower != "projector":
            mixers[s.module] = _unchanged if s.tower in OWN_RESIDUAL else _nothing
    for module in host.model.modules():
        if isinstance(module, nn.GroupNorm):
            mixers[module] = _unchanged
        elif isinstance(module, nn.Conv2d) and any(
            size > step for size, step in zip(module.kernel_size, module.stride)
        ):
            mixers[module] = _own_stretch
    training = [module for module in host.model.modules() if module.training]
    with contextlib.ExitStack() as stack:
        for module in training:
            module.training = False
            stack.callback(setattr, module, "training", True)
        for module, instead in mixers.items():
            stack.callback(module.register_forward_hook(instead).remove)
        if site is not None:

            def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                if states.ndim > 3 or site.path.endswith(OVER_CHANNELS):
                    raise InputError(
                        f"The tokens of {site.name} ({type(module).__name__}) have no known places: it attends "
                        "within windows that it cuts by itself, or between channels.",
                        "ask for boxes of the features, or at sites of the text",
                    )
                caught.append(_rows(states))

            stack.callback(site.module.register_forward_pre_hook(catch, with_kwargs=True).remove)
        yield


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def _unchanged(module: nn.Module, args: Any, output: Any) -> Tensor:
    return args[0]


def _own_stretch(conv: nn.Conv2d, args: Any, output: Any) -> Tensor:
    """Of a convolution that overlaps itself what lies below each output: a stride, from the padding on."""
    pads = [(k - 1) // 2 for k in conv.kernel_size] if isinstance(conv.padding, str) else conv.padding
    own: Any = (..., *(slice(pad, pad + step) for pad, step in zip(pads, conv.stride)))
    weight = torch.zeros_like(conv.weight)
    weight[own] = conv.weight[own]
    return F.conv2d(args[0], weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def featurizer(host: PlainHost, kind: str) -> tuple[Callable[[dict[str, Any]], Tensor], set[str]]:
    """From the processor's output to features (features, dim), and the arguments that this needs."""
    base: Any = getattr(host, "base", None)
    tower, projector = (getattr(base, name, None) for name in CROSS_FEATURES)
    reads = any(site.tower == "text" and site.kind == "cross" for site in host.sites)
    known: Any
    get: Callable[..., Any]
    if hasattr(base, f"get_{kind}_features"):
        known = getattr(base, f"get_{kind}_features")
        get = functools.partial(known, return_dict=True)
    elif kind == "image" and hasattr(base, EMBEDDER):
        embedder, mark = getattr(base, EMBEDDER), host.vocabulary.placeholders["image"]
        known = functools.partial(embedder.forward, inputs_embeds=None)

        def get(input_ids: Tensor, **inputs: Any) -> Any:
            words = host.model.get_input_embeddings()(input_ids)  # type: ignore[operator]
            return embedder(input_ids=input_ids, **{**inputs, "inputs_embeds": words})[input_ids == mark]

    elif kind == "image" and tower is not None and reads:
        known = tower.forward

        def get(**inputs: Any) -> Any:
            states = tower(**inputs).last_hidden_state
            return states if projector is None else projector(states)

    else:
        raise InputError(
            f"{type(host.model).__name__} has no features of {kind}s that could have boxes.",
            f"pass a model of transformers that reads {kind}s",
        )
    parameters = inspect.signature(known).parameters.values()
    plain = {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}

    def features(inputs: dict[str, Any]) -> Tensor:
        out = get(**{name: value for name, value in inputs.items() if name in plain})
        if getattr(out, CODES, None) is not None:
            return _rows(out.last_hidden_state.flatten(2).transpose(1, 2))
        return torch.cat([_rows(part) for part in host.unpack(out)])

    return features, {name for name, required in plain.items() if required}


def patch_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the patches that the vision tower cuts."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.stride[-1] > 1]
    for module in convolutions:
        if module.kernel_size == module.stride:
            return module.kernel_size[-2], module.kernel_size[-1]
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    strides = getattr(vision, "patch_stride", None)  # of a tower of several stages
    size = strides[0] if strides else getattr(vision, "patch_size", None)
    if size is None and convolutions:
        size = convolutions[0].stride[-2:]
    if size is None:
        raise InputError(
            f"{type(model).__name__} does not say into which patches it cuts a picture.",
            "look at it without boxes: its vision tower is no transformer on patches",
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])
