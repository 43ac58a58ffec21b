"""The sites of a model, its heads, its cache and its pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saccade.core.boxes import picture_boxes
from saccade.core.cache import new_cache, track
from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError, SaccadeError
from saccade.core.method import EVENTS, Method
from saccade.core.passes import HiddenCall
from saccade.core.plan import make_plans, reach
from saccade.core.seams.plain import PlainHost
from saccade.core.site import Site, match
from saccade.examining.diagnosis import PICTURE, Cached, Heads, Pictures, Places, told

# ---- sites -----------------------------------------------------------------------------------------------


def find_places(host: PlainHost, cached: Cached | None) -> tuple[Places, ...]:
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in host.sites:
        groups.setdefault((site.tower, site.kind, site.seam, _events(host, site, cached)), []).append(site)
    return tuple(
        Places(
            pattern_of(sites, host.sites), len(sites), tower, kind, seam, events,
            tuple(dict.fromkeys(type(site.module).__name__ for site in sites)),
        )
        for (tower, kind, seam, events), sites in groups.items()
    )  # fmt: skip


def _events(host: PlainHost, site: Site, cached: Cached | None) -> tuple[str, ...]:
    """What `attach` takes there. Entries leave a cache only where there is one that lets them go."""
    open_to = []
    for event in (e for e in EVENTS if e in reach(site)):
        if event == "evict" and (cached is None or cached.refusal or site.tower != host.main_tower):
            continue
        with contextlib.suppress(AttachError):
            make_plans([_only(event)(sites=site.name)], host.sites)
            open_to.append(event)
    return tuple(open_to)


@functools.cache
def _only(event: str) -> type[Method]:
    """A method that overrides this event alone."""
    return dataclass(eq=False)(type("Probe", (Method,), {event: lambda self, *args: None}))


def pattern_of(chosen: Sequence[Site], sites: Sequence[Site]) -> str:
    """The shortest pattern that names these sites of a model and no others."""
    first, names = chosen[0], {site.name for site in chosen}
    if len(chosen) == 1:
        return first.name
    runs = _runs(site.index for site in chosen if site.index is not None)
    spans = [
        f"{first.tower}.{a}:{b}.{first.kind}" if b > a + 1 else f"{first.tower}.{a}.{first.kind}"
        for a, b in runs
    ]
    for pattern in (*spans[:1], f"{first.tower}.*.{first.kind}", "|".join(spans)):
        with contextlib.suppress(AttachError):
            if {site.name for site in match(pattern, sites)} == names:
                return pattern
    return "|".join(site.name for site in chosen)


# ---- heads and caches ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Seen(Method):
    """Watches every site, and changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fired: set[str] = set()
        self.calls: dict[str, AttentionCall] = {}  # the first of each site, alive: no memory is used twice

    def observe(self, call: AttentionCall) -> None:
        self.fired.add(call.site.name)
        self.calls.setdefault(call.site.name, call)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.fired.add(call.site.name)
        return h


def watcher(host: PlainHost) -> Seen:
    called = tuple(site.name for site in host.sites if "observe" in reach(site))
    passed = tuple(site.name for site in host.sites if site.seam == "module")
    return Seen(sites={"observe": called, "hidden": passed})


def find_heads(host: PlainHost, seen: Seen) -> tuple[Heads, ...]:
    groups: dict[Heads, list[Site]] = {}
    owners: dict[int, str] = {}  # by where keys are stored
    for site in host.sites:
        if (call := seen.calls.get(site.name)) is None:
            continue
        owner = site.name
        if call.k.numel():
            owner = owners.setdefault(call.k.untyped_storage().data_ptr(), site.name)
        shape = Heads(
            f"{site.tower} {site.kind}", call.q.shape[1], call.k.shape[1], call.q.shape[3],
            call.window if isinstance(call.window, int) else None, call.softcap, call.sinks is not None,
            "" if owner == site.name else owner,
        )  # fmt: skip
        groups.setdefault(shape, []).append(site)
    return tuple(dataclasses.replace(h, sites=pattern_of(sites, host.sites)) for h, sites in groups.items())


def find_cache(host: PlainHost, out: Any) -> Cached | None:
    """The cache that a pass gave back or, where it gave none, that a generation would begin with."""
    model: Any = host.model
    cache = host.cache_of_output(out)
    if cache is None and getattr(model, "can_generate", bool)():
        cache = new_cache(model.config)
    if cache is None:
        return None
    layers: dict[str, list[int]] = {}
    for number, layer in enumerate(getattr(cache, "self_attention_cache", cache).layers):
        layers.setdefault(type(layer).__name__, []).append(number)
    refusal = ""
    try:
        track(cache)
    except SaccadeError as e:
        refusal = e.problem
    return Cached({name: spans(numbers) for name, numbers in layers.items()}, _elsewhere(host), refusal)


def _elsewhere(host: PlainHost) -> dict[str, str]:
    """Layers of the main tower's stacks that hold no attention, by what stands there instead."""
    found: dict[str, list[int]] = {}
    layers = [site for site in host.sites if site.kind == "layer" and site.tower == host.main_tower]
    attention = [site.path for site in host.sites if site.seam != "module"]

    def attends(path: str) -> bool:
        return any(inner.startswith(f"{path}.") for inner in attention)

    for stack in dict.fromkeys(site.path.rpartition(".")[0] for site in layers):
        common = {name for site in layers if attends(site.path) for name, _ in site.module.named_children()}
        for number, layer in enumerate(host.model.get_submodule(stack).children()):
            if not attends(f"{stack}.{number}"):
                own = [type(m).__name__ for name, m in layer.named_children() if name not in common]
                found.setdefault(" ".join(own) or type(layer).__name__, []).append(number)
    return {name: spans(numbers) for name, numbers in found.items()}


def spans(numbers: Iterable[int]) -> str:
    """`0:3 5 7:9` of sorted numbers."""
    return " ".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in _runs(numbers))


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """First and next after the last of every run of neighbours."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


# ---- pictures --------------------------------------------------------------------------------------------


def find_pictures(host: PlainHost, processor: Any, run: bool) -> Pictures | None:
    vision = any(site.tower == "vision" for site in host.sites)
    placeholders = {kind: i for kind, i in host.vocabulary.placeholders.items() if kind != "audio"}
    makers = (("image", "get_image_features"), ("video", "get_video_features"))
    owners = {
        kind: f"{type(owner).__name__}.{name}"
        for owner, name, what in host.wraps()
        for kind, maker in makers
        if name == maker
    }
    if not (vision or placeholders or owners) or host.main_tower == "vision":
        return None
    crosses = any(site.tower == "text" and site.kind == "cross" for site in host.sites)
    read = "placeholders" if not host.lack("image") else "cross-attention" if crosses else "nothing"
    layer = host.feature_layer() if vision and read != "nothing" else None
    found = Pictures(placeholders, owners, read, layer)
    if read == "nothing":
        return found
    if processor is None or not run:
        return dataclasses.replace(found, problem="no processor to try" if run else "not tried")
    try:
        boxes = picture_boxes(host.model, processor, PICTURE)
    except Exception as e:  # processors and towers raise whatever befalls them
        return dataclasses.replace(found, problem=told(e))
    return dataclasses.replace(found, tokens=len(boxes), boxed=int((~boxes.isnan().any(-1)).sum()))


def has_chat(processor: Any) -> bool:
    owners = (processor, getattr(processor, "tokenizer", None))
    return any(getattr(owner, "chat_template", None) for owner in owners)
