"""What a method is: a dataclass of options that overrides the events it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saccade.core.errors import OptionError, nearest
from saccade.core.system import System, option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from saccade.core.branch import Branch
    from saccade.core.cache import TrackedLayer
    from saccade.core.call import AttentionCall
    from saccade.core.features import Item
    from saccade.core.passes import Denoising, HiddenCall, Pass, Run
    from saccade.core.session import Session
    from saccade.core.site import Site
    from saccade.core.tokens import Tokens, TokensCall

# In the order in which they run inside one attention call.
CALL_EVENTS = ("inputs", "bias", "scores", "weights", "replace", "output", "observe")
SITE_EVENTS = ("context", "skip", "tokens", *CALL_EVENTS, "evict", "hidden")
SAMPLING_EVENTS = ("enter", "denoise", "step")  # of a pipeline of diffusers
RUN_EVENTS = ("features", "branches", "prediction", *SAMPLING_EVENTS)
EVENTS = (*SITE_EVENTS, *RUN_EVENTS)
PHASES = ("prefill", "extend", "decode", "denoise")
STAGES = ("before", "after")

Sites = str | tuple[str, ...] | Mapping[str, "str | tuple[str, ...]"]


@dataclass(eq=False, kw_only=True)
class Method(System):
    """Options only: what lives for a generation is in `run.state`, what lives for a conversation in
    `call.state`. One instance may serve many sessions and threads.

    `sites` is a pattern, several of them, or one per event. `rows` and `heads` narrow `scores` and
    `weights`; `batch` and `phases` narrow every event of a call.
    """

    sites: Sites = option("*.self", "where: a pattern of sites, or one for each event")
    rows: str | int = option("all", "query rows that scores and weights see: all, last, question, generated")
    heads: tuple[int, ...] | dict[str, tuple[int, ...]] | str | None = option(
        None,
        "heads that scores and weights see: numbers; numbers by site, and no other sites; the best of a table's "
        "file, as in heads.safetensors:20 or :5%; None for all",
    )
    batch: str = option(
        "all", "rows of the batch that the events of a call see: all; in sampling cond, uncond"
    )
    phases: tuple[str, ...] = option(PHASES, "passes in which the method acts")
    stage = "after"  # whether `features` sees them before or after the projector; a subclass may make it an option

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.heads, str):
            from saccade.core.heads import best

            self.heads = best(self.heads)
        if not isinstance(self.heads, tuple | list | Mapping | None):
            raise OptionError(
                f"{type(self).__name__}(heads={self.heads!r}): that is no choice of heads.",
                "give numbers, numbers by site, such as a table's top(20), or a table's file",
            )
        if taken := {field.name for field in dataclasses.fields(self)} & set(EVENTS):
            raise OptionError(
                f"{type(self).__name__} has an option called like the event {', '.join(sorted(taken))}.",
                "give the option another name",
            )
        for name, given, known in (
            ("phases", self.phases, PHASES),
            ("sites", self.sites if isinstance(self.sites, Mapping) else (), EVENTS),
            ("stage", (self.stage,), STAGES),
        ):
            for word in given:
                if word not in known:
                    raise OptionError(
                        f"{type(self).__name__}({name}={given!r}): there is no {word!r}.",
                        nearest(word, known) or f"use some of {', '.join(known)}",
                    )

    def calibrate(self, session: Session, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Measure what the method needs to know of a model; the session saves it under the method's name."""
        raise NotImplementedError

    def kept_as(self) -> str:
        """Under which name the session keeps what `calibrate` measured."""
        return self.card.slug

    def begin(self, run: Run) -> None:
        """Before a generation, or before a forward that starts a sequence of its own."""

    def end(self, run: Run) -> Any:
        """After it. What is returned is kept in `session.results[slug]`."""

    def extra(self, run: Run, grad: bool) -> Method | None:
        """What acts for this method in a further pass that another one asks for by `run.forward`."""
        return None

    def features(self, item: Item) -> Tokens | None:
        """Which features of a picture go to the text tower, and what stands for them; or, with stage="before", for
        what the projector makes them of."""
        return None

    def branches(self, run: Run) -> Iterable[Branch]:
        """Other prompts that are followed beside this one, in the same steps."""
        return ()

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        """Logits of the next token (batch, vocabulary), from this prompt's and the branches'. In sampling the
        guided noise that the scheduler is given, beside `p.raw`, the denoiser's predictions by name."""
        return base

    def enter(self, p: Denoising, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The denoiser's own arguments, by name. `p.narrow(inputs, "cond")` leaves rows out."""
        return inputs

    def denoise(self, latents: Tensor, p: Denoising, predict: Callable[..., Tensor]) -> Tensor:
        """Latents before a step, the first too; `predict(latents, rows="cond")` is differentiable."""
        return latents

    def step(self, latents: Tensor, p: Denoising) -> Tensor:
        """Latents after a step, the last too."""
        return latents

    def context(self, site: Site, states: Tensor) -> Tensor:
        """What an attention module of a denoiser is given beside the stream, before keys and values."""
        return states

    def skip(self, site: Site, p: Pass) -> Tensor | None:
        """The output of an attention module in place of running it."""
        return None

    def tokens(self, call: TokensCall) -> Tokens | None:
        """Which tokens go into a layer, and stay from there on."""
        return None

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Change queries, keys and values of this call."""
        return q, k, v

    def bias(self, call: AttentionCall) -> Tensor | None:
        """A term for the scores, broadcast to (batch, heads, queries, keys). Stays on the fused kernel."""
        return None

    def acts(self, call: AttentionCall) -> bool:
        """Whether the method edits scores or weights in this call; where none does, the native operator answers."""
        return True

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

    def evict(self, call: AttentionCall, cache: TrackedLayer) -> Tensor | None:
        """Which entries of the layer's cache stay: slots (slots,), (batch, slots) or (batch, key heads, slots),
        -1 for an empty one."""
        return None

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        """Change hidden states (batch, tokens, width) at a layer, input, mlp, neurons or embed site, or what an
        attention module gives."""
        return h

    def sites_of(self, event: str) -> tuple[str, ...]:
        """The patterns at which `event` of this method is wanted."""
        patterns = self.sites.get(event, ()) if isinstance(self.sites, Mapping) else self.sites
        return (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def heads_at(self, site: Site) -> tuple[int, ...] | None:
        """The heads that scores and weights see at a site; None for all."""
        chosen: Any = self.heads
        return tuple(chosen.get(site.name, ())) if isinstance(chosen, Mapping) else chosen

    @classmethod
    def events(cls) -> tuple[str, ...]:
        """The events that the class overrides: what a method overrides is what it costs."""
        return tuple(e for e in EVENTS if getattr(cls, e) is not getattr(Method, e))
