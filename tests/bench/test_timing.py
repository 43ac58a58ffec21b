"""Timings by a clock of our own, memory by what is allocated, and the rows that they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import saccade
from saccade import world
from saccade.bench import timing
from saccade.bench.measured import CANNOT_TELL, timed, told
from saccade.bench.results import Results
from saccade.bench.rows import Timed, path_of, read_all, read_timed
from saccade.core.runtime import Runtime
from saccade.evals.interval import Estimate
from saccade.evals.registry import task
from saccade.stack import Stack, load

STACK, TASK = "fastervlm(keep=0.25)", "world/questions"
MIB = 2**20


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return world.load("vlm")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "SIDES", {"cpu": 64})
    timing.roofline.cache_clear()


def test_all_are_asked_in_turn_and_say_as_much(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is asked is told by what is attached and how long the prompt is."""
    asked: list[tuple[bool, int, int]] = []
    generate = type(model[0]).generate

    def seen(self: Any, *args: Any, **given: Any) -> Any:
        out = generate(self, *args, **given)
        prompt = given["input_ids"].shape[1]
        asked.append((bool(Runtime.of(self).sessions), prompt, out.shape[1] - prompt))
        return out

    monkeypatch.setattr(type(model[0]), "generate", seen)
    sample = task(TASK).samples(1, 0)[0]
    found = timing.timed(*model, load(STACK), sample, task(TASK), {"visual": 36.0}, {})
    (_, prompt, length), *rest = asked
    assert found.tokens == max(2, length)
    assert {said for _, _, said in rest} == {found.tokens}
    bare, stack, oracle = (False, prompt), (True, prompt), (False, prompt - 144 + 36)
    order = [one[:2] for one in rest]
    for who in (bare, stack):  # once to warm up and once for the memory
        assert order[:4].count(who) == 2
    rounds = order[4:]
    assert len(rounds) == 2 * 2 * 3
    for start in (0, 6):
        assert rounds[start : start + 6 : 2] == rounds[start + 1 : start + 6 : 2]  # warm
        assert set(rounds[start : start + 6]) == {bare, stack, oracle}
    for name in ("bare", "stack", "oracle"):
        assert len(found.seconds[name]) == 2
        assert all(0 < f < s for f, s in zip(found.first[name], found.seconds[name], strict=True))
    assert found.refused == {} and set(found.peak) == {"bare", "stack"}
    assert found.peak["stack"] < found.peak["bare"]


def test_what_has_no_oracle(model: Any) -> None:
    sample = task(TASK).samples(1, 0)[0]
    for stack, cost in ((Stack(), {"visual": 144.0}), (load("vicrop"), {"refused": "a driver"})):
        found = timing.timed(*model, stack, sample, task(TASK), cost, {})
        assert "oracle" not in found.seconds
        assert ("first" in found.refused) == bool(stack)
    later = task("world/conversation").samples(1, 0)[-1]
    found = timing.timed(*model, load(STACK), later, task("world/conversation"), {"visual": 36.0}, {})
    assert "said before" in found.refused["oracle"]


def test_a_shortened_prompt() -> None:
    ids = torch.tensor([[1, 7, 9, 9, 9, 9, 5, 6]])
    assert timing.shortened(ids, 9, 4) is None
    found = timing.shortened(ids, 9, 3)
    assert found is not None
    assert found["input_ids"].tolist() == [[1, 7, 6, 6, 6, 5, 6]]
    assert found["attention_mask"].tolist() == [[1] * 7]


def test_memory_is_what_was_held_at_once() -> None:
    before = torch.ones(MIB)

    def work() -> None:
        nonlocal before
        for _ in range(3):
            torch.ones(6 * MIB)  # one after the other
        one = torch.ones(8 * MIB)
        other = one + one
        del one
        before = other[:1] + 1

    assert 64 * MIB <= timing.grown(torch.device("cpu"), work) < 64 * MIB + 1000
    assert (
        64 * MIB <= timing.grown(torch.device("cpu"), work) < 64 * MIB + 1000
    )  # nothing is hidden by the first


