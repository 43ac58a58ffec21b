"""Models that call `F.scaled_dot_product_attention` themselves: a scope around the module says which site calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.plan import execute
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.session import Runtime

_sdpa = F.scaled_dot_product_attention
_scope = threading.local()  # .stack: what runs around the innermost attention module of this thread
_lock = threading.Lock()
_attached = 0
_fast_path_was = True


class Scope:
    """One running attention module."""

    def __init__(self, site: Site, runtime: Runtime, x: Tensor | None) -> None:
        self.site, self.runtime, self.x = site, runtime, x
        self.call: AttentionCall | None = None


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    around = _around_mha if isinstance(site.module, nn.MultiheadAttention) else _around
    undo = wrap(site.module, "forward", functools.partial(around, site, runtime))
    _patch()

    def remove() -> None:
        undo()
        _unpatch()

    return remove


def scopes() -> list[Scope]:
    if not hasattr(_scope, "stack"):
        _scope.stack = []
    return _scope.stack


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _around(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    stack = scopes()
    stack.append(Scope(site, runtime, first_tensor(args, kwargs)))
    try:
        return forward(*args, **kwargs)
    finally:
        stack.pop()


def _around_mha(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`nn.MultiheadAttention` leaves the fused kernel when asked for weights: we ask for none and answer them."""
    wants_weights = kwargs.get("need_weights", True)
    scope = Scope(site, runtime, first_tensor(args, kwargs))
    stack = scopes()
    stack.append(scope)
    try:
        out, _ = forward(*args, **{**kwargs, "need_weights": False})
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
    if scope is None or pass_ is None or (plan is None and not isinstance(scope.site.module, nn.MultiheadAttention)):
        return _sdpa(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    flat = query.ndim == 3  # (heads, queries, dim) of a single sample
    q, k, v = (t[None] if flat else t for t in (query, key, value))
    mask = attn_mask
    if mask is not None and mask.ndim < 4:
        mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
    call = scope.call = AttentionCall(
        scope.site, q, k, v, mask, scale=scale, causal=is_causal, operator=_native, pass_=pass_, x=scope.x,
        options={"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa},
    )  # fmt: skip
    out = _native(call) if plan is None else execute(call, plan)
    return out[0] if flat else out


def _native(call: AttentionCall) -> Tensor:
    assert call.options is not None
    return _sdpa(call.q, call.k, call.v, attn_mask=call.mask, is_causal=call.causal, **call.options)


def _patch() -> None:
    """While something is attached, and never at import."""
    global _attached, _fast_path_was
    with _lock:
        if _attached == 0:
            _fast_path_was = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # the C++ encoder layer calls no Python at all
            F.scaled_dot_product_attention = _dispatch
        _attached += 1


def _unpatch() -> None:
    global _attached
    with _lock:
        _attached -= 1
        if _attached == 0:
            torch.backends.mha.set_fastpath_enabled(_fast_path_was)
            if F.scaled_dot_product_attention is _dispatch:
                F.scaled_dot_product_attention = _sdpa
