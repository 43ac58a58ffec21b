"""What can be reached in a model, and what each method of the catalogue would miss there.

Nothing is guessed from a family's name: sites are those that `attach` finds, an event is open where `attach`
takes it, a small pass tells which sites fire, and every method is tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saccade import catalog
from saccade.core.boxes import picture_boxes
from saccade.core.cache import new_cache, track
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import AttachError, InputError, SaccadeError, VersionError
from saccade.core.method import EVENTS, Method
from saccade.core.passes import HiddenCall
from saccade.core.plan import make_plans, reach
from saccade.core.samples import Inputs, made_up, of_first_layer
from saccade.core.seams import private
from saccade.core.seams.plain import PlainHost, restore
from saccade.core.session import Runtime, attach, check_needs, is_pipeline, tracks
from saccade.core.site import Site, match
from saccade.loading import TORCHVISION_REMEDY, torchvision_problem
from saccade.stack import load

PICTURE = (96, 64)  # width and height of what the processor is given
PARTLY = "made-up inputs may not reach all of a model: processor= or inputs= say more"
ROUNDING = 1e-5  # of the largest output: what a fused path that is off while we look may differ by

# The first version that we know, and the last where a newer one may have moved.
RANGES = {
    "torch": ("2.9", ""),
    "transformers": (private.KNOWN.split(" to ")[0], private.KNOWN.split(" to ")[1]),
    "diffusers": ("0.42", ""),
    "timm": ("1.0.15", ""),
}


PRIVATE = {"transformers": private.NAMES, "diffusers": private.DIFFUSERS}


# ---- what is found ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    library: str
    version: str
    known: str
    problem: str = ""


@dataclass(frozen=True)
class Places:
    """Sites of one tower and kind that take the same events."""

    sites: str  # a pattern that names them
    count: int
    tower: str
    kind: str
    seam: str
    events: tuple[str, ...]
    modules: tuple[str, ...]  # their classes


@dataclass(frozen=True)
class Heads:
    """Attention of one shape. `dim` is 0 where only scores are reached."""

    sites: str
    heads: int
    key_heads: int
    dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    reuses: str = ""  # the site whose keys these are


@dataclass(frozen=True)
class Cached:
    """Of the main tower: the cache's layers by type, layers without attention, why no token can leave."""

    layers: dict[str, str]
    elsewhere: dict[str, str]  # what mixes tokens there instead
    refusal: str = ""


@dataclass(frozen=True)
class Pictures:
    placeholders: dict[str, int]
    features: dict[str, str]  # by kind, who makes them
    read: str  # placeholders, cross-attention, or nothing
    layer: int | None  # of the vision tower, whose output becomes features
    tokens: int | None = None  # features of a small picture
    boxed: int | None = None  # and how many have a box in it
    problem: str = ""  # why there are no boxes


@dataclass(frozen=True)
class Trial:
    """A small pass: bare, observed everywhere, detached. Differences are shares of the largest number."""

    inputs: dict[str, str]
    fired: int = 0
    silent: tuple[str, ...] = ()  # patterns of sites that never fire
    unreached: tuple[str, ...] = ()  # modules that attend and are no site
    observed: float | None = None
    detached: float | None = None
    note: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Fit:
    slug: str
    kind: str
    fits: bool | None  # None: it brings models of its own
    missing: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    model: str
    parameters: int
    dtype: str
    device: str
    versions: tuple[Version, ...]
    places: tuple[Places, ...] = ()
    heads: tuple[Heads, ...] = ()
    cached: Cached | None = None
    pictures: Pictures | None = None
    chat_template: bool | None = None  # None without a processor
    trial: Trial | None = None
    methods: tuple[Fit, ...] = ()
    problem: str = ""  # why nothing can be attached
    remedy: str = ""

    @property
    def healthy(self) -> bool:
        """Something can be attached, and where a pass was tried, observing and detaching change nothing."""
        trial = self.trial
        if self.problem or trial is None:
            return not self.problem
        return not trial.problem and not trial.detached and (trial.observed or 0) <= ROUNDING

    def as_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **dataclasses.asdict(self)}

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False)

    def plain(self, width: int = 80) -> str:
        """The whole diagnosis in columns."""
        return "\n".join(_written(self, width))

    def __repr__(self) -> str:
        return self.plain()

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{escape(p.sites)}</code></td><td>{p.seam}</td><td>{' '.join(p.events)}</td></tr>"
            for p in self.places
        )
        yes = ", ".join(escape(f.slug) for f in self.methods if f.fits)
        no = "".join(
            f"<li><code>{f.slug}</code> {escape(f.missing)}</li>" for f in self.methods if f.fits is False
        )
        return (
            f"<b>{escape(self.model)}</b> {escape(self.problem)}<table>{rows}</table>"
            f"<details><summary>methods: {yes or 'none'}</summary><ul>{no}</ul></details>"
        )


