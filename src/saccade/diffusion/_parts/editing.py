"""A batch whose first prompt is the source of the others, and its maps at a quarter of the latents' side."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.passes import Denoising


def sampling(call: AttentionCall) -> Denoising:
    """The running call of the denoiser, of a source and at least one edit."""
    p = call.pass_
    assert isinstance(p, Denoising)
    if max(len(index) for index in p.rows.values()) < 2:
        raise InputError(
            f"{type(call.run.method).__name__} takes the first prompt for the source of others.",
            "call the pipeline with a list of prompts, the source first, and the same latents for all",
        )
    return p


def side(p: Denoising, tokens: int) -> float:
    """Of a site's grid, as a share of the latents'."""
    return (tokens / p.inputs["sample"][0, 0].numel()) ** 0.5


def attention_to(call: AttentionCall, words: Tensor) -> Tensor | None:
    """Of every row, summed over these columns (batch, keys) and averaged over heads: (batch, height, width).
    None at sites of another grid than a quarter of the latents' side, the paper's 16 of 64."""
    p = call.pass_
    assert isinstance(p, Denoising)
    grid = p.grid(call.q.shape[2])
    if grid is None or side(p, call.q.shape[2]) != 0.25:
        return None
    return (call.weights() * words[:, None, None, :]).sum(-1).mean(1).unflatten(-1, grid)


def saying(call: AttentionCall, *words: str) -> Tensor:
    """Columns of any of the words: (batch, keys)."""
    return torch.stack([call.columns(f"word:{word}")[:, 0, 0] for word in words]).any(0)
