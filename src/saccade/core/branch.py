"""Prompts that are followed beside the caller's: prefilled alone, then rows of the same cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.cache import TrackedLayer
from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.core.method import Method
    from saccade.core.passes import Pass, Run
    from saccade.core.state import Sequence

REDUCES = ("features", "tokens", "evict")  # these act on branches too
ASSISTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")


@dataclass
class Branch:
    """Another prompt, with methods of its own, or on another model (which then keeps a cache of its own).

    `from_step` is the generated token from which it is followed; it is given the answer so far. `around` is entered
    while its prompt is read.
    """

    inputs: Mapping[str, Any]
    methods: tuple[Method, ...] = ()
    model: nn.Module | None = None
    from_step: int = 0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Open:
    """A branch that is being followed. On the caller's model its rows stand in the caller's cache; on another
    model it keeps a cache of its own."""

    def __init__(self, branch: Branch, method: Method, run: Run, mask: Tensor, last: Tensor) -> None:
        self.branch, self.method, self.run = branch, method, run
        self.mask = mask  # (rows, tokens so far)
        self.next = last + 1  # (rows,) position of the next token
        self.cache: Any = None  # of another model

    @property
    def sequence(self) -> Sequence:
        assert self.run.last is not None
        return self.run.last.sequence

    def reorder(self, index: Tensor) -> None:
        self.mask = self.mask.index_select(0, index.to(self.mask.device))
        self.next = self.next.index_select(0, index.to(self.next.device))
        if self.cache is not None:
            self.cache.reorder_cache(index)
        else:
            self.sequence.reorder(index)

    def advance(self, tokens: int = 1) -> None:
        self.mask = F.pad(self.mask, (0, tokens), value=1)
        self.next = self.next + tokens


def step(
    run: Run, pass_: Pass, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A forward of the prompt and of the branches that have rows beside it; its logits are the methods' mix."""
    mixing = run.overriding("branches", "prediction")
    if not mixing or run.follows:
        return forward(*args, **kwargs)
    host, rows = run.runtime.host, pass_.sequence.rows
    inside = [opened for opened in run.branches if opened.cache is None]
    ids: Any = pass_.inputs.get("input_ids")
    for opened in inside:
        opened.advance()
    if inside:
        kwargs = host.with_rows(host.bind(args, kwargs), inside, pass_, run.moved)
        args = ()
        pass_.groups = _groups(run, inside, pass_, ids)
    out = forward(*args, **kwargs)
    pass_.groups = None
    logits = out.logits
    found = {id(o): logits[rows * at : rows * (at + 1), -1] for at, o in enumerate(inside, 1)}
    for opened in run.branches:
        if opened.cache is not None:
            found[id(opened)] = read(opened, ids)
    found |= _begin(run, pass_, rows)
    if pass_.phase != "decode" and not pass_.complete:
        return out
    base = logits[:rows, -1]
    for run.method in mixing:
        mine = [found[id(o)] for o in run.branches if o.method is run.method]
        mix = run.method.prediction(base, mine, pass_)
        if mix.shape != base.shape:
            raise InputError(
                f"The prediction of {type(run.method).__name__} is {tuple(mix.shape)}, of {tuple(base.shape)} logits.",
                "return one logit for every row and word",
            )
        base = mix
    out.logits = torch.cat([logits[:rows, :-1], base[:, None].to(logits.dtype)], 1)
    for name in ("hidden_states", "attentions"):
        if inside and out.get(name) is not None:
            out[name] = tuple(t[:rows] for t in out[name])
    return out


def _groups(run: Run, inside: list[Open], pass_: Pass, ids: Tensor) -> list[tuple[slice, Pass, int]]:
    rows = ids.shape[0]
    columns = pass_.start + run.moved
    groups = [(slice(0, rows), pass_, run.moved)]
    for at, opened in enumerate(inside, 1):
        sequence = opened.sequence
        offset = columns - sequence.length
        sequence.extend(ids, (rows, ids.shape[1]), ids.device, generated=True, samples=rows)
        side = type(pass_)(opened.run, sequence, "decode", pass_.inputs, ids.shape[1])
        side.tracked = True
        groups.append((slice(rows * at, rows * (at + 1)), side, offset))
    return groups


