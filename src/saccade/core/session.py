"""Attaching methods to a model, and the runtime that stands around its forward."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import AttachError
from saccade.core.method import Method
from saccade.core.passes import Pass, Run
from saccade.core.plan import Plan, make_plans, merge
from saccade.core.seams import hidden, sdpa, softmax
from saccade.core.seams.plain import PlainHost, restore
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site
from saccade.core.state import Sequence


def attach(model: nn.Module, *methods: Method | Iterable[Method]) -> Session:
    """Attach methods to a model as it is; leaving the `with` block takes them off again.

    >>> with sc.attach(model, sc.load("var+vhr(alpha=1.5)")) as session:
    ...     ids = model.generate(**inputs)
    """
    flat: list[Method] = []
    for method in methods:
        flat.extend([method] if isinstance(method, Method) else method)
    return Session(model, tuple(flat))


class Session:
    """Methods on a model. Sessions nest, and leave in any order."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...]) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise AttachError(
                    f"{method!r} is no method.", "attach instances, such as sc.VAR() or sc.load('var')"
                )
        self.model = getattr(model, "_orig_mod", model)
        self.methods = methods
        self.results: dict[str, Any] = {}  # what the methods' `end` returned in the last run, by slug
        self._runtime = Runtime.of(self.model)
        self._runtime.add(self)

    @property
    def sites(self) -> list[Site]:
        return self._runtime.host.sites

    @property
    def plans(self) -> Mapping[Site, Plan]:
        """What this session does, by site."""
        return self._runtime.own_plans[self]

    def detach(self) -> None:
        """Take the methods off. The model is then as it was, to the bit."""
        self._runtime.remove(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model alone, for a while."""
        self._runtime.pause(self, True)
        try:
            yield
        finally:
            self._runtime.pause(self, False)

    def summary(self) -> str:
        """What is attached where."""
        lines = [f"{type(self.model).__name__}, {len(self.methods)} method(s)"]
        for method in self.methods:
            lines.append(f"  {method}")
            for event in type(method).events():
                names = [s.name for s, plan in self.plans.items() if method in getattr(plan, event)]
                if names:
                    lines.append(f"    {event:8} {len(names):3} sites  {names[0]} .. {names[-1]}")
        return "\n".join(lines)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Runtime:
    """One for each model with something attached. Passes live on a stack of the thread."""

    _of: dict[int, Runtime] = {}  # by id: the runtime holds its model while something is attached
    _lock = threading.RLock()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.host = host_of(model)
        self.sessions: list[Session] = []
        self.own_plans: dict[Session, dict[Site, Plan]] = {}
        self.methods: tuple[Method, ...] = ()
        self.plans: dict[Site, Plan] = {}
        self.last_pass: Pass | None = None
        self._paused: set[Session] = set()
        self._local = threading.local()
        self._undo: list[Callable[[], None]] = []
        self._installed: dict[Site, Callable[[], None]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Runtime:
        with cls._lock:
            return cls._of.get(id(model)) or cls(model)

    # ---- sessions ------------------------------------------------------------------------------------

    def add(self, session: Session) -> None:
        with self._lock:
            plans = make_plans(session.methods, self.host.sites)
            taken = {id(m) for other in self.sessions for m in other.methods}
            again = next((m for m in session.methods if id(m) in taken), None)
            if again is not None or len({id(m) for m in session.methods}) < len(session.methods):
                raise AttachError(
                    "One and the same method object is attached to this model twice.", "make a second one"
                )
            merge([*self.own_plans.values(), plans])
            try:
                if not self.sessions:
                    self._of[id(self.model)] = self
                    self._install()
                self.sessions.append(session)
                self.own_plans[session] = plans
                self._replan()
            except BaseException:
                self.remove(session)
                raise

    def remove(self, session: Session) -> None:
        with self._lock:
            if session in self.sessions:
                self.sessions.remove(session)
            self.own_plans.pop(session, None)
            self._paused.discard(session)
            self._replan()
            if not self.sessions:
                self._uninstall()
                self._of.pop(id(self.model), None)

    def pause(self, session: Session, paused: bool) -> None:
        with self._lock:
            (self._paused.add if paused else self._paused.discard)(session)
            self._replan()

    def _replan(self) -> None:
        active = [s for s in self.sessions if s not in self._paused]
        self.methods = tuple(m for s in active for m in s.methods)
        self.plans = merge([self.own_plans[s] for s in active])
        self.ensure(self.plans)
        wanted = {site for plans in self.own_plans.values() for site in plans}
        for site in [s for s in self._installed if s not in wanted]:
            self._installed.pop(site)()

    def ensure(self, sites: Iterable[Site]) -> None:
        """Stand at these sites, where we do not yet."""
        for site in sites:
            if site not in self._installed:
                self._installed[site] = installer(site)(site, self)

    def _install(self) -> None:
        host = self.host
        self._undo.append(wrap(self.model, "forward", self._forward))
        for tower, root in host.roots().items():
            self._undo.append(wrap(root, "forward", functools.partial(self._tower, tower)))
        for obj, name, what in host.wraps():
            around = self._generate if what == "generate" else functools.partial(self._features, what)
            self._undo.append(wrap(obj, name, around))

    def _uninstall(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    # ---- passes --------------------------------------------------------------------------------------

    @property
    def _passes(self) -> list[Pass]:
        if not hasattr(self._local, "passes"):
            self._local.passes, self._local.run = [], None
        return self._local.passes

    def current(self) -> Pass:
        """The pass that runs in this thread. A module that is called by itself is a pass of its own, and
        gradient checkpointing comes back to the last one."""
        passes = self._passes
        if passes:
            return passes[-1]
        if torch._C._current_graph_task_id() != -1 and self.last_pass is not None:
            return self.last_pass
        return self._pass(Run(self, {}, self.methods, self.plans), {}, None)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self.host.bind(args, kwargs)
        self.host.check()
        cache = self.host.cache(inputs)
        sequence = self.host.sequence_of(cache)
        with self._run(inputs, sequence) as run:
            pass_ = self._pass(run, inputs, sequence)
            length = pass_.sequence.length - pass_.tokens
            if cache is not None:
                self.host.follow(cache, pass_.sequence)
            try:
                with self._push(pass_):
                    out = forward(*args, **kwargs)
            except BaseException:
                pass_.sequence.crop(length)
                raise
            made = self.host.cache_of_output(out)
            if made is not None and made is not cache:
                self.host.follow(made, pass_.sequence)
            return out

    def _tower(self, tower: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A tower that is called by itself, or before the model's forward, is a pass too."""
        inputs = {**{f"args{i}": a for i, a in enumerate(args)}, **kwargs}
        if self._passes:
            self._passes[-1].tower_inputs[tower] = inputs
            return forward(*args, **kwargs)
        with self._run(inputs, None) as run:
            pass_ = Pass(run, Sequence(self.host.vocabulary), "prefill", inputs)
            pass_.tower_inputs[tower] = inputs
            with self._push(pass_):
                return forward(*args, **kwargs)

    def _pass(self, run: Run, inputs: Mapping[str, Any], sequence: Sequence | None) -> Pass:
        host = self.host
        run.step += 1
        sequence = sequence or Sequence(host.vocabulary)
        ids, shape = host.ids(inputs)
        if shape is None:
            return Pass(run, sequence, "prefill", inputs)
        rows, tokens = shape
        device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
        cache = host.cache(inputs)
        past = host.cached_tokens(cache) if cache is not None else 0
        if sequence.length < past:
            sequence.unknown(run.past_ids(sequence.length, past, rows), (rows, past - sequence.length), device)
        phase = run.phase(past, tokens)
        run.start = past if run.start is None else run.start
        mask = host.mask(inputs, past + tokens)
        sequence.extend(ids, shape, device, generated=phase == "decode", samples=run.samples)
        sequence.pad(mask)
        pass_ = Pass(run, sequence, phase, inputs, tokens, mask)
        if phase != "decode":
            run.place_items(pass_)
        return pass_

    @contextlib.contextmanager
    def _push(self, pass_: Pass) -> Iterator[None]:
        self._passes.append(pass_)
        self.last_pass = pass_
        try:
            yield
        finally:
            self._passes.pop()

    @contextlib.contextmanager
    def _run(self, inputs: dict[str, Any], sequence: Sequence | None) -> Iterator[Run]:
        """The running generation; or a forward that stands alone, with a run of its own, which later
        forwards on its cache go on with."""
        run = self._local.run if self._passes is not None else None
        if run is not None:
            yield run
            return
        run = sequence.run if sequence is not None else None
        if run is None or run.methods is not self.methods:
            run = Run(self, self.host.prompt(inputs), self.methods, self.plans)
            run.begin()
        self._local.run = run
        try:
            yield run
        finally:
            self._local.run = None
        self._report(run)

    def _report(self, run: Run) -> None:
        results = run.end()
        for session in self.sessions:
            session.results.update({k: v for k, (m, v) in results.items() if m in session.methods})

    # ---- the library's methods -----------------------------------------------------------------------

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One `generate()` is one run. A generation inside another is a run of its own."""
        given = {**({"inputs": args[0]} if args else {}), **kwargs}
        outer = self._local.run if self._passes is not None else None
        run = Run(self, self.host.prompt(given), self.methods, self.plans, generating=True)
        run.begin()
        self._local.run = run
        try:
            out = generate(*args, **kwargs)
        finally:
            self._local.run = outer
        self._report(run)
        return out

    def _features(self, kind: str, features: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = features(*args, **kwargs)
        run = self._local.run if self._passes is not None else None
        if run is not None:
            run.features.setdefault(kind, []).extend(self.host.counts(out))
            if self._passes and self._passes[-1].tokens:
                run.place_items(self._passes[-1])
        return out

    def extra_pass(self, inputs: Mapping[str, Any], methods: tuple[Method, ...], grad: bool) -> Any:
        """A forward beside the running one, with methods of its own."""
        plans = merge([make_plans(methods, self.host.sites)])
        with self._lock:
            self.ensure(plans)
        outer = self._local.run if self._passes is not None else None
        run = Run(self, self.host.prompt(inputs), methods, plans)
        saved = self.host.transient()
        self._local.run = run
        try:
            with torch.set_grad_enabled(grad):
                run.begin()
                out = self.model(**inputs)
                run.end()
                return out
        finally:
            restore(saved)
            self._local.run = outer


def installer(site: Site) -> Callable[[Site, Runtime], Callable[[], None]]:
    if site.seam == "interface":
        from saccade.core.seams import transformers

        return transformers.install
    return {"sdpa": sdpa.install, "softmax": softmax.install, "module": hidden.install}[site.seam]


def host_of(model: Any) -> PlainHost:
    """What knows this kind of model."""
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"A {type(model).__name__} is no torch module.", "pass the model itself, such as a PreTrainedModel"
        )
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        from saccade.core.seams.transformers import TransformersHost

        return TransformersHost(model)
    return PlainHost(model)
