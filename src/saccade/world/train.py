"""Training the world's models from nothing: `python -m saccade.world.train vlm [--out DIR]`.

The data of a step is a function of the seed, the step and what was saved with the model before, so that a run that
was killed goes on where it was saved and ends where it would have ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from saccade.core.errors import InputError, plainly
from saccade.world.embedded import CARD, WEIGHTS, checksum

Batch = dict[str, Tensor]
RECIPES = ("vlm", "qwen", "clip", "lm")


class Recipe(Protocol):
    """What is trained, on what, and how it is judged."""

    does: str  # "answers", "writes" or "embeds": what loads it
    steps: int
    seed: int
    model: nn.Module  # what is kept
    helpers: nn.Module  # heads of auxiliary losses and the like, thrown away in the end

    def batch(self, step: int) -> Batch:
        """A function of the seed, the step, and what validating has left in the helpers."""

    def loss(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and its parts by name."""

    def rate(self, step: int, name: str) -> float:
        """Learning rate of a parameter."""

    def compile(self) -> None:
        """Compile, in place, what most of a step is spent in."""

    def validate(self) -> dict[str, float]: ...

    def export(self, folder: Path) -> None:
        """Write the model and its processor as transformers reads them."""


class Steps(Dataset[Batch]):
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __getitem__(self, step: int) -> Batch:
        return self.recipe.batch(step)


def train(recipe: Recipe, out: Path, *, device: str = "cpu", workers: int = 0, every: int = 250) -> None:
    """Train to the end, or go on from the checkpoint in `out`; the validation curve is `out/curve.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    modules = nn.ModuleDict({"model": recipe.model, "helpers": recipe.helpers}).to(device)
    parameters = dict(modules.named_parameters())
    optimizers = _optimizers(parameters)
    start, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        modules.load_state_dict(saved["modules"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, seconds = saved["step"], saved["seconds"]
    shown: dict[str, float] = {}
    clock = time.perf_counter() - seconds
    batches = _batches(recipe, start, every, workers)
    progress = tqdm(batches, total=recipe.steps, initial=start, mininterval=5)
    for step, batch in progress:
        modules.train()
        loss, parts = recipe.loss(step, {name: value.to(device) for name, value in batch.items()})
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, group["name"])
            optimizer.step()
            optimizer.zero_grad()
        if not torch.isfinite(loss):
            raise InputError(
                f"The loss is {loss.item()} in step {step}.", f"go on from {checkpoint}, lower rate"
            )
        for name, value in parts.items():
            shown[name] = 0.95 * shown.get(name, value.item()) + 0.05 * value.item()
        progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            modules.eval()
            with torch.no_grad():
                row = {"step": step + 1, "minutes": (time.perf_counter() - clock) / 60, **recipe.validate()}
            with (out / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(row | {f"loss {name}": value for name, value in shown.items()}) + "\n")
            tqdm.write("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
            state = {
                "modules": modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "seconds": time.perf_counter() - clock,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    recipe.export(out / "model")
    _write_card(recipe, out, device, (time.perf_counter() - clock) / 60)


def _batches(recipe: Recipe, start: int, every: int, workers: int) -> Iterator[tuple[int, Batch]]:
    """Drawn anew behind every validation, on which they may depend."""
    while start < recipe.steps:
        steps = range(start, min(recipe.steps, start + every - start % every))
        loader = DataLoader(
            Steps(recipe), batch_size=None, sampler=steps, num_workers=workers,
            prefetch_factor=4 if workers else None,
        )  # fmt: skip
        yield from zip(steps, loader)
        start = steps.stop


def _write_card(recipe: Recipe, out: Path, device: str, minutes: float) -> None:
    """What the figures of `saccade.world.evaluate` are added to."""
    folder = out / "model"
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    card = {
        "does": recipe.does,
        "sha256": checksum(folder / WEIGHTS),
        "recipe": " ".join((sys.modules[type(recipe).__module__].__doc__ or "").split()),
        "parameters": sum(parameter.numel() for parameter in recipe.model.parameters()),
        "steps": recipe.steps,
        "seed": recipe.seed,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "minutes": round(minutes, 1),
        "torch": torch.__version__,
        "validation": {name: value for name, value in curve[-1].items() if not name.startswith("loss")},
        "failures": [],
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def _optimizers(parameters: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for all else: embeddings, heads, norms and biases."""
    inside = {n: p for n, p in parameters.items() if p.ndim == 2 and (".layers." in n or ".blocks." in n)}
    outside = {n: p for n, p in parameters.items() if n not in inside}
    muon = torch.optim.Muon(_groups(inside), weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(_groups(outside), betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def _groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [parameter], "name": name} for name, parameter in parameters.items()]


def trapezoid(step: int, steps: int, warmup: int = 100, falling: float = 0.4) -> float:
    """Share of the learning rate: up, level, and down to zero over the last part."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (falling * steps))


def recipe_of(name: str, seed: int) -> Recipe:
    if name not in RECIPES:
        raise InputError(f"No recipe is called {name!r}.", f"train one of {', '.join(RECIPES)}")
    torch.manual_seed(seed)
    recipe: Recipe = importlib.import_module(f"saccade.world.recipes.{name}").recipe(seed)
    return recipe


@plainly
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help=f"which model: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, help="where checkpoints, curve and model go (world-NAME)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU (2)")
    parser.add_argument("--compile", action="store_true", help="a third faster; asks for a C++ compiler")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes meanwhile (0)")
    parser.add_argument("--every", type=int, default=250, help="steps between validations and checkpoints")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    recipe = recipe_of(chosen.name, chosen.seed)
    if chosen.compile:
        recipe.compile()
    train(
        recipe,
        chosen.out or Path(f"world-{chosen.name}"),
        device=chosen.device,
        workers=chosen.workers,
        every=chosen.every,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
