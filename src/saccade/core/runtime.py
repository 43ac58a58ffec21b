"""The runtime that stands around the forward of a model with something attached."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from saccade.core import branch
from saccade.core.cache import refuse_paged
from saccade.core.errors import AttachError, InputError
from saccade.core.features import choose, refuse_unnamed
from saccade.core.host import check_events, check_needs, host_of
from saccade.core.method import Method
from saccade.core.passes import Pass, Run
from saccade.core.plan import Plan, make_plans, merge, reducing
from saccade.core.probe import featurizer
from saccade.core.seams import hidden, projections, projector, rotation, sdpa, softmax, tokens, unembed
from saccade.core.seams.plain import PlainHost, restore
from saccade.core.seams.wrap import wrap, wrap_call
from saccade.core.site import Site, match
from saccade.core.state import Sequence

if TYPE_CHECKING:
    from saccade.core.boxes import Located
    from saccade.core.session import Session


class _Running(threading.local):
    """What runs in a thread: passes, the innermost last, and the run that they belong to."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.run: Run | None = None


class Runtime:
    """One for each model with something attached. Passes live on a stack of the thread."""

    _of: ClassVar[dict[int, Runtime]] = {}  # by id: the runtime holds its model while something is attached
    _lock = threading.RLock()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.host = host_of(model)
        self.sessions: list[Session] = []
        self.own_plans: dict[Session, dict[Site, Plan]] = {}
        self.methods: tuple[Method, ...] = ()
        self.plans: dict[Site, Plan] = {}
        self.last_pass: Pass | None = None
        self.located: Located | None = None  # the pictures of the coming runs
        self._head: unembed.Head | None = None
        self._projector: nn.Module | None = None
        self._anatomy: projections.Anatomy | None = None
        self._rotations: dict[str, rotation.Rotation] | None = None
        self._paused: list[Session] = []  # once for every `paused()` that a session is in
        self._local = _Running()
        self._undo: list[Callable[[], None]] = []
        self._installed: dict[tuple[Any, str], Callable[[], None]] = {}  # by site and what stands there

    @classmethod
    def of(cls, model: nn.Module) -> Runtime:
        with cls._lock:
            return cls._of.get(id(model)) or cls(model)

    # ---- sessions ------------------------------------------------------------------------------------

    def add(self, session: Session) -> None:
        with self._lock:
            for method in session.methods:
                check_needs(method, self.host)
                check_events(method, self.host)
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
            self._paused = [s for s in self._paused if s is not session]
            self._replan()
            if not self.sessions:
                self._uninstall()
                if self._of.get(id(self.model)) is self:
                    del self._of[id(self.model)]

    def pause(self, session: Session, paused: bool) -> None:
        with self._lock:
            if paused:
                self._paused.append(session)
            elif session in self._paused:
                self._paused.remove(session)
            self._replan()

    def _replan(self) -> None:
        active = [s for s in self.sessions if s not in self._paused]
        self.methods = tuple(m for s in active for m in s.methods)
        self.plans = merge([self.own_plans[s] for s in active])
        tracked = any(tracks(s.methods) for s in self.sessions)
        wanted = merge([*self.own_plans.values()])
        self.ensure(wanted, tracked)
        needed = places(wanted, self.host, tracked)
        for key in [k for k in self._installed if k not in needed]:
            self._installed.pop(key)()

    def ensure(self, plans: Mapping[Site, Plan], tracked: bool) -> None:
        """Stand where these plans act, and where tokens may be missing."""
        for key, install in places(plans, self.host, tracked).items():
            if key in self._installed:
                continue
            site, what = key
            if what == "rotary":
                self._installed[key] = install(site, self)
                continue
            for other in self._of.values():
                if other is not self and any(
                    getattr(theirs, "module", None) is site.module for theirs, _ in other._installed
                ):
                    raise AttachError(
                        f"{site.name} ({site.path or 'the model itself'}) is attached already, through another "
                        "object that contains it.",
                        "attach to the same object, or detach the other session first",
                    )
            self._installed[key] = install(site, self)

    def _install(self) -> None:
        host = self.host
        if host.samples:
            self._undo.append(wrap_call(self.model, functools.partial(host.sample, self)))
            return
        self._undo.append(wrap(self.model, "forward", self._forward))
        for tower, root in host.roots().items():
            names = tuple(inspect.signature(root.forward).parameters)
            self._undo.append(wrap(root, "forward", functools.partial(self._tower, tower, names)))
        for obj, name, what in host.wraps():
            if what == "generate":
                self._undo.append(wrap(obj, name, self._generate))
            elif what == "paged":
                self._undo.append(wrap(obj, name, refuse_paged))
            elif what == "forward":  # a part that people call by itself
                names = tuple(inspect.signature(getattr(obj, name)).parameters)
                self._undo.append(wrap(obj, name, functools.partial(self._tower, host.main_tower, names)))
            elif what == "deepstack":
                self._undo.append(wrap(obj, name, functools.partial(tokens.deepstack, self)))
            else:
                self._undo.append(wrap(obj, name, functools.partial(self._features, what)))

    def _uninstall(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.last_pass = None

    # ---- passes --------------------------------------------------------------------------------------

    @property
    def _passes(self) -> list[Pass]:
        return self._local.passes

    def current(self) -> Pass:
        """The pass that runs in this thread. A module that is called by itself is a pass of its own, and
        gradient checkpointing comes back to the last one."""
        passes = self._passes
        if passes:
            return passes[-1]
        if self.recomputing and self.last_pass is not None:
            return self.last_pass
        if self.host.samples:  # a denoiser that is called outside of its pipeline is left alone
            return Pass(Run(self, {}, (), {}), Sequence(self.host.vocabulary), "prefill", {})
        return self._pass(Run(self, {}, self.methods, self.plans), {}, None)

    @property
    def recomputing(self) -> bool:
        """Gradient checkpointing runs a layer for the second time."""
        return not self._passes and torch._C._current_graph_task_id() != -1

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.host.check()
        return self._main_pass(self.host.bind(args, kwargs), forward, args, kwargs)

    def _main_pass(
        self,
        inputs: dict[str, Any],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        cache = self.host.cache(inputs)
        with self._run(inputs, self.host.sequence_of(cache)) as run:
            if run.tracked:
                inputs = self.host.track_inputs(inputs)
                args, kwargs, cache = (), inputs, self.host.cache(inputs)
            pass_ = self._pass(run, inputs, cache)
            pass_.tracked = run.tracked and cache is not None
            refuse_unnamed(run)
            pass_.sequence.run = None if run.generating else run
            run.last, run.cache = pass_, cache
            if cache is not None:
                self.host.follow(cache, pass_.sequence, run.branches)
            try:
                with self.push(pass_), self.host.attended(cache, pass_.tracked):
                    out = branch.step(run, pass_, forward, args, kwargs)
            except BaseException as error:
                pass_.sequence.crop(pass_.start)
                if pass_.removals and type(error) is RuntimeError:
                    joined = any(removal.appended is not None for removal in pass_.removals.values())
                    words = ("joined", "join", "more") if joined else ("left", "leave", "fewer")
                    towers = " and ".join(pass_.removals)
                    raise InputError(
                        f"Tokens {words[0]} {towers}, and a later part does not take {words[2]}: {error}",
                        f"let none {words[1]} there: narrow it with sites=, or choose among features behind the tower",
                    ) from error
                raise
            made = self.host.cache_of_output(out)
            if made is not None and made is not cache:
                self.host.follow(made, pass_.sequence)
            return out

    def _tower(
        self, tower: str, names: tuple[str, ...], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A tower that is called by itself, or before the model's forward, is a pass too."""
        inputs = {**dict(zip(names, args)), **kwargs}
        if self._passes:
            self._passes[-1].tower_inputs[tower] = inputs
            return forward(*args, **kwargs)
        if tower == self.host.main_tower:
            return self._main_pass(inputs, forward, args, kwargs)
        with self._run(inputs, None) as run:
            pass_ = Pass(run, Sequence(self.host.vocabulary), "prefill", inputs)
            pass_.tower_inputs[tower] = inputs
            with self.push(pass_):
                return forward(*args, **kwargs)

    def _pass(self, run: Run, inputs: Mapping[str, Any], cache: Any) -> Pass:
        host = self.host
        run.step += 1
        sequence = host.sequence_of(cache) or Sequence(host.vocabulary)
        ids, shape = host.ids(inputs)
        inputs = {
            name: value for name, value in inputs.items() if value is not cache
        }  # a pass may outlive it
        if shape is None:
            return Pass(run, sequence, "prefill", inputs)
        rows, tokens = shape
        device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
        past = host.cached_tokens(cache) - run.moved if cache is not None else 0
        if sequence.length < past:
            sequence.unknown(
                run.past_ids(sequence.length, past, rows), (rows, past - sequence.length), device
            )
        sequence.crop(past)
        run.sequence, sequence.unverified = sequence, run.unverified
        if ids is None:  # only embeddings came here, but a prompt with ids was given further up
            ids = run.past_ids(past, past + tokens, rows)
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
    def push(self, pass_: Pass) -> Iterator[None]:
        self._passes.append(pass_)
        if torch.is_grad_enabled():
            self.last_pass = pass_
        try:
            yield
        finally:
            self._passes.pop()

    @contextlib.contextmanager
    def _run(self, inputs: dict[str, Any], sequence: Sequence | None) -> Iterator[Run]:
        """The running generation; or a forward that stands alone, with a run of its own, which later
        forwards on its cache go on with."""
        run = self._local.run
        if run is not None:
            yield run
            return
        run = sequence.run if sequence is not None else None
        if run is None or run.methods is not self.methods:
            run = Run(self, self.host.prompt(inputs), self.methods, self.plans, tracked=tracks(self.methods))
            run.begin()
        else:
            run.go_on(self.host.prompt(inputs))
        self._local.run = run
        try:
            yield run
        finally:
            self._local.run = None
        self._report(run)

    @contextlib.contextmanager
    def sampling(self, run: Run) -> Iterator[None]:
        """One sampling of a pipeline is one run."""
        outer = self._passes, self._local.run
        run.begin()
        self._local.passes, self._local.run = [], run
        try:
            yield
        finally:
            self._local.passes, self._local.run = outer
        self._report(run)

    def plan(self, methods: tuple[Method, ...], tracked: bool = False) -> dict[Site, Plan]:
        """What the methods of a side pass do; all that they need stands."""
        plans = merge([make_plans(methods, self.host.sites)])
        with self._lock:
            self.ensure(plans, tracked)
        return plans

    def rediscover(self) -> None:
        """The host has found other sites: plan anew."""
        with self._lock:
            self.own_plans = {s: make_plans(s.methods, self.host.sites) for s in self.sessions}
            self._replan()

    def _report(self, run: Run) -> None:
        results = run.end()
        for session in self.sessions if results else ():
            mine = {id(m) for m in session.methods}
            session.results.update({name: result for name, method, result in results if id(method) in mine})

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What this thread runs meanwhile runs without methods, and leaves no trace in the running pass."""
        outer = self._passes, self._local.run
        run = Run(self, {}, (), {})
        self._local.passes, self._local.run = [Pass(run, Sequence(self.host.vocabulary), "prefill", {})], run
        try:
            yield
        finally:
            self._local.passes, self._local.run = outer

    # ---- the library's methods -----------------------------------------------------------------------

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One `generate()` is one run. A generation inside another is a run of its own."""
        self.host.check()
        given = {**({"inputs": args[0]} if args else {}), **kwargs}
        in_pieces = self.host.in_pieces(given)
        outer = self._passes, self._local.run
        run = Run(
            self,
            self.host.prompt(given),
            self.methods,
            self.plans,
            generating=True,
            in_pieces=in_pieces,
            tracked=tracks(self.methods),
        )
        branch.refuse_unverified(run, given)
        cache = self.host.cache(given)
        run.start = 0 if cache is None else self.host.cached_tokens(cache)
        run.begin()
        self._local.passes, self._local.run = [], run
        try:
            out = generate(*args, **kwargs)
        finally:
            self._local.passes, self._local.run = outer
            branch.close(run)
        answer = run.answer = getattr(out, "sequences", out)
        self._report(run)
        sequence = run.sequence
        if sequence is not None and isinstance(answer, Tensor):
            sequence.unfed = answer[:, sequence.length :] if answer.shape[0] == sequence.rows else None
        return out

    def _features(self, kind: str, features: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._local.run
        choosing = [] if run is None else run.overriding("features")
        call = functools.partial(features, *args, **kwargs)
        early = any(method.stage == "before" for method in choosing)
        out, projection = projector.watched(self.host, call) if early else (call(), None)
        if run is None:
            return out
        parts = self.host.unpack(out)
        run.features.setdefault(kind, []).extend(part.shape[-2] if part.ndim > 1 else 1 for part in parts)
        if self._passes and self._passes[-1].tokens:
            run.place_items(self._passes[-1])
        if not choosing:
            return out
        given = {**dict(zip(inspect.signature(features).parameters, args)), **kwargs}
        return self.host.pack(out, choose(kind, parts, choosing, given, run, projection))

    def extra_pass(
        self, inputs: Mapping[str, Any], methods: tuple[Method, ...], grad: bool, last_only: bool = False
    ) -> Any:
        """A forward beside the running one, with methods of its own."""
        if not self.sessions:
            raise AttachError("The session is detached.", "run forwards while it is attached")
        with torch.set_grad_enabled(grad):
            return self.side_pass(self.host.extra(inputs, last_only), methods)[0]

    @property
    def head(self) -> unembed.Head:
        if self._head is None:
            self._head = unembed.find(self.host, lambda i: self.side_pass(self.host.extra(i, False), ())[0])
        return self._head

    def unembed(self, h: Tensor, norm: bool) -> Tensor:
        return self.head(h, norm=norm)

    def projector(self, inputs: Mapping[str, Any]) -> nn.Module:
        """What makes features of the vision tower's tokens, watched once on the pictures of a prompt."""
        if self._projector is None:
            features, _ = featurizer(self.host, "image")
            with self.alone(), torch.no_grad():
                _, found = projector.watched(self.host, lambda: features(dict(inputs)))
            if found is None:
                raise AttachError(
                    f"No module behind the vision tower of {type(self.model).__name__} makes features.",
                    "use a model such as LLaVA, whose projector is a module",
                )
            self._projector = found.module
        return self._projector

    @property
    def anatomy(self) -> projections.Anatomy:
        if self._anatomy is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._anatomy = projections.find(
                    self.host, lambda inputs, methods: self.side_pass(self.host.extra(inputs, False), methods)
                )
        return self._anatomy

    def rotation(self, site: Site) -> rotation.Rotation:
        if self._rotations is None:
            self._rotations = rotation.find(
                self.host, lambda inputs, methods: self.side_pass(self.host.extra(inputs, False), methods)
            )
        if site.name not in self._rotations:
            raise InputError(
                f"{site.name} ({type(site.module).__name__}) does not turn queries and keys by known frequencies.",
                "use a decoder with rotary positions",
            )
        return self._rotations[site.name]

    def linears(self, name: str) -> projections.Linears:
        site = match(name, self.host.sites)[0]
        found = self.anatomy.linears.get(site.name, "it is no self-attention of the main tower")
        if isinstance(found, str):
            raise AttachError(
                f"{site.name} ({type(site.module).__name__}) does not show the matrices of its heads: {found}.",
                "leave it out with sites=",
            )
        return found

    def taking(self, site: Site, heads: Tensor, made: Tensor) -> tuple[Tensor, Tensor | float]:
        linear = projections.taking(site.module, heads, made)
        return projections.weight(linear), projections.bias(linear)

    def readout(self) -> tuple[nn.LayerNorm, nn.Linear]:
        return projections.readout(self.model)

    def norm(self, name: str) -> nn.Module:
        """The one right before attention or an mlp."""
        site = match(name, self.host.sites)[0]
        norm = self.anatomy.norms.get(site.name)
        if norm is None:
            raise AttachError(
                f"{site.name} ({type(site.module).__name__}): no norm is seen right before it.",
                "use a decoder that normalises what its layers are given",
            )
        return norm

    def mlp(self, name: str, h: Tensor) -> Tensor:
        site = match(name, self.host.sites)[0]
        out = site.module(self.norm(name)(h))
        return out[0] if isinstance(out, tuple) else out

    def side_pass(
        self,
        inputs: dict[str, Any],
        methods: tuple[Method, ...],
        *,
        tracked: bool = False,
        run: Run | None = None,
        reductions: tuple[Method, ...] | None = None,
    ) -> tuple[Any, Run]:
        """A forward with methods of its own, as a new run or as one that goes on. For a branch, with the
        session's `reductions`, which do there nothing but reduce."""
        tracked = tracked or tracks(methods)
        begins = run is None
        if run is None:
            plans = self.plan(methods, tracked)
            if reductions is not None:
                plans = merge([reducing(make_plans(reductions, self.host.sites)), plans])
                methods = (*reductions, *methods)
            run = Run(
                self,
                self.host.prompt(inputs),
                methods,
                plans,
                tracked=tracked,
                follows=reductions is not None,
            )
        outer = self._passes, self._local.run
        saved = self.host.transient()
        self._local.passes, self._local.run = [], run
        try:
            if begins:
                run.begin()
            out = self.host.call(inputs, run)
            if begins:
                run.end()
            return out, run
        finally:
            restore(saved)
            self._local.passes, self._local.run = outer


TRACKING = {"features", "tokens", "evict", "branches"}  # tokens go missing, or rows come


def tracks(methods: Iterable[Method]) -> bool:
    return any(TRACKING & set(type(method).events()) for method in methods)


def places(
    plans: Mapping[Site, Plan], host: PlainHost, tracked: bool
) -> dict[tuple[Any, str], Callable[[Any, Runtime], Callable[[], None]]]:
    """What has to stand where, for these plans."""
    found: dict[tuple[Any, str], Callable[[Any, Runtime], Callable[[], None]]] = {}
    for site, plan in plans.items():
        if site.seam != "module":
            found[site, "attention"] = installer(site)
        if plan.hidden:
            found[site, "hidden"] = hidden.install
        if plan.context or plan.skip:
            found[site, "module"] = sdpa.install_module
    towers = {site.tower for site, plan in plans.items() if plan.tokens}
    if tracked and not host.samples:
        towers.add(host.main_tower)
        for module in host.rotaries():
            found[module, "rotary"] = tokens.install_rotary
    for site in host.sites:
        if site.tower in towers and site.kind == "layer":
            found[site, "tokens"] = tokens.install
        elif site.tower in towers and site.seam != "module":
            found[site, "attention"] = installer(site)
    return found


def installer(site: Site) -> Callable[[Site, Runtime], Callable[[], None]]:
    if site.seam == "interface":
        from saccade.core.seams import transformers

        return transformers.install
    return {"sdpa": sdpa.install, "softmax": softmax.install}[site.seam]
