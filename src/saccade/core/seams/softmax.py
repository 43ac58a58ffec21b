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
from saccade.core.errors import AttachError
from saccade.core.plan import edited_weights, observe
from saccade.core.seams.sdpa import first_tensor
from saccade.core.seams.wrap import wrap
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.session import Runtime

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
        if func not in _SOFTMAX or args[0].ndim < 3:
            return func(*args, **(kwargs or {}))
        return self._softmax(args[0], lambda s: func(s, *args[1:], **(kwargs or {})))

    def _softmax(self, scores: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        pass_ = self.runtime.current()
        plan = pass_.plans[self.site]
        shape = scores.shape
        if scores.ndim == 3:  # (batch and heads, queries, keys)
            scores = scores.view(-1, self._heads(), *shape[1:])
        call = ScoredCall(self.site, scores, softmax, shape, pass_, self.x)
        edits = [m for m in plan.edits if pass_.phase in m.phases]
        everything = slice(0, scores.shape[2])
        if edits:
            spans = {id(m): call.resolve(m.rows) for m in edits}
            w = edited_weights(call, plan, edits, spans, everything, scores)
            call.edit(everything, w)
        else:
            w = call.softmax(scores)
        observe(call, plan)
        return w.view(shape)

    def _heads(self) -> int:
        names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
        found = next((getattr(self.site.module, n) for n in names if hasattr(self.site.module, n)), None)
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
        shape: torch.Size,
        pass_: Any,
        x: Tensor | None,
    ) -> None:
        batch, heads, queries, keys = scores.shape
        q, k = scores.new_empty(batch, heads, queries, 0), scores.new_empty(batch, heads, keys, 0)
        super().__init__(
            site, q, k, k, None, scale=1.0, causal=False, operator=AttentionCall.next, pass_=pass_, x=x
        )
        self._given, self._by_model, self._shape = scores, softmax, shape

    def softmax(self, scores: Tensor, heads: Any = None) -> Tensor:
        """The model's own softmax where all rows and heads are there, so that its dtype rules hold."""
        if scores.shape == self._given.shape:
            return self._by_model(scores.view(self._shape)).view(scores.shape)
        return self._by_model(scores)

    def _scores(self, span: Span, heads: Any, *, native: bool) -> Tensor:
        s = take_rows(self._given, span)
        return s if heads is None else s[:, heads]
