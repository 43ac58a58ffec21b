"""Half of a cache's entries leave after the prompt, with Saccade and with kvpress: `python -m benchmarks.eviction
--kvpress PYTHON [--rounds N]`.

kvpress takes no transformers that Saccade takes. It is measured by its own interpreter, and each against the bare
model beside it; both must write the same words.

    python -m venv .venv-kvpress
    .venv-kvpress/bin/pip install kvpress
    python -m benchmarks.eviction --kvpress .venv-kvpress/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM

from benchmarks.llama import ABOUT, llama
from benchmarks.measure import Row, interleaved, write

LENGTH, KEPT, WINDOW, KERNEL = 2048, 1024, 64, 5
WORDS = 8
Attach = Callable[[LlamaForCausalLM], AbstractContextManager[object]]


def with_saccade() -> dict[str, Attach]:
    from saccade.core.cache import TrackedLayer
    from saccade.core.call import AttentionCall
    from saccade.core.method import Method
    from saccade.core.session import attach

    class KeyNorm(Method):
        """The shortest keys of every head stay."""

        def evict(self, call: AttentionCall, cache: TrackedLayer) -> Tensor:
            return cache.keys.norm(dim=-1).topk(KEPT, largest=False).indices

    class SnapKV(Method):
        """The last entries stay, and what their queries attend to most."""

        def evict(self, call: AttentionCall, cache: TrackedLayer) -> Tensor:
            w = call.weights(slice(-WINDOW, None))[..., :-WINDOW].mean(2)  # (batch, heads, keys)
            w = F.avg_pool1d(w, KERNEL, 1, KERNEL // 2).unflatten(1, (-1, call.groups)).mean(2)
            return F.pad(w, (0, WINDOW), value=torch.inf).topk(KEPT).indices

    options = {"sites": "text.*.self", "phases": ("prefill",)}
    return {
        "Saccade, shortest keys": lambda model: attach(model, KeyNorm(**options)),
        "Saccade, SnapKV": lambda model: attach(model, SnapKV(**options)),
    }


def with_kvpress() -> dict[str, Attach]:
    from kvpress import KnormPress, SnapKVPress

    share = 1 - KEPT / LENGTH
    return {
        "kvpress, shortest keys": KnormPress(share),
        "kvpress, SnapKV": SnapKVPress(share, window_size=WINDOW, kernel_size=KERNEL),
    }


def prefill(model: LlamaForCausalLM, ids: Tensor) -> tuple[Cache, Tensor]:
    cache = DynamicCache(config=model.config)
    out = model(ids, past_key_values=cache, logits_to_keep=1)
    return cache, out.logits.argmax(-1)


def read_on(model: LlamaForCausalLM, cache: Cache, word: Tensor) -> list[int]:
    """So many words more, at the places that they have in the whole text."""
    words = []
    for place in range(LENGTH, LENGTH + WORDS):
        words.append(int(word))
        out = model(word, past_key_values=cache, position_ids=torch.tensor([[place]]), logits_to_keep=1)
        word = out.logits.argmax(-1)
    return words


def mebibytes(cache: Cache) -> float:
    held = [t for layer in cache.layers for t in (layer.keys, layer.values, getattr(layer, "pos", None))]
    return sum(t.numel() * t.element_size() for t in held if t is not None) / 2**20


def measure(name: str, ways: Mapping[str, Attach], rounds: int) -> dict[str, Any]:
    """Every way has a model of its own, on which it stays."""
    bare = llama()
    ids = torch.randint(3, 8_000, (1, LENGTH))
    prefills, readings, words, sizes = {}, {}, {}, {}
    with contextlib.ExitStack() as stack:
        for way, attach in {"bare": contextlib.nullcontext, **ways}.items():
            model = copy.deepcopy(bare)
            stack.enter_context(attach(model))
            cache, word = prefill(model, ids)
            words[way], sizes[way] = read_on(model, copy.deepcopy(cache), word), mebibytes(cache)
            prefills[way] = lambda model=model: prefill(model, ids)
            readings[way] = lambda model=model, cache=cache, word=word: reread(model, cache, word)
        variants = dict.fromkeys(prefills, contextlib.nullcontext)
        found = interleaved(
            f"prefill of {LENGTH:,}, {name}", prefills["bare"], variants, {}, rounds, prefills
        )
        found += interleaved(
            f"{WORDS} words more, {name}", readings["bare"], variants, {}, 4 * rounds, readings
        )
    return {
        "rows": [asdict(row) for row in found],
        "words": words,
        "held": ", ".join(f"{size:.1f} MiB {way}" for way, size in sizes.items()),
        "about": ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers")),
    }


def reread(model: LlamaForCausalLM, cache: Cache, word: Tensor) -> None:
    read_on(model, cache, word)
    cache.crop(-WORDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="more rounds, narrower quartiles (10)")
    parser.add_argument(
        "--kvpress", metavar="PYTHON", help="an interpreter that has kvpress; without it this is one"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if chosen.kvpress is None:
        print(json.dumps(measure("kvpress' environment", with_kvpress(), chosen.rounds)))
        raise SystemExit
    command = [chosen.kvpress, "-m", "benchmarks.eviction", "--rounds", str(chosen.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = measure("Saccade's environment", with_saccade(), chosen.rounds)
    if [*ours["words"].values()] != [*theirs["words"].values()]:
        raise SystemExit(f"They write other words: {ours['words']}, {theirs['words']}")
    notes = {
        "model": ABOUT,
        "kvpress' environment": theirs["about"],
        "cache, Saccade": ours["held"],
        "cache, kvpress": theirs["held"],
        "words written": f"the same {WORDS} in both environments, for each way",
    }
    rows = [Row(**row) for row in (*ours["rows"], *theirs["rows"])]
    print(write("eviction", rows, notes).read_text())
