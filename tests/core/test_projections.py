"""Matrices of heads against the models' own weights, cut by hand, and against what goes into their attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Look, shared, unchanged
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import AttachError

Cut = Callable[[Any], tuple[Tensor, Tensor, Tensor, Tensor]]


def by_head(weight: Tensor, heads: int) -> Tensor:
    """Of (out, in): (heads, in, dim)."""
    return weight.view(heads, -1, weight.shape[1]).transpose(1, 2)


def llama(model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One linear layer each, keys and values of two heads."""
    a = model.model.layers[1].self_attn
    return (
        by_head(a.q_proj.weight, 4),
        by_head(a.k_proj.weight, 2),
        by_head(a.v_proj.weight, 2),
        a.o_proj.weight.T.reshape(4, 16, 64),
    )


def gpt2(model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All queries, all keys, all values in one, turned round."""
    a = model.transformer.h[1].attn
    q, k, v = (part.T for part in a.c_attn.weight.split(64, 1))
    return by_head(q, 4), by_head(k, 4), by_head(v, 4), a.c_proj.weight.view(4, 16, 64)


def falcon(model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two groups, in each the queries of two heads, a key and a value, which it repeats."""
    a = model.transformer.h[1].self_attention
    groups = a.query_key_value.weight.view(2, 4, 16, 64).transpose(2, 3)  # (groups, parts, in, dim)
    q = groups[:, :2].reshape(4, 64, 16)
    k, v = (groups[:, part].repeat_interleave(2, 0) for part in (2, 3))
    return q, k, v, a.dense.weight.T.reshape(4, 16, 64)


@pytest.mark.parametrize("cut", [llama, gpt2, falcon])
def test_they_are_the_models_own_weights(cut: Cut) -> None:
    model = shared(cut.__name__)
    with unchanged(model), sc.attach(model) as session:
        found = session.matrices("text.1.self")
    for mine, theirs in zip((found.q, found.k, found.v, found.o), cut(model), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen3",
        "gpt2",
        "falcon",
        "gpt_oss",
        "bert",
        "modernbert",
        "t5",
        "llava",
        "qwen2_5_vl",
        "molmo2",
    ],
)
def test_values_and_outputs_follow_from_them(name: str) -> None:
    """Between two tokens, so that biases fall out: of values that of x W_v, of what attention adds that of
    the sum over heads of o_h W_o."""
    model, site = shared(name, torch.float64), "text.1.self"
    look = Look(tell=lambda call: (call.v, call.out), sites=site)
    seen: dict[str, Tensor] = {}
    with sc.attach(model, look) as session:
        found = session.matrices(site)
        look.seen.clear()
        module = next(s.module for s in session.sites if s.name == site)
        dense = model.encoder.layer[1].attention.output.dense if name == "bert" else module

        def kept(_: Any, args: Any, kwargs: Any) -> None:
            seen["x"] = (*args, *kwargs.values())[0]

        hooks = [
            module.register_forward_pre_hook(kept, with_kwargs=True),
            dense.register_forward_hook(lambda _, __, out: seen.update(y=out if name == "bert" else out[0])),
        ]
        run(model, family(name).inputs())
        for hook in hooks:
            hook.remove()
    v, out = look.at(site)[-1]

    def between(t: Tensor) -> Tensor:
        return t[..., 1:, :] - t[..., :1, :]

    assert_close(between(v), between(seen["x"])[:, None] @ found.v)
    assert_close(between(seen["y"]), (between(out) @ found.o).sum(1))


def test_heads_of_a_group_share_their_values() -> None:
    with sc.attach(shared("llama")) as session:
        found = session.matrices("text.0.self")
    assert [torch.equal(found.value(a), found.value(b)) for a, b in ((0, 1), (1, 2), (2, 3))] == [
        True,
        False,
        True,
    ]


def test_they_follow_the_weights_when_these_change() -> None:
    model = family("llama").build()
    with sc.attach(model) as session, torch.no_grad():
        before = session.matrices("text.1.self")
        model.model.layers[1].self_attn.v_proj.weight.mul_(2)
        assert_close(session.matrices("text.1.self").v, 2 * before.v)


def test_an_mlp_goes_with_the_norm_before_it() -> None:
    h = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layer, block = shared("llama").model.layers[0], shared("gpt2").transformer.h[0]
    for name, expected in (
        ("llama", layer.mlp(layer.post_attention_layernorm(h))),
        ("gpt2", block.mlp(block.ln_2(h))),
    ):
        with sc.attach(shared(name)) as session:
            assert torch.equal(session.mlp("text.0.mlp", h), expected)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deepseek_v3", "queries are not made of what the layer is given"),
        ("gemma3n", "values are changed on their way"),
        ("bloom", "written out by hand"),
        ("vit", "a forward of words alone fails"),
        ("blip2", "a forward of words alone fails"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(name: str, why: str) -> None:
    model = shared(name)
    site = "vision.0.self" if name == "vit" else "text.0.self"
    with unchanged(model), sc.attach(model) as session, pytest.raises(AttachError, match=why):
        session.matrices(site)


def test_other_towers_gates_and_weights_that_are_not_all_are_refused() -> None:
    with (
        sc.attach(shared("llava")) as session,
        pytest.raises(AttachError, match="no self-attention of the main"),
    ):
        session.matrices("vision.0.self")
    for part, why in (("v_proj", "more than multiply"), ("o_proj", "goes through more")):
        model = family("llama").build()
        attention = model.model.layers[0].self_attn
        inner = getattr(attention, part)
        forward = inner.forward
        if part == "v_proj":
            inner.forward = lambda x, forward=forward: forward(x) + x.sum(-1, keepdim=True)
        else:
            setattr(attention, part, torch.nn.Sequential(torch.nn.Tanh(), inner))
        with sc.attach(model) as session, pytest.raises(AttachError, match=why):
            session.matrices("text.0.self")


def test_a_decoder_without_a_norm_before_its_mlp_is_refused() -> None:
    with sc.attach(shared("gemma3n")) as session, pytest.raises(AttachError, match="no norm is seen"):
        session.mlp("text.0.mlp", torch.zeros(1, 64))
