"""Models that call `F.scaled_dot_product_attention` themselves: a scope around the module says which site calls.

Attention modules of diffusers may call another kernel: those of its registry are answered too, those that
multiply by themselves are refused by name.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError
from saccade.core.plan import execute
from saccade.core.seams.discovery import names_used
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime

_sdpa = F.scaled_dot_product_attention
_scope = threading.local()  # .stack: what runs around the innermost attention module of this thread
_lock = threading.Lock()
_attached = 0
_slow = 0  # who wants the C++ fast path off
_fast_path_was = True
_mha_parameters = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


class Scope:
    """One running attention module."""

    def __init__(self, site: Site, runtime: Runtime, x: Tensor | None, context: Any = None) -> None:
        self.site, self.runtime, self.x, self.context = site, runtime, x, context
        self.call: AttentionCall | None = None
        self.calls = 0
        self.keeps_weights = False


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    around = _around_mha if isinstance(site.module, nn.MultiheadAttention) else _around
    backends_again = _no_op
    if hasattr(site.module, "processor"):
        check_processor(site)
        backends_again = answer_backends()
    undo = wrap(site.module, "forward", functools.partial(around, site, runtime))
    fast_again = slow_path()
    _patch()

    def remove() -> None:
        undo()
        _unpatch()
        fast_again()
        backends_again()

    return remove


def install_module(site: Site, runtime: Runtime) -> Callable[[], None]:
    """Stand around the whole module, for `context` and `skip`."""
    names = tuple(inspect.signature(site.module.forward).parameters)
    return wrap(site.module, "forward", functools.partial(_instead, site, runtime, names), outermost=True)


def _instead(
    site: Site,
    runtime: Runtime,
    names: tuple[str, ...],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    pass_ = runtime.current()
    plan = pass_.plans.get(site)
    if plan is None:
        return forward(*args, **kwargs)
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    for method in plan.context:
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, Tensor) and pass_.phase in method.phases:
            pass_.run.method = method
            kwargs["encoder_hidden_states"] = method.context(site, states)
    for method in plan.skip:
        if pass_.phase in method.phases:
            pass_.run.method = method
            out = method.skip(site, pass_)
            if out is not None:
                return out
    return forward(**kwargs)


def scopes() -> list[Scope]:
    if not hasattr(_scope, "stack"):
        _scope.stack = []
    return _scope.stack


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _around(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    stack = scopes()
    context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    stack.append(Scope(site, runtime, first_tensor(args, kwargs), context))
    try:
        return forward(*args, **kwargs)
    finally:
        stack.pop()


def _around_mha(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`nn.MultiheadAttention` leaves the fused kernel when asked for weights: we ask for none and answer them."""
    kwargs = {**dict(zip(_mha_parameters, args)), **kwargs}
    scope = Scope(site, runtime, kwargs["query"])
    scope.keeps_weights = wants_weights = kwargs.get("need_weights", True)
    stack = scopes()
    stack.append(scope)
    try:
        out, _ = forward(**{**kwargs, "need_weights": False})
    finally:
        stack.pop()
    if not wants_weights or scope.call is None:
        return out, None
    w = scope.call.weights().to(out.dtype)
    w = w.mean(1) if kwargs.get("average_attn_weights", True) else w
    return out, w if out.ndim == 3 else w[0]


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    stack = scopes()
    scope = stack[-1] if stack else None
    pass_ = scope.runtime.current() if scope else None
    plan = pass_.plans.get(scope.site) if scope and pass_ else None
    if (
        scope is None
        or pass_ is None
        or (plan is None and not isinstance(scope.site.module, nn.MultiheadAttention))
    ):
        return _sdpa(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    flat = query.ndim == 3  # (heads, queries, dim) of a single sample
    q, k, v = (t[None] if flat else t for t in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.ndim < 4:
        mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
    places = pass_.places(scope.site)
    call = scope.call = AttentionCall(
        scope.site, q, k, v, mask, scale=scale, causal=is_causal, operator=_native, pass_=pass_, x=scope.x,
        options={"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}, context=scope.context,
        source=scope.calls, pos=places, keep=places,
    )  # fmt: skip
    scope.calls += 1
    call.keeps_weights = scope.keeps_weights
    out = _native(call) if plan is None else execute(call, plan)
    return out[0] if flat else out


# ---- kernels of diffusers ---------------------------------------------------------------------------------

KERNELS = frozenset(("scaled_dot_product_attention", "dispatch_attention_fn"))
_backends: dict[Any, Callable[..., Any]] = {}  # what stood in the registry
_answered = 0


def _no_op() -> None:
    return None


def check_processor(site: Site) -> None:
    """Refuse a processor that multiplies queries and keys by itself, where nothing of it would be seen."""
    processor: Any = type(site.module.processor)
    if not names_used(processor) & KERNELS:
        raise AttachError(
            f"{site.name} ({site.path}) attends with {processor.__name__}, which multiplies queries and keys by "
            "itself.",
            "call disable_attention_slicing() on the pipeline, or set_attn_processor(AttnProcessor2_0()) on the "
            "denoiser",
        )


def answer_backends() -> Callable[[], None]:
    """Stand in the registry of diffusers' kernels, where one may be chosen that never calls torch's."""
    global _answered
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    table = registry._backends
    with _lock:
        if _answered == 0:
            _backends.update({name: kernel for name, kernel in table.items() if "native" not in name.value})
            table.update(
                {name: functools.wraps(k)(functools.partial(_backend, k)) for name, k in _backends.items()}
            )
        _answered += 1

    def undo() -> None:
        global _answered
        with _lock:
            _answered -= 1
            if _answered == 0:
                table.update(_backends)
                _backends.clear()

    return undo


def _backend(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    **options: Any,
) -> Tensor:
    """One of the registry's kernels: (batch, tokens, heads, dim)."""
    stack = scopes()
    scope = stack[-1] if stack else None
    pass_ = scope.runtime.current() if scope else None
    plan = pass_.plans.get(scope.site) if scope and pass_ else None
    if scope is None or pass_ is None or plan is None:
        return kernel(query=query, key=key, value=value, attn_mask=attn_mask, **options)

    def operator(call: AttentionCall) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        given = {**options, "is_causal": call.causal} if "is_causal" in options else options
        mask = {} if call.mask is None else {"attn_mask": call.mask}
        return kernel(query=q, key=k, value=v, **mask, **given).transpose(1, 2)

    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    call = scope.call = AttentionCall(
        scope.site, q, k, v, attn_mask, scale=options.get("scale"), causal=options.get("is_causal", False),
        operator=operator, pass_=pass_, x=scope.x, options=options, context=scope.context, source=scope.calls,
    )  # fmt: skip
    scope.calls += 1
    return execute(call, plan).transpose(1, 2)


def _native(call: AttentionCall) -> Tensor:
    assert call.options is not None
    return _sdpa(call.q, call.k, call.v, attn_mask=call.mask, is_causal=call.causal, **call.options)


def slow_path() -> Callable[[], None]:
    """Off with torch's C++ encoder layer, which calls no Python at all; returns what puts it back."""
    global _slow, _fast_path_was
    with _lock:
        if _slow == 0:
            _fast_path_was = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _slow += 1

    def undo() -> None:
        global _slow
        with _lock:
            _slow -= 1
            if _slow == 0:
                torch.backends.mha.set_fastpath_enabled(_fast_path_was)

    return undo


def _patch() -> None:
    """While something is attached, and never at import."""
    global _attached, _sdpa
    with _lock:
        if _attached == 0:
            _sdpa = F.scaled_dot_product_attention  # which may be another library's
            F.scaled_dot_product_attention = _dispatch
        _attached += 1


def _unpatch() -> None:
    global _attached
    with _lock:
        _attached -= 1
        if _attached == 0 and F.scaled_dot_product_attention is _dispatch:
            F.scaled_dot_product_attention = _sdpa