# ---- the examination -------------------------------------------------------------------------------------


def doctor(model: Any, processor: Any = None, inputs: Inputs | None = None, *, run: bool = True) -> Diagnosis:
    """What is reachable in a model or pipeline, and what each method of the catalogue would miss.

    A small pass is tried, on `inputs` or on made-up ones, unless `run` is False. The model stays as it was.

    >>> sc.doctor(model, processor)
    """
    model = getattr(model, "_orig_mod", model)
    about = _about(model)
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    try:
        host = Runtime.of(model).host
    except SaccadeError as e:
        if not (isinstance(model, nn.Module) or is_pipeline(model)):
            raise
        trial = _without_sites(model, given) if run and isinstance(model, nn.Module) else None
        return Diagnosis(**about, trial=trial, problem=e.problem, remedy=e.remedy)
    except (ImportError, RuntimeError):
        if not (wrong := torchvision_problem()):
            raise
        problem = f"transformers does not import beside a torchvision that does not fit this torch ({wrong})"
        return Diagnosis(**about, problem=problem, remedy=TORCHVISION_REMEDY)
    if Runtime.of(model).sessions:
        raise AttachError(
            f"Methods are attached to this {type(model).__name__}: the bare model is what is examined.",
            "detach them first",
        )
    with _as_it_was(host.modules(), host.transient()):
        seen = _watcher(host)
        trial, out = _try(host, processor, given, seen) if run else (None, None)
        cached = _cached(host, out)
        return Diagnosis(
            **about,
            places=_places(host, cached),
            heads=_heads(host, seen),
            cached=cached,
            pictures=_pictures(host, processor, run),
            chat_template=None if processor is None else _has_chat(processor),
            trial=trial,
            methods=_methods(model, cached),
        )


def _about(model: Any) -> dict[str, Any]:
    modules = {id(module): module for _, module in _modules(model)}
    parameters = list({id(p): p for m in modules.values() for p in m.parameters(recurse=False)}.values())
    first = next((p for p in parameters if p.is_floating_point()), None)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": "" if first is None else str(first.dtype).removeprefix("torch."),
        "device": "" if first is None else str(first.device),
        "versions": tuple(_versions()),
    }


def _versions() -> Iterator[Version]:
    for library, (lowest, newest) in RANGES.items():
        version = _version(library)
        if not version:
            continue
        known = f"{lowest} to {newest}" if newest else f"{lowest} and newer"
        moved = _moved(library)
        if _numbers(version) < _numbers(lowest):
            moved = moved or "older than what is known"
        elif newest and _numbers(version)[:2] > _numbers(newest):
            moved = moved or "newer than what is known, but nothing that is leant on has moved"
        yield Version(library, version, known, moved)
    if importlib.util.find_spec("torchvision") is not None:
        wrong = torchvision_problem()
        problem = f"does not fit this torch ({wrong})" if wrong else ""
        yield Version("torchvision", _version("torchvision"), "the build for this torch", problem)


def _version(library: str) -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _moved(library: str) -> str:
    """What of a library's inside is not as we know it. One that is not loaded is not loaded for this."""
    problems = []
    for name in PRIVATE.get(library, ()) if library in sys.modules else ():
        try:
            private.check_names((name,), library)
        except VersionError as e:
            problems.append(e.problem)
        except RuntimeError:  # torchvision's, which is told by itself
            break
    return " ".join(problems)


def _modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """By path, a pipeline's parts included."""
    parts = {"": model} if isinstance(model, nn.Module) else getattr(model, "components", {})
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            yield from part.named_modules(prefix=name)


@contextlib.contextmanager
def _as_it_was(modules: Iterable[nn.Module], saved: list[tuple[Any, str, Any]]) -> Iterator[None]:
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


# ---- sites -----------------------------------------------------------------------------------------------


def _places(host: PlainHost, cached: Cached | None) -> tuple[Places, ...]:
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
class _Seen(Method):
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


def _watcher(host: PlainHost) -> _Seen:
    called = tuple(site.name for site in host.sites if "observe" in reach(site))
    passed = tuple(site.name for site in host.sites if site.seam == "module")
    return _Seen(sites={"observe": called, "hidden": passed})


def _heads(host: PlainHost, seen: _Seen) -> tuple[Heads, ...]:
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


def _cached(host: PlainHost, out: Any) -> Cached | None:
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


# ---- a small pass ----------------------------------------------------------------------------------------