def test_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_best", lambda work, _: 0.5 if work() is not None else 0.0)
    found = timing.roofline(torch.device("cpu"), torch.float32)
    assert found == {"flops": 2 * 64**3 / 0.5, "bytes": 4 * 8 * 64 * 2 * 64 / 0.5}


def row(name: str, bare: list[float], stack: list[float], first: float = 0.25, **other: Any) -> Timed:
    seconds = {"bare": bare, "stack": stack}
    begun = {who: [first * one for one in each] for who, each in seconds.items()}
    peak = {"bare": 4 * MIB, "stack": 3 * MIB}
    limits = {"flops": 1.0, "bytes": 1.0}
    return Timed(name, 3, seconds, begun, peak, other.get("refused", {}), limits, {})


def test_figures_by_hand() -> None:
    rows = [row("a", [4.0, 4.4, 4.0], [2.0, 2.0, 2.2]), row("b", [4.0, 4.0], [2.0, 1.6])]
    found = timed(rows, {}, {})
    speed = sorted([2.0, 2.2, 4 / 2.2, 2.0, 2.5])
    assert found["speed-up"].found == Estimate(2.0, pytest.approx(2.0), pytest.approx(2.2), 5)
    assert speed[1] == 2.0 and found["speed-up"].verdict == "better"
    first = found["first token ms"]
    assert (first.found.value, first.found.low, first.found.high) == (500, 500, 500)
    assert first.change and first.change.value == -500 and first.verdict == "better"
    assert found["per token ms"].found.value == 1e3 * (2.0 - 0.5) / 2
    assert found["peak mebibytes"].found.value == 3 and found["peak mebibytes"].verdict == "better"
    assert found["bound"].note and "oracle speed-up" not in found
    refused = timed([row("a", [1.0], [1.0], refused={"first": "no", "oracle": "none"})], {}, {})
    assert refused["first token ms"].note == refused["per token ms"].note == "no"
    assert refused["oracle speed-up"].note == "none"


@pytest.mark.parametrize(
    ("value", "low", "high", "better", "verdict"),
    [
        (-2.0, -2.5, -1.0, True, "better"),
        (2.0, 1.0, 2.5, False, "worse"),
        (2.0, 0.9, 2.9, True, CANNOT_TELL),
        (-0.5, -1.0, 0.0, True, CANNOT_TELL),
        (0.0, 0.0, 0.0, False, CANNOT_TELL),
    ],
)
def test_what_spreads_wider_than_it_is_large_is_marked(
    value: float, low: float, high: float, better: bool, verdict: str
) -> None:
    assert told(Estimate(value, low, high, 9), better) == verdict


def test_timings_are_kept_apart_and_made_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def fake(_: Any, __: Any, stack: Stack, sample: Any, *rest: Any) -> Timed:
        made.append(sample.id)
        return row(sample.id, [2.0] * 3, [1.0] * 3)

    monkeypatch.setattr(timing, "timed", fake)

    def run(**options: Any) -> Results:
        return saccade.bench({"world/vlm": model}, [STACK], TASK, tmp_path, limit=1, **options)

    run()
    answered = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert not made and not read_timed(tmp_path)
    found = run(timing=True)
    assert len(made) == 2 * 4 and len(set(made)) == 4
    assert all(path.read_bytes() == data for path, data in answered.items())
    assert len(read_all(tmp_path)) == len(read_timed(tmp_path)) == 2
    one = next(one for one in found if one.stack == "fastervlm" and one.score == "speed-up")
    assert one.found.value == 2.0 and "thread" in one.note

    torn = path_of(tmp_path, read_timed(tmp_path)[-1][0])
    torn.write_bytes(torn.read_bytes()[:-9])
    run(timing=True)
    assert len(made) == 9 and made[-1] in made[:-1]
    run(timing=True)
    assert len(made) == 9
    monkeypatch.setattr(timing, "name_of", lambda _: "another machine")
    latest = run(timing=True)
    assert len(made) == 17 and len(read_timed(tmp_path)) == 4
    assert {one.note for one in latest if one.score == "first token ms"} == {"another machine, 1 thread"}
