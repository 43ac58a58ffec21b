"""Costs by torch's own count of what ran, by formulas, and by the memory of the cache."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import generate, subject
from helpers import Exact, method, shared
from torch.utils.flop_counter import FlopCounterMode
from zoo import FAMILIES

import saccade as sc
from core.missing import Evict, Leave, entries, staying
from core.test_tokens import asked
from saccade.core.cost import Cost, bound
from saccade.core.errors import InputError
from saccade.core.tokens import Tokens

LAYERS, WEIGHTS = 4, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # of the tiny llama, in each layer
SPARSEMM = "sparsemm(budget=16, window=4, head_scores=uniform)"


def run(
    model: Any, forward: Callable[[], Any], *methods: Any
) -> tuple[dict[str, Cost], FlopCounterMode, Any]:
    """What was counted, what torch counted at the same time, and what came out."""
    with (
        sc.attach(model, *methods, sc.Count()) as session,
        FlopCounterMode(display=False) as counter,
        Exact(),
    ):
        out = forward()
    return session.results["Count"], counter, out


def by_tower(counter: FlopCounterMode) -> Counter[str]:
    """Of the layers, as torch counts them."""
    found: Counter[str] = Counter()
    for name, operators in counter.get_flop_counts().items():
        if re.search(r"(layers|h)\.\d+$", name):
            found["vision" if re.search("(?i)vision|clip", name) else "text"] += sum(operators.values())
    return found


def llama(queries: int, keys: int, layers: int = 1) -> int:
    """FLOPs of a sample in some layers."""
    return layers * (2 * WEIGHTS * queries + 2 * 2 * 4 * 16 * queries * keys)


@pytest.mark.parametrize("name", ["llama", "llava", "gpt2", "gpt_oss", "deepseek_v3", "gemma3"])
def test_layers_cost_what_torch_counts(name: str) -> None:
    model, inputs = subject(name, "eager"), asked(name)
    with torch.no_grad():
        costs, counter, _ = run(model, lambda: model(**inputs))
    assert costs["prefill"].flops == by_tower(counter)
    assert costs["decode"] == Cost()
    costs, counter, _ = run(model, lambda: generate(model, inputs, 4))
    assert costs["prefill"].flops + costs["decode"].flops == by_tower(counter)
    assert (costs["prefill"].passes, costs["decode"].passes) == (1, 3)


class Twice(sc.Method):
    """Reads the prompt once more, and in the answer its first token."""

    def begin(self, run: Any) -> None:
        run.forward(run.inputs)

    def prediction(self, base: Any, branches: Any, p: Any) -> Any:
        if p.phase == "decode":
            p.run.forward({name: rows[:, :1] for name, rows in p.run.inputs.items()})
        return base


def test_a_further_pass_is_counted_where_it_is_asked_for() -> None:
    model, inputs = subject("llama", "eager"), asked("llama")
    bare, _, _ = run(model, lambda: generate(model, inputs, 3))
    costs, counter, _ = run(model, lambda: generate(model, inputs, 3), Twice())
    rows, tokens = inputs["input_ids"].shape
    assert costs["prefill"].flops["text"] == bare["prefill"].flops["text"] + rows * llama(
        tokens, tokens, LAYERS
    )
    assert costs["decode"].flops["text"] == bare["decode"].flops["text"] + 2 * rows * llama(1, 1, LAYERS)
    assert costs["prefill"].flops + costs["decode"].flops == by_tower(counter)
    assert costs["prefill"].tokens == bare["prefill"].tokens
    assert costs["prefill"].read["text"] > bare["prefill"].read["text"]


def test_what_is_differentiated_is_refused() -> None:
    model, inputs = subject("llama", "eager"), asked("llama")

    class Backward(sc.Method):
        def begin(self, run: Any) -> None:
            run.forward(run.inputs, grad=True)

    with sc.attach(model, Backward(), sc.Count()), pytest.raises(InputError, match="Backward differentiates"):
        model(**inputs)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_what_is_left_out_stands_outside_of_layers(name: str) -> None:
    model, inputs = subject(name, "eager"), asked(name)
    costs, counter, _ = run(model, lambda: model(**inputs))
    outside = re.compile(r"(rotary_emb|lm_head|multi_modal_projector|patch_embedding)$")
    rest = [sum(ops.values()) for path, ops in counter.get_flop_counts().items() if outside.search(path)]
    assert costs["prefill"].flops.total() + sum(rest) == counter.get_total_flops()


def test_tokens_that_leave_spare_the_layers_above() -> None:
    model, inputs = subject("llama", "eager"), asked("llama")
    tokens = inputs["input_ids"].shape[1]
    keep = staying(inputs, share=0.5)
    left, real = int(keep.sum(1).max()), inputs["attention_mask"] != 0
    bare, _, _ = run(model, lambda: generate(model, inputs, 3))
    less, counter, _ = run(model, lambda: generate(model, inputs, 3), Leave(keep={2: keep}))
    assert less["prefill"].flops + less["decode"].flops == by_tower(counter)
    assert bare["prefill"].flops["text"] == 2 * llama(tokens, tokens, LAYERS)
    assert less["prefill"].flops["text"] == 2 * (llama(tokens, tokens, 2) + llama(left, left, 2))
    spared = sum(llama(1, tokens + step, 2) - llama(1, left + step, 2) for step in (1, 2))
    assert bare["decode"].flops["text"] - less["decode"].flops["text"] == 2 * spared
    whole, part = int(real.sum()), int((keep & real).sum())
    assert less["prefill"].tokens == {"text.0": whole, "text.1": whole, "text.2": part, "text.3": part}
    padding = {f"text.{i}": 2 * tokens - whole if i < 2 else 2 * left - part for i in range(LAYERS)}
    assert less["prefill"].padding == padding


def test_features_that_stay_behind_spare_the_text_alone() -> None:
    model, inputs = subject("llava", "eager"), asked("llava")
    half = method(features=lambda item: Tokens(torch.arange(0, item.x.shape[0], 2)))
    bare, _, _ = run(model, lambda: generate(model, inputs, 2))
    less, counter, _ = run(model, lambda: generate(model, inputs, 2), half())
    assert less["prefill"].flops + less["decode"].flops == by_tower(counter)
    assert less["prefill"].flops["vision"] == bare["prefill"].flops["vision"] > 0
    assert less["prefill"].flops["text"] < bare["prefill"].flops["text"]


@pytest.mark.parametrize("stack", ["", "pyramiddrop", SPARSEMM, f"pyramiddrop+{SPARSEMM}"])
def test_the_cache_is_as_large_as_its_tensors(stack: str) -> None:
    model, inputs = subject("llava"), asked("llava")
    costs, _, out = run(model, lambda: generate(model, inputs), *(sc.load(stack) if stack else ()))
    layers = out.past_key_values.layers
    tensors = [
        [getattr(layer, name, None) for name in ("keys", "values", "pos", "shift")] for layer in layers
    ]
    wanted = {f"text.{i}": sum(t.nbytes for t in held if t is not None) for i, held in enumerate(tensors)}
    assert costs["decode"].cache_bytes == wanted
    assert not costs["prefill"].cache_bytes


def test_the_bound_is_the_share_that_is_left() -> None:
    model, inputs = subject("llama"), asked("llama")
    tokens, keep = inputs["input_ids"].shape[1], staying(inputs, share=0.3)
    entry = entries(inputs, "heads")
    left, held = int(keep.sum(1).max()), int(entry.sum(-1).max())
    bare, _, _ = run(model, lambda: generate(model, inputs, 5))
    less, _, _ = run(model, lambda: generate(model, inputs, 3), Leave(keep={1: keep}))
    thin, _, _ = run(model, lambda: generate(model, inputs, 5), Evict(keep=dict.fromkeys(range(4), entry)))

    def step(keys: float) -> float:
        """Bytes that a layer reads."""
        return 8 * (WEIGHTS + 2 * 2 * 2 * 16 * keys)  # keys and values, samples, key heads, width

    found = bound(bare, less)
    assert math.isclose(
        found.prefill, llama(tokens, tokens, 4) / (llama(tokens, tokens) + llama(left, left, 3))
    )
    assert math.isclose(found.decode, 4 * step(tokens + 2.5) / (step(tokens + 1.5) + 3 * step(left + 1.5)))
    found = bound(bare, thin)
    assert found.prefill == 1
    assert math.isclose(found.decode, step(tokens + 2.5) / step(held + 2.5))
    short, _, _ = run(model, lambda: generate(model, inputs, 1))
    assert math.isnan(bound(bare, short).decode)


def test_costs_add_up() -> None:
    model, inputs = subject("llama"), asked("llama")
    once, _, _ = run(model, lambda: generate(model, inputs))
    pieces, _, _ = run(model, lambda: generate(model, inputs, prefill_chunk_size=11))
    twice = once["decode"] + once["decode"]
    assert twice.passes == 2 * once["decode"].passes
    assert twice.flops["text"] == 2 * once["decode"].flops["text"]
    assert twice.cache_bytes["text.3"] == 2 * once["decode"].cache_bytes["text.3"]
    assert pieces["prefill"].passes > 1
    assert pieces["prefill"].tokens == once["prefill"].tokens
    assert pieces["decode"] == once["decode"]


def test_what_shapes_do_not_tell_is_refused() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    replaced = method(replace=lambda call: call.next())
    with sc.attach(model, replaced(sites="text.1.self"), sc.Count()), pytest.raises(InputError, match="Edit"):
        model(**inputs)
    for name, said in (
        ("bloom", r"text\.0\.layer \(BloomBlock"),
        ("t5", r"\(T5Block"),
        ("lfm2", r"\(Lfm2Decoder"),
    ):
        with sc.attach(shared(name), sc.Count()), pytest.raises(InputError, match=said):
            shared(name)(**FAMILIES[name].inputs())
    model = shared("falcon")  # which attends by hand where weights are asked for
    with sc.attach(model, sc.Count()), pytest.raises(InputError, match="did not see"):
        model(**FAMILIES["falcon"].inputs(), output_attentions=True)
