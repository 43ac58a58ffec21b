"""Measuring a model on the world: `python -m saccade.world.evaluate [MODEL] [--scenes N] [--json] [--card PATH]`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saccade.core.errors import InputError, plainly
from saccade.loading import load_model

Figures = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by split, task and name


@plainly
def main(argv: list[str] | None = None) -> int:
    from saccade.evals.world import measure

    parser = argparse.ArgumentParser(
        prog="python -m saccade.world.evaluate", description="Measure a model on the world."
    )
    parser.add_argument(
        "model", nargs="?", default="world/vlm", help="embedded, folder or hub id (%(default)s)"
    )
    parser.add_argument(
        "--scenes", type=int, default=1000, metavar="N", help="of each split, or texts (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="questions at a time (%(default)s)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: the model's own)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: what there is)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--card", type=Path, metavar="PATH", help="write the figures into this card")
    chosen = parser.parse_args(argv)
    card = _card(chosen.card) if chosen.card else {}
    model, processor = load_model(chosen.model, chosen.dtype, chosen.device, any_kind=True)
    if processor is None:
        raise InputError(f"{chosen.model} has no processor and no tokenizer.", "give a model that has one")
    scored = measure(model, processor, chosen.scenes, chosen.seed, chosen.batch)
    figures: Figures = {
        split: {
            task: {name: _written(asdict(estimate)) for name, estimate in scores.items()}
            for task, scores in tasks.items()
        }
        for split, tasks in scored.items()
    }
    if chosen.card:
        card["figures"] = {"scenes": chosen.scenes, "seed": chosen.seed, **figures}
        chosen.card.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(figures, indent=2) if chosen.json else table(figures))
    return 0


def table(figures: Figures) -> str:
    """Every figure with its 95% interval, the splits side by side."""
    splits = list(figures)
    lines = [f"{'':40}" + "".join(f"{split:>24}" for split in splits)]
    for task in figures[splits[0]]:
        lines.append(task)
        for name in dict.fromkeys(name for split in splits for name in figures[split][task]):
            cells = (_cell(figures[split][task].get(name)) for split in splits)
            lines.append(f"  {name:38}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    ends = (estimate[end] for end in ("low", "high"))
    return f"{estimate['value']:.3f} " + "".join(" -    " if end is None else f" {end:.3f}" for end in ends)


def _written(estimate: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {
        name: None if math.isnan(value) else round(value, 4) if isinstance(value, float) else value
        for name, value in estimate.items()
        if name != "draws"
    }


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no card: {e}.", "give the JSON file of a model's card") from e
    if not isinstance(card, dict):
        raise InputError(f"{path} is no card: it holds a {type(card).__name__}.", "give a JSON object")
    return card


if __name__ == "__main__":
    sys.exit(main())
