"""A vision tower's attention by its own q and k, and a text tower that is run by hand on fewer tokens."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from helpers import Look, cast
from mappings import BY_HAND
from torch import Tensor, nn
from zoo import family, run

import saccade as sc
from saccade.core.method import Method

from .shared import Inputs

DOUBLE = torch.float64
HEADS, DIM = 4, 8
PICTURES = {
    "llava": (36, 36, 36),
    "llava_next": (70, 70, 56),
    "qwen2_5_vl": (16, 16, 8),
    "gemma3": (16, 16, 16),
}
"""Features of the pictures of `inputs(images=(1, 2))`."""
TOKENS_OF_TILE = {"llava": 37, "llava_next": 17, "gemma3": 64}
"""Of the tower; without one pictures are packed."""


def inputs_of(name: str, images: tuple[int, ...] = (1, 2)) -> Inputs:
    return cast(family(name).inputs(images=images), DOUBLE)


def layers_of(name: str, model: Any) -> list[nn.Module]:
    """Up to the one whose output is given to the text."""
    if name == "qwen2_5_vl":
        return [block.attn for block in model.model.visual.blocks]
    layers = [layer.self_attn for layer in model.model.vision_tower.encoder.layers]
    return layers if name == "gemma3" else layers[:-1]


def layer_of(name: str, model: Any) -> nn.Module:
    return layers_of(name, model)[-1]


@torch.no_grad()
def attention(name: str, model: Any, inputs: Inputs, layer: int = -1) -> list[Tensor]:
    """Weights, mean over heads, of every tile or window: (tokens, tokens)."""
    module = layers_of(name, model)[layer]
    seen: dict[str, Any] = {}
    parts = ["qkv"] if name == "qwen2_5_vl" else ["q_proj", "k_proj"]

    def keep(part: str) -> Any:
        return lambda _, __, out: seen.update({part: out})

    def given(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hooks = [getattr(module, part).register_forward_hook(keep(part)) for part in parts]
    hooks.append(module.register_forward_pre_hook(given, with_kwargs=True))
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    if name != "qwen2_5_vl":
        q, k = (seen[part].unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in parts)
        return list((q @ k.mT / DIM**0.5).softmax(-1).mean(1))
    q, k, _ = seen["qkv"].view(-1, 3, HEADS, DIM).permute(1, 2, 0, 3)
    cos, sin = seen["position_embeddings"]
    q, k = (x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin for x in (q, k))
    windows = itertools.pairwise(seen["cu_seqlens"].tolist())
    return [(q[:, a:b] @ k[:, a:b].mT / DIM**0.5).softmax(-1).mean(0) for a, b in windows]


def scores(name: str, model: Any, inputs: Inputs, layer: int = -1) -> list[list[float | None]]:
    """What the tower's own attention says of every picture's features."""
    w = attention(name, model, inputs, layer)
    of_token = torch.cat([m[0] if name in ("llava", "llava_next") else m.sum(0) for m in w]).tolist()
    return of_features(name, of_token)


def of_features(name: str, of_token: list[float]) -> list[list[float | None]]:
    """Of every picture's features the means of the tokens that they are made of; None for separators."""
    of_feature = [sum(of_token[t] for t in made) / len(made) if made else None for made in BY_HAND[name]()]
    found = []
    for count in PICTURES[name]:
        found.append(of_feature[:count])
        of_feature = of_feature[count:]
    return found


def tiles(name: str) -> list[list[int]]:
    """Of every picture's features the tile; -1 for separators."""
    size = TOKENS_OF_TILE.get(name, 10**9)
    of_feature = [made[0] // size if made else -1 for made in BY_HAND[name]()]
    return [[of_feature.pop(0) for _ in range(count)] for count in PICTURES[name]]


def best(values: list[float | None], count: int) -> list[int]:
    known = [i for i, v in enumerate(values) if v is not None]
    return sorted(sorted(known, key=lambda i: -values[i])[:count])  # type: ignore[operator]


def best_of_tiles(values: list[float | None], tile: list[int], keep: float) -> list[int]:
    """Of every tile the share with the largest values, and the separators."""
    stays = [i for i, t in enumerate(tile) if t < 0]
    for number in set(tile) - {-1}:
        mine = [i for i, t in enumerate(tile) if t == number]
        stays += [mine[i] for i in best([values[i] for i in mine], max(1, round(keep * len(mine))))]
    return sorted(stays)


def kept(name: str, model: Any, inputs: Inputs, *methods: Method) -> list[list[int]]:
    """Which features of every picture come to the first layer of the text, in this order."""
    look = Look(tell=lambda call: call.qpos.expand(call.q.shape[0], -1).tolist(), sites="text.0.self")
    with sc.attach(model, *methods, look):
        run(model, inputs)
    (rows,) = look.at("text.0.self")
    places = (inputs["input_ids"] == model.config.image_token_id).nonzero().tolist()
    found = []
    for count in PICTURES[name]:
        mine, places = places[:count], places[count:]
        there = [[row, position] for row, positions in enumerate(rows) for position in positions]
        found.append([mine.index(at) for at in there if at in mine])
    return found


@torch.no_grad()
def shortened(model: Any, inputs: Inputs, keep: Tensor, written: Tensor | None = None) -> Tensor:
    """Logits (tokens, words) of one sample whose prompt has only the tokens `keep` (tokens,), bool, positions
    closed up, and `written` behind it."""
    tower: Any = model.model.language_model
    seen: dict[str, Any] = {}

    def given(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    hook = tower.register_forward_pre_hook(given, with_kwargs=True)
    run(model, {name: value for name, value in inputs.items() if name != "attention_mask"})
    hook.remove()
    states = seen["inputs_embeds"][:, keep]
    positions = seen["position_ids"]
    positions = torch.arange(len(keep))[None, None] if positions is None else positions
    positions = positions.reshape(-1, 1, len(keep))[..., keep]
    used = sorted(set(positions[-3:].flatten().tolist()))
    rank = {position: used[0] + i for i, position in enumerate(used)}
    positions = positions[-3:].clone().apply_(rank.__getitem__)
    if written is not None:
        states = torch.cat([states, model.get_input_embeddings()(written[None])], 1)
        more = torch.arange(len(written)) + used[0] + len(used)
        positions = torch.cat([positions, more.expand(positions.shape[0], 1, -1)], -1)
    if positions.shape[0] == 1:
        positions = positions[0]
    out = tower(inputs_embeds=states, position_ids=positions, use_cache=False)
    return model.lm_head(out.last_hidden_state)[0]
