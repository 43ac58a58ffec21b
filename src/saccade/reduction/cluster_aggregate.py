"""Send one token for each cluster of a picture's tokens: their mean.

    clusters  k-means of the N tokens, k-means++ to begin, Lloyd's iterations, Euclidean;  k = round(keep * N)
    token c   the mean of cluster c's members; tokens stand in the order of their members' mean place

Beside it, under the same options, what it is compared with: the member nearest each mean; k tokens at random,
on a grid, by the class token's attention, by the question's; and patches merged in pairs inside of the tower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.features import Item
from saccade.core.importance import note, noted, tower_attention
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens, TokensCall
from saccade.reduction._parts.budget import apportioned
from saccade.reduction._parts.choice import top
from saccade.reduction._parts.clusters import aggregates, clusters, nearest
from saccade.reduction._parts.tower import note_left, survivors


@dataclass(eq=False)
class ClusterAggregate(Method):
    card = Card(
        slug="cluster_aggregate",
        name="Cluster & Aggregate",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="Token Sequence Compression for Efficient Multimodal Computing (Omri et al., 2025)",
        summary="Cluster a picture's tokens and keep the means; or any of the baselines of that comparison",
        needs=("image",),
        neutral={"keep": 1.0},
        sure="abstract",
        choices=(
            "Tokens are clustered behind the projector, so that merged patches are clustered too; the paper "
            "clusters what the vision encoder gives.",
            "Order, iterations and the first means are a reconstruction.",
            "A picture is clustered with all its tiles; separators between rows of tiles stay beside the k.",
            "Every picture begins from the same seed, so that its tokens do not depend on those beside it.",
            "By the question: the mean over its words of softmax(word . token / sqrt(width)), in the text "
            "tower's input.",
            "In towers without a class token the attention that a patch receives, summed, stands in.",
            "In the tower pairs merge before each layer, by the keys of the layer before it, in proportion to "
            "their sizes; a layer's share of what has to leave is even.",
        ),
        tags=("token merging", "clustering", "k-means", "random", "baselines", "training-free"),
    )

    keep: float = option(0.25, "share of a picture's tokens that stays; 1 changes nothing", low=0, high=1)
    choice: str = option(
        "aggregate",
        "what stands for the picture",
        choices=("aggregate", "nearest", "random", "grid", "class", "question", "merge"),
    )
    iterations: int = option(20, "of Lloyd's, unless nothing moves any more", low=0)
    starts: int = option(1, "beginnings, of which the one with the least error counts", low=1)
    seed: int = option(0, "of the first means, and of random tokens")
    sites: Sites = option(
        {"observe": "vision.*.self", "tokens": "vision.*.layer"}, "where class and merge look and merge"
    )

    def observe(self, call: AttentionCall) -> None:
        last = call.site.layer == call.run.feature_layer
        if self.choice == "class" and last:
            note(call, tower_attention(call))
        elif self.choice == "merge":
            call.run.state["behind"] = call
            if last:
                note_left(call)

    def tokens(self, call: TokensCall) -> Tokens | None:
        last = call.run.feature_layer
        if self.choice != "merge" or self.keep == 1 or not 1 <= call.site.layer <= last:
            return None
        places = call.tokens("image")[0].nonzero()[:, 0]
        if call.site.layer == 1:
            call.run.state["target"] = _count(self.keep, len(places))
            call.run.state["sizes"] = torch.ones(call.h.shape[:2], dtype=call.h.dtype, device=call.h.device)
        excess = len(places) - call.run.state["target"]
        pairs = math.ceil(excess / (last + 1 - call.site.layer))
        if pairs > len(places) // 2:
            raise InputError(
                f"{len(places)} patches would have to lose {pairs} before {call.site.name}, and pairs are fewer.",
                "keep more, or use a model whose vision tower has more layers",
            )
        keys = call.run.state["behind"].k.mean(1)
        keep, h, sizes = merged(call.h, call.run.state["sizes"], keys, places, pairs)
        call.run.state["sizes"] = sizes
        return Tokens(keep, values=h)

    def features(self, item: Item) -> Tokens | None:
        if self.keep == 1:
            return None
        if self.choice == "merge":
            return Tokens(survivors(item), positions="renumber")
        grid = item.grid()
        patches = grid[:, 0] >= 0
        if not bool(patches.any()):  # of queries, which have no place
            patches = torch.ones_like(patches)
        x = item.x[patches]
        x, k = x if x.dtype == torch.float64 else x.float(), _count(self.keep, len(x))
        values = None
        if self.choice in ("aggregate", "nearest"):
            cluster = clusters(x, k, self.iterations, self.starts, self.seed)
            means = aggregates(x, cluster, k)
            chosen = nearest(x, cluster, means)
            if self.choice == "aggregate":
                values = item.x.clone()
                values[patches.nonzero()[chosen.sort().values, 0]] = means.to(values.dtype)
        elif self.choice == "random":
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:k]
        elif self.choice == "grid":
            chosen = uniform(grid[patches], k)
        else:
            scores = noted(item)[0][patches] if self.choice == "class" else by_question(item, x)
            chosen = top(scores, k).nonzero()[:, 0]
        keep = ~patches
        keep[patches.nonzero()[chosen.to(patches.device), 0]] = True
        return Tokens(keep, None if values is None else values[keep], positions="renumber")


def _count(keep: float, tokens: int) -> int:
    return max(1, round(keep * tokens))


# ---- what it is compared with -----------------------------------------------------------------------------


def uniform(grid: Tensor, k: int) -> Tensor:
    """k of the tokens with these tiles, rows and columns (tokens, 3), evenly spread."""
    tiles = grid[:, 0].unique()
    sizes = torch.stack([(grid[:, 0] == tile).sum() for tile in tiles])
    found = []
    for tile, count in zip(tiles, apportioned(k, sizes.double(), sizes.tolist()), strict=True):
        mine = (grid[:, 0] == tile).nonzero()[:, 0]
        rows, columns = (grid[mine, 1:].amax(0) + 1).tolist()
        lines = min(rows, count, max(round(math.sqrt(count * rows / columns)), -(-count // columns)))
        for line, part in zip(_middles(lines, rows), _even(count, lines), strict=True):
            found += [mine[line * columns + column] for column in _middles(part, columns)]
    return torch.stack(found)


def _middles(count: int, length: int) -> list[int]:
    """Middles of `count` equal parts of a length."""
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]


def _even(count: int, parts: int) -> list[int]:
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


def by_question(item: Item, x: Tensor) -> Tensor:
    words = item.run.embed(item.question).to(x.dtype)
    return (words @ x.T / math.sqrt(x.shape[1])).float().softmax(-1).mean(0)


def merged(
    h: Tensor, sizes: Tensor, keys: Tensor, places: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens (tiles, tokens) stay when the most alike pairs of every second patch and the others merge; what
    they are, and of how many patches."""
    some, others = places[::2], places[1::2]
    alike = F.normalize(keys[:, some], dim=-1) @ F.normalize(keys[:, others], dim=-1).mT
    likeness, other = alike.max(-1)
    first = likeness.topk(pairs, dim=1).indices
    source, target = some[first], others[other.gather(1, first)]  # (tiles, pairs)
    sums = h * sizes[..., None]
    sums = sums.scatter_add(1, target[..., None].expand(-1, -1, h.shape[-1]), _rows(sums, source))
    sizes = sizes.scatter_add(1, target, sizes.gather(1, source))
    keep = torch.ones_like(sizes, dtype=torch.bool).scatter(1, source, False)
    left = keep.nonzero()[:, 1].view(len(keep), -1)
    return keep, _rows(sums / sizes[..., None], left), sizes.gather(1, left)


def _rows(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))
