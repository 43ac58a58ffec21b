"""Other kernels and processors, caches, offloading, compilers, several calls in one module."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import Look, method
from torch import Tensor
from zoo.base import generator
from zoo.pipelines import PIPELINES, ready

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError
from saccade.core.method import Method

from .test_pipelines import everywhere
from .test_sampling import sampled

LOUDER = method(output=lambda call, o: o * 1.5)


def sites_seen(name: str, pipe: Any) -> set[str]:
    look = Look(sites=everywhere(PIPELINES[name]), tell=lambda call: None)
    sampled(PIPELINES[name], look, pipe=pipe, num_inference_steps=1)
    return {site for site, _, _ in look.seen}


# ---- kernels ---------------------------------------------------------------------------------------------


def test_flex_attention_is_seen_and_changed() -> None:
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    p, pipe = PIPELINES["flux"], ready("flux")
    table = dict(registry._backends)
    native = p.sample(pipe, num_inference_steps=1)
    edited = sampled(p, LOUDER(sites="dit.*.joint"), num_inference_steps=1)
    with attention_dispatch.attention_backend("flex"):
        bare = p.sample(pipe, num_inference_steps=1)
        assert sites_seen("flux", pipe) == set(everywhere(p).split("|"))
        assert torch.equal(sampled(p, Look(sites="dit.*.joint"), num_inference_steps=1), bare)
        torch.testing.assert_close(
            sampled(p, LOUDER(sites="dit.*.joint"), num_inference_steps=1), edited, rtol=1e-4, atol=1e-4
        )
        weighted = method(weights=lambda call, w: w * 1.5)(sites="dit.*.joint")
        torch.testing.assert_close(sampled(p, weighted, num_inference_steps=1), edited, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bare, native, rtol=1e-4, atol=1e-4)
    assert registry._backends == table


def test_a_backend_that_the_library_sets_for_good_is_seen() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    pipe = PIPELINES["flux"].build()
    active = registry._active_backend
    try:
        pipe.transformer.set_attention_backend("flex")
        assert sites_seen("flux", pipe) == set(everywhere(PIPELINES["flux"]).split("|"))
    finally:
        registry.set_active_backend(active)
    assert registry._active_backend == AttentionBackendName.NATIVE


def legacy() -> dict[str, Callable[[Any], Any]]:
    from diffusers.models.attention_processor import AttnProcessor

    return {
        "AttnProcessor": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        "SlicedAttnProcessor": lambda pipe: pipe.enable_attention_slicing(),
    }


@pytest.mark.parametrize("name", ["AttnProcessor", "SlicedAttnProcessor"])
@pytest.mark.parametrize("when", ["before", "after", "bare"])
def test_processors_that_multiply_by_themselves_are_refused(name: str, when: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    pipe = PIPELINES["sd"].build()
    change, look = legacy()[name], Look(sites="unet.mid.*.self")
    with pytest.raises(AttachError, match=rf"unet.mid.0.0.self .* attends with {name}, which multiplies"):
        if when != "after":
            change(pipe)
            sc.attach(pipe if when == "before" else pipe.unet, look)
        else:
            with sc.attach(pipe, look):
                change(pipe)
                PIPELINES["sd"].sample(pipe)
    if name == "SlicedAttnProcessor":
        pipe.disable_attention_slicing()
    else:
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert sites_seen("sd", pipe)


def test_fused_projections_are_seen() -> None:
    pipe = PIPELINES["sd"].build()
    pipe.unet.fuse_qkv_projections()
    assert sites_seen("sd", pipe) == set(everywhere(PIPELINES["sd"]).split("|"))


# ---- caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cache_over_blocks_is_refused(when: str) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe, look = PIPELINES["flux"].build(), Look(sites="dit.*.joint")
    with pytest.raises(AttachError, match="cache is enabled on FluxTransformer2DModel") as refusal:
        if when == "before":
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
            sc.attach(pipe, look)
        else:
            with sc.attach(pipe, look):
                pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
                PIPELINES["flux"].sample(pipe)
    assert "disable_cache" in refusal.value.remedy
    pipe.transformer.disable_cache()
    assert sites_seen("flux", pipe)


# ---- offloading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "level", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offloading(level: dict[str, Any], when: str) -> None:
    p, pipe = PIPELINES["flux"], PIPELINES["flux"].build()
    bare = p.sample(pipe)
    cpu = torch.device("cpu")
    look = Look(sites=everywhere(p), tell=lambda call: call.columns("word:cat").any())

    def offload() -> None:
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, **level)

    if when == "before":
        offload()
    with sc.attach(pipe, look):
        if when == "after":
            offload()
        assert torch.equal(p.sample(pipe), bare)
    assert {site for site, _, _ in look.seen} == set(everywhere(p).split("|"))
    assert torch.equal(p.sample(pipe), bare)
    with sc.attach(pipe, LOUDER(sites="dit.*.joint")):
        assert not torch.equal(p.sample(pipe), bare)
    assert torch.equal(p.sample(pipe), bare)


def test_layerwise_casting() -> None:
    pipe = PIPELINES["flux"].build()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    bare = PIPELINES["flux"].sample(pipe)
    assert torch.equal(sampled(PIPELINES["flux"], Look(sites="dit.*.joint"), pipe=pipe), bare)


# ---- several calls in one module ---------------------------------------------------------------------------


def test_a_picture_beside_the_text_is_a_call_of_its_own() -> None:
    """IP-Adapter: first to the text, then to the picture's tokens."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = PIPELINES["sd"].build()
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.set_processor(IPAdapterAttnProcessor2_0(32, 32, num_tokens=(4,)))
    picture = torch.randn(2, 1, 4, 32, generator=generator(1))
    hook = attn.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "encoder_hidden_states": (k["encoder_hidden_states"], [picture])}),
        with_kwargs=True,
    )

    def tell(call: AttentionCall) -> Any:
        return call.source, call.k.shape[2], int(call.columns("image").sum()), int(call.columns("text").sum())

    look = Look(sites="unet.mid.*.cross", tell=tell)
    sampled(PIPELINES["sd"], look, pipe=pipe, num_inference_steps=1)
    hook.remove()
    assert [told for _, _, told in look.seen] == [(0, 77, 0, 2 * 77), (1, 4, 2 * 4, 0)]


