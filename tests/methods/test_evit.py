"""EViT against towers that are run by hand, the kept patches in the order of their attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers as T
from helpers import Look, shared
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from zoo import FAMILIES, run
from zoo.base import noise

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.evit import EViT, annealed

from .shared import two

MODELS = ("vit", "timm_vit")
EXAMPLE = {"keep": 0.5}
DISCRETE = ("keep",)
DOUBLE = torch.float64
TWICE = {"output": "vision.0:2.self", "hidden": "vision.*.self|vision.*.mlp", "tokens": "vision.*.layer"}
"""In both layers below the last, so that what was fused may leave or be fused again."""


# ---- the paper, layer by layer ------------------------------------------------------------------------------


class Parts(NamedTuple):
    before: nn.Module
    qkv: Callable[[Tensor], list[Tensor]]  # (tiles, tokens, width) each
    out: nn.Module
    heads: int
    behind: nn.Module
    mlp: nn.Module


def parts_of(name: str, layer: Any) -> Parts:
    if name == "timm_vit":
        a = layer.attn
        return Parts(
            layer.norm1, lambda x: a.qkv(x).chunk(3, -1), a.proj, a.num_heads, layer.norm2, layer.mlp
        )
    a = layer.attention if name == "vit" else layer.self_attn
    out = a.o_proj if name == "vit" else a.out_proj
    norms = ("layernorm_before", "layernorm_after") if name == "vit" else ("layer_norm1", "layer_norm2")
    before, behind = (getattr(layer, norm) for norm in norms)
    return Parts(before, lambda x: [a.q_proj(x), a.k_proj(x), a.v_proj(x)], out, 4, behind, layer.mlp)


def layers_of(name: str, model: Any) -> Any:
    if name == "timm_vit":
        return model.blocks
    return model.layers if name == "vit" else model.vision_model.encoder.layers


def by_hand(name: str, model: Any, h: Tensor, keep: float, stages: tuple[int, ...], fuse: bool) -> Tensor:
    """The class token behind the last layer, of states (tiles, tokens, width) before the first."""
    for number, layer in enumerate(layers_of(name, model)):
        p = parts_of(name, layer)
        q, k, v = (t.unflatten(-1, (p.heads, -1)).transpose(1, 2) for t in p.qkv(p.before(h)))
        w = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = h + p.out((w @ v).transpose(1, 2).flatten(2))
        if number in stages:
            rows = []
            for tile, a in zip(x, w.mean(1)[:, 0]):
                order = sorted(range(1, len(a)), key=lambda j: -float(a[j].detach()))
                count = math.ceil(keep * (len(a) - 1))
                fused = torch.stack([a[j] * tile[j] for j in order[count:]]).sum(0)
                rows.append(torch.stack([tile[0], *(tile[j] for j in order[:count]), *[fused] * fuse]))
            x = torch.stack(rows)
        h = x + p.mlp(p.behind(x))
    return h[:, 0]


def first_input(name: str, model: Any) -> Tensor:
    """States before the first layer."""
    seen: list[Tensor] = []
    hook = layers_of(name, model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, two(FAMILIES[name], DOUBLE))
    hook.remove()
    return seen[0]


def class_token(name: str, model: Any, *methods: EViT) -> Tensor:
    """Behind the last layer."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out)[:, 0])

    hook = layers_of(name, model)[-1].register_forward_hook(keep)
    with sc.attach(model, *methods):
        run(model, two(FAMILIES[name], DOUBLE))
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["vit", "timm_vit", "clip"])
def test_it_is_the_papers_tower_whatever_the_order_of_what_stays(name: str, fuse: bool) -> None:
    model = shared(name, DOUBLE)
    expected = by_hand(name, model, first_input(name, model), 0.5, (0, 1), fuse)
    got = class_token(name, model, EViT(keep=0.5, fuse=fuse, sites=TWICE))
    assert_close(got, expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_by_default_of_three_layers_the_second_is_a_stage() -> None:
    model = shared("vit", DOUBLE)
    expected = by_hand("vit", model, first_input("vit", model), 0.3, (1,), True)
    assert_close(class_token("vit", model, EViT(keep=0.3)), expected, atol=1e-10, rtol=0)


def test_all_kept_is_the_model() -> None:
    model, inputs = shared("vit"), two(FAMILIES["vit"])
    with sc.attach(model, EViT(keep=1.0)):
        kept = run(model, inputs)
    assert torch.equal(kept, run(model, inputs))


# ---- how many, and what it costs ----------------------------------------------------------------------------


def deit(width: int, heads: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    config = T.ViTConfig(**sizes, image_size=224, patch_size=16)
    return T.ViTModel._from_config(config, attn_implementation="eager").eval()


def test_so_many_tokens_come_to_each_layer() -> None:
    model, look = deit(12, 3), Look(tell=lambda call: call.q.shape[2])
    with sc.attach(model, EViT(keep=0.7), look):
        run(model, {"pixel_values": noise(1, 3, 224, 224)})
    counts = [told for _, _, told in look.seen]
    assert counts == [1 + 196] * 4 + [1 + 138 + 1] * 3 + [1 + 98 + 1] * 3 + [1 + 70 + 1] * 2


def test_deit_spares_a_third_of_its_operations_but_for_the_mlps_of_what_leaves() -> None:
    width, model, picture = 384, deit(384, 6), {"pixel_values": noise(1, 3, 224, 224)}

    def counted(*methods: EViT) -> int:
        with sc.attach(model, *methods), FlopCounterMode(display=False) as counter:
            run(model, picture)
        return counter.get_total_flops()

    def linear(tokens: int, maps: int) -> int:
        return 2 * tokens * maps * width**2

    def of_layers(attending: list[int], thinking: list[int]) -> int:
        of_attention = sum(linear(n, 4) + 4 * n * n * width for n in attending)
        return of_attention + sum(linear(n, 8) for n in thinking)

    attending = [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2
    thinking = [*attending[1:], 72]  # the paper's: behind attention they are gone
    bare, ours = counted(), counted(EViT(keep=0.7))
    whole, papers = of_layers([197] * 12, [197] * 12), of_layers(attending, thinking)
    extra = 3 * linear(1, 2) + 2 * (140 + 100 + 72) * width  # the class token's row again, and sums
    assert abs((bare - ours) - (whole - of_layers(attending, attending))) < 3 * extra
    assert 1 - ours / bare == pytest.approx(0.30, abs=0.01)
    assert 1 - papers / whole == pytest.approx(0.34, abs=0.01)


# ---- training -----------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_papers_tower() -> None:
    """Also those that go through the attention by which tokens are fused."""
    model: Any = FAMILIES["vit"].build().double()
    states, weight = first_input("vit", model).detach(), model.layers[0].attention.q_proj.weight
    (expected,) = torch.autograd.grad(by_hand("vit", model, states, 0.5, (0, 1), True).square().sum(), weight)
    seen: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out[:, 0]))
    with sc.attach(model, EViT(keep=0.5, sites=TWICE)):
        model(**two(FAMILIES["vit"], DOUBLE))
    hook.remove()
    (got,) = torch.autograd.grad(seen[0].square().sum(), weight)
    assert_close(got, expected, atol=1e-9, rtol=1e-6)


def test_a_tower_learns_while_the_rate_is_annealed() -> None:
    assert annealed(0, 0.6) == 1 and annealed(1, 0.6) == annealed(2, 0.6) == 0.6
    assert annealed(0.5, 0.6) == pytest.approx(0.8) and annealed(0.25, 0.6) > 0.9
    torch.manual_seed(0)
    model: Any = FAMILIES["vit"].build().train()
    pictures, classes = noise(8, 3, 48, 48), torch.arange(8) % 2
    pictures[classes == 1, :, :24] += 1
    learner, losses, method = torch.optim.Adam(model.parameters(), 1e-3), [], EViT()
    with sc.attach(model, method):
        for step in range(20):
            method.keep = annealed(step / 15, 0.5)
            logits = model(pixel_values=pictures).pooler_output[:, :2]
            losses.append(nn.functional.cross_entropy(logits, classes))
            learner.zero_grad()
            losses[-1].backward()
            learner.step()
    assert losses[-1] < 0.5 * losses[0]


# ---- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "why"), [("dinov2", "simply add"), ("siglip_vision", "has none")])
def test_a_tower_that_cannot_fuse_is_refused(name: str, why: str) -> None:
    model = shared(name)
    with sc.attach(model, EViT(keep=0.5)), pytest.raises(InputError, match=why):
        run(model, two(FAMILIES[name]))
