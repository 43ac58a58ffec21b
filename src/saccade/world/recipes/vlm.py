"""How `world/vlm` learns to see, to answer and to describe.

First the vision tower alone: every patch's projected feature is put beside the embeddings of the words for what
it shows (kind, colour, letter, left or right, top or bottom). Then all together: one picture, many questions,
packed in a row behind it, each seeing the picture and itself. At the word that names a thing, the middle layer
also has to tell whether it is there, how often, its colour, its place and what is written on it; without that,
yes and no stay at chance for long, and no word is read. In half of the steps visual tokens are missing, their
positions kept or closed up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saccade.world.architectures import vlm, vlm_processor
from saccade.world.kinds import GRID
from saccade.world.recipes.answering import IMAGE, Answering
from saccade.world.recipes.labels import TOKENS
from saccade.world.words import INDEX


class Vlm(Answering):
    tower = "vision_tower"
    placed_by = None

    def __init__(self, seed: int, steps: int = 3000, rows: int = 32, alone: int = 400) -> None:
        model = vlm()
        see_places(model.model.vision_tower)
        super().__init__(model, seed, steps, rows, alone)

    def opening(self, pictures: int) -> tuple[list[int], np.ndarray]:
        ids = [INDEX[word] for word in ("<s>", "user", ":")] + [IMAGE] * (pictures * TOKENS)
        return ids, np.arange(len(ids))[None]

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        chosen = out.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        return self.model.model.multi_modal_projector(chosen), out.pooler_output

    @property
    def projection(self) -> nn.Linear:
        return self.model.model.multi_modal_projector.linear_2

    def processor(self) -> Any:
        return vlm_processor()

    def compile(self) -> None:
        self.model.model.vision_tower.compile()
        self.model.model.language_model.compile(dynamic=True)


@torch.no_grad()
def see_places(tower: Any) -> None:
    """Begin with places as waves of both axes, patches at the same scale, and attention to what is alike."""
    embeddings = tower.embeddings
    width = embeddings.position_embedding.weight.shape[1]
    waves = 1.5 / 30.0 ** (torch.arange(width // 4) / (width // 4))
    at = torch.arange(GRID).float()
    y, x = (sides.flatten()[:, None] * waves for sides in torch.meshgrid(at, at, indexing="ij"))
    embeddings.position_embedding.weight[1:] = 0.7 * torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    weight = embeddings.patch_embedding.weight
    weight.normal_(0, weight[0].numel() ** -0.5)
    embeddings.class_embedding.normal_(0, 0.5)
    for layer in tower.encoder.layers:
        layer.self_attn.q_proj.weight.normal_(0, 0.07)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def recipe(seed: int) -> Vlm:
    return Vlm(seed)
