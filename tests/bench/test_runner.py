"""A run that is cut off, wherever it is, ends as one that is not; and what would mix does not."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import saccade
from saccade import world
from saccade.bench import fingerprint, rows, runner
from saccade.bench.rows import Row, Writer, locked, read, read_all
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.session import attach
from saccade.evals.asking import answers
from saccade.evals.registry import task
from saccade.evals.task import Sample
from saccade.stack import Stack, load

SLOW, KILLED = (Path(__file__).with_name(name) for name in ("slow.py", "killed.py"))
STACK, TASK = "fastervlm(keep=0.5)", "world/questions"


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {"world/vlm": world.load("vlm")}


def run(models: Any, out: Path, stacks: Any = (STACK,), tasks: Any = (TASK,), **options: Any) -> Any:
    return saccade.bench(models, stacks, tasks, out, **{"limit": 2, "batch": 4, **options})


def said(out: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that is no time nor version, by combination, in order of the samples."""
    return {
        fingerprint.fingerprint(about): sorted(
            (r.id, r.question, r.truth, r.group, r.picture, r.text, r.tokens, r.cost, r.alone) for r in found
        )
        for about, found in read_all(out)
    }


@pytest.fixture(scope="module")
def whole(models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, ...]]]:
    out = tmp_path_factory.mktemp("whole")
    run(models, out, batch=2)
    return said(out)


def test_rows_are_what_the_model_says(models: Any, whole: Any) -> None:
    model, processor = models["world/vlm"]
    samples = task(TASK).samples(2, 0)
    assert len(whole) == 2
    bare = [str(a) for a in answers(model, processor, samples, max_new_tokens=8)]
    with attach(model, load(STACK)):
        reduced = [str(a) for a in answers(model, processor, samples, max_new_tokens=8)]
    expected = [sorted((s.id, s.question, t) for s, t in zip(samples, texts)) for texts in (bare, reduced)]
    found = [[(row[0], row[1], row[5]) for row in one] for one in whole.values()]
    assert sorted(found) == sorted(expected)
    tokenizer = processor.tokenizer
    for one in whole.values():
        for row in one:
            assert row[6] == len(tokenizer(row[5], add_special_tokens=False).input_ids) + 1  # and the end


def test_neither_batch_nor_repetition_changes_anything(models: Any, whole: Any, tmp_path: Path) -> None:
    run(models, tmp_path, batch=5)
    assert said(tmp_path) == whole
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    run(models, tmp_path, batch=3)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before


