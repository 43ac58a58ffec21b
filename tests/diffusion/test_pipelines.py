"""Pipelines as hosts: their sites, the names of their rows, what their tokens are, and leaving no trace."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import Look, attention_sites, method, unchanged
from torch import Tensor, nn
from zoo.pipelines import NEGATIVE, OTHER, PIPELINES, PROMPT, Pipeline, ready

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError, InputError

ALL = [pytest.param(p, id=name) for name, p in PIPELINES.items()]
GUIDED_AT_ONCE = ("sd", "sdxl", "sd3", "pixart", "cogvideox")
JOINT = {"sd3": "image first", "flux": "text first", "cogvideox": "text first"}
TOKENS = {"sd": 77, "sdxl": 77, "sd3": 77 + 24, "flux": 24, "pixart": 20, "wan": 20, "cogvideox": 16}
"""Of the text that the denoiser is given."""


def everywhere(p: Pipeline) -> str:
    prefix = "unet" if p.denoiser == "unet" else "dit"
    return "|".join(s for s in attention_sites(p.denoiser_of(ready(p.name))) if s.startswith(prefix))


def look(p: Pipeline, tell: Any, sites: str = "", **options: Any) -> Look:
    seen = Look(tell=tell, sites=sites or everywhere(p))
    with sc.attach(ready(p.name), seen):
        p.sample(ready(p.name), **options)
    return seen


@contextmanager
def traceless(pipe: Any) -> Iterator[None]:
    """Nothing is left on the pipeline, its scheduler and its parts."""

    def traces() -> dict[str, Any]:
        parts = {name: part for name, part in pipe.components.items() if hasattr(part, "__dict__")}
        kept = {name: (type(part), sorted(vars(part))) for name, part in parts.items()}
        return {**kept, "pipeline": (type(pipe), sorted(k for k in vars(pipe) if k not in RUNNING))}

    before = traces()
    with unchanged(pipe.unet if hasattr(pipe, "unet") else pipe.transformer):
        yield
    assert traces() == before


RUNNING = {"_guidance_scale", "_num_timesteps", "_interrupt", "_cross_attention_kwargs", "_clip_skip"} | {
    *(
        "_joint_attention_kwargs",
        "_current_timestep",
        "_attention_kwargs",
        "_denoising_end",
        "_guidance_rescale",
    ),
    *("_skip_layer_guidance_scale", "_guidance_scale_2", "_progress_bar_config"),
}
"""What a pipeline itself keeps of its last call."""


# ---- attaching and leaving -------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ALL)
def test_all_sites_are_seen_and_nothing_is_changed(p: Pipeline) -> None:
    pipe = ready(p.name)
    bare = p.sample(pipe)
    seen = Look(sites=everywhere(p), tell=lambda call: call.phase)
    with traceless(pipe), sc.attach(pipe, seen):
        assert torch.equal(p.sample(pipe), bare)
    assert {name for name, _, _ in seen.seen} == set(everywhere(p).split("|"))
    assert {phase for _, phase, _ in seen.seen} == {"denoise"}
    assert torch.equal(p.sample(pipe), bare)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("sd", ["unet.down.0.0.0.self", "unet.mid.0.0.cross", "unet.up.1.0.0.cross"]),
        ("sdxl", ["unet.down.1.0.1.cross", "unet.up.0.1.1.self"]),
        ("sd3", ["dit.0.joint", "dit.2.joint"]),
        ("flux", ["dit.1.joint", "dit.single.0.joint"]),
        ("pixart", ["dit.1.self", "dit.1.cross"]),
        ("wan", ["dit.0.self", "dit.0.cross"]),
        ("cogvideox", ["dit.0.joint", "dit.1.joint"]),
    ],
)
def test_sites_have_the_denoisers_names(name: str, some: list[str]) -> None:
    with sc.attach(ready(name)) as session:
        assert set(some) <= {site.name for site in session.sites}


def test_dual_attention_of_sd3_is_self_attention() -> None:
    pipe = PIPELINES["sd3"].build(dual_attention_layers=(0,))
    with sc.attach(pipe) as session:
        kinds = {s.path: s.kind for s in session.sites if s.path.endswith(("attn", "attn2"))}
    assert kinds["transformer_blocks.0.attn2"] == "self"
    assert kinds["transformer_blocks.0.attn"] == "joint"


def test_sessions_leave_in_any_order() -> None:
    p, pipe = PIPELINES["flux"], ready("flux")
    bare = p.sample(pipe)
    louder = method(output=lambda call, o: o * 1.5)
    with traceless(pipe):
        first, second = (
            sc.attach(pipe, louder(sites="dit.0.joint")),
            sc.attach(pipe, louder(sites="dit.1.joint")),
        )
        both = p.sample(pipe)
        first.detach()
        one = p.sample(pipe)
        second.detach()
    with sc.attach(pipe, louder(sites="dit.1.joint")):
        assert torch.equal(p.sample(pipe), one)
    assert not torch.equal(one, both)
    assert torch.equal(p.sample(pipe), bare)


def test_a_pause_is_the_pipeline_alone() -> None:
    p, pipe = PIPELINES["wan"], ready("wan")
    bare = p.sample(pipe)
    with sc.attach(pipe, method(output=lambda call, o: o * 2)(sites="dit.*.cross")) as session:
        with session.paused():
            assert torch.equal(p.sample(pipe), bare)
        assert not torch.equal(p.sample(pipe), bare)


@pytest.mark.parametrize("event", ["observe", "denoise", "step", "enter", "prediction", "begin", "end"])
def test_an_exception_leaves_nothing_behind(event: str) -> None:
    p, pipe = PIPELINES["sd"], ready("sd")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with traceless(pipe), sc.attach(pipe, method(**{event: fail})(sites="unet.mid.*.cross")):
        with pytest.raises(ZeroDivisionError):
            p.sample(pipe, num_inference_steps=1)
        assert "step" not in vars(pipe.scheduler)
        assert "encode_prompt" not in vars(pipe)


def test_another_denoiser_is_found_when_a_run_begins() -> None:
    p, pipe = PIPELINES["flux"], PIPELINES["flux"].build()
    seen = Look(sites="dit.*.joint", tell=lambda call: id(call.site.module))
    with sc.attach(pipe, seen):
        p.sample(pipe)
        old, pipe.transformer = pipe.transformer, PIPELINES["flux"].build().transformer
        before = len(seen.seen)
        p.sample(pipe)
    modules = {id(m) for m in pipe.transformer.modules()}
    assert {told for _, _, told in seen.seen[before:]} <= modules
    assert not any("forward" in vars(m) for m in [*old.modules(), *pipe.transformer.modules()])


def test_the_denoiser_alone_is_left_alone() -> None:
    pipe = ready("flux")
    seen = Look(sites="dit.*.joint")
    given: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    PIPELINES["flux"].sample(pipe, num_inference_steps=1)
    hook.remove()
    with sc.attach(pipe, seen), torch.no_grad():
        pipe.transformer(**given)
    assert not seen.seen


def test_another_thread_may_share_the_denoiser() -> None:
    p, pipe = PIPELINES["flux"], ready("flux")
    bare = p.sample(pipe)
    other = type(pipe)(
        **{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    )
    other.set_progress_bar_config(disable=True)
    results: dict[str, Tensor] = {}
    with sc.attach(pipe, method(output=lambda call, o: o * 2)(sites="dit.*.joint")):
        thread = threading.Thread(target=lambda: results.update(other=p.sample(other)))

        def start(_: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
            if i == 0:
                thread.start()
                thread.join()
            return {}

        p.sample(pipe, callback_on_step_end=start)
    assert torch.equal(results["other"], bare)


def test_a_pipeline_is_not_kept_alive() -> None:
    pipe = PIPELINES["wan"].build()
    with sc.attach(pipe, Look(sites="dit.*.cross")):
        PIPELINES["wan"].sample(pipe, num_inference_steps=1)
    import weakref

    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None


# ---- rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ALL)
def test_rows_have_the_names_of_guidance(p: Pipeline) -> None:
    seen = look(
        p,
        lambda call: {name: index.tolist() for name, index in call.pass_.rows.items()},
        prompt=[PROMPT, OTHER],
    )
    rows = [told for name, _, told in seen.seen if name == seen.seen[0][0]]
    if p.name in GUIDED_AT_ONCE:
        assert rows == [{"uncond": [0, 1], "cond": [2, 3]}] * 3
    else:
        assert rows == [{"cond": [0, 1]}, {"uncond": [0, 1]}] * 3


def test_without_guidance_there_is_one_part() -> None:
    seen = look(PIPELINES["sd"], lambda call: list(call.pass_.rows), guidance_scale=1.0)
    assert {tuple(told) for _, _, told in seen.seen} == {("cond",)}


def test_a_negative_prompt_that_says_the_same_is_still_the_first_half() -> None:
    seen = look(
        PIPELINES["sd"],
        lambda call: {n: i.tolist() for n, i in call.pass_.rows.items()},
        negative_prompt=PROMPT,
    )
    assert seen.seen[0][2] == {"uncond": [0], "cond": [1]}


@pytest.mark.parametrize("p", ALL)
def test_steps_are_counted(p: Pipeline) -> None:
    seen = look(p, lambda call: (call.pass_.i, call.pass_.total, float(call.pass_.t.flatten()[0])))
    site = seen.seen[0][0]
    told = list(dict.fromkeys(seen.at(site)))
    assert [(i, total) for i, total, _ in told] == [(0, 3), (1, 3), (2, 3)]
    times = ready(p.name).scheduler.timesteps.tolist()
    assert [t for _, _, t in told] == pytest.approx([t / 1000 if p.name == "flux" else t for t in times])


# ---- words and places ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", ALL)
def test_the_columns_of_a_word_are_those_of_its_tokens(p: Pipeline) -> None:
    """Counted with the tokenizers; in SD3 the columns of T5 stand behind those of CLIP."""
    seen = look(p, lambda call: call.columns("word:cat")[:, 0, 0] if call.site.kind != "self" else None)
    pipe = ready(p.name)
    tokenizers = {
        name: getattr(pipe, name)
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3")
        if hasattr(pipe, name)
    }
    clip, t5 = (
        next(
            (
                t(PROMPT).input_ids.index(t("cat").input_ids[at])
                for t in tokenizers.values()
                if kind in type(t).__name__
            ),
            None,
        )
        for kind, at in (("CLIP", 1), ("T5", 0))
    )
    wanted = {
        "sd": [clip],
        "sdxl": [clip],
        "sd3": [clip, 77 + (t5 or 0)],
        "flux": [t5],
        "pixart": [t5],
        "wan": [t5],
        "cogvideox": [t5],
    }[p.name]
    told = [mask for _, _, mask in seen.seen if mask is not None]
    assert told
    for mask in told:
        before = mask.shape[1] - TOKENS[p.name] if JOINT.get(p.name) == "image first" else 0
        cond = mask[-1].nonzero()[:, 0].tolist()
        assert cond in ([column + before for column in wanted], [])
        assert not mask[:-1].any()
    if p.name in GUIDED_AT_ONCE:
        assert all(mask[-1].any() for mask in told)
    else:
        assert any(mask[-1].any() for mask in told)


def test_words_of_several_tokens_and_several_words() -> None:
    columns = {}

    def tell(call: AttentionCall) -> None:
        for text in ("umbrella", "Red Cat", "castle"):
            columns[text] = [row.nonzero()[:, 0].tolist() for row in call.columns(f"word:{text}")[:, 0, 0]]

    look(PIPELINES["sd"], tell, "unet.mid.*.cross", prompt="a red cat, an umbrella", num_inference_steps=1)
    ids = ready("sd").tokenizer("a red cat, an umbrella").input_ids
    assert columns["umbrella"] == [[], list(range(6, len(ids) - 1))]
    assert columns["Red Cat"] == [[], [2, 3]]
    assert columns["castle"] == [[3], []]


def test_columns_follow_several_pictures_of_a_prompt() -> None:
    seen = look(
        PIPELINES["sd3"],
        lambda call: call.columns("word:horse")[:, 0, 0].any(-1).tolist(),
        prompt=[PROMPT, OTHER],
        num_images_per_prompt=2,
        num_inference_steps=1,
    )
    assert seen.seen[0][2] == [False] * 4 + [False, False, True, True]


def test_words_are_found_where_the_pipeline_changed_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ready("sd").encode_prompt

    def louder(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(1.1 * states for states in encode(*args, **kwargs))

    monkeypatch.setattr(ready("sd"), "encode_prompt", louder)
    seen = look(PIPELINES["sd"], lambda call: call.columns("word:cat")[:, 0, 0], "unet.mid.*.cross")
    assert seen.seen[0][2].nonzero().tolist() == [[1, 3]]


def test_an_encoder_of_the_same_length_is_not_mistaken_for_another() -> None:
    seen = look(PIPELINES["flux"], lambda call: call.columns("word:cat")[:, 0, 0], max_sequence_length=77)
    t5 = ready("flux").tokenizer_2
    assert seen.seen[0][2].nonzero().tolist() == [[0, t5(PROMPT).input_ids.index(t5("cat").input_ids[0])]]


def test_a_word_that_nobody_says_is_refused() -> None:
    with pytest.raises(InputError, match="'zebra'"):
        look(PIPELINES["sd"], lambda call: call.columns("word:zebra"), "unet.mid.*.cross")


def test_without_a_prompt_no_word_is_known() -> None:
    pipe = ready("sd")
    made = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    with pytest.raises(InputError, match="the word 'cat'"):
        look(
            PIPELINES["sd"], lambda call: call.columns("word:cat"), "unet.mid.*.cross", prompt=None,
            negative_prompt=None, prompt_embeds=made[0], negative_prompt_embeds=made[1],
        )  # fmt: skip


@pytest.mark.parametrize("name", list(JOINT))
def test_the_order_of_text_and_image_is_found(name: str) -> None:
    """Against what the module itself is given: the text's values, without norm and rotation."""
    p, pipe = PIPELINES[name], ready(name)
    context: dict[str, Tensor] = {}
    sites = everywhere(p)

    def note(path: str) -> Any:
        return lambda module, args, kwargs: context.update({path: kwargs.get("encoder_hidden_states")})

    denoiser = p.denoiser_of(pipe)
    paths = {s.name: s.path for s in sc.attach(pipe).sites if s.seam != "module"}
    hooks = [
        denoiser.get_submodule(x).register_forward_pre_hook(note(x), with_kwargs=True) for x in paths.values()
    ]
    wrong = []

    def tell(call: AttentionCall) -> None:
        text = call.columns("text")[0, 0, 0]
        states = context[call.site.path]
        assert int(text.sum()) == TOKENS[name]
        assert bool(text[0]) == (JOINT[name] == "text first")
        if states is not None:
            module: Any = call.site.module
            own = (getattr(module, "add_v_proj", None) or module.to_v)(states)
            wrong.append(not torch.allclose(call.v[:, :, text].transpose(1, 2).flatten(2), own, atol=1e-5))

    try:
        look(p, tell, sites, num_inference_steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert wrong and not any(wrong)


def test_the_order_is_known_where_only_single_blocks_are_asked() -> None:
    seen = look(PIPELINES["flux"], lambda call: call.columns("text")[0, 0, 0], "dit.single.*.joint")
    assert all(bool(text[0]) and int(text.sum()) == 24 for _, _, text in seen.seen)


@pytest.mark.parametrize("p", ALL)
def test_boxes_tile_the_picture(p: Pipeline) -> None:
    def tell(call: AttentionCall) -> tuple[Tensor, tuple[int, ...] | None]:
        visual = call.queries("visual")[0]
        return call.qlayout.boxes[0, visual], call.pass_.grid(int(visual.sum()))  # type: ignore[attr-defined]

    height, width = p.call["height"], p.call["width"]
    for _, _, (boxes, grid) in look(p, tell, num_inference_steps=1).seen:
        frames = 1 if len(grid) == 2 else grid[0]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert float(area.sum()) == pytest.approx(frames * height * width)
        assert len(boxes.unique(dim=0)) * frames == len(boxes)
        assert boxes.amax(0).tolist()[2:] == [width, height]
        assert boxes[1, 0] == boxes[0, 2] or grid[-1] == 1


def test_a_box_is_where_the_latent_is() -> None:
    """A bump in the latents shows first in the query whose box covers it."""
    p, pipe = PIPELINES["pixart"], ready("pixart")
    latents = torch.zeros(1, 4, 16, 24)
    bumped = latents.clone()
    bumped[:, :, 4, 10] = 5.0  # the picture's pixels (20, 8) to (22, 10)
    xs = []
    for given in (latents, bumped):
        seen = Look(sites="dit.0.self", tell=lambda call: (call.x, call.qlayout.boxes))
        with sc.attach(pipe, seen):
            p.sample(pipe, latents=given, num_inference_steps=1)
        xs.append(seen.seen[0][2])
    (a, boxes), (b, _) = xs
    (moved,) = (a - b).abs().amax((0, 2)).nonzero()[:, 0].tolist()
    x0, y0, x1, y1 = boxes[0, moved].tolist()
    assert x0 <= 20 and x1 >= 22 and y0 <= 8 and y1 >= 10


# ---- what a pipeline cannot give -------------------------------------------------------------------------


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline

    class Nothing(DiffusionPipeline):
        def __init__(self, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(AttachError, match="Nothing has no denoiser"):
        sc.attach(Nothing(DDIMScheduler()))


@pytest.mark.parametrize("event", ["denoise", "step", "enter"])
def test_a_bare_denoiser_takes_no_steps(event: str) -> None:
    with pytest.raises(AttachError, match=f"{event!r}.*takes no denoising steps"):
        sc.attach(ready("sd").unet, method(**{event: lambda x, *_: x})(sites="*.cross"))


def test_a_part_that_is_attached_twice_is_refused() -> None:
    pipe = ready("sd")
    with sc.attach(pipe, Look(sites="*.cross")), pytest.raises(AttachError, match="attached already"):
        sc.attach(pipe.unet, Look(sites="*.cross"))


def test_importing_saccade_does_not_import_diffusers() -> None:
    import subprocess
    import sys

    code = "import sys, saccade, saccade.core.session; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_modules_of_the_pipeline_stay_modules() -> None:
    pipe = ready("sd")
    with sc.attach(pipe, Look(sites="*.cross")):
        assert isinstance(pipe.unet, nn.Module)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert pipe.components.keys() == ready("sd").components.keys()
