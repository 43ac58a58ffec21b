"""Fill a cache of 128 MiB, let half of its entries leave, by row and head other ones, and print by how many bytes
the process grew and shrank, and what `Count` says of the cache before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import saccade as sc

ROWS, TOKENS = 8, 512
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}


class Half(sc.Method):
    """After the first word of the answer, other entries leave every head of every row, and other numbers of them."""

    def evict(self, call: Any, cache: Any) -> Tensor | None:
        if call.phase == "prefill":
            return None
        drawn = torch.rand(cache.keys.shape[:3], generator=torch.Generator().manual_seed(call.site.index))
        slots = drawn.argsort(-1)[..., : cache.keys.shape[2] // 2]
        few = torch.arange(slots.shape[1])[None, :, None] + torch.arange(ROWS)[:, None, None]
        return torch.where(torch.arange(slots.shape[2]) < few, -1, slots)


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def main() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, head_dim=128, **SHAPE)).eval()
    grown, said = [], []
    with torch.no_grad(), sc.attach(model, Half(sites="text.*.self"), sc.Count()) as session:
        for tokens in (16, TOKENS):  # the first to warm up
            cache = None
            for ids in (torch.ones(ROWS, tokens, dtype=torch.long), torch.ones(ROWS, 1, dtype=torch.long)):
                before = resident()
                cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
                grown.append(resident() - before)
                said.append(session.results["Count"]["decode"].cache_bytes.total())
    print(json.dumps({"grown": grown[2:], "said": said[2:]}))


if __name__ == "__main__":
    main()
