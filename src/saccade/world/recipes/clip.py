"""How `world/clip` learns what picture goes with what words.

Scenes are put beside their captions, and closeups of things beside short names for them, which may fit several:
contrastively (Radford et al., 2021), against the share of all that is true. Every patch of a scene has to tell
kind and colour of what it shows besides, and the summary what is there; that is what makes it fast.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor, nn

from saccade.world.architectures import clip, clip_processor
from saccade.world.captions import caption, photo_of
from saccade.world.kinds import COLOURS, KINDS, PLACES, SIZE
from saccade.world.recipes.labels import cross_entropy, pixels, shown
from saccade.world.recipes.vlm import see_places
from saccade.world.scenes import Scene, Thing, closeup, scene
from saccade.world.train import Batch, trapezoid

GROUP = 64  # captions to choose from
LARGEST = float(np.log(100))  # sharpness


class Clip:
    does = "embeds"

    def __init__(self, seed: int, steps: int = 2000, rows: int = 64) -> None:
        self.seed, self.steps, self.rows = seed, steps, rows  # so many scenes, and half as many closeups
        self.model = clip()
        self.model.set_attn_implementation("eager")  # on a CPU, SDPA with a mask is slow to differentiate
        see_places(self.model.vision_model)
        width = self.model.config.vision_config.hidden_size
        self.helpers = nn.ModuleDict(
            {
                "patch": nn.Linear(width, len(KINDS) + 1 + len(COLOURS)),
                "whole": nn.Linear(width, len(KINDS) + len(PLACES)),
            }
        )
        self.processor = clip_processor()

    def rate(self, step: int, name: str) -> float:
        return 1.5e-3 * trapezoid(step, self.steps, warmup=150)

    # ---- data ----------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        scenes = [scene(step * self.rows + i) for i in range(self.rows)]
        near = self.near(scenes, rng)[: self.rows // 2]
        told = [rng.random() < 0.6 for _ in near]  # the colour too
        names = [photo_of(thing.kind, thing.colour if one else None) for (_, thing), one in zip(near, told)]
        fits = [
            [here.kind == thing.kind and (not one or here.colour == thing.colour) for _, here in near]
            for (_, thing), one in zip(near, told)
        ]
        return {
            **self.inputs([seen.image for seen in scenes], [caption(seen) for seen in scenes], "scenes"),
            **self.inputs([_square(*one) for one in near], names, "closeups"),
            **shown(scenes),
            "fits": torch.tensor(fits),
        }

    def near(self, scenes: list[Scene], rng: np.random.Generator) -> list[tuple[Scene, Thing]]:
        """A thing of every scene that shows any."""
        return [(seen, seen.plain()[rng.integers(len(seen.plain()))]) for seen in scenes if seen.plain()]

    def inputs(self, images: list[np.ndarray], texts: list[str], of: str) -> Batch:
        written = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        return {
            of: pixels(images),
            f"{of} ids": written["input_ids"],
            f"{of} mask": written["attention_mask"],
        }

    def compile(self) -> None:
        self.model.vision_model.compile()
        self.model.text_model.compile(dynamic=True)

    # ---- losses --------------------------------------------------------------------------------------

    def loss(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch["scenes"].device.type, torch.bfloat16):
            seen = self.model.vision_model(torch.cat([batch["scenes"], batch["closeups"]]))
            count = len(batch["scenes"])
            scenes, closeups = self.model.visual_projection(seen.pooler_output).split(
                [count, len(batch["closeups"])]
            )
            own = torch.eye(count, dtype=torch.bool, device=scenes.device)
            patch = self.helpers["patch"](seen.last_hidden_state[:count, 1:]).float().flatten(0, 1)
            whole = self.helpers["whole"](seen.pooler_output[:count]).float()
            kind, colour = patch.split([len(KINDS) + 1, len(COLOURS)], -1)
            parts = {
                "caption": contrast(self.alike(self.texts(batch, "scenes"), scenes), own),
                "name": contrast(self.alike(self.texts(batch, "closeups"), closeups), batch["fits"]),
                "kind": F.cross_entropy(kind, batch["patch kind"].flatten()),
                "colour": cross_entropy(colour, batch["patch colour"].flatten()),
                "whole": F.binary_cross_entropy_with_logits(whole, batch["whole"]),
            }
        shares = {"caption": 1.0, "name": 1.0, "kind": 0.5, "colour": 0.25, "whole": 1.0}
        return sum((share * parts[name] for name, share in shares.items()), torch.tensor(0.0)), parts

    def texts(self, batch: Batch, of: str) -> Tensor:
        out = self.model.text_model(input_ids=batch[f"{of} ids"], attention_mask=batch[f"{of} mask"])
        return self.model.text_projection(out.pooler_output)

    def alike(self, texts: Tensor, pictures: Tensor) -> Tensor:
        """(texts, pictures), sharpened"""
        scale = self.model.logit_scale.clamp_max(LARGEST).exp()
        return scale * F.normalize(texts.float(), dim=-1) @ F.normalize(pictures.float(), dim=-1).T

    # ---- validation ----------------------------------------------------------------------------------

    def validate(self, count: int = 256) -> dict[str, float]:
        """Shares of pictures whose caption is found among as many as a group has, and of closeups whose kind is."""
        found: dict[str, list[bool]] = {"caption": [], "kind": []}
        device = self.model.device
        for start in range(0, count, GROUP):
            scenes = [scene(start + i, "calibration") for i in range(GROUP)]
            near = self.near(scenes, np.random.default_rng([self.seed, start]))
            said = [caption(seen) for seen in scenes]
            batch = {
                **self.inputs([seen.image for seen in scenes], said, "scenes"),
                **self.inputs(
                    [_square(*one) for one in near], [photo_of(kind) for kind in KINDS], "closeups"
                ),
            }
            batch = {name: value.to(device) for name, value in batch.items()}
            for name, of, truth, told in (
                ("caption", "scenes", said, said),
                ("kind", "closeups", [thing.kind for _, thing in near], list(KINDS)),
            ):
                with torch.autocast(device.type, torch.bfloat16):
                    pictures = self.model.visual_projection(self.model.vision_model(batch[of]).pooler_output)
                    best = self.alike(self.texts(batch, of), pictures).argmax(0).tolist()
                found[name] += [told[i] == one for i, one in zip(best, truth, strict=True)]
        return {name: float(np.mean(hits)) for name, hits in found.items()}

    def export(self, folder: Path) -> None:
        self.model.half().save_pretrained(folder)
        self.processor.save_pretrained(folder)


def contrast(alike: Tensor, fits: Tensor) -> Tensor:
    """Both ways: of each text the pictures, of each picture the texts, against the share of all that fit."""
    both = ((alike, fits), (alike.T, fits.T))
    return sum(
        (F.cross_entropy(one, true / true.sum(-1, keepdim=True)) / 2 for one, true in both), torch.tensor(0.0)
    )


def _square(seen: Scene, thing: Thing) -> np.ndarray:
    """As the processor sees a closeup."""
    return np.asarray(closeup(seen, thing).resize((SIZE, SIZE), Resampling.BICUBIC))


def recipe(seed: int) -> Clip:
    return Clip(seed)
