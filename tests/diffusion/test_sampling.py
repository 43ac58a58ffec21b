"""What happens between the pipeline's own steps: latents, predictions, branches, rows, contexts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Look, method, unchanged
from torch import Tensor
from zoo.base import generator
from zoo.pipelines import NEGATIVE, OTHER, PIPELINES, PROMPT, Pipeline, ready

import saccade as sc
from saccade.core.branch import Branch
from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError, InputError
from saccade.core.method import Method
from saccade.core.passes import Denoising
from saccade.core.seams.wrap import wrap

from .test_pipelines import ALL, GUIDED_AT_ONCE, traceless

GUIDANCE = {"sd": 7.5, "sdxl": 5.0, "sd3": 5.0, "flux": 3.0, "pixart": 4.5, "wan": 5.0, "cogvideox": 6.0}
CROSS = ("sd", "sdxl", "pixart", "wan")


@dataclass(eq=False)
class Move(Method):
    """Add something before or after every step."""

    before: float | None = None
    after: float | None = None
    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def denoise(self, latents: Tensor, p: Denoising, predict: Callable[..., Tensor]) -> Tensor:
        self.seen.append(("denoise", p.i, p.total))
        return latents if self.before is None else latents + self.before

    def step(self, latents: Tensor, p: Denoising) -> Tensor:
        self.seen.append(("step", p.i, p.total))
        return latents if self.after is None else latents + self.after


def sampled(p: Pipeline, *methods: Method, pipe: Any = None, **options: Any) -> Tensor:
    pipe = pipe or ready(p.name)
    with sc.attach(pipe, *methods):
        return p.sample(pipe, **options)


@contextmanager
def moved_by_hand(
    p: Pipeline, by: float, first: bool, last: bool, steps: int = 3
) -> Iterator[dict[str, Any]]:
    """The pipeline with its own means: the prepared latents changed, and its callback."""
    pipe = ready(p.name)
    prepare = pipe.prepare_latents
    with pytest.MonkeyPatch.context() as patch:
        if first:

            def moved(*args: Any, **kwargs: Any) -> Any:
                out = prepare(*args, **kwargs)
                return (out[0] + by, *out[1:]) if isinstance(out, tuple) else out + by

            patch.setattr(pipe, "prepare_latents", functools.wraps(prepare)(moved))

        def callback(_: Any, i: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": kwargs["latents"] + by} if last or i < steps - 1 else {}

        if p.name == "pixart":  # which knows only the older callback, without an answer

            def in_place(i: int, t: Any, latents: Tensor) -> None:
                if last or i < steps - 1:
                    latents += by

            yield {"callback": in_place}
        else:
            yield {"callback_on_step_end": callback}


# ---- latents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ALL)
def test_latents_before_every_step_are_those_of_an_oracle(p: Pipeline) -> None:
    bare, move = p.sample(ready(p.name)), Move(before=0.1)
    with traceless(ready(p.name)):
        got = sampled(p, move)
    with moved_by_hand(p, 0.1, first=True, last=False) as options:
        assert torch.equal(got, p.sample(ready(p.name), **options))
    assert not torch.equal(got, bare)
    assert [m for m in move.seen if m[0] == "denoise"] == [("denoise", i, 3) for i in range(3)]
    assert torch.equal(sampled(p, Move(before=0.0)), bare)
    assert torch.equal(sampled(p, Move()), bare)


@pytest.mark.parametrize("p", ALL)
def test_latents_after_every_step_are_those_of_an_oracle(p: Pipeline) -> None:
    move = Move(after=0.1)
    got = sampled(p, move)
    with moved_by_hand(p, 0.1, first=False, last=True) as options:
        assert torch.equal(got, p.sample(ready(p.name), **options))
    assert [m for m in move.seen if m[0] == "step"] == [("step", i, 3) for i in range(3)]


@dataclass(eq=False)
class Towards(Method):
    """Follow the gradient of what the image attends to a column."""

    column: int = 2
    losses: list[tuple[float, float]] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def begin(self, run: Any) -> None:
        run.state["maps"] = []

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        p = call.pass_
        assert isinstance(p, Denoising)
        if p.purpose == "predict":
            text = int(call.columns("text")[0, 0, 0].nonzero()[0])
            call.run.state["maps"].append(w[..., text + self.column].mean())
        return w

    def denoise(self, latents: Tensor, p: Denoising, predict: Callable[..., Tensor]) -> Tensor:
        maps = p.run.state["maps"]

        def loss(x: Tensor) -> Tensor:
            maps.clear()
            predict(x)
            return -torch.stack(maps).mean()

        x = latents.detach().requires_grad_()
        before = loss(x)
        (gradient,) = torch.autograd.grad(before, x)
        new = (latents - 0.05 * gradient / gradient.norm().clamp_min(1e-12)).detach()
        self.losses.append((float(before), float(loss(new))))
        self.gradients.append(gradient)
        return new


@pytest.mark.parametrize("p", ALL)
@pytest.mark.parametrize("inference_mode", [False, True], ids=["no grad", "inference mode"])
def test_a_gradient_of_the_attention_lowers_its_loss(p: Pipeline, inference_mode: bool) -> None:
    towards = Towards(sites="*.cross" if p.name in CROSS else "*.joint")
    pipe = ready(p.name)
    with torch.inference_mode(inference_mode), traceless(pipe):
        sampled(p, towards, num_inference_steps=2)
    assert len(towards.losses) == 2
    assert all(after < before for before, after in towards.losses)
    assert all(g.norm() > 0 for g in towards.gradients)
    assert all(parameter.grad is None for parameter in p.denoiser_of(pipe).parameters())


def test_predict_is_what_the_denoiser_says_of_the_latents() -> None:
    p, pipe = PIPELINES["sd"], ready("sd")
    told: list[Tensor] = []
    given: dict[str, Any] = {}

    def denoise(latents: Tensor, pass_: Denoising, predict: Callable[..., Tensor]) -> Tensor:
        told.extend((predict(latents), predict(latents, "uncond"), predict(latents, None)))
        with pytest.raises(InputError, match="no rows 'other', only uncond, cond"):
            predict(latents, "other")
        return latents

    hook = pipe.unet.register_forward_pre_hook(
        lambda m, a, k: given.update(k, sample=a[0], t=a[1]), with_kwargs=True
    )
    sampled(p, method(denoise=denoise)(sites="unet.mid.*"), num_inference_steps=1)
    hook.remove()
    with torch.no_grad():
        both = pipe.unet(given["sample"], given["t"], given["encoder_hidden_states"]).sample
        halves = [
            pipe.unet(x[None], given["t"], c[None]).sample
            for x, c in zip(given["sample"], given["encoder_hidden_states"])
        ]
    assert torch.equal(told[2], both)
    assert torch.equal(told[1], halves[0])
    assert torch.equal(told[0], halves[1])


def test_methods_change_latents_in_the_order_of_attachment() -> None:
    double = method(denoise=lambda latents, p, predict: latents * 2)(sites="unet.mid.*")
    add = Move(before=1.0, sites="unet.mid.*")
    one = method(denoise=lambda latents, p, predict: latents * 2 + 1.0)(sites="unet.mid.*")
    p = PIPELINES["sd"]
    assert torch.equal(sampled(p, double, add), sampled(p, one))


# ---- schedulers ------------------------------------------------------------------------------------------

SECOND_ORDER = {"HeunDiscreteScheduler": 7, "KDPM2DiscreteScheduler": 7, "PNDMScheduler": 5}


@pytest.mark.parametrize(
    "name",
    [
        *SECOND_ORDER,
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "DDPMScheduler",
        "LCMScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_a_step_is_a_step_with_every_scheduler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    p, pipe = PIPELINES["sd"], ready("sd")
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, name)(beta_schedule="scaled_linear", **more))
    evaluated: list[Any] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: evaluated.append(1))
    bare = p.sample(pipe, num_inference_steps=4)
    move = Move(before=0.0, after=0.0)
    assert torch.equal(sampled(p, move, num_inference_steps=4), bare)
    hook.remove()
    assert move.seen == [(event, i, 4) for i in range(4) for event in ("denoise", "step")]
    assert len(evaluated) == 2 * SECOND_ORDER.get(name, 4)
    assert not torch.equal(sampled(p, Move(before=0.1), num_inference_steps=4), bare)


def test_runge_kutta_steps_of_pndm() -> None:
    from diffusers import PNDMScheduler

    p, pipe = (
        PIPELINES["sd"],
        PIPELINES["sd"].build(PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=False)),
    )
    move = Move(before=0.0)
    assert torch.equal(
        sampled(p, move, pipe=pipe, num_inference_steps=5), p.sample(pipe, num_inference_steps=5)
    )
    assert [(i, total) for event, i, total in move.seen if event == "denoise"] == [(i, 5) for i in range(5)]


# ---- other pipelines, and callers who take part ------------------------------------------------------------


def test_a_callback_that_replaces_the_latents() -> None:
    def halve(_: Any, i: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": kwargs["latents"] * 0.5}

    for name in ("sd", "flux", "sdxl"):
        p, pipe = PIPELINES[name], ready(name)
        bare = p.sample(pipe, callback_on_step_end=halve)
        assert torch.equal(sampled(p, Move(before=0.0), callback_on_step_end=halve), bare)

        def both(_: Any, i: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": kwargs["latents"] * 0.5 + (0.1 if i < 2 else 0)}

        with moved_by_hand(p, 0.1, first=True, last=False):
            oracle = p.sample(pipe, callback_on_step_end=both)
        assert torch.equal(sampled(p, Move(before=0.1), callback_on_step_end=halve), oracle)


def test_an_interrupted_sampling() -> None:
    def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = i == 0
        return {}

    move = Move()
    sampled(PIPELINES["sd"], move, callback_on_step_end=stop)
    assert move.seen == [("denoise", 0, 3), ("step", 0, 3)]


def test_img2img_and_inpainting() -> None:
    import diffusers

    image = torch.rand(1, 3, 32, 32, generator=generator(3))
    kw = {"prompt": PROMPT, "image": image, "num_inference_steps": 5, "output_type": "latent"}
    img2img = diffusers.StableDiffusionImg2ImgPipeline(
        **ready("sd").components, requires_safety_checker=False
    )
    wide = PIPELINES["sd"].build(in_channels=9)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**wide.components, requires_safety_checker=False)
    mask = (torch.rand(1, 1, 32, 32, generator=generator(4)) > 0.5).float()
    for pipe, more in (
        (img2img, {"strength": 0.6}),
        (inpaint, {"mask_image": mask, "height": 32, "width": 32, "num_inference_steps": 3}),
    ):
        pipe.set_progress_bar_config(disable=True)

        def run(pipe: Any = pipe, more: dict[str, Any] = more, **options: Any) -> Tensor:
            return pipe(**{**kw, **more, **options}, generator=generator(0)).images

        bare, move = run(), Move(before=0.0)
        with sc.attach(pipe, move):
            assert torch.equal(run(), bare)
        assert [i for event, i, total in move.seen if event == "denoise" and total == 3] == [0, 1, 2]
        prepare = pipe.prepare_latents

        def moved(*args: Any, prepare: Any = prepare, **kwargs: Any) -> Any:
            out = prepare(*args, **kwargs)
            return (out[0] + 0.1, *out[1:]) if isinstance(out, tuple) else out + 0.1

        def callback(_: Any, i: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": kwargs["latents"] + 0.1} if i < 2 else {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe, "prepare_latents", moved)
            oracle = run(callback_on_step_end=callback)
        with sc.attach(pipe, Move(before=0.1)):
            assert torch.equal(run(), oracle)


@pytest.mark.parametrize("where", ["scale_model_input", "step"])
def test_latents_that_are_mixed_on_their_way_are_refused(where: str) -> None:
    """By a pipeline that has something else between its scheduler and its denoiser."""
    p, pipe = PIPELINES["sd"], ready("sd")

    def mixing(inner: Any, *args: Any, **kwargs: Any) -> Any:
        if where == "step":
            return inner(*args[:2], args[2] * 0.5, **kwargs)
        return inner(*args, **kwargs) + 0.5

    @dataclass(eq=False)
    class Mix(Method):
        def begin(self, run: Any) -> None:
            undo.append(wrap(pipe.scheduler, where, mixing, outermost=True))

    undo: list[Callable[[], None]] = []
    with traceless(pipe):
        with pytest.raises(InputError, match="something else than its latents"):
            sampled(p, Mix(), Move(before=0.1))
        undo.pop()()


# ---- predictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ALL)
def test_raw_predictions_make_the_guided_one(p: Pipeline) -> None:
    errors: list[float] = []

    def prediction(base: Tensor, branches: list[Tensor], pass_: Denoising) -> Tensor:
        cond, uncond = pass_.raw["cond"], pass_.raw["uncond"]
        errors.append(
            float((uncond + GUIDANCE[p.name] * (cond - uncond) - base).abs().max() / base.abs().max())
        )
        return base

    bare = p.sample(ready(p.name))
    assert torch.equal(sampled(p, method(prediction=prediction)(sites="*")), bare)
    assert len(errors) == 3 and max(errors) < 1e-5


@pytest.mark.parametrize("p", ALL)
def test_a_prediction_of_ones_own_is_what_the_scheduler_gets(p: Pipeline) -> None:
    """Other guidance, mixed from the raw predictions, is the pipeline's own with that scale."""
    name = "true_cfg_scale" if p.name == "flux" else "guidance_scale"

    def weaker(base: Tensor, branches: list[Tensor], pass_: Denoising) -> Tensor:
        return pass_.raw["uncond"] + 2.0 * (pass_.raw["cond"] - pass_.raw["uncond"])

    asked = p.sample(ready(p.name), **{name: 2.0})
    assert torch.equal(sampled(p, method(prediction=weaker)(sites="*")), asked)


