"""Tasks by name.

world/NAME                of the embedded world: world/pope-adversarial
world/broken/NAME         of its scenes whose co-occurrence is broken
world/calibration/NAME    of its scenes on which constants are chosen
BENCHMARK:PATH,option=value,...    of files that you have, whose paths are without commas

pope:coco_pope_random.json,images=val2014
chair:instances_val2014.json,captions=captions_val2014.json,synonyms=synonyms.txt,images=val2014
gqa:testdev_balanced_questions.json,images=images
vqav2:v2_OpenEnded_mscoco_val2014_questions.json,annotations=v2_mscoco_val2014_annotations.json,images=val2014
textvqa:TextVQA_0.5.1_val.json,images=train_images
mme:MME_Benchmark                  a folder, or a table: mme:MME.tsv
scienceqa:data/scienceqa,images=data/scienceqa/images/test,split=test
mmbench:MMBench_DEV_EN.tsv
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from saccade.core.errors import InputError, nearest
from saccade.evals import world, writing
from saccade.evals.files import FileTask
from saccade.evals.mmbench import MmBench
from saccade.evals.mme import Mme
from saccade.evals.official import Coco, Gqa, Pope, TextVqa, VqaV2
from saccade.evals.scienceqa import ScienceQa
from saccade.evals.task import Task

KINDS: tuple[type[FileTask], ...] = (Pope, Coco, Mme, Gqa, VqaV2, TextVqa, ScienceQa, MmBench)
BENCHMARKS = {kind.slug: kind for kind in KINDS}


def task(name: str) -> Task:
    slug, colon, rest = name.partition(":")
    if colon and slug in BENCHMARKS:
        return _of_file(slug, rest)
    known = embedded()
    if name in known:
        return known[name]
    every = [*known, *map(_usage, BENCHMARKS)]
    near = nearest(name, known) or nearest(slug, BENCHMARKS)
    raise InputError(f"There is no task {name!r}.", f"{near} use one of:\n  ".lstrip() + "\n  ".join(every))


def embedded() -> dict[str, Task]:
    natural = {f"world/{one.name}": one for one in (*world.tasks(world.NATURAL), *writing.TASKS)}
    others = (world.BROKEN, world.CALIBRATION)
    return natural | {f"world/{split}/{one.name}": one for split in others for one in world.tasks(split)}


def for_choosing(name: str) -> str:
    """The same task on a split from which no result is told."""
    found = task(name)
    chosen = f"world/{world.CALIBRATION}/{found.name}"
    if name in embedded() and chosen in embedded():
        return chosen
    if isinstance(found, ScienceQa) and found.split != "test":
        return name
    raise InputError(
        f"{name} has no split to choose on: a constant that is chosen on what is measured flatters.",
        f"choose on one of world/{world.CALIBRATION}/..., or on scienceqa:...,split=val",
    )


def _of_file(slug: str, written: str) -> Task:
    kind, remedy = BENCHMARKS[slug], f"write {_usage(slug)}"
    path, *options = written.split(",")
    given = {"file": path}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key in given:
            problem = "is given twice" if equals else "has no value"
            raise InputError(f"{key!r} {problem} in '{slug}:{written}'.", remedy)
        given[key] = value
    known, hints = {one.name: one for one in fields(kind)}, get_type_hints(kind)
    for key in given:
        if key not in known:
            raise InputError(f"{slug} has no option {key!r}.", remedy)
    for key, one in known.items():
        if not given.get(key) and (key in given or _needed(one)):
            raise InputError(f"{slug} needs {'a path' if key == 'file' else key}.", remedy)
    try:
        return kind(**{key: _value(hints[key], value) for key, value in given.items()})
    except ValueError as e:
        raise InputError(f"'{slug}:{written}': {e}.", remedy) from e


def _value(hint: type, value: str) -> Any:
    return Path(value).expanduser() if hint is Path else hint(value)


def _needed(one: Field[object]) -> bool:
    return one.default is MISSING


def _usage(slug: str) -> str:
    _, *options = fields(BENCHMARKS[slug])
    shown = [f"{one.name}=..." if _needed(one) else f"[{one.name}={one.default}]" for one in options]
    return ",".join([f"{slug}:PATH", *shown])
