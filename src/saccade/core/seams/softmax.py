"""Models that write attention out by hand: their softmax is all that can be reached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from saccade.core.call import AttentionCall, Span, take_rows
from saccade.core.errors import AttachError, InputError
from saccade.core.plan import acting, edited_weights, observe
from saccade.core.seams.sdpa import first_tensor
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.runtime import Runtime

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


def install(site: Site, runtime: Runtime) -> Callable[[], None]:
    return wrap(site.module, "forward", functools.partial(_around, site, runtime))


def _around(site: Site, runtime: Runtime, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    pass_ = runtime.current()
    if site not in pass_.plans:
        return forward(*args, **kwargs)
    with _Listen(site, runtime, first_tensor(args, kwargs)):
        return forward(*args, **kwargs)


class _Listen(TorchFunctionMode):
    def __init__(self, site: Site, runtime: Runtime, x: Tensor | None) -> None:
        super().__init__()
        self.site, self.runtime, self.x = site, runtime, x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        scores = args[0] if args else given.pop("input", None)
        dim = args[1] if len(args) > 1 else given.pop("dim", given.pop("axis", None))
        if func not in _SOFTMAX or scores is None or scores.ndim < 3 or dim not in (-1, scores.ndim - 1):
            return func(*args, **(kwargs or {}))
        return self._softmax(scores, lambda s: func(s, -1, *args[2:], **given))

    def _softmax(self, scores: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        pass_ = self.runtime.current()
        plan = pass_.plans[self.site]
        fold, unfold = self._folding(scores.shape)
        scores = fold(scores)
        call = ScoredCall(self.site, scores, softmax, lambda s: fold(softmax(unfold(s))), pass_, self.x)
        edits = acting(call, plan)
        everything = slice(0, scores.shape[2])
        if edits:
            spans = {id(m): call.resolve(m.rows) for m in edits}
            w = edited_weights(call, plan, edits, spans, everything, scores)
            call.edit(everything, w)
        else:
            w = call.softmax(scores)
        observe(call, plan)
        return unfold(w)

    def _folding(self, shape: torch.Size) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What makes scores (batch, heads, queries, keys), and what gives them back their shape."""
        if len(shape) == 4:
            return (lambda t: t), (lambda t: t)
        if len(shape) == 3:  # (batch and heads, queries, keys)
            heads = self._heads(shape[0])
            return (lambda t: t.reshape(-1, heads, *shape[1:])), (lambda t: t.reshape(shape))
        heads = self._heads()
        axis = next((i for i in range(1, len(shape) - 2) if shape[i] == heads), 1)  # beside windows
        rest = shape[:axis] + shape[axis + 1 :]  # of the moved scores, without heads
        return (
            lambda t: t.movedim(axis, -3).reshape(-1, heads, *shape[-2:]),
            lambda t: t.reshape(*rest[:-2], heads, *shape[-2:]).movedim(-3, axis),
        )

    def _heads(self, rows: int = 0) -> int:
        names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
        found = next((getattr(self.site.module, n) for n in names if hasattr(self.site.module, n)), None)
        if found is None and self.x is not None and rows == self.x.shape[0]:
            return 1
        if found is None:
            raise AttachError(
                f"{self.site.name} ({type(self.site.module).__name__}) does not say how many heads it has.",
                "leave this site out with sites=",
            )
        return int(found)


class ScoredCall(AttentionCall):
    """A call of which only the scores are known: no queries, keys or values."""

    def __init__(
        self,
        site: Site,
        scores: Tensor,
        softmax: Callable[[Tensor], Tensor],
        softmax_of_all: Callable[[Tensor], Tensor],
        pass_: Any,
        x: Tensor | None,
    ) -> None:
        batch, heads, queries, keys = scores.shape
        q, k = scores.new_empty(batch, heads, queries, 0), scores.new_empty(batch, heads, keys, 0)
        places = pass_.places(site)
        super().__init__(
            site, q, k, k, None, scale=1.0, causal=False, operator=AttentionCall.next, pass_=pass_, x=x,
            pos=places, keep=places,
        )  # fmt: skip
        self._given, self._by_model, self._of_all = scores, softmax, softmax_of_all

    def softmax(self, scores: Tensor, heads: Any = None) -> Tensor:
        """The model's own softmax where all rows and heads are there, so that its dtype rules hold."""
        if scores.shape == self._given.shape:
            return self._of_all(scores)
        return self._by_model(scores)

    def apply(self, w: Tensor) -> Tensor:
        raise InputError(
            f"{self.site.name} ({type(self.site.module).__name__}) writes attention out by hand: its queries, keys and "
            "values are not reached.",
            "use scores() or weights() there, or leave the site out with sites=",
        )

    def native(self, **changed: Any) -> Tensor:
        return self.apply(self._given)

    def _scores(self, span: Span, heads: Any, *, native: bool) -> Tensor:
        s = take_rows(self._given, span)
        return s if heads is None else s[:, heads]
