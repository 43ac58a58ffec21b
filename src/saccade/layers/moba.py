"""Attend to the own block of keys, and to the past blocks whose mean key answers the query best.

    s_b = q . mean(K_b)
    a query attends to    its own block, causally;   the top - 1 blocks before it with the largest s_b
    o = softmax over all keys of these blocks

No parameters: a trained model can change to it and back, layer by layer, and while it generates the means
of full blocks are kept. `MoBA` puts it into a model, `MoBAttention` is a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.ops.moba import block_means, moba, routed


@dataclass(eq=False)
class MoBA(Method):
    card = Card(
        slug="moba",
        name="MoBA",
        kind="method",
        family="layers",
        form="layer",
        target="llm",
        paper="MoBA: Mixture of Block Attention for Long-Context LLMs (Lu et al., 2025)",
        summary="Attend to a few blocks of keys, chosen by the mean key of each",
        needs=("first_token",),
        neutral={"top": 1000000},
        trains="full",
        code="MoonshotAI/MoBA",
        choices=(
            "Single steps are routed too, by means that are kept beside the cache, as in the paper; the "
            "released code decodes with full attention.",
            "Blocks begin at a sample's first word, so that padding changes nothing.",
            "Means are taken in float32; the released code takes them in the precision of the keys.",
        ),
        headline="deployed for long-context requests of Kimi",
        tags=("sparse attention", "block attention", "long context", "routing", "mixture of experts"),
    )

    block: int = option(512, "keys in a block; the paper's 512 to 4096", low=1)
    top: int = option(3, "blocks that a query attends to, its own included", low=1)
    sites: Sites = option("text.*.self", "layers; the paper keeps the last ones full where it fine-tunes")

    def replace(self, call: AttentionCall) -> Tensor:
        if not call.causal and call.mask is None and call.q.shape[2] > 1:
            raise InputError(
                f"{call.site.name} attends both ways: blocks have no past.", "use a causal model"
            )
        if call.is_plain:
            name, past = f"means of {call.site.layer}", call.k.shape[2] - call.q.shape[2]
            known = call.state.get(name)
            known = None if known is None else known[:, :, : past // self.block]  # a cache may be cut back
            means = call.state[name] = block_means(call.k, self.block, known)
            return moba(call.q, call.k, call.v, block=self.block, top=self.top, scale=call.scale, means=means)
        call.add_bias(self._left_out(call))
        return call.next()

    def _left_out(self, call: AttentionCall) -> Tensor:
        """A term for the scores where words are padded, missing or masked: (batch, heads, queries, keys)."""
        number = call.klayout.where("all")
        number = torch.where(number, number.cumsum(1) - 1, -1)  # of every word in its sample
        q_block, k_block = (_blocks(number, pos, self.block) for pos in (call.qpos, call.kpos))
        k_block = k_block if k_block.ndim == 3 else k_block[:, None]
        chosen = routed(call.q, call.k, q_block, k_block, top=self.top)
        return torch.zeros_like(chosen, dtype=call.q.dtype).masked_fill(
            ~chosen, torch.finfo(call.q.dtype).min
        )


def _blocks(number: Tensor, pos: Tensor, block: int) -> Tensor:
    """Of the words at positions (words,), (batch, words) or (batch, heads, words), -1 for none."""
    if pos.ndim == 3:
        at = number[:, None].expand(-1, pos.shape[1], -1).gather(2, pos.clamp_min(0))
    else:
        at = number.gather(1, pos.clamp_min(0).expand(number.shape[0], -1))
    return torch.where((at < 0) | (pos < 0), -1, at // block)


class MoBAttention(nn.Module):
    """Self-attention over (batch, tokens, width), causal.

    `mask` (batch, tokens) is True for words and False for padding. `cache` is a dictionary, empty at first,
    in which keys, values and the means of full blocks are kept from call to call.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_heads: int | None = None,
        *,
        block: int = 512,
        top: int = 3,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dim = heads, key_heads or heads, width // heads
        if width % heads or heads % self.key_heads:
            raise InputError(
                f"A width of {width}, {heads} heads and {self.key_heads} key heads do not come out even.",
                "let heads divide the width, and key_heads the heads",
            )
        self.block, self.top = block, top
        self.q = nn.Linear(width, heads * self.dim, bias=bias)
        self.k = nn.Linear(width, self.key_heads * self.dim, bias=bias)
        self.v = nn.Linear(width, self.key_heads * self.dim, bias=bias)
        self.o = nn.Linear(heads * self.dim, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if context is not None:
            raise InputError(
                "MoBAttention is causal and reads its own words alone.", "call it without context"
            )
        if mask is not None and cache is not None:
            raise InputError("MoBAttention keeps no padding.", "give a cache, or a mask, but not both")
        q, k, v = (
            layer(x).unflatten(-1, (heads, self.dim)).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.key_heads), (self.v, self.key_heads))
        )
        if mask is not None:
            out = self._masked(q, k, v, mask)
        elif cache is None:
            out = moba(q, k, v, block=self.block, top=self.top)
        else:
            k = cache["k"] = torch.cat([cache["k"], k], 2) if "k" in cache else k
            v = cache["v"] = torch.cat([cache["v"], v], 2) if "v" in cache else v
            means = cache["means"] = block_means(k, self.block, cache.get("means"))
            out = moba(q, k, v, block=self.block, top=self.top, means=means)
        return self.o(out.transpose(1, 2).flatten(2))

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        block = torch.where(mask, (mask.cumsum(1) - 1) // self.block, -1)
        chosen = routed(q, k, block, block[:, None], top=self.top)
        at = torch.arange(mask.shape[1], device=mask.device)
        sees = (chosen & (at <= at[:, None])) | (
            (at == at[:, None]) & ~mask[:, None, :, None]
        )  # padding sees itself
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