def test_raw_predictions_have_the_sign_that_the_scheduler_gets() -> None:
    """A pipeline that turns the sign after guidance, as some do."""
    p, pipe = PIPELINES["sd"], ready("sd")
    guided: list[float] = []

    def prediction(base: Tensor, branches: list[Tensor], pass_: Denoising) -> Tensor:
        cond, uncond = pass_.raw["cond"], pass_.raw["uncond"]
        guided.append(float((uncond + 7.5 * (cond - uncond) - base).abs().max()))
        return base

    with sc.attach(pipe, method(prediction=prediction)(sites="*"), Turn()):
        p.sample(pipe)
    assert max(guided) < 1e-4


@dataclass(eq=False)
class Turn(Method):
    """Stands around the scheduler's step as a pipeline's own minus would."""

    def begin(self, run: Any) -> None:
        scheduler = run.runtime.model.scheduler
        run.state["undo"] = wrap(
            scheduler, "step", lambda inner, noise, *a, **k: inner(-noise, *a, **k), outermost=True
        )

    def end(self, run: Any) -> None:
        run.state["undo"]()


@dataclass(eq=False)
class Blind(Method):
    """A branch with a method of its own, or with other text."""

    share: float = 1.0
    inputs_: dict[str, Tensor] = field(default_factory=dict)
    louder: float = 1.0
    counts: list[int] = field(default_factory=list)

    def branches(self, run: Any) -> Any:
        edit = method(output=lambda call, o: o * self.louder)(
            sites="*.mid.*" if hasattr(run.runtime.model, "unet") else "*.joint"
        )
        return [Branch(self.inputs_, (edit,), from_step=1)]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Denoising) -> Tensor:  # type: ignore[override]
        self.counts.append(len(branches))
        return base if not branches else base + self.share * (branches[0] - p.raw["cond"])


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_branch_is_a_call_of_its_own(name: str) -> None:
    p = PIPELINES[name]
    bare = p.sample(ready(name))
    alike = Blind(sites="*")
    rounding = 1e-3 if name in GUIDED_AT_ONCE else 0  # a batch of one rounds otherwise than one of two
    assert float((sampled(p, alike) - bare).abs().max()) <= rounding
    assert alike.counts == [0, 1, 1]
    assert float((sampled(p, Blind(louder=0.0, sites="*")) - bare).abs().max()) > 0.01
    assert torch.equal(sampled(p, Blind(louder=0.0, share=0.0, sites="*")), bare)


