"""MoBA in models against an attention of the tests' own, query by query; and as a module."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from helpers import assert_as_good_as, shared
from torch import Tensor
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from zoo import family, run
from zoo.base import TEXT, enliven, words

import saccade as sc
from saccade import catalog
from saccade.core.errors import AttachError, InputError
from saccade.layers.moba import MoBA, MoBAttention

from . import test_shared as checks
from .shared import generated

EXAMPLE = {"block": 4, "top": 2}
DISCRETE = ("top",)
MODELS = ("llama", "gpt2")
DOUBLE = torch.float64


# ---- in a model, by hand ---------------------------------------------------------------------------------


def by_hand(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """One softmax over the tokens of the chosen blocks, for one sample and from the first token on."""
    block, top, groups = EXAMPLE["block"], EXAMPLE["top"], q.shape[1] // k.shape[1]
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        keys, values = k[0, h // groups], v[0, h // groups]
        for i in range(q.shape[2]):
            means = [keys[b * block : (b + 1) * block].mean(0) for b in range(i // block)]
            order = sorted(range(i // block), key=lambda b: -float(q[0, h, i] @ means[b]))
            seen = [j for j in range(i + 1) if j // block in (i // block, *order[: top - 1])]
            out[0, h, i] = (keys[seen] @ q[0, h, i] * scale).softmax(0) @ values[seen]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("by_blocks", by_hand)
AttentionMaskInterface.register("by_blocks", eager_mask)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_prompt_and_what_is_written_on_it(name: str) -> None:
    model, oracle = shared(name, DOUBLE), shared(name, DOUBLE, "by_blocks")
    ids = words(1, 27)
    with sc.attach(model, MoBA(**EXAMPLE)):
        got = generated(model, {"input_ids": ids}, 8)
    expected = run(oracle, {"input_ids": got.sequences})
    assert_close(torch.stack(got.logits, 1), expected[:, 26:-1].float(), atol=1e-5, rtol=0)


def test_it_replaces_attention() -> None:
    model, ids = shared("llama", DOUBLE), words(1, 27)
    with sc.attach(model, MoBA(**EXAMPLE)):
        got = run(model, {"input_ids": ids})
    assert_close(got, run(shared("llama", DOUBLE, "by_blocks"), {"input_ids": ids}), atol=1e-10, rtol=0)


def test_only_where_it_is_wanted() -> None:
    model, ids = shared("llama", DOUBLE), words(1, 27)
    oracle = family("llama").build().double()
    for layer in oracle.model.layers[1:3]:
        layer.self_attn.config = type(layer.self_attn.config)(**oracle.config.to_dict())
        layer.self_attn.config._attn_implementation = "by_blocks"
    with sc.attach(model, MoBA(**EXAMPLE, sites="text.1:3.self")):
        got = run(model, {"input_ids": ids})
    assert_close(got, run(oracle, {"input_ids": ids}), atol=1e-10, rtol=0)


def test_a_model_with_masks_of_its_own_gets_the_same() -> None:
    """Eager attention has a mask for everything."""
    ids = words(1, 27)
    both = []
    for implementation in ("sdpa", "eager"):
        model = shared("llama", DOUBLE, implementation)
        with sc.attach(model, MoBA(**EXAMPLE)):
            both.append(run(model, {"input_ids": ids}))
    assert_close(*both, atol=1e-5, rtol=0)  # the eager softmax is in float32


def test_a_cache_that_was_cut_back() -> None:
    """Means of blocks that were taken back are made again."""
    model, ids = shared("llama", DOUBLE), words(1, 27)
    other = torch.cat([ids[:, :13], words(1, 14, seed=8)], 1)
    with sc.attach(model, MoBA(**EXAMPLE)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            cache.crop(-14)
            assert cache.get_seq_length() == 13
            steps = other[:, 13:].split(1, 1)
            got = torch.cat([model(input_ids=step, past_key_values=cache).logits for step in steps], 1)
    expected = run(shared("llama", DOUBLE, "by_blocks"), {"input_ids": other})[:, 13:]
    assert_close(got, expected, atol=1e-10, rtol=0)


def test_a_model_with_a_scale_of_its_own() -> None:
    made = []
    for implementation in ("sdpa", "by_blocks"):
        config = T.GraniteConfig(**TEXT, attention_multiplier=0.4)
        one = T.GraniteForCausalLM._from_config(config, attn_implementation=implementation)
        made.append(enliven(one).double().eval())
    model, oracle = made
    with sc.attach(model, MoBA(**EXAMPLE)):
        got = run(model, {"input_ids": words(1, 27)})
    assert_close(got, run(oracle, {"input_ids": words(1, 27)}), atol=1e-10, rtol=0)


def test_attention_both_ways_is_refused() -> None:
    model = shared("bert")
    try:
        with sc.attach(model, MoBA()), pytest.raises(InputError, match="both ways"):
            run(model, {"input_ids": words(1, 9)})
    except AttachError:
        pass


def entry() -> checks.Entry:
    return checks.Entry(catalog.entry("moba").card, catalog.load_class("moba"), sys.modules[__name__])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("check", checks.ON_MODELS["method"], ids=checks.name_of)
def test_shared_checks_on_models(check: Any, name: str) -> None:
    check(checks.Trial(entry(), family(name)))


@pytest.mark.parametrize("check", checks.ONCE["method"], ids=checks.name_of)
def test_shared_checks(check: Any) -> None:
    check(entry())


# ---- as a module -----------------------------------------------------------------------------------------


def layer(dtype: torch.dtype = DOUBLE, **options: Any) -> MoBAttention:
    torch.manual_seed(0)
    return MoBAttention(32, 4, **{"key_heads": 2, "block": 8, "top": 2, **options}).to(dtype)


def states(batch: int, tokens: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(dtype)


def dense(module: MoBAttention, x: Tensor) -> Tensor:
    """Causal attention with the module's own weights."""
    heads = [(x @ w.weight.T).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (module.q, module.k, module.v)]
    out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) @ module.o.weight.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 63), (1, 100)])