def _try(host: PlainHost, processor: Any, inputs: Inputs | None, seen: _Seen) -> tuple[Trial, Any]:
    """The trial, and what the bare model gave."""
    given, bare, note = _working(host, processor, inputs)
    if given is None:
        return Trial({}, note=note), None
    listener = _Listener(_modules(host.model), [site.module for site in host.sites if site.seam != "module"])
    with listener:
        _run(host.model, given)
    trial = Trial(_described(given), unreached=listener.found, note=note)
    try:
        with attach(host.model, seen):
            observed = _run(host.model, given)
    except Exception as e:  # ours, or the model's that does not bear being watched
        return dataclasses.replace(trial, problem=f"observing everywhere fails: {_told(e)}"), bare
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
                f"These inputs do not go through {type(host.model).__name__}: {_told(e)}.",
                "give what its forward takes, by name or in a tuple",
            ) from e
    problems: list[str] = []
    for make in made_up(host, processor, PICTURE):
        try:
            if given := make():
                note = f"what the processor makes fails: {problems[0]}" if processor and problems else ""
                return given, _run(host.model, given), note
        except Exception as e:  # processors and models raise whatever befalls them
            problems.append(_told(e))
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


def _told(error: Exception) -> str:
    if isinstance(error, SaccadeError):
        return error.problem
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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


def _without_sites(model: nn.Module, inputs: Inputs | None) -> Trial:
    """Where a model attends in which nothing can be attached."""
    given = of_first_layer(model) if inputs is None else inputs
    listener = _Listener(model.named_modules(), ())
    try:
        with listener, _as_it_was(model.modules(), []):
            _run(model, given)
    except Exception as e:  # the made-up inputs may not fit
        return Trial(_described(given), note=f"a pass fails: {_told(e)}")
    return Trial(_described(given), unreached=listener.found)


# ---- pictures --------------------------------------------------------------------------------------------


def _pictures(host: PlainHost, processor: Any, run: bool) -> Pictures | None:
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
        return dataclasses.replace(found, problem=_told(e))
    return dataclasses.replace(found, tokens=len(boxes), boxed=int((~boxes.isnan().any(-1)).sum()))


def _has_chat(processor: Any) -> bool:
    owners = (processor, getattr(processor, "tokenizer", None))
    return any(getattr(owner, "chat_template", None) for owner in owners)


# ---- methods ---------------------------------------------------------------------------------------------


def _methods(model: Any, cached: Cached | None) -> tuple[Fit, ...]:
    with attach(model):  # one discovery for all
        return tuple(_fit(model, card, cached) for card in catalog.cards())


def _fit(model: Any, card: Card, cached: Cached | None) -> Fit:
    """Whether a method attaches as it is written in a stack, its options at their defaults."""
    fit = functools.partial(Fit, card.slug, card.kind)
    if card.kind == "experiment":
        return fit(None, "runs on models of its own")
    name = ""
    try:
        (system,) = load(card.slug)
        name = type(system).__name__
        if isinstance(system, Driver):
            check_needs(system, Runtime.of(model).host)
            helpers = [f for f in dataclasses.fields(system) if f.metadata.get("helper")]
            wanting = [f for f in helpers if getattr(system, f.name) is None]
            return fit(True, f"give it {wanting[0].name}=" if wanting else "")
        assert isinstance(system, Method)
        attach(model, system).detach()
    except SaccadeError as e:
        missing = e.problem.removeprefix(f"{name} ").removeprefix(f"cannot serve {type(model).__name__}: ")
        return fit(False, " ".join(missing.split()).rstrip("."), e.remedy)
    except ImportError as e:
        return fit(False, _told(e), f"pip install {e.name}" if e.name else "install it")
    if cached is not None and cached.refusal and tracks([system]):
        return fit(False, cached.refusal.rstrip("."), "use it on a model whose every layer keeps keys")
    calibrated = type(system).calibrate is not Method.calibrate
    return fit(True, "first measure the model, session.calibrate(method, samples)" if calibrated else "")


# ---- in words --------------------------------------------------------------------------------------------


