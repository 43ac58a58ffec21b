"""Where the embedded model looks to name a thing, and whether the name depends on it.

    python -m benchmarks.grounding [--scenes 500] [--rows build/grounding.jsonl]

Of scenes of the test split that the model describes: for every thing that is the only one of its kind and is named,
the share of each head's attention on the picture that lies on the thing's mask, over the mask's share of the picture;
and for one name of each scene deletion and insertion in the order of its map. Intervals draw scenes again. A row is
kept of every scene, and the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.measure import RESULTS, machine
from saccade import looking, world
from saccade.core.record import Recording
from saccade.evals import grounding
from saccade.evals.faithfulness import RANDOM, STEPS, faithfulness
from saccade.evals.interval import Estimate, bootstrap
from saccade.report.markdown import table
from saccade.world.captions import ASKED
from saccade.world.scenes import Scene, scene

SITES = "text.*.self"
Seen = dict[str, Any]  # of a scene: what was named, and how faithful one name's map is


def rows(count: int, path: Path) -> list[Seen]:
    """Of so many scenes in which a thing is named, the kept ones first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    telling = [row for row in kept if row["things"]]
    model, processor = world.load("vlm")
    with (
        path.open("a") as file,
        tqdm(total=count, initial=min(count, len(telling)), unit="scene") as progress,
    ):
        while len(telling) < count:
            kept.append(looked(model, processor, scene(len(kept), "test")))
            file.write(json.dumps(kept[-1]) + "\n")
            file.flush()
            if kept[-1]["things"]:
                telling.append(kept[-1])
                progress.update()
    return telling[:count]


def looked(model: Any, processor: Any, shown: Scene) -> Seen:
    picture = shown.picture()
    seen = looking.look(model, processor, picture, ASKED, columns="image", dtype="float32")
    boxes = seen.layouts[0].boxes[0, seen.layouts[0].where("image")[0]]
    things, words = [], named(shown, seen)
    for kind, word in words.items():
        mask = np.any([shown.mask(i) for i, thing in enumerate(shown.things) if thing.kind == kind], 0)
        shares = grounding.shown(torch.from_numpy(mask), boxes)
        maps = seen.map(SITES, word=word).tensor  # (layers, heads, image tokens)
        whole, each = (grounding.inside(m, shares) for m in (maps.mean((0, 1)), maps))
        chance = float(shares.mean())
        things.append({"kind": kind, "chance": chance, "whole": float(whole), "inside": each.tolist()})
    row: Seen = {"scene": shown.seed, "things": things}
    if words:
        kind = list(words)[np.random.default_rng(shown.seed).integers(len(words))]
        found = faithfulness(model, processor, [picture], seen, words[kind], seed=shown.seed)
        p = found.curves["map"][0]
        row |= {order: found.areas(order) for order in found.curves} | {"kind": kind, "p": [p[0], p[-1]]}
    return row


def named(shown: Scene, seen: Recording) -> dict[str, int]:
    """The word of the answer for each thing that is alone of its kind."""
    alone = {thing.kind for thing in shown.unique()}
    return {
        word.text: i for i, word in reversed([*enumerate(seen.words)]) if word.said and word.text in alone
    }


# ---- what they come to -----------------------------------------------------------------------------------


def factor(scenes: Sequence[Seen], inside: Any) -> Estimate:
    """Of attention on things, over the things' share of the pictures."""
    sums = [[sum(f(t) for t in row["things"]) for row in scenes] for f in (inside, lambda t: t["chance"])]
    return bootstrap(sums, lambda totals: totals[..., 0] / totals[..., 1])


def mean(values: Sequence[float]) -> Estimate:
    return bootstrap([values, np.ones(len(values))], lambda totals: totals[..., 0] / totals[..., 1])


def measured(scenes: Sequence[Seen]) -> dict[str, Any]:
    layers, heads = np.shape(scenes[0]["things"][0]["inside"])
    factors = [
        [factor(scenes, lambda t, at=(i, j): t["inside"][at[0]][at[1]]) for j in range(heads)]
        for i in range(layers)
    ]
    areas = {order: [float(np.mean(row[order])) for row in scenes] for order in ("map", "random", "reversed")}

    def apart(more: str, less: str) -> Estimate:
        return mean([a - b for a, b in zip(areas[more], areas[less], strict=True)])

    beaten = [float(np.mean([area > row["map"][0] for area in row["random"]])) for row in scenes]
    return {
        "factor by layer and head": factors,
        "factor of their mean": factor(scenes, lambda t: t["whole"]),
        "faithfulness": {
            "p with the whole picture": mean([row["p"][0] for row in scenes]),
            "p without any place": mean([row["p"][1] for row in scenes]),
            "deletion, brightest first": mean(areas["map"]),
            "deletion, random order": mean(areas["random"]),
            "deletion, faintest first": mean(areas["reversed"]),
            "deletion, random less brightest": apart("random", "map"),
            "insertion, brightest less random": apart("reversed", "random"),
            "random orders beaten": mean(beaten),
        },
    }


def written(found: Mapping[str, Any], about: Mapping[str, str]) -> str:
    factors: list[list[Estimate]] = found["factor by layer and head"]
    whole: Estimate = found["factor of their mean"]
    above = sum(one.low > 1 for one in itertools.chain(*factors))
    head = ["layer", *(f"head {i}" for i in range(len(factors[0])))]
    lines = [[str(i), *map(told, layer)] for i, layer in enumerate(factors)]
    faithful = [
        [name, f"{e.value:.3f}", f"{e.low:.3f} to {e.high:.3f}"] for name, e in found["faithfulness"].items()
    ]
    return "\n".join(
        [
            "# Grounding",
            "",
            "How many times more of the attention on the picture lies on a thing than if all places were looked at "
            "alike, while its name is said; with 95% intervals.",
            "",
            *(f"- {name}: {value}" for name, value in about.items()),
            "",
            f"The mean of all layers and heads: {told(whole)}. Above chance by the interval: {above} of "
            f"{sum(map(len, factors))} heads, in bold.",
            "",
            table(head, lines),
            "",
            "### Faithfulness",
            "",
            "Areas under the probability of the name, while places are removed from the picture in an order.",
            "",
            table(["", "mean", "95% interval"], faithful),
            "",
        ]
    )


def told(one: Estimate) -> str:
    text = f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"
    return f"**{text}**" if one.low > 1 else text


def plain(found: Any) -> Any:
    """For JSON."""
    if isinstance(found, Estimate):
        return {"value": found.value, "low": found.low, "high": found.high}
    if isinstance(found, Mapping):
        return {name: plain(one) for name, one in found.items()}
    return [plain(one) for one in found]


def results(scenes: Sequence[Seen], folder: Path = RESULTS) -> Path:
    orders = f"{STEPS} steps, {RANDOM} random orders a scene"
    things = f"{sum(len(row['things']) for row in scenes):,} in {len(scenes):,} scenes of the test split"
    about = machine() | {
        "model": "world/vlm, float32",
        "question": ASKED,
        "things": things,
        "faithfulness": orders,
    }
    found, path = measured(scenes), folder / "grounding.md"
    path.write_text(written(found, about))
    (folder / "grounding.json").write_text(json.dumps({"about": about, **plain(found)}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scenes", type=int, default=500, metavar="N", help="in which a thing is named (500)"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        default="build/grounding.jsonl",
        metavar="FILE",
        help="where rows are kept (%(default)s)",
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(results(rows(chosen.scenes, chosen.rows)).read_text())
