"""Standing around one sampling of a pipeline: its scheduler, its text encoders, its denoisers.

The pipeline's loop is its own. What methods change is put where it meets the denoiser and the scheduler:
changed latents into the denoiser's input, through the scheduler's own scaling, and into the scheduler's step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core import branch
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError, nearest
from saccade.core.method import Method
from saccade.core.passes import Denoising, Run, rows_of
from saccade.core.plan import Plan, merge
from saccade.core.seams.wrap import wrap, wrap_call
from saccade.core.site import Site
from saccade.core.state import Sequence
from saccade.core.words import Word, find, pieces, words
from saccade.models.towers import LATENT_INPUTS

if TYPE_CHECKING:
    from saccade.core.branch import Branch
    from saccade.core.seams.diffusers import PipelineHost


@dataclass
class Read:
    """What a text encoder was given, and what it made of it."""

    encoder: str
    ids: Tensor  # (prompts, tokens)
    states: list[Tensor]  # (prompts, tokens, width) each: of several layers
    spoken: list[list[Word]] | None = None


@dataclass
class Scaled:
    """The last input that the scheduler scaled."""

    sample: Tensor
    scale: Callable[[Tensor], Tensor]


@dataclass
class Side:
    """A branch that is followed: the denoiser's arguments that differ, and a run of its own."""

    method: Method
    branch: Branch
    run: Run


