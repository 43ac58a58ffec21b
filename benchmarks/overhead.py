"""What it costs to have something attached: `python -m benchmarks.overhead [--rounds N] [--quick]`.

A Llama of 12 layers, 512 wide, with 32,000 words; prefill of 512 and 4,096 tokens with the last logits only,
and one token more on a cache of that length.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from benchmarks.measure import Row, Variant, in_fresh_process, interleaved, peak_bytes, write
from saccade.core.branch import Branch
from saccade.core.cache import TrackedLayer
from saccade.core.call import AttentionCall
from saccade.core.method import Method
from saccade.core.passes import Run
from saccade.core.recorder import Record
from saccade.core.session import attach
from saccade.core.tokens import Tokens, TokensCall

METHODS = "from saccade.cli import main; main(['methods'])"
IMAGE = 7  # the placeholder of a picture
PEAKS = {
    "words": "the last row",
    "half of it pictures": "the image columns of the last row",
}  # what is recorded


@dataclass(eq=False)
class Observe(Method):
    """Does nothing, at every site."""

    def observe(self, call: AttentionCall) -> None:
        pass


@dataclass(eq=False)
class LastRow(Method):
    """Computes the last row's weights, everywhere."""

    def observe(self, call: AttentionCall) -> None:
        call.weights("last")


@dataclass(eq=False)
class KeepTokens(Method):
    """Asks which tokens stay, and keeps all."""

    sites: str = "text.1.layer"
    phases: tuple[str, ...] = ("prefill", "extend")

    def tokens(self, call: TokensCall) -> Tokens:
        return Tokens(torch.ones(call.h.shape[1], dtype=torch.bool))


@dataclass(eq=False)
class KeepCache(Method):
    """A cache that knows its positions and loses nothing."""

    def evict(self, call: AttentionCall, cache: TrackedLayer) -> Tensor | None:
        return None


@dataclass(eq=False)
class Beside(Method):
    """The same prompt once more, as a branch."""

    def branches(self, run: Run) -> list[Branch]:
        return [Branch(run.inputs)]


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=8192, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config()).eval()


def seeing() -> LlavaForConditionalGeneration:
    """The same decoder behind a small tower, whose every picture is 256 tokens."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=224,
        patch_size=14,
    )  # fmt: skip
    both = LlavaConfig(vision_config=tower, text_config=config(), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(both).eval()


def _floor(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
):
    """The least that last-row weights can cost: the native operator, then one product and a softmax. In the other
    order long keys would still be in the processor's cache when the operator wants them."""
    out = sdpa_attention_forward(module, query, key, value, mask, **options)
    ((query[:, :, -1:] @ key.transpose(-1, -2)) * module.scaling).softmax(-1)
    return out