def _begin(run: Run, pass_: Pass, rows: int) -> dict[int, Tensor]:
    """Open the branches whose step has come."""
    if not pass_.complete:
        return {}
    if run.waiting is None:
        run.waiting = pending(run)
        if run.waiting and not run.generating:
            raise InputError(
                f"{type(run.waiting[0][0]).__name__} follows a branch, which takes steps.",
                "use model.generate()",
            )
    if not run.waiting:
        return {}
    prompt = run.inputs["input_ids"].shape[1]
    answer: Any = pass_.sequence.ids_from(prompt)
    if run.cache is None:
        raise InputError(
            f"{type(run.waiting[0][0]).__name__} follows a branch, whose rows stand in the cache.",
            "generate with a cache (use_cache=True)",
        )
    found = {}
    for method, branch in [w for w in run.waiting if w[1].from_step <= answer.shape[1]]:
        run.waiting = [w for w in run.waiting if w[1] is not branch]
        opened, logits = open_branch(method, branch, run, answer, run.cache)
        run.branches.append(opened)
        found[id(opened)] = logits
    return found


def close(run: Run) -> None:
    """Give the cache back as the caller's alone."""
    inside = [opened for opened in run.branches if opened.cache is None]
    if inside and run.cache is not None and run.last is not None:
        strip(run.runtime.host.cache_layers(run.cache), run.last.sequence.rows, run.moved)
        run.runtime.host.follow(run.cache, run.last.sequence)
    run.branches, run.moved = [], 0


def refuse_unverified(run: Run, given: Mapping[str, Any]) -> None:
    """Assisted decoding feeds candidates that may be taken back, which what we remember cannot be: what a method
    keeps in `call.state` is refused when it is asked for."""
    configs = (given.get("generation_config"), getattr(run.runtime.model, "generation_config", None))
    told = [given, *(vars(config) for config in configs if config is not None)]
    run.unverified = next((name for name in ASSISTED for options in told if options.get(name)), "")
    if run.unverified and run.tracked:
        raise InputError(
            f"generate({run.unverified}=...) feeds tokens that are not yet decided, and tokens are missing or rows are "
            "added in this session.",
            "generate without it",
        )


def pending(run: Run) -> list[tuple[Method, Branch]]:
    """The branches that the run's methods want."""
    wanted = []
    for method in run.overriding("branches"):
        run.method = method
        wanted += [(method, branch) for branch in method.branches(run)]
    return wanted


def open_branch(method: Method, branch: Branch, run: Run, answer: Tensor, cache: Any) -> tuple[Open, Tensor]:
    """Prefill a branch alone, at the caller's own batch, then repeat it for beams and let it read the answer
    so far (rows, tokens). Returns it and its logits (rows, vocabulary)."""
    runtime = run.runtime
    host = runtime.host
    check_prompt(method, branch, run.samples)
    ids = branch.inputs["input_ids"]
    repeats = answer.shape[0] // ids.shape[0]
    mask = branch.inputs.get("attention_mask", torch.ones_like(ids)).repeat_interleave(repeats, 0)
    if branch.model is not None:
        out = branch.model(**branch.inputs, use_cache=True)
        opened = Open(branch, method, run, mask, mask.sum(1) - 1)
        opened.cache = out.past_key_values
    else:
        own = host.track_inputs(
            {**host.extra(host.positioned(branch.inputs), last_only=True), "use_cache": True}
        )
        reductions = tuple(run.overriding(*REDUCES))
        with branch.around():
            out, side = runtime.side_pass(own, branch.methods, tracked=True, reductions=reductions)
        opened = Open(branch, method, side, mask, host.last_position(side).repeat_interleave(repeats, 0))
        opened.cache = own["past_key_values"]
    opened.cache.batch_repeat_interleave(repeats)
    logits = out.logits[:, -1].repeat_interleave(repeats, 0)
    if answer.shape[1]:
        logits = read(opened, answer)
    if branch.model is None:
        run.moved += join(host.cache_layers(cache), host.cache_layers(opened.cache), 1)
        opened.cache = None
    return opened, logits


def check_prompt(method: Method, branch: Branch, samples: int) -> None:
    """Refuse a branch that cannot be followed."""
    name, ids = type(method).__name__, branch.inputs.get("input_ids")
    if ids is None:
        raise InputError(
            f"A branch of {name} has no input_ids.", "give it the inputs of a forward, as run.inputs"
        )
    if ids.shape[0] != samples:
        raise InputError(
            f"A branch of {name} has {ids.shape[0]} rows, the prompt has {samples}.",
            "give it a row for each sample",
        )
    if not ids.shape[1]:
        raise InputError(f"A branch of {name} has no tokens.", "give it one at least")