def test_cross_attention_of_image_to_video() -> None:
    """Wan's attends to the picture first; it stays cross-attention though it has matrices of its own."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        added_kv_proj_dim=24, image_dim=24,
    ).eval()  # fmt: skip
    look = Look(sites="dit.*.cross", tell=lambda call: (call.source, call.k.shape[2]))
    with sc.attach(model, look), torch.no_grad():
        model(
            torch.randn(1, 16, 1, 4, 4), torch.tensor([5]), torch.randn(1, 512, 32), torch.randn(1, 257, 24),
        )  # fmt: skip
    assert [told for _, _, told in look.seen] == [(0, 257), (1, 512)]


# ---- compilers -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ByStep(Method):
    """Decides before a step, and acts inside of it."""

    def denoise(self, latents: Tensor, p: Any, predict: Any) -> Tensor:
        p.run.state["factor"] = 1.0 + p.i / 2
        return latents

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        return o * call.run.state["factor"]


@pytest.fixture
def fresh() -> Any:
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


HOW: dict[str, Callable[[Any, str], Any]] = {
    "compile()": lambda pipe, name: getattr(pipe, name).compile(fullgraph=True, backend="eager"),
    "torch.compile": lambda pipe, name: setattr(
        pipe, name, torch.compile(getattr(pipe, name), fullgraph=True, backend="eager")
    ),
    "a block by Inductor": lambda pipe, name: getattr(pipe, name).mid_block.compile(fullgraph=True),
    "repeated blocks": lambda pipe, name: getattr(pipe, name).compile_repeated_blocks(
        fullgraph=True, backend="eager"
    ),
}
EDITS: dict[str, Callable[[str], Method]] = {
    "output": lambda sites: LOUDER(sites=sites),
    "bias": lambda sites: method(bias=lambda call: torch.linspace(0, 3, call.k.shape[2]))(sites=sites),
    "weights": lambda sites: method(weights=lambda call, w: w * 1.5)(sites=sites),
    "a row": lambda sites: method(weights=lambda call, w: w * 1.5)(sites=sites, rows=3),
    "by step": lambda sites: ByStep(sites=sites),
}


COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor makes C++, and no compiler is here"
)


@pytest.mark.parametrize(
    ("name", "how", "edit"),
    [
        ("pixart", "compile()", "by step"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("pixart", "compile()", "output"),
                ("pixart", "torch.compile", "weights"),
                ("flux", "compile()", "bias"),
                ("flux", "repeated blocks", "output"),
                ("flux", "torch.compile", "by step"),
                *(("sd", "compile()", edit) for edit in ("output", "bias", "a row")),
            )
        ),
        pytest.param("sd", "a block by Inductor", "output", marks=[pytest.mark.slow, COMPILER]),
    ],
)
@pytest.mark.parametrize("order", ["compiled, then attached", "attached, then compiled"])
def test_a_compiled_denoiser(name: str, how: str, edit: str, order: str, fresh: Any) -> None:
    p, pipe = PIPELINES[name], PIPELINES[name].build()
    sites = {"pixart": "dit.*.cross", "flux": "dit.*.joint", "sd": "unet.mid.*.cross"}[name]
    bare, edited = p.sample(pipe), sampled(p, EDITS[edit](sites), pipe=pipe)
    assert not torch.equal(edited, bare)
    if order.startswith("compiled"):
        HOW[how](pipe, p.denoiser)
        torch.testing.assert_close(p.sample(pipe), bare, rtol=1e-4, atol=1e-4)
    with sc.attach(pipe, EDITS[edit](sites)):
        if order.startswith("attached"):
            HOW[how](pipe, p.denoiser)
        torch.testing.assert_close(p.sample(pipe), edited, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p.sample(pipe), bare, rtol=1e-4, atol=1e-4)
