"""TGATE by what is run and what is not, and against a pipeline gated by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo.pipelines import OTHER, PIPELINES, PROMPT, ready

import saccade as sc
from saccade.core.errors import AttachError
from saccade.core.passes import HiddenCall
from saccade.diffusion.tgate import TGate

EXAMPLE: dict[str, Any] = {"gate": 0.5}
PROMPTS = (PROMPT, OTHER)


@contextmanager
def counted(name: str) -> Iterator[dict[str, list[int]]]:
    """Rows of every call of the denoiser, and of its projections of the text."""
    denoiser = PIPELINES[name].denoiser_of(ready(name))
    rows: dict[str, list[int]] = {"denoiser": [], "keys": []}

    def note(what: str) -> Any:
        return lambda m, args, kwargs, out: rows[what].append(len(out[0] if isinstance(out, tuple) else out))

    keys = [m for path, m in denoiser.named_modules() if path.endswith("attn2.to_k")]
    hooks = [m.register_forward_hook(note("keys"), with_kwargs=True) for m in keys]
    hooks.append(denoiser.register_forward_hook(note("denoiser"), with_kwargs=True))
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def gated(name: str, gate: float, **options: Any) -> Tensor:
    with sc.attach(ready(name), TGate(gate=gate)):
        return PIPELINES[name].sample(ready(name), num_inference_steps=4, **options)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("sd", [2, 2, 1, 1]), ("sdxl", [2, 2, 1, 1]), ("pixart", [2, 2, 1, 1]), ("wan", [1] * 6)],
)
def test_text_is_not_read_after_the_gate_and_half_of_the_batch_is_gone(name: str, calls: list[int]) -> None:
    with counted(name) as rows:
        gated(name, 0.5)
    layers = sum(
        path.endswith("attn2") for path, _ in PIPELINES[name].denoiser_of(ready(name)).named_modules()
    )
    assert rows["denoiser"] == calls
    assert len(rows["keys"]) == layers * 2 * (2 if name == "wan" else 1)


def test_a_gate_at_the_end_is_the_pipeline() -> None:
    for name in ("sd", "wan"):
        bare = PIPELINES[name].sample(ready(name), num_inference_steps=4)
        assert torch.equal(gated(name, 1.0), bare)


def test_one_step_at_least_runs_in_full() -> None:
    assert torch.equal(gated("pixart", 0.0), gated("pixart", 0.25))
    assert not torch.equal(gated("pixart", 0.25), gated("pixart", 0.5))


def test_the_kept_output_is_the_mean_of_the_halves() -> None:
    kept: dict[str, list[Tensor]] = {}
    given: dict[str, list[Tensor]] = {}

    class Noted(TGate):
        def skip(self, site: Any, p: Any) -> Tensor | None:
            out = super().skip(site, p)
            if out is not None:
                kept.setdefault(site.name, []).append(out)
            return out

        def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
            given.setdefault(call.site.name, []).append(h)
            return super().hidden(call, h)

    with sc.attach(ready("sd"), Noted(gate=0.5)):
        PIPELINES["sd"].sample(ready("sd"), num_inference_steps=4, prompt=[PROMPT, OTHER])
    for name, outs in kept.items():
        uncond, cond = given[name][1].chunk(2)
        assert len(outs) == 2
        assert all(torch.equal(out, torch.stack([uncond, cond]).mean(0)) for out in outs)


def by_hand(name: str, gate: int, steps: int) -> Tensor:
    """SD's loop, written here: guidance until the gate, kept outputs in place of cross-attention after it."""
    p, pipe = PIPELINES[name], ready(name)
    negative = p.call["negative_prompt"]
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True, negative)
    pipe.scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    modules = {path: m for path, m in pipe.unet.named_modules() if path.endswith("attn2")}
    outs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda m, args, out: outs.update({path: out.mean(0, keepdim=True)})

    for i, t in enumerate(pipe.scheduler.timesteps):
        if i < gate:
            hooks = [m.register_forward_hook(keep(path)) for path, m in modules.items()]
            both = pipe.unet(torch.cat([latents] * 2), t, torch.cat([uncond, cond])).sample
            noise = both[:1] + p.call["guidance_scale"] * (both[1:] - both[:1])
        else:
            hooks = [
                m.register_forward_hook(lambda m, a, o, path=path: outs[path]) for path, m in modules.items()
            ]
            noise = pipe.unet(latents, t, cond).sample
        for hook in hooks:
            hook.remove()
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


def test_it_is_the_loop_gated_by_hand() -> None:
    for gate in (1, 2, 3):
        with torch.no_grad():
            wanted = by_hand("sd", gate, 4)
        assert torch.equal(gated("sd", gate / 4), wanted)


def test_without_guidance_the_only_output_is_kept() -> None:
    """With nothing but one step in four to change, keeping what is constant over steps changes nothing."""
    p, pipe = PIPELINES["sd"], ready("sd")
    bare = p.sample(pipe, num_inference_steps=4, guidance_scale=1.0)
    constant = {
        m: m.register_forward_hook(lambda m, a, o: torch.ones_like(o))
        for path, m in pipe.unet.named_modules()
        if path.endswith("attn2")
    }
    plain = p.sample(pipe, num_inference_steps=4, guidance_scale=1.0)
    same = gated("sd", 0.25, guidance_scale=1.0)
    for hook in constant.values():
        hook.remove()
    assert torch.equal(same, plain)
    assert not torch.equal(plain, bare)


def test_joint_attention_has_nothing_to_leave_out() -> None:
    with pytest.raises(AttachError, match="cross"):
        sc.attach(ready("flux"), TGate())
