"""The checks that every method of the catalogue which acts in sampling goes through by itself.

A method is tried on the tiny pipelines of its card's `target`, with the options `EXAMPLE` of its test module.
Two prompts begin from the same latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusion.test_pipelines import traceless
from torch import Tensor
from zoo.base import generator
from zoo.pipelines import OTHER, PIPELINES, PROMPT, Pipeline, ready

import saccade as sc

from .test_shared import Entry, entries

PIPELINES_OF = {
    "unet diffusion": ("sd", "sdxl"),
    "unet/dit diffusion": ("sd", "sdxl", "pixart", "wan"),
    "dit diffusion": ("sd3", "flux"),
}
"""By target. Guided in one batch and in two calls, with one text encoder and two."""
STEPS = 4


@dataclass(frozen=True)
class Trial:
    """A method on a pipeline."""

    entry: Entry
    p: Pipeline

    @property
    def pipe(self) -> Any:
        return ready(self.p.name)

    def bare(self) -> Tensor:
        return sample(self.p, getattr(self.entry.tests, "PROMPTS", (PROMPT, OTHER)))

    def with_method(self, **options: Any) -> Tensor:
        with sc.attach(self.pipe, self.entry.make(**options)):
            return self.bare()


def sample(p: Pipeline, prompts: tuple[str, ...], **options: Any) -> Tensor:
    """All prompts from the same latents, few steps."""
    if p.name in ("sd", "sdxl"):
        options.setdefault(
            "latents", torch.randn(1, 4, 16, 16, generator=generator(5)).repeat(len(prompts), 1, 1, 1)
        )
    return p.sample(ready(p.name), prompt=list(prompts), num_inference_steps=STEPS, **options)


def acts(t: Trial) -> None:
    """Beyond what is rounded; a probe changes nothing, to the bit, and has a result."""
    bare = t.bare()
    with sc.attach(t.pipe, t.entry.make()) as session:
        made = t.bare()
    if t.entry.card.form == "probe":
        assert torch.equal(made, bare)
        assert session.results[t.entry.card.slug]
    else:
        assert float((made - bare).abs().max()) > 1e-4 * float(bare.abs().max())


def leaves_nothing_behind(t: Trial) -> None:
    bare = t.bare()
    with traceless(t.pipe):
        t.with_method()
    assert torch.equal(t.bare(), bare)


def leaves_nothing_behind_when_an_event_fails(t: Trial) -> None:
    bare = t.bare()
    for event in t.entry.events:
        with pytest.MonkeyPatch.context() as patch, traceless(t.pipe), pytest.raises(ZeroDivisionError):
            patch.setattr(t.entry.cls, event, lambda *_: 1 / 0)
            t.with_method()
    assert torch.equal(t.bare(), bare)


def neutral_changes_nothing_to_the_bit(t: Trial) -> None:
    assert t.entry.card.neutral or t.entry.card.form == "probe"
    assert torch.equal(t.with_method(**t.entry.card.neutral), t.bare())


def a_sampling_leaves_nothing_for_the_next(t: Trial) -> None:
    with sc.attach(t.pipe, t.entry.make()):
        assert torch.equal(t.bare(), t.bare())


CHECKS: tuple[Callable[[Trial], None], ...] = (
    acts,
    leaves_nothing_behind,
    leaves_nothing_behind_when_an_event_fails,
    neutral_changes_nothing_to_the_bit,
    a_sampling_leaves_nothing_for_the_next,
)
TRIALS = [
    Trial(entry, PIPELINES[name]) for entry in entries() for name in PIPELINES_OF.get(entry.card.target, ())
]


def name_of(value: Any) -> str:
    return f"{value.entry.card.slug}-{value.p.name}" if isinstance(value, Trial) else value.__name__


@pytest.mark.parametrize(("trial", "check"), [(t, check) for t in TRIALS for check in CHECKS], ids=name_of)
def test_on_pipelines_of_its_target(trial: Trial, check: Callable[[Trial], None]) -> None:
    check(trial)
