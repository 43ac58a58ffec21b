"""ConceptAttention against a stream of concepts that is carried through the blocks here, and on planted values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from zoo.pipelines import PIPELINES, PROMPT, ready

import saccade as sc
from saccade.core.branch import Branch
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.passes import Run
from saccade.probes.concept_attention import ConceptAttention, ConceptMaps, Concepts

EXAMPLE: dict[str, Any] = {"concepts": ("cat", "dog")}


def maps_of(name: str, pipe: Any = None, prompts: int = 1, **options: Any) -> ConceptMaps:
    pipe = pipe or ready(name)
    with sc.attach(pipe, ConceptAttention(**{**EXAMPLE, **options})) as session:
        PIPELINES[name].sample(pipe, num_inference_steps=2, prompt=[PROMPT] * prompts)
    return session.results["concept_attention"]


@pytest.mark.parametrize(("name", "grid"), [("flux", (8, 12)), ("sd3", (16, 24)), ("cogvideox", (3, 1, 1))])
def test_maps_sum_to_one_over_the_concepts_and_follow_them(name: str, grid: tuple[int, ...]) -> None:
    found = maps_of(name, concepts=("cat", "dog", "castle"), first=0.0)
    assert found.maps.shape == (1, 3, *grid)
    assert_close(found.maps.sum(1), torch.ones_like(found.maps[:, 0]))
    assert float(found.maps.std()) > 1e-3
    turned = maps_of(name, concepts=("castle", "cat", "dog"), first=0.0)
    assert_close(turned.maps[:, [1, 2, 0]], found.maps, atol=1e-4, rtol=1e-3)


def test_identical_concepts_share_evenly() -> None:
    twins = maps_of("flux", concepts=("cat", "cat")).maps
    assert_close(twins, torch.full_like(twins, 0.5))


def test_the_two_ways_to_average_agree_for_one_layer_and_one_step_and_differ_for_more() -> None:
    one = [maps_of("flux", average=way, steps=(1,), first=0.5).maps for way in ("maps", "scores")]
    assert_close(*one)
    more = [maps_of("flux", average=way, first=0.0).maps for way in ("maps", "scores")]
    assert float((more[0] - more[1]).abs().max()) > 1e-4
    assert float((one[0] - more[0]).abs().max()) > 1e-4


def first_tokens(pipe: Any, concepts: Iterable[str], length: int = 24) -> Tensor:
    ids = pipe.tokenizer_2(
        list(concepts), padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return pipe.text_encoder_2(ids)[0][:, 0]


def test_it_is_a_stream_that_the_blocks_carry_beside_the_prompt() -> None:
    """Flux, its blocks' own parts called one by one, on what its blocks were given in a bare sampling."""
    pipe, concepts = ready("flux"), ("cat", "castle", "dog")
    model, given, outs = pipe.transformer, [], []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
        for block in model.transformer_blocks
    ]
    hooks += [
        block.attn.to_out[0].register_forward_pre_hook(lambda _, args: outs.append(args[0]))
        for block in model.transformer_blocks
    ]
    hooks.append(
        model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    )
    PIPELINES["flux"].sample(pipe, num_inference_steps=1, true_cfg_scale=1.0)
    for hook in hooks:
        hook.remove()
    call, *blocks = given
    with torch.no_grad():
        pooled = torch.zeros_like(call["pooled_projections"])
        temb = model.time_text_embed(call["timestep"] * 1000, pooled)
        x = model.context_embedder(first_tokens(pipe, concepts))[None]
        turns = [t[24:] for t in blocks[0]["image_rotary_emb"]]  # of the image; concepts are not turned
        expected = []
        for block, seen, out in zip(model.transformer_blocks, blocks, outs, strict=True):
            a = block.attn
            image = block.norm1(seen["hidden_states"], emb=seen["temb"])[0]
            own, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1_context(x, emb=temb)

            def heads(t: Tensor) -> Tensor:
                return t.unflatten(-1, (2, 16))

            def turned(t: Tensor, turns: Any = turns) -> Tensor:
                pairs = torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)
                return t * turns[0][:, None] + pairs * turns[1][:, None]

            q = a.norm_added_q(heads(a.add_q_proj(own)))
            k = torch.cat(
                [a.norm_added_k(heads(a.add_k_proj(own))), turned(a.norm_k(heads(a.to_k(image))))], 1
            )
            v = torch.cat([heads(a.add_v_proj(own)), heads(a.to_v(image))], 1)
            w = torch.einsum("bchd,bkhd->bhck", q, k).div(4).softmax(-1)
            mine = torch.einsum("bhck,bkhd->bchd", w, v).flatten(2)
            expected.append((mine @ out[:, -96:].mT).softmax(1))
            x = x + gate[:, None] * a.to_add_out(mine)
            inner = block.norm2_context(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
            x = x + gate_mlp[:, None] * block.ff_context(inner)
    with sc.attach(pipe, ConceptAttention(concepts=concepts, first=0.0)) as session:
        PIPELINES["flux"].sample(pipe, num_inference_steps=1, true_cfg_scale=1.0)
    found = session.results["concept_attention"].maps.flatten(2)
    assert_close(found, torch.stack(expected).mean(0), atol=1e-4, rtol=1e-3)


@dataclass(eq=False)
class Told(Method):
    """A branch that is the prompt's own call, all tokens of its text taken for concepts; what its layers give."""

    sites: Any = "dit.?.joint"

    def begin(self, run: Run) -> None:
        run.state.update(image={}, text={}, outs={})

    def observe(self, call: AttentionCall) -> None:
        if "cond" in call.pass_.rows:
            rows, image = call.pass_.rows["cond"], call.columns("visual")[0, 0, 0]
            k, v, out = (t[rows] for t in (call.k, call.v, call.out))
            call.run.state["image"][call.site.name] = k[:, :, image], v[:, :, image], out[:, :, image]
            call.run.state["text"][call.site.name] = out[:, :, ~image]

    def branches(self, run: Run) -> Iterable[Branch]:
        self.outs: dict[str, Tensor] = {}
        yield Branch(
            {}, (Concepts(sites=self.sites, count=run.last.text, image=run.state["image"]), Kept(told=self))
        )

    def end(self, run: Run) -> Any:
        return run.state["text"], self.outs


@dataclass(eq=False)
class Kept(Method):
    told: Any = None
    sites: Any = "dit.?.joint"

    def observe(self, call: AttentionCall) -> None:
        assert call.out is not None
        self.told.outs[call.site.name] = call.out[:, :, call.columns("text")[0, 0, 0]]


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_concepts_with_the_prompts_states_modulation_and_context_get_its_outputs(name: str) -> None:
    with sc.attach(ready(name), Told()) as session:
        PIPELINES[name].sample(ready(name), num_inference_steps=1)
    text, outs = session.results["Told"]
    assert text.keys() == outs.keys() and len(text) > 1
    for site, expected in text.items():
        assert_close(outs[site], expected, atol=1e-5, rtol=1e-4)


def planted() -> Any:
    """Flux, whose two first features are what a token shows: it attends to its like, and takes that from it. These
    channels of a head are turned by a position that is 0 for every token of a picture."""
    pipe = PIPELINES["flux"].build()
    model = pipe.transformer
    with torch.no_grad():
        for layer in (model.x_embedder, model.context_embedder):
            layer.weight.zero_()
            layer.bias.zero_()
        model.x_embedder.weight[:2, :2] = torch.eye(2)
        states = first_tokens(pipe, ("cat", "dog"))
        model.context_embedder.weight[:2] = torch.linalg.pinv(states).T
        for block in model.transformer_blocks:
            for part in (block.norm1.linear, block.norm1_context.linear):
                part.weight.zero_()
                part.bias.zero_()
            a = block.attn
            for part in (a.to_q, a.to_k, a.to_v, a.add_q_proj, a.add_k_proj, a.add_v_proj):
                part.weight.zero_()
                part.bias.zero_()
                part.weight[[0, 1], [0, 1]] = 1.0
                part.weight[[16, 17], [0, 1]] = 1.0
            for norm in (a.norm_q, a.norm_k, a.norm_added_q, a.norm_added_k):
                norm.weight.fill_(2.0)
    return pipe


def test_planted_values_are_found_where_they_were_planted() -> None:
    pipe, region = planted(), torch.zeros(8, 12, dtype=torch.bool)
    region[2:6, 3:9] = True
    latents = torch.zeros(1, 96, 16)
    latents[0, :, 0], latents[0, :, 1] = region.flatten().float(), (~region).flatten().float()
    with sc.attach(pipe, ConceptAttention(**EXAMPLE, first=0.0)) as session:
        PIPELINES["flux"].sample(pipe, num_inference_steps=1, latents=latents, true_cfg_scale=1.0)
    found = session.results["concept_attention"]
    for mask in (found.segmentation()[0] == 0, found.masks()[0, 0], ~found.masks()[0, 1]):
        assert (mask & region).sum() / (mask | region).sum() > 0.9


def test_a_prompt_is_answered_for_every_picture() -> None:
    found = maps_of("flux", prompts=2)
    assert found.maps.shape[0] == 2
    assert float((found.maps[0] - found.maps[1]).abs().max()) > 1e-4


def test_a_real_picture_is_noised_half_way_and_seen_in_one_step() -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe = FluxImg2ImgPipeline(**ready("flux").components)
    pipe.set_progress_bar_config(disable=True)
    picture = F.interpolate(torch.eye(4)[None, None], (32, 48)).expand(1, 3, -1, -1)
    with sc.attach(pipe, ConceptAttention(**EXAMPLE, steps=(0,))) as session:
        pipe(
            PROMPT, image=picture, height=32, width=48, strength=0.5, num_inference_steps=4,
            max_sequence_length=24, output_type="latent",
        )  # fmt: skip
    assert session.results["concept_attention"].maps.shape == (1, 2, 8, 12)


def test_without_concepts_or_with_too_many_it_says_so() -> None:
    with pytest.raises(InputError, match="no concepts"):
        maps_of("flux", concepts=())
    with pytest.raises(InputError, match="25 concepts"):
        maps_of("flux", concepts=("cat",) * 25)