def read(opened: Open, ids: Tensor) -> Tensor:
    """Let a branch that has a cache of its own read more of the answer: (rows, vocabulary) behind the last."""
    run = opened.run
    if opened.branch.model is None and ids.shape[1] > 1:
        for column in ids.split(1, 1):  # what methods do after each token, they do here
            logits = read(opened, column)
        return logits
    opened.advance(ids.shape[1])
    inputs = {
        "input_ids": ids,
        "attention_mask": opened.mask,
        "past_key_values": opened.cache,
        "use_cache": True,
    }
    if opened.branch.model is not None:
        return opened.branch.model(**inputs).logits[:, -1]
    inputs["position_ids"] = opened.next[:, None] - 1
    out, _ = run.runtime.side_pass(inputs, run.methods, tracked=True, run=run)
    return out.logits[:, -1]


def join(layers: list[TrackedLayer], others: list[TrackedLayer], repeats: int) -> int:
    """Put the rows of one cache below those of another, right-aligned. Returns by how many columns the first
    one's own rows moved."""
    moved = 0
    for mine, theirs in zip(layers, others, strict=True):
        theirs.batch_repeat_interleave(repeats)
        if mine.keys is None:  # it reads those of another layer
            continue
        if mine.pos is None and theirs.pos is None and mine.seen == theirs.seen:
            mine.keys, mine.values = (
                torch.cat([mine.keys, theirs.keys]),
                torch.cat([mine.values, theirs.values]),
            )
            continue
        a, b = mine.positions(), theirs.positions()
        gap = mine.seen - theirs.seen
        if gap < 0:
            moved, mine.seen = -gap, theirs.seen
            a = torch.where(a < 0, a, a - gap)
        else:
            b = torch.where(b < 0, b, b + gap)
        if a.ndim != b.ndim:
            heads = mine.keys.shape[1]
            a, b = (p if p.ndim == 3 else p[:, None].expand(-1, heads, -1) for p in (a, b))
        slots = max(mine.keys.shape[2], theirs.keys.shape[2])
        mine.keys = torch.cat([pad_left(t, slots, -2) for t in (mine.keys, theirs.keys)])
        mine.values = torch.cat([pad_left(t, slots, -2) for t in (mine.values, theirs.values)])
        mine.pos = torch.cat([pad_left(p, slots, -1, -1) for p in (a, b)])
        mine.ragged = mine.ragged or theirs.ragged or bool((mine.pos < 0).any())
        if mine.shift is not None or theirs.shift is not None:
            mine.shift = torch.cat([_shift(mine, a.shape[0]), _shift(theirs, b.shape[0])])
    return moved


def strip(layers: list[TrackedLayer], rows: int, moved: int) -> None:
    """Leave the first rows alone in the cache, as if nothing had been joined."""
    for layer in layers:
        if layer.keys is None or layer.keys.shape[0] == rows:
            continue
        layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]
        layer.shift = None if layer.shift is None else layer.shift[:rows]
        layer.seen -= moved
        if layer.pos is not None:
            pos = layer.pos[:rows]
            pos = torch.where(pos < 0, -1, pos - moved)
            empty = int((pos < 0).flatten(0, -2).long().cumprod(-1).sum(-1).min())
            layer.keys, layer.values, pos = (
                layer.keys[..., empty:, :],
                layer.values[..., empty:, :],
                pos[..., empty:],
            )
            layer.ragged = bool((pos < 0).any())
            whole = torch.arange(layer.seen, device=pos.device)
            layer.pos = None if pos.shape[-1] == layer.seen and bool((pos == whole).all()) else pos
        layer.keys, layer.values, layer.call_pos = layer.keys.clone(), layer.values.clone(), layer.pos


def pad_left(t: Tensor, length: int, axis: int, value: float = 0) -> Tensor:
    missing = length - t.shape[axis]
    if missing <= 0:
        return t
    shape = list(t.shape)
    shape[axis] = missing
    return torch.cat([t.new_full(shape, value), t], axis)


def _shift(layer: TrackedLayer, rows: int) -> Tensor:
    if layer.shift is None:
        return torch.zeros(rows, dtype=torch.long, device=layer.keys.device)
    return layer.shift
