"""What a vision tower itself finds important, for methods of every family."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import AttentionCall


def tower_attention(call: AttentionCall) -> Tensor:
    """(batch, tokens): attention of the class token, mean over heads; in towers without one, what a token
    receives from all, summed, so that windows of every size count alike."""
    first = call.columns("special")[:, 0, 0, 0]
    if bool(first.all()):
        return call.weights(0).mean(1)[:, 0]
    total = call.q.new_zeros(call.q.shape[0], call.k.shape[2], dtype=torch.float32)
    for rows in call.chunks():
        total += call.weights(rows, keep=False).mean(1).sum(1)
    return total
