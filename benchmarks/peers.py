"""The same tasks with Saccade, nnsight, TransformerLens and by hand: `python -m benchmarks.peers [--rounds N]`.

    python -m venv .venv-peers
    .venv-peers/bin/pip install -e '.[report]' nnsight transformer-lens
    .venv-peers/bin/python -m benchmarks.peers

Read the last row of attention in every layer; observe the last state of every layer; halve what a layer's attention
gives to the first columns. Every way has a copy of the same model, all in one process, and all must find the same
numbers. TransformerLens computes attention by hand, whatever is asked for; nnsight reads weights where the whole
model does, and otherwise makes them from the query and the keys on their way to the fused kernel. Memory is by how
much a fresh process grows in one forward, the median of three.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import nnsight
import torch
from nnsight import NNsight
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.llama import ABOUT, hooked, last_row, last_row_of_llama, llama
from benchmarks.measure import Row, in_fresh_process, interleaved, peak_bytes, write
from saccade.core.call import AttentionCall
from saccade.core.method import Method
from saccade.core.passes import HiddenCall
from saccade.core.recorder import Record
from saccade.core.session import attach

Work = Callable[..., list[Tensor] | None]  # of ids and further inputs of the model: what was found
Build = Callable[[LlamaForCausalLM], Work]
LAYER, COLUMNS = 3, 64  # where weights are edited


def bare(model: LlamaForCausalLM) -> Work:
    def work(ids: Tensor, **inputs: Any) -> None:
        model(ids, logits_to_keep=1, **inputs)

    return work


def eager(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.set_attn_implementation("eager")
    return model


def bridged(model: LlamaForCausalLM) -> Any:
    return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)


# ---- the last row or state of every layer ----------------------------------------------------------------


@dataclass(eq=False)
class LastRow(Method):
    sites: str = "text.*.self"
    found: list[Tensor] = field(default_factory=list)

    def observe(self, call: AttentionCall) -> None:
        self.found.append(call.weights("last"))


@dataclass(eq=False)
class LastState(Method):
    sites: str = "text.*.layer"
    found: list[Tensor] = field(default_factory=list)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.found.append(h[:, -1])
        return h


def by_saccade(method: type[LastRow | LastState]) -> Build:
    def build(model: LlamaForCausalLM) -> Work:
        seeing = method()
        attach(model, seeing)

        def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
            seeing.found = []
            model(ids, logits_to_keep=1, **inputs)
            return seeing.found

        return work

    return build


def saccade_rows_once(model: LlamaForCausalLM) -> Work:
    def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
        method = LastRow()
        with attach(model, method):
            model(ids, logits_to_keep=1, **inputs)
        return method.found

    return work


def saccade_record(model: LlamaForCausalLM) -> Work:
    session = attach(model, Record(rows="last", dtype="float32"))

    def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
        model(ids, logits_to_keep=1, **inputs)
        return [part.weights for part in session.results["Record"].parts]

    return work


def hook_rows(model: LlamaForCausalLM) -> Work:
    attention = [layer.self_attn for layer in model.model.layers]

    def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
        found: list[Tensor] = []

        def hook(module: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
            found.append(last_row_of_llama(module, kwargs))

        with hooked(attention, hook):
            model(ids, logits_to_keep=1, **inputs)
        return found

    return work


def hook_states(model: LlamaForCausalLM) -> Work:
    found: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: found.append(out[:, -1]))

    def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
        found.clear()
        model(ids, logits_to_keep=1, **inputs)
        return [*found]

    return work


def eager_rows(model: LlamaForCausalLM) -> Work:
    eager(model)

    def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
        out = model(ids, logits_to_keep=1, output_attentions=True, **inputs)
        return [w[:, :, -1:] for w in out.attentions]

    return work


def by_nnsight(read: Callable[[Any], Tensor], *, whole_eager: bool = False) -> Build:
    """`read` finds it in a traced layer."""

    def build(model: LlamaForCausalLM) -> Work:
        traced = NNsight(eager(model) if whole_eager else model)

        def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
            with traced.trace(ids, logits_to_keep=1, **inputs):
                found = nnsight.save([])
                for layer in traced.model.layers:
                    found.append(read(layer))
            return found

        return work

    return build


def traced_row(layer: Any) -> Tensor:
    q, k = layer.self_attn.source.attention_interface_1.inputs[0][1:3]
    return last_row(q, k)


def by_lens(hook: str) -> Build:
    def build(model: LlamaForCausalLM) -> Work:
        bridge = bridged(model)
        names = [f"blocks.{i}.{hook}" for i in range(len(bridge.blocks))]

        def work(ids: Tensor, **inputs: Any) -> list[Tensor]:
            _, cache = bridge.run_with_cache(
                ids, return_cache_object=False, names_filter=names, pos_slice=-1, logits_to_keep=1, **inputs
            )
            return [cache[name] for name in names]

        return work

    return build


# ---- half of what a layer gives to the first columns -----------------------------------------------------


@dataclass(eq=False)
class Halve(Method):
    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        return torch.cat([w[..., :COLUMNS] / 2, w[..., COLUMNS:]], -1)


def saccade_edit(model: LlamaForCausalLM) -> Work:
    attach(model, Halve(sites=f"text.{LAYER}.self"))
    return lambda ids: [model(ids, logits_to_keep=1).logits]


def nnsight_edit(model: LlamaForCausalLM) -> Work:
    traced = NNsight(eager(model))
    attention = traced.model.layers[LAYER].self_attn

    def work(ids: Tensor) -> list[Tensor]:
        with traced.trace(ids, logits_to_keep=1):
            attention.source.attention_interface_1.source.nn_functional_softmax_0.output[..., :COLUMNS] /= 2
            logits = traced.output.logits.save()
        return [logits]

    return work


def lens_edit(model: LlamaForCausalLM) -> Work:
    bridge = bridged(model)

    def halve(w: Tensor, hook: object) -> Tensor:
        w[..., :COLUMNS] /= 2
        return w

    hooks = [(f"blocks.{LAYER}.attn.hook_pattern", halve)]
    return lambda ids: [bridge.run_with_hooks(ids, fwd_hooks=hooks, logits_to_keep=1)]


# ---- measuring -------------------------------------------------------------------------------------------

TASKS: dict[str, dict[str, Build]] = {
    "last row of every layer": {
        "bare": bare,
        "Saccade, a method": by_saccade(LastRow),
        "Saccade, attached for this forward alone": saccade_rows_once,
        "Saccade, Record": saccade_record,
        "raw hooks that make the query again": hook_rows,
        "nnsight, from query and keys": by_nnsight(traced_row),
        "nnsight, whole model eager": by_nnsight(
            lambda layer: layer.self_attn.output[1][:, :, -1:], whole_eager=True
        ),
        "TransformerLens": by_lens("attn.hook_pattern"),
        "whole model eager, output_attentions": eager_rows,
    },
    "last state of every layer": {
        "bare": bare,
        "Saccade": by_saccade(LastState),
        "raw hooks": hook_states,
        "nnsight": by_nnsight(lambda layer: layer.output[:, -1]),
        "TransformerLens": by_lens("hook_out"),
    },
    "edit of one layer's weights": {
        "bare": bare,
        "Saccade": saccade_edit,
        "nnsight, whole model eager": nnsight_edit,
        "TransformerLens": lens_edit,
    },
}


def works(task: str, model: LlamaForCausalLM) -> dict[str, Work]:
    return {name: build(copy.deepcopy(model)) for name, build in TASKS[task].items()}


def agree(found: Mapping[str, list[Tensor] | None]) -> None:
    """What is fast must also be right."""
    stacked = {
        name: torch.stack(tensors).flatten(1) for name, tensors in found.items() if tensors is not None
    }
    first, *others = stacked
    for other in others:
        torch.testing.assert_close(
            stacked[other], stacked[first], rtol=1e-4, atol=1e-5, msg=f"{first}, {other}"
        )


def prefill(task: str, model: LlamaForCausalLM, length: int, rounds: int) -> list[Row]:
    ids = torch.randint(3, 8_000, (1, length))
    ways = {name: partial(work, ids) for name, work in works(task, model).items()}
    agree({name: work() for name, work in ways.items()})
    return timed(f"{task}, prefill of {length:,}", ways, rounds)


def decode(task: str, model: LlamaForCausalLM, length: int, rounds: int) -> list[Row]:
    """One word more on a cache."""
    ids = torch.randint(3, 8_000, (1, length))

    def way(work: Work) -> Callable[[], list[Tensor] | None]:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, logits_to_keep=1)

        def step() -> list[Tensor] | None:
            found = work(ids[:, :1], past_key_values=cache)
            cache.crop(-1)
            return found

        return step

    ways = {name: way(work) for name, work in works(task, model).items()}
    agree({name: step() for name, step in ways.items()})
    return timed(f"{task}, one word more on {length:,}", ways, rounds)


def timed(case: str, ways: Mapping[str, Callable[[], object]], rounds: int) -> list[Row]:
    variants = dict.fromkeys(ways, contextlib.nullcontext)
    return interleaved(case, ways["bare"], variants, {}, rounds, ways)


def peak(task: str, variant: str, length: int) -> int:
    """Of one forward, in a process that has done nothing else of the kind."""
    work = TASKS[task][variant](llama())
    work(torch.randint(3, 8_000, (1, COLUMNS)))
    ids = torch.randint(3, 8_000, (1, length))
    return peak_bytes(lambda: work(ids))


def with_memory(rows: list[Row], task: str, length: int) -> list[Row]:
    def grown(variant: str) -> float:
        arguments = ("benchmarks.peers", "--peak", task, variant, str(length))
        return statistics.median(in_fresh_process(*arguments) for _ in range(3)) / 2**20

    return [replace(row, mebibytes=grown(row.variant)) for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="more rounds, narrower quartiles (20)")
    parser.add_argument("--peak", nargs=3, metavar=("TASK", "VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if chosen.peak:
        task, variant, length = chosen.peak
        print(peak(task, variant, int(length)))
        raise SystemExit
    model, found = llama(), []
    for task in TASKS:
        found += prefill(task, model, 512, chosen.rounds)
        found += with_memory(prefill(task, model, 2048, max(5, chosen.rounds // 4)), task, 2048)
    for task in ("last row of every layer", "last state of every layer"):
        found += decode(task, model, 512, 2 * chosen.rounds)
    said = {name: version(name) for name in ("nnsight", "transformer-lens")}
    print(write("peers", found, {"model": ABOUT, **said}).read_text())
