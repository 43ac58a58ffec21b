"""What a run costs, counted from shapes, and the speed-up that it allows.

    FLOPs of a layer = 2 * parameters of its linear maps * tokens + 2 * (d_k + d_v) * heads * queries * keys
    bytes of a layer = its linear maps + keys and values, once in each pass

Attention is counted whole; a kernel that leaves out what the causal rule hides does up to half of its products
in the prefill. Of experts as many are counted as a token needs, though a batch may read more. Left out are
norms, rotations, convolutions, other products without weights, all that stands outside of layers, and
what a method computes by itself; a further pass of the model that it asks for is counted. So these are bounds:
with all that no method spares a gain is smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from saccade.core.errors import InputError
from saccade.core.method import Method, option
from saccade.core.seams.transformers import unfolding
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.call import AttentionCall
    from saccade.core.passes import Pass, Run


@dataclass
class Cost:
    """Of one phase, or of several runs together."""

    passes: int = 0  # of the main tower
    tokens: Counter[str] = field(default_factory=Counter)  # by layer, real ones
    visual: Counter[str] = field(default_factory=Counter)  # by layer of the main tower: those of pictures
    padding: Counter[str] = field(default_factory=Counter)  # by layer: what is computed beside them
    flops: Counter[str] = field(default_factory=Counter)  # by tower
    read: Counter[str] = field(default_factory=Counter)  # bytes by tower
    cache_bytes: Counter[str] = field(default_factory=Counter)  # by layer, held in the end

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Bound(NamedTuple):
    """How many times faster a run can become, at most; NaN of a phase that it does not have."""

    prefill: float  # where arithmetic is the limit
    decode: float  # where memory is: bytes that a step reads


def bound(before: Mapping[str, Cost], after: Mapping[str, Cost]) -> Bound:
    """Of two runs on the same prompts, by what `Count` returned. Their answers may differ in length."""
    flops = [run["prefill"].flops.total() for run in (before, after)]
    read = [run["decode"].read.total() / max(1, run["decode"].passes) for run in (before, after)]
    return Bound(*(a / b if a and b else float("nan") for a, b in (flops, read)))


@dataclass(eq=False, kw_only=True)
class Count(Method):
    """Counts FLOPs, bytes and tokens of the model's own passes, with what else is attached.

    `session.results["Count"]` has a `Cost` of the `prefill`, in however many pieces, and one of the `decode`, which
    ends with the cache that the run was given; `generate()` always gives one.
    """

    sites: Any = option("*.self", "where: a pattern of self-attention sites")

    def begin(self, run: Run) -> None:
        self._log(run)

    def _log(self, run: Run) -> _Log:
        state = run.state_of(self)
        if "log" not in state:
            state["log"] = _Log(self._weights(run))
        return state["log"]

    def _weights(self, run: Run) -> dict[Site, _Weights]:
        host, sites = run.runtime.host, run.places(self, "observe")
        names = [type(method).__name__ for method in run.overriding("branches", "replace", "skip")]
        if names or host.samples:
            raise InputError(
                f"What {' and '.join(names) or 'a denoiser'} does is not told by the shapes of the model's attention.",
                "measure its time, or count without it",
            )
        weights: dict[Site, _Weights] = {}
        towers = {site.tower for site in sites}
        for layer in [s for s in host.sites if s.kind == "layer" and s.tower in towers]:
            inside = [s for s in host.sites if s.seam != "module" and s.path.startswith(f"{layer.path}.")]
            if not inside or any(s.kind != "self" or s.seam == "softmax" for s in inside):
                raise InputError(
                    f"{layer.name} ({type(layer.module).__name__}) does more than attend to itself, by a kernel: "
                    "shapes do not tell what it costs.",
                    "narrow Count with sites= to other towers",
                )
            weights |= {site: _weights(site, layer, inside) for site in inside if site in sites}
        if not weights:
            raise InputError(
                f"{type(host.model).__name__} has no layers around its attention, and layers are counted.",
                "measure its time",
            )
        return weights

    def observe(self, call: AttentionCall) -> None:
        log: _Log = call.run.state["log"]
        site, weights = call.site, log.weights.get(call.site)
        if weights is None:  # a pooling head, outside of layers
            return
        phase = "decode" if call.phase == "decode" else "prefill"
        layer, cost = site.name.removesuffix(".self"), log.costs[phase]
        main = site.tower == call.run.runtime.host.main_tower
        if main and call.pass_ is not log.last:
            log.last = call.pass_
            cost.passes += 1
        weights.charge(cost, call)
        batch, _, queries, _ = call.q.shape
        cost.tokens[layer] += batch * queries
        if main:
            log.add("padding", phase, layer, ~call.queries("all"))
            if phase == "prefill" and call.qlayout.named:
                log.add("visual", phase, layer, call.queries("visual"))

    def extra(self, run: Run, grad: bool) -> Method:
        if grad:
            names = ", ".join(type(method).__name__ for method in run.methods if method is not self)
            raise InputError(
                f"{names} differentiates, which costs what shapes of attention do not tell.",
                "measure its time",
            )
        log = self._log(run)
        phase = "decode" if run.last and run.last.phase == "decode" else "prefill"
        return _Extra(layers=log.weights, cost=log.costs[phase], sites=self.sites)

    def end(self, run: Run) -> dict[str, Cost]:
        log: _Log = run.state["log"]
        costs = {phase: cost + Cost() for phase, cost in log.costs.items()}
        for (what, phase, layer), count in log.counts.items():
            getattr(costs[phase], what)[layer] = int(count)
            if what == "padding":
                costs[phase].tokens[layer] -= int(count)
        tower = run.runtime.host.main_tower
        ran = run.last is not None and run.last.phase in self.phases
        if ran and log.last is None and any(site.tower == tower for site in log.weights):
            raise InputError(
                f"{type(run.runtime.model).__name__} attended where Count did not see it.",
                "load the model with attn_implementation='sdpa'",
            )
        for index, held in enumerate(run.runtime.host.cache_layers(run.cache)):
            storages = [t.untyped_storage() for t in vars(held).values() if isinstance(t, Tensor)]
            memory = {storage.data_ptr(): storage.nbytes() for storage in storages}
            costs["decode"].cache_bytes[f"{tower}.{index}"] = sum(memory.values())
        return costs


class _Weights(NamedTuple):
    """Parameters of a layer's linear maps: by which a token is multiplied, and a key; and bytes of both."""

    by_token: int
    by_key: int
    bytes: int

    def charge(self, cost: Cost, call: AttentionCall) -> None:
        """FLOPs and bytes of a layer in one pass."""
        batch, heads, queries, width = call.q.shape
        keys, tower = call.k.shape[2], call.site.tower
        products = batch * heads * queries * keys * (width + call.v.shape[3])
        cost.flops[tower] += 2 * (self.by_token * batch * queries + self.by_key * batch * keys + products)
        cost.read[tower] += self.bytes + call.k.nbytes + call.v.nbytes