def test_a_branch_reads_other_text() -> None:
    """A branch with the negative prompt is the unconditional half: together they are weaker guidance."""
    p, pipe = PIPELINES["sd"], ready("sd")
    negative = pipe.encode_prompt(NEGATIVE, "cpu", 1, False)[0]
    seen: list[float] = []

    def prediction(base: Tensor, branches: list[Tensor], pass_: Denoising) -> Tensor:
        seen.append(float((branches[0] - pass_.raw["uncond"]).abs().max()))
        return base

    edit = method(branches=lambda run: [Branch({"encoder_hidden_states": negative})], prediction=prediction)
    sampled(p, edit(sites="*"))
    assert len(seen) == 3 and max(seen) < 1e-4


# ---- rows of the batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart"])
@pytest.mark.parametrize("event", ["output", "weights", "bias", "inputs"])
def test_other_rows_stay_native_to_the_bit(name: str, event: str) -> None:
    changes: dict[str, Callable[..., Any]] = {
        "output": lambda call, o: o * 1.5,
        "weights": lambda call, w: w * 1.5,
        "bias": lambda call: torch.linspace(0, 3, call.k.shape[2]),
        "inputs": lambda call, q, k, v: (q * 2, k, v),
    }
    p, pipe = PIPELINES[name], ready(name)
    sites = "*.joint" if name == "sd3" else "unet.mid.*.cross" if name == "sd" else "dit.0.cross"
    made: dict[str, list[Tensor]] = {"bare": [], "edited": []}

    def note(into: str) -> Look:
        return Look(sites=sites, tell=lambda call: made[into].append(call.out.clone()))  # type: ignore[union-attr]

    sampled(p, note("bare"), num_inference_steps=1)
    edit = method(**{event: changes[event]})(sites=sites, batch="cond")
    first: list[Tensor] = []
    with sc.attach(pipe, edit) as session:
        site = next(s for s in session.sites if s in session.plans)
        hook = site.module.register_forward_hook(
            lambda m, a, o: first.append(o[0] if isinstance(o, tuple) else o)
        )
        p.sample(pipe, num_inference_steps=1)
        hook.remove()
    plain: list[Tensor] = []
    hook = site.module.register_forward_hook(
        lambda m, a, o: plain.append(o[0] if isinstance(o, tuple) else o)
    )
    p.sample(pipe, num_inference_steps=1)
    hook.remove()
    assert torch.equal(first[0][0], plain[0][0])
    assert not torch.equal(first[0][1], plain[0][1])


