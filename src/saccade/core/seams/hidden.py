"""Hidden states: the output of a layer or mlp, the input of an mlp's last linear, the input of layer 0."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.core.seams.wrap import wrap
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.session import Runtime


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    around = _before if site.kind in ("neurons", "embed") else _after
    return wrap(site.module, "forward", functools.partial(around, site, runtime))


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
    plan = pass_.plans.get(site)
    for method in plan.hidden if plan else ():
        if pass_.phase in method.phases:
            pass_.run.method = method
            h = method.hidden(site, h)
    return h
