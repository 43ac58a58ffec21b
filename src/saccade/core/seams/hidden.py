"""Hidden states: the input or output of a layer, the output of an mlp, the input of its last linear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core.passes import HiddenCall, Pass
from saccade.core.seams.sdpa import slow_path
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    around = _before if site.kind in ("input", "neurons", "embed") else _after
    undo = wrap(site.module, "forward", functools.partial(around, site, runtime))
    if not any(isinstance(module, nn.TransformerEncoderLayer) for module in runtime.host.modules()):
        return undo
    fast_again = slow_path()

    def remove() -> None:
        undo()
        fast_again()

    return remove


def _before(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if args:
        args = (_edit(site, runtime, args[0]), *args[1:])
    else:
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        kwargs = {**kwargs, name: _edit(site, runtime, kwargs[name])}
    return forward(*args, **kwargs)


def _after(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = forward(*args, **kwargs)
    if isinstance(out, tuple):
        return (_edit(site, runtime, out[0]), *out[1:])
    return _edit(site, runtime, out)


def _edit(site: Site, runtime: Runtime, h: Tensor) -> Tensor:
    pass_ = runtime.current()
    if pass_.groups is not None:  # a prompt and its branches, each with the methods that act on it
        return torch.cat([_edit_rows(site, part, h[rows]) for rows, part, _ in pass_.groups])
    return _edit_rows(site, pass_, h)


def _edit_rows(site: Site, pass_: Pass, h: Tensor) -> Tensor:
    plan = pass_.plans.get(site)
    if plan is None:
        return h
    call = HiddenCall(site, pass_)
    for method in plan.hidden:
        if pass_.phase in method.phases:
            pass_.run.method = method
            h = method.hidden(call, h)
    return h
