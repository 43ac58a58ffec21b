"""The checks that every method of the catalogue which acts in sampling goes through by itself.

A method is tried on the tiny pipelines of its card's `target`, with the options `EXAMPLE` of its test module.
Two prompts begin from the same latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusion.test_pipelines import traceless
from helpers import rms
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
PAIRED = {"masactrl", "prompt_to_prompt"}
"""Their second prompt takes from the first."""
STEPS = 4


@dataclass(frozen=True)
class Trial:
    """A method on a pipeline."""

    entry: Entry
    p: Pipeline

    @property
    def pipe(self) -> Any:
        return ready(self.p.name)

    @property
    def prompts(self) -> tuple[str, ...]:
        return getattr(self.entry.tests, "PROMPTS", (PROMPT, OTHER))

    def bare(self) -> Tensor:
        return sample(self.p, self.prompts)

    def with_method(self, **options: Any) -> Tensor:
        with sc.attach(self.pipe, self.entry.make(**options)):
            return self.bare()


def sample(p: Pipeline, prompts: tuple[str, ...], pipe: Any = None, **options: Any) -> Tensor:
    """All prompts from the same latents, few steps."""
    pipe = pipe or ready(p.name)
    if p.name in ("sd", "sdxl"):
        latents = torch.randn(1, 4, 16, 16, generator=generator(5)).repeat(len(prompts), 1, 1, 1)
        options.setdefault("latents", latents.to(pipe.dtype))
    return p.sample(pipe, prompt=list(prompts), num_inference_steps=STEPS, **options)


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


def a_batch_equals_its_first_prompt(t: Trial) -> None:
    if t.entry.card.slug in PAIRED:
        return
    with sc.attach(t.pipe, t.entry.make()):
        together, alone = t.bare(), sample(t.p, t.prompts[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


def bfloat16_is_as_good_as_the_pipeline_in_bfloat16(t: Trial) -> None:
    """The error against float32 with the same weights is at most twice the bare pipeline's."""
    low = copy.deepcopy(t.pipe).to(torch.bfloat16)
    high = copy.deepcopy(low).to(torch.float32)

    def error_with(*methods: Any) -> float:
        made = []
        for pipe in (low, high):
            with sc.attach(pipe, *methods):
                made.append(sample(t.p, t.prompts, pipe).double())
        return rms(made[0] - made[1])

    assert error_with(t.entry.make()) <= 2 * error_with()


CHECKS: tuple[Callable[[Trial], None], ...] = (
    acts,
    leaves_nothing_behind,
    leaves_nothing_behind_when_an_event_fails,
    neutral_changes_nothing_to_the_bit,
    a_sampling_leaves_nothing_for_the_next,
    a_batch_equals_its_first_prompt,
    bfloat16_is_as_good_as_the_pipeline_in_bfloat16,
)
TRIALS = [
    Trial(entry, PIPELINES[name]) for entry in entries() for name in PIPELINES_OF.get(entry.card.target, ())
]


def name_of(value: Any) -> str:
    return f"{value.entry.card.slug}-{value.p.name}" if isinstance(value, Trial) else value.__name__


@pytest.mark.parametrize(("trial", "check"), [(t, check) for t in TRIALS for check in CHECKS], ids=name_of)
def test_on_pipelines_of_its_target(trial: Trial, check: Callable[[Trial], None]) -> None:
    check(trial)