def test_with_all_blocks_it_is_dense_forward_and_backward(
    dtype: torch.dtype, batch: int, tokens: int
) -> None:
    results = []
    for kind, form in ((DOUBLE, dense), (dtype, dense), (dtype, lambda module, x: module(x))):
        module = layer(dtype, top=99).to(kind)
        x = states(batch, tokens, dtype).to(kind).requires_grad_()
        out = form(module, x)
        out.float().square().sum().backward()
        results.append([out.detach(), x.grad, *(w.grad for w in module.parameters())])
    for exact, plain, got in zip(*results, strict=True):
        assert_as_good_as(got, plain, exact)


def test_step_by_step_on_its_cache() -> None:
    module, x = layer(), states(3, 40)
    cache: dict[str, Tensor] = {}
    parts = [module(part, cache=cache) for part in x.split([21, 1, 1, 1, 9, 1, 6], 1)]
    assert_close(torch.cat(parts, 1), module(x))
    assert cache["means"].shape == (3, 2, 5, 8)


def test_padding_on_either_side_changes_nothing() -> None:
    module, x = layer(), states(2, 30)
    for real in (slice(7, 30), slice(0, 23)):
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[1] = False
        mask[1, real] = True
        got = module(x, mask=mask)
        assert got.isfinite().all()
        assert_close(got[0], module(x[:1])[0])
        assert_close(got[1, real], module(x[1:, real])[0])


def test_what_the_module_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="context"):
        layer()(states(1, 4), states(1, 4))
    with pytest.raises(InputError, match="not both"):
        layer()(states(1, 4), mask=torch.ones(1, 4, dtype=torch.bool), cache={})
    for heads, key_heads in ((5, 1), (4, 3)):
        with pytest.raises(InputError, match="even"):
            MoBAttention(32, heads, key_heads)
