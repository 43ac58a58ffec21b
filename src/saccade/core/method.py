"""What a method is: a dataclass of options that overrides the events it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from saccade.core.card import Card
from saccade.core.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from saccade.core.call import AttentionCall
    from saccade.core.passes import Run
    from saccade.core.session import Session
    from saccade.core.site import Site

# In the order in which they run inside one attention call.
CALL_EVENTS = ("inputs", "bias", "scores", "weights", "replace", "output", "observe")
EVENTS = (*CALL_EVENTS, "hidden")

Sites = str | tuple[str, ...] | Mapping[str, "str | tuple[str, ...]"]


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A documented option of a method, checked when the method is made."""
    return dataclasses.field(
        default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices}
    )


@dataclass(eq=False)
class Method:
    """Options only: what lives for a generation is in `run.state`, what lives for a conversation in
    `call.state`. One instance may serve many sessions and threads.

    `sites` is a pattern, several of them, or one per event. `rows` and `heads` narrow `scores` and
    `weights`; `phases` narrows every event of a call.
    """

    card: ClassVar[Card]

    sites: Sites = option("*.self", "where: a pattern of sites, or one for each event")
    rows: str | int = option("all", "query rows that scores and weights see: all, last, question, generated")
    heads: tuple[int, ...] | None = option(None, "heads that scores and weights see; None for all")
    phases: tuple[str, ...] = option(("prefill", "extend", "decode"), "passes in which the method acts")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_option(type(self), field, getattr(self, field.name))

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Measure what the method needs to know of a model; the session saves it under the method's name."""
        raise NotImplementedError

    def begin(self, run: Run) -> None:
        """Before a generation, or before a forward that starts a sequence of its own."""

    def end(self, run: Run) -> Any:
        """After it. What is returned is kept in `session.results[slug]`."""

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Change queries, keys and values of this call."""
        return q, k, v

    def bias(self, call: AttentionCall) -> Tensor | None:
        """A term for the scores, broadcast to (batch, heads, queries, keys). Stays on the fused kernel."""
        return None

    def scores(self, call: AttentionCall, s: Tensor) -> Tensor:
        """Change masked scores (batch, heads, rows, keys) before the softmax."""
        return s

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        """Change weights (batch, heads, rows, keys) after the softmax."""
        return w

    def replace(self, call: AttentionCall) -> Tensor | None:
        """Another operator in place of attention: (batch, heads, queries, dim)."""
        return None

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        """Change head outputs (batch, heads, queries, dim) before the output projection."""
        return o

    def observe(self, call: AttentionCall) -> None:
        """Read, after all edits."""

    def hidden(self, site: Site, h: Tensor) -> Tensor:
        """Change hidden states (batch, tokens, width) at a layer, mlp, neurons or embed site."""
        return h

    def sites_of(self, event: str) -> tuple[str, ...]:
        """The patterns at which `event` of this method is wanted."""
        patterns = self.sites.get(event, ()) if isinstance(self.sites, Mapping) else self.sites
        return (patterns,) if isinstance(patterns, str) else tuple(patterns)

    @classmethod
    def events(cls) -> tuple[str, ...]:
        """The events that the class overrides: what a method overrides is what it costs."""
        return tuple(e for e in EVENTS if getattr(cls, e) is not getattr(Method, e))


def check_option(owner: type, field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a value outside of what the option's declaration allows."""
    low, high, choices = (field.metadata.get(key) for key in ("low", "high", "choices"))
    name = f"{owner.__name__}({field.name}={value!r})"
    doc = field.metadata.get("doc", "")
    if choices is not None and value not in choices:
        raise OptionError(f"{name}: not one of {', '.join(map(repr, choices))}.", f"{field.name}: {doc}")
    if low is None and high is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise OptionError(f"{name}: a number is wanted.", f"{field.name}: {doc}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
        raise OptionError(f"{name}: out of range, {limits} is allowed.", f"{field.name}: {doc}")
