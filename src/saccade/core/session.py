"""Attaching methods to a model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saccade.core import calibration
from saccade.core.boxes import locate
from saccade.core.driver import Driver, refusal
from saccade.core.host import check_needs, unwrapped
from saccade.core.method import Method
from saccade.core.plan import Plan
from saccade.core.runtime import Runtime
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.core.question import Answer, Question
    from saccade.core.seams.projections import Matrices


def attach(model: nn.Module, *methods: Method | Iterable[Method]) -> Session:
    """Attach methods to a model as it is; leaving the `with` block takes them off again.

    >>> with sc.attach(model, sc.load("var+vhr(alpha=1.5)")) as session:
    ...     ids = model.generate(**inputs)
    """
    flat: list[Method] = []
    for method in methods:
        flat.extend(method if isinstance(method, list | tuple) else [method])  # type: ignore[list-item]
    return Session(model, tuple(flat))


class Session:
    """Methods on a model. Sessions nest, and leave in any order."""

    def __init__(self, model: nn.Module, methods: tuple[Method, ...]) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise refusal(method)
        self.model = unwrapped(model)
        self.methods = methods
        self._did: Mapping[Site, Plan] = {}  # its plans, once it is detached
        self.results: dict[str, Any] = {}  # what the methods' `end` returned in the last run, by slug
        with Runtime._lock:
            self._runtime = Runtime.of(self.model)
            self._runtime.add(self)

    @property
    def sites(self) -> list[Site]:
        return self._runtime.host.sites

    @property
    def plans(self) -> Mapping[Site, Plan]:
        """What this session does, or did until it was detached, by site."""
        return self._runtime.own_plans.get(self, self._did)

    def locate(self, processor: Any, images: Sequence[Any]) -> None:
        """Say which pictures the coming runs are given, as the processor is given them: a list, or a list
        for every sample. Layouts then know the box of every visual token, and which picture it shows.
        An empty list ends it."""
        self._runtime.located = locate(self.model, processor, images) if images else None

    def forward(
        self,
        inputs: Mapping[str, Any],
        methods: Iterable[Method] = (),
        *,
        grad: bool = False,
        last_only: bool = False,
    ) -> Any:
        """One forward with these methods alone, none unless given. `last_only` as in `Run.forward`."""
        return self._runtime.extra_pass(inputs, tuple(methods), grad, last_only)

    def run(self, driver: Driver, question: Question) -> Answer:
        """Let a driver answer a question. The methods of this session act in the answers that it asks for."""
        check_needs(driver, self._runtime.host)
        driver.check(question)
        located, start = self._runtime.located, time.perf_counter()
        try:
            answer = driver.run(self, question)
        finally:
            self._runtime.located = located
        answer.seconds = time.perf_counter() - start
        return answer

    def unembed(self, h: Tensor, norm: bool = True) -> Tensor:
        """Logits that the model's own head gives to hidden states (..., width), as if a last layer had made
        them; without the final norm where it is not wanted."""
        return self._runtime.unembed(h, norm)

    def matrices(self, site: str) -> Matrices:
        """W_q, W_k, W_v and W_o of the heads of a self-attention, such as `text.3.self`."""
        return self._runtime.linears(site).matrices()

    def parameters(self, site: str, parts: str) -> dict[nn.Parameter, Tensor]:
        """The weights and biases of a self-attention that make its queries, keys or values, as in "kv", and which
        of their elements do."""
        return self._runtime.linears(site).parameters(parts)

    def cut(self, site: str, heads: Iterable[int]) -> None:
        """Take heads out of the weights of a self-attention, for good."""
        self._runtime.linears(site).cut(set(heads))

    def projector(self, inputs: Mapping[str, Any]) -> nn.Module:
        """The module that makes features of the vision tower's tokens, found on the pictures of a prompt."""
        return self._runtime.projector(inputs)

    def mlp(self, site: str, h: Tensor) -> Tensor:
        """What an mlp, such as `text.0.mlp`, and the norm before it make of hidden states (..., width)."""
        return self._runtime.mlp(site, h)

    def calibrate(self, method: Method, samples: Iterable[Mapping[str, Any]]) -> Path:
        """Let the method measure this model, and keep the result where the method will find it."""
        return calibration.save(method.kept_as(), self.model, method.calibrate(self, samples))

    def detach(self) -> None:
        """Take the methods off. The model is then as it was, to the bit."""
        self._did = self.plans
        self._runtime.remove(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model alone, for a while."""
        self._runtime.pause(self, True)
        try:
            yield
        finally:
            self._runtime.pause(self, False)

    def summary(self) -> str:
        """What is attached where."""
        lines = [f"{type(self.model).__name__}, {len(self.methods)} method(s)"]
        for method in self.methods:
            lines.append(f"  {method}")
            for event in type(method).events():
                plans = ((s.name, self.plans.get(s)) for s in self.sites)
                names = [name for name, plan in plans if plan and method in getattr(plan, event, ())]
                if names:
                    lines.append(f"    {event:8} {len(names):3} sites  {names[0]} .. {names[-1]}")
        return "\n".join(lines)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
