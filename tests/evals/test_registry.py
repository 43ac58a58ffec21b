"""Tasks by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from saccade.core.errors import InputError
from saccade.evals import registry, world
from saccade.evals.official import Coco, Pope
from saccade.evals.registry import task
from saccade.evals.scienceqa import ScienceQa


def test_tasks_of_the_world() -> None:
    assert task("world/pope-adversarial") == world.Pope("adversarial")
    assert task("world/broken/captions") == world.Captions("broken")
    assert task("world/needle in 128").max_new_tokens == 2
    known = registry.embedded()
    assert len(known) == 3 * len(world.tasks("test")) + len(registry.writing.TASKS)
    assert all(name.endswith(f"/{one.name}") for name, one in known.items())


def test_tasks_of_files() -> None:
    assert task("pope:a/b.json,images=c d") == Pope(Path("a/b.json"), Path("c d"))
    paths = {"captions": Path("c"), "synonyms": Path("s"), "images": Path("i")}
    assert task("chair:a,images=i,captions=c,synonyms=s") == Coco(Path("a"), **paths)
    assert task("chair:a,images=i,captions=c,synonyms=s,max_new_tokens=64").max_new_tokens == 64
    assert task("scienceqa:a,images=~/b,split=val") == ScienceQa(Path("a"), Path.home() / "b", "val")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "world/pope-adversaria",
            "no task 'world/pope-adversaria'.\n  → did you mean world/pope-adversarial",
        ),
        ("pop:a.json", "did you mean pope? use one of:\n  world/pope-random\n"),
        ("pope", "\n  pope:PATH,images=...\n"),
        ("", "scienceqa:PATH,images=...,[split=test]\n"),
        ("pope:a.json", "pope needs images.\n  → write pope:PATH,images=..."),
        ("pope:,images=b", "pope needs a path."),
        ("pope:a.json,images=", "pope needs images."),
        ("scienceqa:a,images=b,split=", "scienceqa needs split."),
        ("pope:a.json,images=b,seed=3", "pope has no option 'seed'."),
        ("pope:a.json,b", "'b' has no value in 'pope:a.json,b'."),
        ("pope:a.json,images=b,images=c", "'images' is given twice"),
        ("chair:a,captions=b,synonyms=c,images=d,max_new_tokens=many", "invalid literal"),
    ],
)
def test_a_name_that_names_nothing_is_refused(name: str, told: str) -> None:
    with pytest.raises(InputError) as e:
        task(name)
    assert told in str(e.value)