@dataclass(eq=False, kw_only=True)
class _Extra(Method):
    """Adds what a further pass costs to the phase in which a method asked for it."""

    layers: dict[Site, _Weights]
    cost: Cost

    def observe(self, call: AttentionCall) -> None:
        if call.site in self.layers:
            self.layers[call.site].charge(self.cost, call)


@dataclass
class _Log:
    weights: dict[Site, _Weights]
    costs: dict[str, Cost] = field(default_factory=lambda: {"prefill": Cost(), "decode": Cost()})
    counts: dict[tuple[str, str, str], Any] = field(default_factory=dict)  # not yet read from the device
    last: Pass | None = None

    def add(self, what: str, phase: str, layer: str, mask: Tensor) -> None:
        key = (what, phase, layer)
        self.counts[key] = self.counts.get(key, 0) + mask.sum()


def _weights(site: Site, layer: Site, inside: Sequence[Site]) -> _Weights:
    """Of the layer, but for what belongs to another attention in it; of a second attention, its own alone."""
    around = site if site.index is None else layer
    others = tuple(f"{s.path}." for s in inside if s is not site)
    over_keys = unfolding(site.module)
    by_token = by_key = size = 0
    for name, module in around.module.named_modules():
        if f"{around.path}.{name}.".startswith(others):
            continue
        for parameters, memory in _maps(module, around):
            size += memory
            if module is over_keys:
                by_key += parameters
            else:
                by_token += parameters
    return _Weights(by_token, by_key, size)


def _maps(module: nn.Module, layer: Site) -> Iterator[tuple[int, int]]:
    """Parameters and bytes that a token needs of the linear maps that are the module's own."""
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(module, nn.Linear):
            if name == "weight":  # which may be packed
                yield module.in_features * module.out_features, weight.nbytes
        elif weight.ndim == 2 and name.endswith("weight") and not isinstance(module, nn.Embedding):
            yield weight.numel(), weight.nbytes
        elif weight.ndim == 3 and "xpert" in type(module).__name__:
            chosen, experts = _chosen(layer), weight.shape[0]
            yield weight.numel() // experts * chosen, weight.nbytes // experts * chosen


def _chosen(layer: Site) -> int:
    """Experts of a token."""
    for module in layer.module.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in ("top_k", "num_experts_per_tok"):
                if isinstance(count := getattr(owner, name, None), int):
                    return count
    raise InputError(
        f"{layer.name} ({type(layer.module).__name__}) does not say how many experts a token goes to.",
        "narrow Count with sites= to towers without experts",
    )