@contextlib.contextmanager
def floor(llama: LlamaForCausalLM) -> Iterator[None]:
    AttentionInterface.register("floor", _floor)
    AttentionMaskInterface.register("floor", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    llama.set_attn_implementation("floor")
    try:
        yield
    finally:
        llama.set_attn_implementation("sdpa")


def run(rounds: int, lengths: tuple[int, ...]) -> tuple[list[Row], dict[str, str]]:
    llama = model()
    bare: Variant = contextlib.nullcontext
    rows: list[Row] = []
    notes = {
        "model": "Llama, 512 wide, 12 layers, 8 heads, 32,000 words, random weights, float32, batch 1",
        "import saccade, with the start of python": f"{seconds('import saccade'):.3f} s (limit 0.2)",
        "saccade methods": f"{seconds(METHODS):.3f} s (limit 0.6)",
    }
    with torch.no_grad():
        for length in lengths:
            ids = torch.randint(3, 32_000, (1, length))
            cache = DynamicCache(config=llama.config)
            llama(ids, past_key_values=cache)

            def prefill(ids: Tensor = ids) -> None:
                llama(ids, logits_to_keep=1, use_cache=True)

            def warm(ids: Tensor = ids) -> None:
                llama(ids[:, :64], logits_to_keep=1, use_cache=True)

            def decode(ids: Tensor = ids, cache: DynamicCache = cache) -> None:
                llama(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                cache.crop(-1)

            reading: dict[str, Variant] = {
                "bare": bare,
                "bare again": bare,
                "Saccade, observe": lambda: attach(llama, Observe()),
            }
            counts = (rounds, 10 * rounds) if length < 1000 else (max(5, rounds // 4), 4 * rounds)
            rows += interleaved(
                f"prefill {length}", prefill, reading, {"Saccade, observe": 1.02}, counts[0], warm=warm
            )
            rows += interleaved(f"decode at {length}", decode, reading, {"Saccade, observe": 1.03}, counts[1])
            last: dict[str, Variant] = {
                "raw floor of last-row weights": lambda: floor(llama),
                "Saccade, last-row weights": lambda: attach(llama, LastRow()),
                "bare": bare,
            }
            rows += interleaved(
                f"prefill {length}, last row",
                prefill,
                last,
                {"Saccade, last-row weights": 1.02},
                counts[0],
                warm=warm,
            )
            rows += interleaved(
                f"decode at {length}, last row", decode, last, {"Saccade, last-row weights": 1.02}, counts[1]
            )
            keeping: dict[str, Variant] = {
                "bare": bare,
                "Saccade, keep all tokens": lambda: attach(llama, KeepTokens()),
            }
            rows += interleaved(
                f"prefill {length}, tokens",
                prefill,
                keeping,
                {"Saccade, keep all tokens": 1.04},
                counts[0],
                warm=warm,
            )

            for what, read in PEAKS.items():
                alone, recorded = (
                    statistics.median(
                        in_fresh_process("benchmarks.overhead", "--peak", one, str(length)) for _ in range(5)
                    )
                    for one in (f"bare {what}", what)
                )
                notes[f"peak memory of prefill {length}, {what}"] = (
                    f"{alone / 2**20:.0f} MiB bare, {recorded / 2**20:.0f} MiB with {read} of every head and layer "
                    f"recorded: {recorded / alone:.3f} (limit 1.05)"
                )
        ids = torch.randint(3, 32_000, (1, 512))

        def generate(rows: int = 1) -> None:
            llama.generate(ids.expand(rows, -1), max_new_tokens=24, do_sample=False)

        beside: dict[str, Variant] = {
            "bare": bare,
            "Saccade, keep all of the cache": lambda: attach(llama, KeepCache(sites="text.*.self")),
            "Saccade, a branch beside": lambda: attach(llama, Beside()),
            "bare, the same prompt twice": bare,
        }
        limits = {"Saccade, keep all of the cache": 1.05, "Saccade, a branch beside": 1.9}
        instead = {"bare, the same prompt twice": lambda: generate(2)}
        rows += interleaved("generate 24 after 512", generate, beside, limits, max(5, rounds // 2), instead)
    return rows, notes


def seconds(code: str) -> float:
    """From the start of a fresh process to its end."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak(what: str, length: int) -> int:
    """Of one prefill, in a process that has done nothing else."""
    if what.endswith("words"):
        read, subject, inputs = Record(sites="text.*.self", rows="last"), model(), {}
        ids = torch.randint(8, 32_000, (1, length))
        short = ids[:, :8]
    else:
        read, subject = Record(sites="text.*.self", rows="last", columns="image"), seeing()
        pictures = length // 2 // 256
        inputs = {"pixel_values": torch.randn(pictures, 3, 224, 224)}
        ids = torch.randint(8, 32_000, (1, length))
        ids[:, : 256 * pictures] = IMAGE
        short = ids[:, -8:]
    recording = contextlib.nullcontext() if what.startswith("bare") else attach(subject, read)
    with torch.no_grad(), recording:
        subject(short, logits_to_keep=1)
        return peak_bytes(lambda: subject(ids, **inputs, logits_to_keep=1, use_cache=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="more rounds, narrower quartiles (40)")
    parser.add_argument("--quick", action="store_true", help="512 tokens only")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--peak", nargs=2, metavar=("WHAT", "LENGTH"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        print(peak(chosen.peak[0], int(chosen.peak[1])))
        raise SystemExit
    found, said = run(chosen.rounds, (512,) if chosen.quick else (512, 4096))
    print(write("overhead", found, said).read_text())