def _written(d: Diagnosis, width: int) -> Iterator[str]:
    place = f", {d.dtype} on {d.device}" if d.dtype else ""
    yield f"{d.model}  {d.parameters:,} parameters{place}"
    said = ((v.library, v.version, f"! {v.problem}" if v.problem else f"({v.known})") for v in d.versions)
    yield from _table(((library, f"{version}  {about}") for library, version, about in said), width)
    if d.problem:
        yield "\nNothing can be attached"
        yield from _table([("why", d.problem), ("way out", d.remedy)], width)
    if d.places:
        yield "\nSites"
        yield from _table([(p.sites, f"{p.seam:<9}  {' '.join(p.events)}") for p in d.places], width, 35)
    if d.heads or d.cached:
        yield "\nHeads and cache"
        leaves = any("evict" in p.events for p in d.places)
        yield from _table([*((h.sites, _shape(h)) for h in d.heads), *_cache_rows(d.cached, leaves)], width)
    if d.pictures:
        yield "\nPictures"
        yield from _table(_picture_rows(d.pictures, d.chat_template), width)
    if d.trial:
        yield "\nA small pass"
        yield from _table(_trial_rows(d.trial), width)
    if d.methods:
        yield f"\nMethods: {sum(fit.fits is True for fit in d.methods)} of {len(d.methods)}"
        yield from _table(_method_rows(d), width)


def _table(rows: Iterable[tuple[str, str]], width: int, indent: int = 0) -> Iterator[str]:
    """Names and beside them what is said of them, which goes on below itself or `indent` columns in."""
    rows = list(rows)
    column = min(22, max((len(name) for name, _ in rows), default=0))
    for name, text in rows:
        rest = " " * max(indent, column + 4)
        if len(name) > column:
            yield textwrap.fill(name.replace("|", "| "), width, initial_indent="  ", subsequent_indent="  ")
            name = ""
        head = f"  {name:<{column}}  "
        yield textwrap.fill(
            text,
            width,
            initial_indent=head,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )


def _shape(h: Heads) -> str:
    said = [f"{h.heads} heads" + (f" of {h.dim}" if h.dim else "")]
    said += [f"{h.key_heads} key heads"] if h.key_heads != h.heads else []
    said += [f"window {h.window}"] if h.window else []
    said += [f"softcap {h.softcap:g}"] if h.softcap else []
    said += ["sinks"] if h.sinks else []
    said += [f"the keys are those of {h.reuses}"] if h.reuses else []
    return ", ".join(said)


def _cache_rows(cached: Cached | None, leaves: bool) -> Iterator[tuple[str, str]]:
    if cached is not None:
        yield from (("cache", f"{kind} in {where}") for kind, where in cached.layers.items())
        yield from (("without attention", f"{where} ({what})") for what, where in cached.elsewhere.items())
        able = "entries can leave it, but not a static, quantised or offloaded one"
        yield "", cached.refusal or (able if leaves else "no entry can leave it, for no site takes evict")


def _picture_rows(pictures: Pictures, chat: bool | None) -> Iterator[tuple[str, str]]:
    if pictures.placeholders:
        yield "placeholders", ", ".join(f"{kind} {i}" for kind, i in pictures.placeholders.items())
    for kind, owner in pictures.features.items():
        yield f"{kind}s", owner
    after = "" if pictures.layer is None else f", as they are after vision layer {pictures.layer}"
    yield "reach the text", f"through {pictures.read}{after}" if pictures.read != "nothing" else "no"
    if pictures.tokens is not None:
        size = " x ".join(map(str, PICTURE))
        yield "boxes", f"{pictures.boxed} of the {pictures.tokens} features of a picture of {size}"
    elif pictures.problem:
        yield "boxes", pictures.problem
    if chat is not None:
        yield "chat template", "yes" if chat else "no"


def _trial_rows(trial: Trial) -> Iterator[tuple[str, str]]:
    if trial.inputs:
        yield "inputs", ", ".join(f"{name} {shape}" for name, shape in trial.inputs.items())
    if trial.note:
        yield "note", trial.note
    if trial.problem:
        yield "!", trial.problem
    if trial.observed is not None and trial.detached is not None:
        fired = f"{trial.fired} sites, never {', '.join(trial.silent)}"
        yield "fired", fired if trial.silent else f"all {trial.fired} sites"
        yield "observing", _exactness(trial.observed)
        yield "detaching", _exactness(trial.detached)
    if trial.unreached:
        yield "out of reach", ", ".join(trial.unreached)


def _method_rows(d: Diagnosis) -> Iterator[tuple[str, str]]:
    """Methods in groups: those that attach, and those that miss the same thing."""
    groups: dict[tuple[bool | None, str], list[str]] = {}
    for fit in sorted(d.methods, key=lambda fit: (fit.fits is not True, bool(fit.missing))):
        groups.setdefault((fit.fits, fit.missing), []).append(fit.slug)
    for (fits, missing), slugs in groups.items():
        names = ", ".join(slugs)
        yield {True: "yes", False: "no", None: "apart"}[fits], f"{names}: {missing}" if missing else names


def _exactness(difference: float) -> str:
    if difference == 0:
        return "exact to the bit"
    return f"{'exact to rounding' if difference <= ROUNDING else '! changes the output'} ({difference:.0e})"