class Sampling:
    def __init__(self, host: PipelineHost, run: Run) -> None:
        self.host, self.run, self.runtime = host, run, run.runtime
        self.pipe: Any = host.model
        self.sequence = Sequence(host.vocabulary)  # holds what methods keep in `call.state`
        self.evaluations = 0  # calls of the scheduler's step
        self.i = -1  # steps begun, less one
        self.calls = 0  # of the denoiser, since the scheduler's last step
        self.latents: Tensor | None = None  # before the step that comes
        self.before: Tensor | None = None  # the latents that `denoise` was given, where it changed them
        self.changed: Tensor | None = None  # and what it made of them
        self.scaled: Scaled | None = None
        self.name = ""  # of the guidance's part that the pipeline asks for now
        self.raw: dict[str, Tensor] = {}  # predictions of this step, by name
        self.encoded: list[Tensor] = []  # text states that the pipeline made, prompt before negative prompt
        self.reads: list[Read] = []
        self.text_first: dict[str, bool] = {}  # by tower
        self.last: Denoising | None = None
        self._columns: list[tuple[Tensor, list[list[Word]]]] = []
        self._sides: list[Side] = []
        self._thread = threading.get_ident()
        self._aside = False  # a call beside the running one
        self._watched = self._watch(run.plans)

    # ---- standing ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        with contextlib.ExitStack() as stack:
            for obj, name, around in (
                (scheduler, "step", self._step),
                (scheduler, "scale_model_input", self._scale),
                (pipe, "prepare_latents", self._prepare),
                (pipe, "encode_prompt", self._encode),
            ):
                if hasattr(obj, name):
                    stack.callback(wrap(obj, name, self._here(around)))
            for module in self._parts("unet", "transformer"):
                stack.callback(wrap_call(module, self._here(functools.partial(self._denoiser, module))))
                if hasattr(module, "cache_context"):
                    stack.callback(wrap(module, "cache_context", self._here(self._naming)))
            for name, module in self._named("text_encoder"):
                hook = module.register_forward_hook(functools.partial(self._read, name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _named(self, *starts: str) -> list[tuple[str, nn.Module]]:
        parts = ((name, getattr(self.pipe, name, None)) for name in self.pipe.components)
        return [
            (name, part) for name, part in parts if name.startswith(starts) and isinstance(part, nn.Module)
        ]

    def _parts(self, *starts: str) -> list[nn.Module]:
        return [module for _, module in self._named(*starts)]

    def _here(self, around: Callable[..., Any]) -> Callable[..., Any]:
        """Another thread may share the scheduler or the denoiser: its calls are its own."""

        def mine(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return (around if threading.get_ident() == self._thread else _pass_on)(inner, *args, **kwargs)

        return mine

    def _prepare(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = prepare(*args, **kwargs)
        self.latents = out[0] if isinstance(out, tuple) else out
        return out

    def _encode(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        parts = out if isinstance(out, tuple) else (out,)
        self.encoded += [part for part in parts if isinstance(part, Tensor) and part.ndim == 3]
        return out

    def _scale(self, scale: Callable[..., Tensor], sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.scaled = Scaled(sample, lambda latents: scale(latents, *args, **kwargs))
        return scale(sample, *args, **kwargs)

    @contextlib.contextmanager
    def _naming(self, naming: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before, self.name = self.name, name
        try:
            with naming(name, *args, **kwargs):
                yield
        finally:
            self.name = before

    def _read(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        states = [getattr(out, "last_hidden_state", None), *(getattr(out, "hidden_states", None) or ())]
        if isinstance(ids, Tensor) and threading.get_ident() == self._thread:
            self.reads.append(Read(name, ids, [s for s in states if isinstance(s, Tensor)]))

    # ---- one call of the denoiser -----------------------------------------------------------------------

    def _denoiser(self, module: nn.Module, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._aside:
            return native(*args, **kwargs)
        names = list(_signature(module).parameters)[: len(args)]
        inputs: dict[str, Any] = {**dict(zip(names, args, strict=True)), **kwargs}
        if self.calls == 0:
            self._begin_step()
        p = self.last = self._pass(module, inputs)
        self.calls += 1
        stance: Any = contextlib.nullcontext()
        if self._watched and p.i == 0 and self.evaluations == 0:
            p.plans = merge([dict(self.run.plans), self._watched])
            if _compiled(module):  # the order is read from values, which a compiled graph has not
                stance = torch.compiler.set_stance("force_eager")

        def call(given: Mapping[str, Any]) -> Any:
            return native(*(given[n] for n in names), **{n: v for n, v in given.items() if n not in names})

        with self.runtime.push(p), stance:
            self._denoise(p, inputs, call)
            if self.changed is not None:
                name = _latent_name(inputs)
                inputs = {**inputs, name: self._place(self.changed, inputs[name])}
            full = p.rows
            entered = self._enter(p, inputs)
            if entered is None:  # nothing of this call is wanted: what was predicted before stands for it
                raw = self.raw["cond"]
                self.raw.update(dict.fromkeys(full, raw))
                return (raw.clone(),) if inputs.get("return_dict") is False else _Sample(raw.clone())
            out = call(entered)
        noise = _noise(out)
        if p.rows is not full:
            noise = _fill(noise, p.rows, full)
            out = _with_noise(out, noise)
        if isinstance(noise, Tensor):
            self.raw.update({name: noise[index.to(noise.device)] for name, index in full.items()})
            self._follow(p, entered, call)
        return out

    def _begin_step(self) -> None:
        self.raw = {}
        if self._first_order:
            self.i += 1

    def _pass(self, module: nn.Module, inputs: Mapping[str, Any], purpose: str = "sample") -> Denoising:
        name = _latent_name(inputs)
        x, context = inputs[name], inputs.get("encoder_hidden_states")
        if isinstance(context, list | tuple):
            context = context[0]
        context = context if isinstance(context, Tensor) and context.ndim == 3 else None
        self.run.step += 1
        p = Denoising(
            self.run, self.sequence, inputs, t=_timestep(inputs), i=self.i, total=self.total,
            rows=self._rows(x, context), context=context, purpose=purpose, module=module,
        )  # fmt: skip
        p.raw = self.raw
        self.run.last = p
        return p

    def _rows(self, x: Tensor, context: Tensor | None) -> dict[str, Tensor]:
        """Which rows are conditional: those whose text is what the pipeline made of the prompt."""
        batch = x.shape[0]
        one = next((len(t) for t in (self.latents, *self.encoded) if t is not None), batch)
        with torch.inference_mode(False):  # gradients may be taken through what they choose
            parts = [torch.arange(at, min(at + one, batch)) for at in range(0, batch, one)]
        if len(parts) == 1 and self.name in ("cond", "uncond"):
            return {self.name: parts[0]}
        names = [
            self._told(context[part], at) if context is not None else "" for at, part in enumerate(parts)
        ]
        if len(parts) == 1:
            return {names[0] or "cond": parts[0]}
        if len(parts) == 2 and set(names) != {"cond", "uncond"}:
            names = ["uncond", "cond"]  # the same text for both, or text that the pipeline changed
        rows: dict[str, Tensor] = {}
        for at, (name, part) in enumerate(zip(names, parts, strict=True)):
            rows[name if name and name not in rows else f"part {at}"] = part
        return rows

    def _told(self, context: Tensor, at: int) -> str:
        """`cond` or `uncond`, by the text."""
        for number, states in enumerate(self.encoded):
            if states.shape == context.shape and torch.equal(states.to(context), context):
                return "uncond" if number % 2 else "cond"
        return ""

    # ---- events -----------------------------------------------------------------------------------------

    def _methods(self, event: str) -> Iterable[Method]:
        for method in self.run.methods:
            if event in type(method).events() and "denoise" in method.phases:
                self.run.method = method
                yield method

    def _denoise(self, p: Denoising, inputs: Mapping[str, Any], call: Callable[..., Any]) -> None:
        methods = list(self._methods("denoise"))
        if not methods or self.calls > 1 or not self._first_order:
            return
        name = _latent_name(inputs)
        latents = self._known_latents(inputs[name])
        with torch.inference_mode(False), torch.enable_grad():
            given = {key: _normal(value) for key, value in inputs.items()}
            first = new = _normal(latents.detach())

            def predict(latents: Tensor, rows: str | None = "cond") -> Tensor:
                return self._predict(p, {**given, name: self._place(latents, given[name])}, rows, call)

            for self.run.method in methods:
                new = self.run.method.denoise(new, p, predict)
        if new is not first:
            self.before, self.changed = latents, new.detach()

    def _predict(
        self, p: Denoising, inputs: dict[str, Any], rows: str | None, call: Callable[..., Any]
    ) -> Tensor:
        if rows is not None and rows not in p.rows:
            raise InputError(
                f"This call of {type(p.module).__name__} has no rows {rows!r}, only {', '.join(p.rows)}.",
                "predict(latents, rows=None) takes those that there are",
            )
        part = copy.copy(p) if rows is None else p.only(rows)
        part.purpose, method = "predict", self.run.method
        if rows is not None:
            batch = sum(len(index) for index in p.rows.values())
            inputs = {key: rows_of(value, p.rows[rows], batch, key) for key, value in inputs.items()}
        part.inputs = inputs
        with self.runtime.push(part):
            noise = _noise(call(inputs))
        self.run.method = method
        return noise

    def _known_latents(self, x: Tensor) -> Tensor:
        """The latents in the denoiser's input: of the last step, or what a callback put in their place."""
        candidates = [self.latents]
        if self.scaled is not None and self.latents is not None:
            candidates.append(self.scaled.sample[: len(self.latents)])
        elif self.latents is not None:
            candidates.append(x[: len(self.latents)])
        for latents in candidates:
            if latents is not None and latents.shape[1:] and torch.equal(self._place(latents, x), x):
                return latents
        raise InputError(
            f"{type(self.pipe).__name__} gives its denoiser something else than its latents.",
            "use a pipeline that gives them scaled, or beside masks and pictures",
        )

    def _place(self, latents: Tensor, x: Tensor) -> Tensor:
        """The denoiser's input with other latents in it; channels, frames or tokens behind them stay."""
        y = torch.cat([latents] * (len(x) // len(latents)))
        y = self.scaled.scale(y) if self.scaled is not None else y
        y = y.to(x.dtype)
        for axis in range(1, x.ndim):
            if y.shape[axis] < x.shape[axis]:
                rest = x.narrow(axis, y.shape[axis], x.shape[axis] - y.shape[axis])
                y = torch.cat([y, rest], axis)
        return y

    def _enter(self, p: Denoising, inputs: dict[str, Any]) -> dict[str, Any] | None:
        entered: dict[str, Any] | None = inputs
        for method in self._methods("enter"):
            if entered is None:
                return None
            entered = method.enter(p, dict(entered))
        if entered is not None and entered is not inputs:
            context = entered.get("encoder_hidden_states")
            p.inputs, p.text = entered, context.shape[1] if isinstance(context, Tensor) else p.text
        return entered

    # ---- extra calls ------------------------------------------------------------------------------------

    def _follow(self, p: Denoising, inputs: Mapping[str, Any], call: Callable[..., Any]) -> None:
        """The branches of this step, beside the rows of the prompt."""
        if self.run.waiting is None:
            self.run.waiting = branch.pending(self.run)
            for method, followed in self.run.waiting:
                own = Run(
                    self.runtime, self.run.inputs, followed.methods, self.runtime.plan(followed.methods)
                )
                own.sampling = self
                own.begin()
                self._sides.append(Side(method, followed, own))
        for at, side in enumerate(self._sides):
            if "cond" in p.rows and p.i >= side.branch.from_step:
                self.raw[f"branch {at}"] = self._side(p, inputs, side.run, call, side.branch.inputs)

    def _side(
        self,
        p: Denoising,
        inputs: Mapping[str, Any],
        run: Run,
        call: Callable[..., Any],
        other: Mapping[str, Any],
    ) -> Tensor:
        batch = sum(len(index) for index in p.rows.values())
        part = p.only("cond")
        part.run, part.plans, part.purpose = run, run.plans, "branch"
        given = {key: rows_of(value, p.rows["cond"], batch, key) for key, value in inputs.items()}
        part.inputs = {**given, **other}
        with self.runtime.push(part):
            return _noise(call(part.inputs))

    def forward(self, inputs: Mapping[str, Any], run: Run) -> Tensor:
        """A call of the denoiser with these arguments, beside the running one."""
        module = next(iter(self.host.denoisers.values())) if self.last is None else self.last.module
        outer, self.run = self.run, run
        try:
            p = self._pass(module, inputs, "forward")
        finally:
            self.run = outer
        self._aside = True
        try:
            with self.runtime.push(p):
                return _noise(module(**inputs))
        finally:
            self._aside = False

    # ---- the scheduler's step ---------------------------------------------------------------------------

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(step).bind(*args, **kwargs)
        p = self.last
        if p is not None:
            bound.arguments["model_output"] = self._mix(p, bound.arguments["model_output"])
        if self.changed is not None and self.before is not None:
            sample = bound.arguments["sample"]
            if not torch.equal(sample, self.before.to(sample)):
                raise InputError(
                    f"{type(self.pipe).__name__} gives its scheduler something else than its latents.",
                    "use a pipeline whose scheduler steps from the latents themselves",
                )
            bound.arguments["sample"] = self.changed.to(sample.dtype)
        self.before = self.changed = self.scaled = None
        out = step(*bound.args, **bound.kwargs)
        self.evaluations += 1
        self.calls = 0
        latents = out[0] if isinstance(out, tuple) else out.prev_sample
        if p is not None and (self._first_order or self.evaluations == self._planned):
            for method in self._methods("step"):
                latents = method.step(latents, p)
        self.latents = latents
        if isinstance(out, tuple):
            return (latents, *out[1:])
        out.prev_sample = latents
        return out

    def _mix(self, p: Denoising, base: Tensor) -> Tensor:
        methods = list(self._methods("prediction"))
        if not methods:
            return base
        p.raw = _like(self.raw, base)
        for self.run.method in methods:
            names = [f"branch {at}" for at, side in enumerate(self._sides) if side.method is self.run.method]
            mine = [p.raw[name] for name in names if name in p.raw]
            base = self.run.method.prediction(base, mine, p)
        return base

    @property
    def _first_order(self) -> bool:
        """Whether the evaluation that comes begins a step: some schedulers evaluate twice, or more often."""
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "state_in_first_order"):
            return bool(scheduler.state_in_first_order)
        if hasattr(scheduler, "prk_timesteps"):
            return _pseudo(scheduler, self.evaluations)
        return True

    @property
    def _planned(self) -> int:
        """Evaluations of the whole sampling."""
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)
        return getattr(self.pipe, "_num_timesteps", None) or (0 if timesteps is None else len(timesteps))

    @property
    def total(self) -> int:
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "prk_timesteps"):
            return sum(_pseudo(scheduler, at) for at in range(self._planned))
        return -(-self._planned // getattr(scheduler, "order", 1))

    # ---- text and image in one sequence -----------------------------------------------------------------

    def _watch(self, plans: Mapping[Site, Plan]) -> dict[Site, Plan]:
        """In the first call, the first joint site of every tower, where joint ones have work."""
        towers = {site.tower for site in plans if site.kind == "joint"}
        watch = Watch(sites="*.joint")
        found = {}
        for tower in towers:
            site = next(s for s in self.host.sites if s.tower == tower and s.kind == "joint")
            found[site] = Plan(observe=(watch,))
        self.runtime.ensure(found, False)
        return found

    # ---- words ------------------------------------------------------------------------------------------

    def columns(self, phrase: str, context: Tensor, rows: Mapping[str, Tensor]) -> list[list[int]]:
        """Tokens of a word in the text that the denoiser is given, for every row."""
        if not any(find(phrase, spoken) for read in self.reads for spoken in self._spoken(read)):
            said = {word.text for read in self.reads for spoken in self._spoken(read) for word in spoken}
            raise InputError(
                f"No prompt says {phrase!r}.", nearest(phrase, said) or f"it has {', '.join(sorted(said))}"
            )
        return [find(phrase, spoken) for spoken in self.words(context, rows)]

    def words(self, context: Tensor, rows: Mapping[str, Tensor]) -> list[list[Word]]:
        """By row, the words at their columns: found where an encoder's own states stand in the text."""
        for known, spoken in self._columns:
            if known.shape == context.shape and torch.equal(known, context):
                return spoken
        found = [self._heard(states) for states in context]
        if not any(found):
            found = self._by_order(context, rows)
        self._columns.append((context, found))
        return found

    def _heard(self, states: Tensor) -> list[Word]:
        """Of one row (tokens, width)."""
        widths = list(dict.fromkeys(read.states[0].shape[-1] for read in self.reads if read.states))
        heard: dict[str, list[Word]] = {}
        for read in self.reads:
            for prompt, ids in enumerate(read.ids):
                at = _place_of(read, prompt, _real(self._tokenizer(read), ids), states, widths)
                if at is not None and read.encoder not in heard:
                    spoken = self._spoken(read)[prompt]
                    heard[read.encoder] = [
                        w._replace(positions=tuple(p + at for p in w.positions)) for w in spoken
                    ]
        return [word for spoken in heard.values() for word in spoken]

    def _by_order(self, context: Tensor, rows: Mapping[str, Tensor]) -> list[list[Word]]:
        """Where the pipeline changed the encoders' states (`clip_skip`): by their length and order."""
        found: list[list[Word]] = [[] for _ in context]
        for encoder in {read.encoder for read in self.reads}:
            reads = [r for r in self.reads if r.encoder == encoder and r.ids.shape[1] == context.shape[1]]
            for name, read in zip(("cond", "uncond"), reads):
                index = rows.get(name, torch.zeros(0)).tolist()
                for at, row in enumerate(index):
                    found[int(row)] += self._spoken(read)[at * len(read.ids) // len(index)]
        return found

    def encode(self, texts: tuple[str, ...]) -> Tensor:
        """What the pipeline's T5 makes of texts, each filled up as the prompt was: (texts, tokens, width)."""
        read = next((r for r in self.reads if "T5" in type(getattr(self.pipe, r.encoder)).__name__), None)
        if read is None:
            raise InputError(
                f"{type(self.pipe).__name__} has not read its prompt with a T5.",
                "use a pipeline with a T5, such as Flux, SD3 or CogVideoX, and give it prompts",
            )
        options = {"padding": "max_length", "max_length": read.ids.shape[1], "truncation": True}
        given = self._tokenizer(read)(list(texts), **options, return_tensors="pt")
        before = list(self.reads)  # these are no prompts
        with torch.no_grad():
            states: Tensor = getattr(self.pipe, read.encoder)(given.input_ids.to(read.ids.device))[0]
        self.reads = before
        return states

    def _tokenizer(self, read: Read) -> Any:
        return getattr(self.pipe, read.encoder.replace("text_encoder", "tokenizer"), None)

    def _spoken(self, read: Read) -> list[list[Word]]:
        if read.spoken is None:
            tokenizer = self._tokenizer(read)
            special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
            read.spoken = []
            for ids in read.ids.tolist():
                texts = (
                    [] if tokenizer is None else pieces(tokenizer, [None if i in special else i for i in ids])
                )
                read.spoken.append(words(texts, len(ids)))
        return read.spoken


class Watch(Method):
    """Reads which of text and image comes first."""

    def observe(self, call: AttentionCall) -> None:
        host: Any = call.run.runtime.host
        host.text_first(call)


def _pass_on(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return inner(*args, **kwargs)


class _Sample:
    """An output of a denoiser, where none was made."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample

    def __getitem__(self, at: int) -> Tensor:
        return (self.sample,)[at]


def _signature(module: nn.Module) -> inspect.Signature:
    return inspect.signature(getattr(module, "_orig_mod", module).forward)


def _compiled(module: nn.Module) -> bool:
    inner = getattr(module, "_orig_mod", module)
    return inner is not module or any(m._compiled_call_impl is not None for m in inner.modules())


def _latent_name(inputs: Mapping[str, Any]) -> str:
    return next(name for name in LATENT_INPUTS if isinstance(inputs.get(name), Tensor))


def _timestep(inputs: Mapping[str, Any]) -> Tensor:
    t = inputs.get("timestep", 0)
    return t if isinstance(t, Tensor) else torch.tensor(t)


def _noise(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out.sample


def _with_noise(out: Any, noise: Tensor) -> Any:
    return (noise, *out[1:]) if isinstance(out, tuple) else type(out)(**{**out, "sample": noise})


def _fill(noise: Tensor, rows: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> Tensor:
    """The prediction of some rows, for all of them."""
    (only,) = rows
    made = noise.new_empty(sum(len(index) for index in full.values()), *noise.shape[1:])
    for index in full.values():
        made[index.to(made.device)] = noise[rows[only].to(noise.device)]
    return made


def _normal(value: Any) -> Any:
    """Tensors that gradients may be taken through, though they were made under inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _normal(v) for key, v in value.items()}
    return type(value)(_normal(v) for v in value) if type(value) in (list, tuple) else value


def _like(raw: Mapping[str, Tensor], base: Tensor) -> dict[str, Tensor]:
    """Predictions as the pipeline hands them on: without a learned variance, and some turn the sign."""
    narrowed = {}
    for name, noise in raw.items():
        for axis in range(1, base.ndim):
            noise = noise.narrow(axis, 0, base.shape[axis]) if noise.shape[axis] > base.shape[axis] else noise
        narrowed[name] = noise.to(base.dtype)
    if "cond" not in narrowed:
        return narrowed
    of = [narrowed[name].flatten().double() for name in ("cond", "uncond") if name in narrowed]
    share = torch.linalg.lstsq(torch.stack(of, 1), base.flatten().double()[:, None]).solution
    return {name: -noise for name, noise in narrowed.items()} if float(share.sum()) < 0 else narrowed


def _pseudo(scheduler: Any, evaluation: int) -> bool:
    """PNDM: four evaluations to a Runge-Kutta step, then one; without these the second repeats the first."""
    warm = len(scheduler.prk_timesteps) if scheduler.prk_timesteps is not None else 0
    if evaluation < warm:
        return evaluation % 4 == 0
    return warm > 0 or evaluation != 1


def _real(tokenizer: Any, ids: Tensor) -> int:
    """Tokens before the padding, the end included."""
    end = (ids == getattr(tokenizer, "eos_token_id", -1)).nonzero()
    return int(end[0]) + 1 if len(end) else len(ids)


def _place_of(read: Read, prompt: int, tokens: int, states: Tensor, widths: list[int]) -> int | None:
    """The column of a row (columns, width) from which the encoder's states of a prompt stand."""
    for made in read.states:
        own = made[prompt, :tokens].to(states)
        for start in {0, *(sum(widths[:n]) for n in range(len(widths))), *widths}:
            part = states[:, start : start + own.shape[1]]
            if part.shape[1] < own.shape[1]:
                continue
            for at in (part == own[0]).all(-1).nonzero()[:, 0].tolist():
                if torch.equal(part[at : at + tokens], own):
                    return at
    return None