def test_methods_with_different_rows_stand_together() -> None:
    p = PIPELINES["sd"]
    sites = "unet.mid.*.cross"

    def factor(by: float, batch: str) -> Method:
        return method(output=lambda call, o: o * by)(sites=sites, batch=batch)

    def by_hand(call: AttentionCall, o: Tensor) -> Tensor:
        scale = torch.ones(len(o))
        scale[call.pass_.rows["cond"]] = 6.0
        scale[call.pass_.rows["uncond"]] = 2.0
        return o * scale[:, None, None, None]

    together = sampled(p, factor(2.0, "all"), factor(3.0, "cond"))
    torch.testing.assert_close(
        together, sampled(p, method(output=by_hand)(sites=sites)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("event", ["weights", "inputs"])
def test_an_onlooker_sees_the_whole_batch_as_edited(event: str) -> None:
    changes: dict[str, Callable[..., Any]] = {
        "weights": lambda call, w: w.roll(1, -1),
        "inputs": lambda call, q, k, v: (q * 2, k, v),
    }
    seen: list[Tensor] = []
    site = "unet.down.0.0.0.cross"
    look = Look(sites=site, tell=lambda call: seen.append(call.weights()))
    sampled(PIPELINES["sd"], look, num_inference_steps=1)
    for batch in ("cond", "all"):
        edit = method(**{event: changes[event]})(sites=site, batch=batch)
        sampled(PIPELINES["sd"], edit, look, num_inference_steps=1)
    bare, cond, both = seen
    assert cond.shape == bare.shape
    assert torch.equal(cond[0], bare[0])
    torch.testing.assert_close(cond[1], both[1])
    assert not torch.equal(both[0], bare[0])


def test_a_call_of_the_other_part_is_left_alone() -> None:
    p, seen = (
        PIPELINES["flux"],
        Look(sites="dit.0.joint", batch="cond", tell=lambda call: list(call.pass_.rows)),
    )
    sampled(p, seen)
    assert [told for _, _, told in seen.seen] == [["cond"]] * 3


def test_rows_without_names_are_refused() -> None:
    from zoo import FAMILIES, run

    model = FAMILIES["unet"].build()
    edit = method(output=lambda call, o: o)(sites="*.cross", batch="cond")
    with sc.attach(model, edit), pytest.raises(InputError, match="the rows of this batch have no names"):
        run(model, FAMILIES["unet"].inputs())  # type: ignore[arg-type]


# ---- the denoiser's inputs, contexts, and modules that are left out ----------------------------------------


@pytest.mark.parametrize("name", ["sd", "wan", "cogvideox"])
def test_another_context_is_another_prompt(name: str) -> None:
    """Given at the denoiser's door as at the pipeline's."""
    p, pipe = PIPELINES[name], ready(name)
    other: list[Tensor] = []
    with sc.attach(
        pipe,
        method(enter=lambda pass_, inputs: other.append(inputs["encoder_hidden_states"]) or inputs)(
            sites="*"
        ),
    ):
        wanted = p.sample(pipe, prompt=OTHER)
    calls = iter(other)

    def enter(pass_: Denoising, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "encoder_hidden_states": next(calls)}

    assert torch.equal(sampled(p, method(enter=enter)(sites="*")), wanted)


@pytest.mark.parametrize("name", CROSS)
def test_context_is_changed_before_keys_and_values(name: str) -> None:
    p, pipe = PIPELINES[name], ready(name)
    bare = p.sample(pipe)
    assert torch.equal(sampled(p, method(context=lambda site, states: states.clone())(sites="*.cross")), bare)
    halved = method(context=lambda site, states: states * 0.5)(sites="*.cross")
    by_hand = [
        m.register_forward_pre_hook(_halve, with_kwargs=True)
        for path, m in p.denoiser_of(pipe).named_modules()
        if path.endswith("attn2")
    ]
    wanted = p.sample(pipe)
    for hook in by_hand:
        hook.remove()
    assert torch.equal(sampled(p, halved), wanted)


def _halve(module: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 1:
        return (args[0], args[1] * 0.5, *args[2:]), kwargs
    return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * 0.5}


def test_a_skipped_module_is_not_run() -> None:
    p, pipe = PIPELINES["pixart"], ready("pixart")
    ran: list[int] = []
    hook = pipe.transformer.transformer_blocks[0].attn2.to_k.register_forward_hook(lambda *_: ran.append(1))
    kept: dict[Any, Tensor] = {}

    def hidden(call: Any, h: Tensor) -> Tensor:
        kept.setdefault((call.site.name, call.pass_.i), h)
        return h

    bare = sampled(p, method(hidden=hidden)(sites="dit.*.cross"))
    ran.clear()
    again = sampled(p, method(skip=lambda site, pass_: kept[site.name, pass_.i])(sites="dit.*.cross"))
    hook.remove()
    assert torch.equal(again, bare)
    assert not ran


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_tokens_that_nobody_sees_leave_the_image_alone(name: str) -> None:
    """Appended at `enter`, answered in `replace`."""
    p = PIPELINES[name]
    concept = torch.randn(1, 3, p.denoiser_of(ready(name)).config.joint_attention_dim, generator=generator(7))
    answers: list[Tensor] = []

    def enter(pass_: Denoising, inputs: dict[str, Any]) -> dict[str, Any]:
        text = inputs["encoder_hidden_states"]
        inputs["encoder_hidden_states"] = torch.cat([text, concept.expand(len(text), -1, -1)], 1)
        if inputs.get("txt_ids") is not None:
            inputs["txt_ids"] = torch.cat([inputs["txt_ids"], torch.zeros(3, 3)])
        return inputs

    def replace(call: AttentionCall) -> Tensor:
        text = call.columns("text")[0, 0, 0].nonzero()[:, 0]
        image = call.columns("image")[0, 0, 0].nonzero()[:, 0]
        mine = text[-3:]
        seen = torch.cat([text[:-3], image]).sort().values
        q, k, v = call.q, call.k, call.v
        out = torch.empty_like(q)
        out[:, :, seen] = call.native(q=q[:, :, seen], k=k[:, :, seen], v=v[:, :, seen])
        both = torch.cat([image, mine])
        out[:, :, mine] = call.native(q=q[:, :, mine], k=k[:, :, both], v=v[:, :, both])
        answers.append(out[:, :, mine])
        return out

    bare = p.sample(ready(name))
    assert torch.equal(sampled(p, method(enter=enter, replace=replace)(sites="dit.*.joint")), bare)
    assert answers


@pytest.mark.parametrize("p", ALL)
def test_projected_states_are_the_sites_own_keys_and_values(p: Pipeline) -> None:
    errors: list[float] = []

    def tell(call: AttentionCall) -> None:
        if not isinstance(call.context, Tensor) or call.site.kind == "self":
            return
        k, v = call.project(call.context)
        text = call.columns("text")[0, 0, 0]
        errors.append(float((v - call.v[:, :, text]).abs().max()))
        if p.name != "flux" and p.name != "cogvideox":  # where keys of the text are turned too
            errors.append(float((k - call.k[:, :, text]).abs().max()))

    look = Look(sites="*.cross" if p.name in CROSS else "*.joint", tell=tell)
    sampled(p, look, num_inference_steps=1)
    assert errors and max(errors) < 1e-5


def test_an_extra_call_leaves_no_trace() -> None:
    p, pipe = PIPELINES["sd"], ready("sd")
    told: list[Tensor] = []

    def step(latents: Tensor, pass_: Denoising) -> Tensor:
        louder = method(output=lambda call, o: o * 2)(sites="unet.mid.*.cross")
        told.append(pass_.run.forward(pass_.inputs))
        told.append(pass_.run.forward(pass_.inputs, [louder]))
        return latents

    def prediction(base: Tensor, branches: list[Tensor], pass_: Denoising) -> Tensor:
        told.append(torch.cat([pass_.raw["uncond"], pass_.raw["cond"]]))
        return base

    bare = p.sample(pipe, num_inference_steps=1)
    assert torch.equal(
        sampled(p, method(step=step, prediction=prediction)(sites="*"), num_inference_steps=1), bare
    )
    raw, again, edited = told
    assert torch.equal(raw, again)
    assert not torch.equal(raw, edited)


def test_state_lives_for_a_sampling() -> None:
    counts: list[int] = []

    def observe(call: AttentionCall) -> None:
        call.run.state["n"] = call.run.state.get("n", 0) + 1
        call.state["n"] = call.state.get("n", 0) + 1
        assert call.state["n"] == call.run.state["n"]
        counts.append(call.run.state["n"])

    seen = method(observe=observe, end=lambda run: run.state["n"])(sites="unet.mid.*.cross")
    with sc.attach(ready("sd"), seen) as session:
        PIPELINES["sd"].sample(ready("sd"))
        PIPELINES["sd"].sample(ready("sd"))
    assert counts == [1, 2, 3, 1, 2, 3]
    assert session.results == {"Edit": 3}


def test_joint_sites_do_not_stand_where_there_is_cross_attention() -> None:
    with unchanged(ready("sd").unet), pytest.raises(AttachError, match="joint"):
        sc.attach(ready("sd"), Look(sites="dit.*.joint"))