@pytest.mark.slow
def test_jobs_come_to_what_one_comes_to(whole: Any, tmp_path: Path) -> None:
    saccade.bench(["world/vlm"], [STACK], [TASK], tmp_path, limit=2, batch=4, jobs=2)
    assert said(tmp_path) == whole
    with pytest.raises(saccade.SaccadeError, match=r"masactrl|MasaCtrl"):
        saccade.bench(["world/vlm"], ["masactrl"], [TASK], tmp_path, limit=2, jobs=2)


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "times"), [(1, 4), (2, 1)])
def test_a_run_that_is_killed_ends_like_one_that_is_not(
    whole: Any, tmp_path: Path, jobs: int, times: int
) -> None:
    rng = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SLOW), str(tmp_path)]
    kills = 0
    for _ in range(times):
        one = subprocess.Popen(
            [*command, "0.2", f"{jobs}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert one.stdout
        assert one.stdout.readline() in ("asks\n", "")
        time.sleep(rng.uniform(0, 0.9))
        one.send_signal(signal.SIGKILL)
        kills += one.wait() == -signal.SIGKILL
        one.stdout.read()  # until its jobs have ended, for nobody listens to them
        held = {path: read(path)[1] for path in tmp_path.glob("*.jsonl")}
        assert all(len({row.id for row in found}) == len(found) for found in held.values())
    subprocess.run([*command, "0", f"{jobs}"], env=environment, check=True, capture_output=True)
    assert kills and said(tmp_path) == whole


@pytest.mark.slow
def test_two_thousand_answers_are_the_same_behind_ten_kills(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    folders = [tmp_path / "whole", tmp_path / "killed"]
    command = [sys.executable, str(KILLED), *map(str, folders), "135", "10"]
    told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    kills = json.loads(told.stdout)
    whole, killed = (
        {path.name: path.read_text().splitlines() for path in out.glob("*.jsonl")} for out in folders
    )
    assert len(whole) == 2 and whole.keys() == killed.keys()
    for name, lines in whole.items():
        (head, *expected), (other, *found) = (map(json.loads, one) for one in (lines, killed[name]))
        assert head == other
        assert all(row.pop("seconds") > 0 for row in (*expected, *found))
        assert expected == found
        assert len({row["text"] for row in expected}) > 5
    assert sum(map(len, whole.values())) - len(whole) >= 2000
    assert kills["killed"] == 10 and kills["at work"] >= 1


def test_a_torn_line_is_asked_again(models: Any, whole: Any, tmp_path: Path) -> None:
    run(models, tmp_path)
    torn, header = sorted(tmp_path.glob("*.jsonl"))
    torn.write_bytes(torn.read_bytes()[:-9])
    header.write_bytes(header.read_bytes()[:40])
    assert sum(len(found) for _, found in read_all(tmp_path)) == len(whole[torn.stem]) - 1
    run(models, tmp_path)
    assert said(tmp_path) == whole


def test_a_full_disk_loses_nothing(
    models: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.write, 0

    def full(file: int, data: bytes) -> int:
        nonlocal calls
        calls += data.startswith(b"{")
        if calls < 4:
            return write(file, data)
        if data.startswith(b"{"):
            return write(file, data[: len(data) * 2 // 3])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rows.os, "write", full)
        with pytest.raises(InputError, match="No space left on device") as raised:
            run(models, tmp_path)
    assert "same command" in raised.value.remedy
    kept = {(row.id, row.text) for _, found in read_all(tmp_path) for row in found}
    assert len(kept) >= 8
    run(models, tmp_path)
    assert said(tmp_path) == whole


def test_two_runs_in_one_folder(models: Any, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="Another run"):
        run(models, tmp_path)
    assert (tmp_path / rows.LOCK).exists()
    with locked(tmp_path):  # what nobody holds is no obstacle
        pass
    with Writer(tmp_path, {"task": 1}), pytest.raises(InputError, match="Another run"):
        Writer(tmp_path, {"task": 1})


def test_a_name_is_checked_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.Asked, "of", lambda *_: pytest.fail("drawn"))
    for name in ("world/vml", "nowhere", str(tmp_path)):
        with pytest.raises(InputError, match=r"vml|no folder|no config"):
            saccade.bench(["world/vlm", name], [], [TASK], tmp_path)


def test_jobs_load_models_by_name(models: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Every job loads"):
        run(models, tmp_path, jobs=2)
    with pytest.raises(InputError, match="0 jobs"):
        run(models, tmp_path, jobs=0)


def test_another_format_is_refused(models: Any, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"format": 0, "about": {}}\n')
    with pytest.raises(InputError, match="format 0"):
        run(models, tmp_path)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["old.jsonl"]


def test_a_file_that_ends_anywhere_is_completed_to_the_byte(tmp_path: Path) -> None:
    about = {"task": "what – is"}
    made = [Row(str(i), "how – ?\n", ["yes"], "", "p", "yes\n", 0.1, 1, {}) for i in range(3)]
    with Writer(tmp_path, about) as writer:
        writer.add(made)
    path = rows.path_of(tmp_path, about)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        held = read(path)[1]
        assert held == made[: len(held)]
        with Writer(tmp_path, about) as writer:
            assert writer.done == {row.id for row in held}
            writer.add(row for row in made if row.id not in writer.done)
        assert path.read_bytes() == data


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    about = {"task": 1}
    with Writer(tmp_path, about) as writer:
        writer.add([Row(str(i), "?", "yes", "", "", "yes", 0.1, 1, {}) for i in range(3)])
    path = rows.path_of(tmp_path, about)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:9], lines[3]]) + "\n")
    with pytest.raises(InputError, match="line 3"):
        read(path)


def test_what_has_other_settings_stays_apart(models: Any, tmp_path: Path) -> None:
    one = ("world/vlm", fingerprint.of_model("world/vlm", models["world/vlm"][0]))
    weights = one[1]["weights"]

    def of(stack: str = STACK, name: str = TASK, limit: int = 2, seed: int = 0) -> str:
        found = task(name)
        about = fingerprint.of_task(name, found, found.samples(limit, seed), limit, seed)
        return fingerprint.fingerprint([fingerprint.of_stack(load(stack), weights), about])

    assert of() == of(stack="fastervlm(keep=0.50)")
    others = [of("fastervlm(keep=0.4)"), of("var"), of(name="world/captions"), of(limit=3), of(seed=1)]
    assert len({of(), *others}) == 6

    samples = task(TASK).samples(2, 0)
    other = [Sample(s.id, [s.images[0].rotate(90)], s.question, s.truth, s.group, s.picture) for s in samples]
    kept, turned = (fingerprint.of_task(TASK, task(TASK), s, 2, 0) for s in (samples, other))
    assert kept != turned


def test_what_cannot_be_written_down_is_refused() -> None:
    assert fingerprint.plain({"a": frozenset("cab")}) == {"a": ["a", "b", "c"]}
    with pytest.raises(InputError, match="object"):
        fingerprint.plain([object()])


def test_a_stack_that_does_not_fit_is_told_before_anything_is_asked(models: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several in a row"):
        run(models, tmp_path, stacks=["vicrop"], tasks=["world/conversation"])
    with pytest.raises(saccade.SaccadeError):
        run(models, tmp_path, stacks=["masactrl"])
    with pytest.raises(InputError, match="no card"):
        run(models, tmp_path, stacks=[Stack([Method()])])
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_driver_answers(models: Any, tmp_path: Path) -> None:
    model, processor = models["world/vlm"]
    run(models, tmp_path, stacks=["vicrop"], limit=1)
    driven = next(found for about, found in read_all(tmp_path) if about["stack"])
    for sample in task(TASK).samples(1, 0)[:2]:
        answer = saccade.ask(model, processor, sample.images, sample.question, "vicrop", max_new_tokens=8)
        assert next(row.text for row in driven if row.id == sample.id) == answer


# ---- code ----------------------------------------------------------------------------------------------

METHOD = '''"""A method."""
from house import tools
from house.parts.first import used


class Dim:
    def bias(self):
        """What it does."""
        return used() + 1  # a little
'''
FILES = {
    "__init__.py": "",
    "dim.py": METHOD,
    "tools.py": "def spare():\n    return 0\n",
    "parts/__init__.py": "",
    "parts/first.py": "def used():\n    from .second import deep\n\n    return deep()\n",
    "parts/second.py": "def deep():\n    return 2\n",
    "other.py": "never = 1\n",
}


@dataclass
class House:
    root: Path

    def code(self) -> str:
        return fingerprint.of_code(["house.dim"])

    def write(self, name: str, change: Callable[[str], str]) -> None:
        path = self.root / name
        path.write_text(change(path.read_text()))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    for name, text in FILES.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "house", raising=False)
    __import__("house")
    return House(tmp_path / "house")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("dim.py", "+ 1", "+ 3"),
        ("tools.py", "return 0", "return 1"),
        ("parts/first.py", "deep()\n", "-deep()\n"),
        ("parts/second.py", "return 2", "return 2.5"),
    ],
)
def test_changed_code_has_another_fingerprint(house: House, name: str, old: str, new: str) -> None:
    before = house.code()
    house.write(name, lambda text: text[: text.rindex(old)] + new + text[text.rindex(old) + len(old) :])
    assert house.code() != before


def test_what_does_not_run_changes_nothing(house: House) -> None:
    before = house.code()
    house.write("dim.py", lambda text: text.replace("What it does", "What it did"))
    house.write(
        "dim.py", lambda text: text.replace("# a little", "# much").replace('"A method.', '"Another.')
    )
    house.write("dim.py", lambda text: text.replace("class", "if TYPE_CHECKING:\n    import x\n\nclass"))
    house.write("parts/second.py", lambda text: f'"""Deep."""\n\n\n{text}')
    house.write("other.py", lambda text: "never = 2\n")
    assert house.code() == before


def test_the_parts_of_a_family_are_code_of_a_method() -> None:
    one = fingerprint._read(
        (Path(runner.__file__).parents[1] / "steering/damro.py").read_text(), "x.y", False
    )
    assert ("saccade.steering._parts.contrast", "contrast") in one[1]
    assert fingerprint.of_code(["saccade.steering.damro"]) != fingerprint.of_code(["saccade.steering.var"])
    with pytest.raises(InputError, match="in no file"):
        fingerprint.of_code(["nowhere"])
