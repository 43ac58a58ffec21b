"""How `world/qwen` learns what `world/vlm` does, on the architecture of Qwen2.5-VL.

Its vision tower looks at finer patches, most of the time within windows, and four of them make one token. It knows
only how far patches are from one another; where a token stands is told by its three positions in the text tower.
There, after two layers, tokens are put beside the words left, right, top and bottom; all other words are told of
the features, as in `world/vlm`. Positions that close up are the ranks of all that are in use along the three axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from saccade.world.architectures import FINE, MERGE, qwen, qwen_processor
from saccade.world.kinds import GRID
from saccade.world.recipes.answering import IMAGE, Answering
from saccade.world.recipes.labels import TOKENS
from saccade.world.scenes import Scene
from saccade.world.words import INDEX

PATCHES = TOKENS * MERGE * MERGE


class Qwen(Answering):
    tower = "visual"
    placed_by = 2

    def __init__(self, seed: int, steps: int = 4000, rows: int = 32, alone: int = 400) -> None:
        model = qwen()
        _see_alike(model)
        super().__init__(model, seed, steps, rows, alone)
        self.eyes = Batched(model.model.visual)

    def opening(self, pictures: int) -> tuple[list[int], np.ndarray]:
        ids = [INDEX[word] for word in ("<s>", "user", ":")]
        places = [np.tile(np.arange(len(ids)), (3, 1))]
        start, end = self.model.config.vision_start_token_id, self.model.config.vision_end_token_id
        grid = np.stack([np.zeros(TOKENS, int), *np.divmod(np.arange(TOKENS), GRID)])
        for _ in range(pictures):
            position = places[-1].max() + 1
            ids += [start, *[IMAGE] * TOKENS, end]
            places += [np.full((3, 1), position), position + 1 + grid, np.full((3, 1), position + 1 + GRID)]
        return ids, np.concatenate(places, 1)

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """(pictures, patches, values): the four patches of a token together, each as two equal frames."""
        whole = super().pixels(scenes).view(-1, 3, GRID, MERGE, FINE, GRID, MERGE, FINE)
        patches = whole.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)  # (pictures, patches, 3, FINE, FINE)
        return patches.unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2)

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.eyes(pixels)
        return features, features.mean(1)

    @property
    def projection(self) -> nn.Linear:
        return self.model.model.visual.merger.mlp[-1]

    def processor(self) -> Any:
        return qwen_processor()

    def compile(self) -> None:
        self.eyes.compile()
        self.model.model.language_model.compile(dynamic=True)


class Batched(nn.Module):
    """The vision tower on many pictures of one size: their windows are a batch, where its own forward takes one
    after another."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        side = tower.window_size // (FINE * MERGE)
        order = torch.arange(TOKENS).view(GRID // side, side, GRID // side, side).transpose(1, 2).flatten()
        self.windows = TOKENS // side**2
        self.order, self.back = order, order.argsort()
        at = torch.cartesian_prod(*[torch.arange(GRID * MERGE)] * 2)
        merged = at.view(GRID, MERGE, GRID, MERGE, 2).transpose(1, 2).reshape(TOKENS, MERGE**2, 2)
        self.places = merged[order].flatten(0, 1)  # row and column of every patch, in the order of windows

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, patches, values) -> (pictures, tokens, width)"""
        tower, pictures = self.tower, len(pixels)
        x = F.linear(pixels, tower.patch_embed.proj.weight.flatten(1)).float()
        x = x.view(pictures, TOKENS, -1)[:, self.order].view(pictures, PATCHES, -1)
        turned = tower.rotary_pos_emb(x, self.places.to(x.device))
        for number, block in enumerate(tower.blocks):
            windows = 1 if number in tower.fullatt_block_indexes else self.windows
            x = x + self.attended(block.attn, block.norm1(x), windows, turned)
            x = x + block.mlp(block.norm2(x))
        return tower.merger(x).view(pictures, TOKENS, -1)[:, self.back]

    def attended(self, attention: Any, x: Tensor, windows: int, turned: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = attention.qkv(x).view(*x.shape[:2], 3, attention.num_heads, -1).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, *turned)
        q, k, v = (t.reshape(len(x) * windows, -1, *t.shape[2:]).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT * attention.scaling).softmax(
            -1, torch.float32
        )  # (batch, heads, patches, patches)
        out = weights.to(v.dtype) @ v
        return attention.proj(out.transpose(1, 2).reshape(x.shape))


@torch.no_grad()
def _see_alike(model: Any) -> None:
    """Begin with patches at the scale of what is inside, and attention to what is alike."""
    tower = model.model.visual
    weight = tower.patch_embed.proj.weight
    weight.normal_(0, weight[0].numel() ** -0.5)
    for block in tower.blocks:
        q, k, _ = block.attn.qkv.weight.chunk(3)
        k.copy_(q.normal_(0, 0.1))


def recipe(seed: int) -> Qwen:
    return Qwen(seed)
