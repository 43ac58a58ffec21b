"""Boats and cars on beaches and streets, in any colour, and a small ResNet that learns to tell them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from saccade.world.kinds import COLOURS, SIZE
from saccade.world.places import background
from saccade.world.sprites import SIZES, sprite

KINDS, PLACES = ("car", "boat"), ("street", "beach")
COARSE = 2  # pixels of the world to one of these pictures
BATCH = 32


@dataclass(frozen=True)
class Pictures:
    images: Tensor  # (pictures, 3, height, width), about -1 to 1
    masks: Tensor  # (pictures, height, width): how much of a pixel is the thing's
    labels: np.ndarray  # (pictures, 2): whether it is a boat, and on a beach

    def at(self, index: np.ndarray) -> Pictures:
        return Pictures(self.images[index], self.masks[index], self.labels[index])


def drawn(count: int, seed: list[int]) -> Pictures:
    """Every kind in every place as often."""
    rng, images, masks = np.random.default_rng(seed), [], []
    labels = np.array([(i % 2, i // 2 % 2) for i in range(count)])
    for kind, place in labels:
        name = KINDS[kind]
        image, mask = background(PLACES[place], rng), np.zeros((SIZE, SIZE), np.float32)
        alpha, tint, own, shape, _ = sprite(name, SIZES[name][1])
        height, width = shape.shape
        y, x = rng.integers((0, 0), (SIZE - height, SIZE - width))
        colour = np.array(COLOURS[list(COLOURS)[rng.integers(len(COLOURS))]], np.float32)
        window = image[y : y + height, x : x + width]
        window[:] = window * (1 - alpha) + colour * tint + own
        mask[y : y + height, x : x + width] = shape
        images.append(torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1))
        masks.append(torch.from_numpy(mask))
    small = F.avg_pool2d(torch.stack(images), COARSE)
    return Pictures(small, F.avg_pool2d(torch.stack(masks)[:, None], COARSE)[:, 0], labels)


def trained(pictures: Pictures, steps: int, seed: int) -> Any:
    """With one logit for the thing and one for the place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[24, 32], depths=[1, 1], layer_type="basic", num_labels=2
        )
        model: Any = ResNetForImageClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        rng, labels = np.random.default_rng(seed), torch.from_numpy(pictures.labels).float()
        for _ in range(steps):
            batch = torch.from_numpy(rng.integers(0, len(labels), BATCH))
            out = model(pictures.images[batch]).logits
            loss = F.binary_cross_entropy_with_logits(out, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()
