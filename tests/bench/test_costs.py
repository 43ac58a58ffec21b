"""What is counted beside a stack, against formulas of the model that ships, and what figures make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import saccade
from saccade import world
from saccade.bench import costs, runner
from saccade.bench.measured import NOTHING, counted, refusal, timed
from saccade.bench.page import page
from saccade.bench.rows import Row, Timed, read_all
from saccade.bench.runner import ALONE, Asked
from saccade.core.question import Answer, prepare_batch, written
from saccade.core.session import attach
from saccade.evals.asking import answers
from saccade.evals.registry import task
from saccade.stack import load

TASK = "world/questions"
PATCHES = 144


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return world.load("vlm")


def layers(config: Any, maps: int, queries: int, keys: int) -> int:
    """FLOPs of a tower: its linear maps, and the products of queries and values with all keys."""
    products = 2 * 2 * config.hidden_size * queries * keys
    return config.num_hidden_layers * (2 * maps * queries + products)


def flops(model: Any, prompt: int, steps: int, visual: int) -> dict[str, float]:
    vision, text = model.config.vision_config, model.config.text_config
    seen = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    share = text.num_key_value_heads / text.num_attention_heads
    read = (2 + 2 * share) * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    tokens = prompt - PATCHES + visual
    first = layers(vision, seen, PATCHES + 1, PATCHES + 1) + layers(text, int(read), tokens, tokens)
    return {
        "prefill": first,
        "decode": sum(layers(text, int(read), 1, tokens + step) for step in range(1, steps + 1)),
    }


@pytest.mark.parametrize(("stack", "visual"), [("", PATCHES), ("fastervlm(keep=0.25)", PATCHES // 4)])
def test_tokens_and_flops_are_those_of_the_formulas(model: Any, stack: str, visual: int) -> None:
    sample = task(TASK).samples(1, 0)[0]
    with attach(model[0], load(stack) if stack else ()):
        found, said = costs.counted(*model, sample, 8)
        (other,) = answers(*model, [sample], max_new_tokens=8)
    inputs = prepare_batch(model[1], [sample.images], [written(model[1], 1, sample.question)])
    prompt = inputs["input_ids"].shape[1]
    assert said == other
    assert found["visual"] == visual
    assert found["flops"] == flops(model[0], prompt, other.tokens - 1, visual)
    weights = sum(
        weight.nbytes
        for name, weight in model[0].named_parameters()
        if "language_model.layers" in name and weight.ndim == 2
    )
    text = model[0].config.text_config
    entry = 2 * 4 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    held = [prompt - PATCHES + visual + step for step in range(1, other.tokens)]
    assert found["bytes"]["decode"] == sum(weights + entry * keys for keys in held)


def test_the_few_are_counted_and_the_others_not(model: Any, tmp_path: Path) -> None:
    stacks = ["fastervlm(keep=0.25)", "damro", "vicrop"]
    found = saccade.bench({"world/vlm": model}, stacks, TASK, tmp_path, limit=1)
    few = {one.id for one in Asked.of(TASK, 1, 0).few}
    assert len(few) == ALONE
    for about, rows in read_all(tmp_path):
        assert {row.id for row in rows if row.cost} == few
        assert {row.id for row in rows if row.alone is not None} <= few
        refused = {row.cost.get("refused", "") for row in rows if row.cost}
        assert all(row.alone == row.text for row in rows if row.cost and refused == {""})
        for stack, said in (("damro", "DAMRO"), ("vicrop", "A driver runs")):
            if about["written"] == stack:
                (why,) = refused
                assert said in why
    by = {(one.stack, one.score): one for one in found}
    assert by["bare", "visual tokens"].found.value == PATCHES
    assert by["fastervlm", "visual tokens"].change.value == PATCHES // 4 - PATCHES
    assert by["damro", "gflops"].note in found.plain(120) and "DAMRO" in by["damro", "gflops"].note
    assert by["fastervlm", "gflops"].verdict == ""  # what is counted needs no test


def test_more_are_asked_alone_where_numbers_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model that says no to whatever it is asked alone of how many there are."""

    def says(model: Any, processor: Any, samples: Any, **_: Any) -> list[Answer]:
        said = [Answer("no" if len(samples) == 1 and one.group == "count" else "yes") for one in samples]
        for one in said:
            one.seconds, one.tokens = 0.1, 2
        return said

    model, processor = world.load("vlm")
    monkeypatch.setattr(runner, "answers", says)
    monkeypatch.setattr(runner, "counted", lambda *_: ({"refused": "for a reason"}, None))
    found = saccade.bench({"rounded": (model.bfloat16(), processor)}, [], TASK, tmp_path, limit=30)
    ((_, rows),) = read_all(tmp_path)
    alone = [at for at, one in enumerate(rows) if one.alone is not None]
    assert len(alone) == 32 and min(alone) < 10 and len(rows) - max(alone) < 10
    assert len({at * 4 // len(rows) for at in alone}) == 4
    flipped = sum(rows[at].group == "count" for at in alone)
    assert 0 < flipped < 32
    told = f"{flipped} of 32"
    (line,) = (line.split("  ") for line in found.plain(99).splitlines() if "flips" in line)
    assert [*filter(None, line)] == ["flips", told]
    assert f"| flips | {told} |" in found.markdown()
    assert f"<b>{told}</b></td>" in page(found)
    by = {one.score: one for one in found}
    assert by["gflops"].note == "for a reason" and by["flips"].values()["value"] == flipped / 32


def row(name: str, cost: dict[str, Any] | None, text: str = "yes", alone: str | None = "yes") -> Row:
    return Row(name, "?", "yes", "", name, text, 0.5, 2, {}, cost, alone if cost else None)


def cost(visual: float, prefill: float, decode: float, size: float = 1.0) -> dict[str, Any]:
    return {
        "visual": visual,
        "flops": {"prefill": prefill, "decode": decode},
        "bytes": {"prefill": size, "decode": size},
    }


def test_figures_of_counts() -> None:
    rows = [row("a", cost(10, 3e9, 1e9)), row("b", None), row("c", cost(20, 5e9, 2e9), "no", "yes")]
    rows.append(row("e", cost(30, 1e9, 0.0)))
    found = counted(rows)
    assert {name: one.value for name, one in found.items()} == {
        "visual tokens": 20,
        "gflops": 4,
        "flips": 1 / 3,
    }
    assert counted([rows[1]]) == {}
    rows.append(row("d", {"refused": "for a reason"}, alone=None))
    found = counted(rows)
    assert found["gflops"] == found["visual tokens"] == NOTHING and refusal(rows) == "for a reason"
    assert found["flips"].value == 1 / 3
    assert set(counted(rows[-1:]).values()) == {NOTHING}


def test_a_machine_needs_what_its_limits_tell() -> None:
    limits = {"flops": 100.0, "bytes": 10.0}
    counts = [
        {"flops": {"prefill": 500.0, "decode": 50.0}, "bytes": {"prefill": 20.0, "decode": 30.0}},
        {"flops": {"prefill": 100.0, "decode": 0.0}, "bytes": {"prefill": 40.0, "decode": 0.0}},
    ]
    assert costs.seconds(counts, limits) == (5 + 3) + (4 + 0)


def test_the_bound_is_what_both_need_at_least() -> None:
    limits = {"flops": 1e9, "bytes": 1.0}
    times = {"bare": [1.0], "stack": [1.0]}
    one = Timed("a", 2, times, times, {"bare": 1, "stack": 1}, {}, limits, {})
    bare, own = {"a": cost(8, 6e9, 1e9, 2)}, {"a": cost(4, 3e9, 1e9, 1)}
    assert timed([one], own, bare)["bound"].found.value == (6 + 2) / (3 + 1)
    assert "bound" not in timed(
        [Timed("a", 2, {"bare": [1.0]}, times, {"bare": 1}, {}, limits, {})], bare, bare
    )
    told = timed([one], {"a": {"refused": "by shapes"}}, bare)["bound"]
    assert (told.found, told.note) == (NOTHING, "by shapes")
