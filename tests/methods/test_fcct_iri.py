"""FCCT against models that are patched by hand and on a planted circuit; IRI against its formula, by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.core.layout import KINDS, Layout
from saccade.probes.fcct_iri import GROUPS, IRI, PARTS, fcct, grouped, highest, louder, noisy

from .planted import IMAGE, LAST, MIDDLE, OUT, SIGNAL, WORD, Route, planted, question
from .shared import generated, two
from .test_notice import by_hand

ATTENTION, MLP = (0.1, 0.5, 0.9, 0.05), (0.8, 0.1, 0.4, 0.2)
EXAMPLE: dict[str, Any] = {
    "recovery": (ATTENTION, MLP), "sources": 0.5, "targets": 1.0, "lam_attention": 1.0, "lam_mlp": 1.0,
}  # fmt: skip
DOUBLE = torch.float64
BOX = (8, 8, 24, 24)
NAMES = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])


@pytest.mark.slow
def test_the_trained_model_is_traced_on_a_scene() -> None:
    """What the answer depends on is in the picture's tokens at first, and at the last in the end."""
    model, processor = sc.world.load("vlm")
    scene = sc.world.scene(9, "test")
    car = next(thing for thing in scene.things if thing.kind == "car")
    asked = sc.Question(processor, [scene.picture()], "is there a car in the image ?")
    with sc.attach(model) as session:
        found = fcct(session, asked, "yes", "car", car.box)
    layer, last = found.recovery.at(part="layer"), found.recovery.at(group="last")
    assert found.clean > 0.9 > found.corrupted
    assert layer.at(layer=7).values.tolist() == pytest.approx([0] * 6 + [1], abs=1e-4)
    assert "recovery" in repr(found)
    traced = tuple(tuple(last.at(part=part).values.tolist()) for part in ("self", "mlp"))
    assert sc.ask(model, processor, scene.picture(), asked.text, stack=IRI(recovery=traced)) == "yes"


# ---- tracing -----------------------------------------------------------------------------------------------


def places(model: Any, asked: sc.Question) -> dict[str, list[int]]:
    """Of the groups that do not hang on boxes."""
    ids = asked.inputs(model)["input_ids"][0].tolist()
    cup = ids.index(asked.processor.tokenizer.encode(" cup")[-1])
    text = [i for i, token in enumerate(ids) if token != model.config.image_token_id]
    return {
        "early text": [i for i in text if i < cup],
        "its name": [cup],
        "late text": [i for i in text if cup < i < len(ids) - 1],
        "last": [len(ids) - 1],
    }


@NAMES
def test_recovery_is_that_of_states_put_back_by_hand(name: str) -> None:
    model, asked = shared(name, DOUBLE), question(name)
    clean = asked.inputs(model)
    corrupted = noisy(clean, 3.0, 0)
    token = asked.processor.tokenizer.encode(" red")[-1]
    with sc.attach(model) as session:
        found = fcct(session, asked, " red", "cup", BOX, rows=11)

    def p(logits: Tensor) -> float:
        return float(logits.softmax(-1)[token])

    before, after = (p(run(model, inputs)[0, -1]) for inputs in (clean, corrupted))
    assert (found.clean, found.corrupted) == (pytest.approx(before, rel=1e-5), pytest.approx(after, rel=1e-5))
    where = places(model, asked)
    for part, layer, group in [
        ("self", 1, "its name"),
        ("mlp", 2, "last"),
        ("layer", 0, "late text"),
        ("layer", 2, "last"),
    ]:
        logits = by_hand(model, clean, corrupted, part, layer, where[group], slice(None))
        made = (p(logits) - after) / (before - after)
        assert float(found.recovery.at(part=part, layer=layer, group=group)) == pytest.approx(made, abs=1e-3)
    assert float(found.recovery.at(part="layer", layer=3, group="last")) == pytest.approx(1, abs=1e-6)


def test_noise_on_the_pixels_has_the_deviation_that_is_asked_for() -> None:
    inputs = {"input_ids": torch.ones(1, 3), "pixel_values": torch.randn(2, 3, 100, 100)}
    inputs["pixel_values"][0] = 0
    changed = noisy(inputs, 3.0, 0)
    assert changed["input_ids"] is inputs["input_ids"]
    added = changed["pixel_values"] - inputs["pixel_values"]
    assert (added[0] == 0).all()
    assert float(added[1].std()) == pytest.approx(3 * float(inputs["pixel_values"].std()), rel=0.02)
    assert torch.equal(noisy(inputs, 3.0, 0)["pixel_values"], changed["pixel_values"])


def test_without_noise_there_is_nothing_to_recover() -> None:
    with sc.attach(shared("llava")) as session, pytest.raises(InputError, match="nothing to recover"):
        fcct(session, question(), " red", "cup", BOX, noise=0.0)


def test_every_token_is_in_its_group() -> None:
    """a . . X . . b, an object of two tokens in the middle; the name is said twice."""
    names = ["special", "text", *["image"] * 6, *["text"] * 6]
    kind = torch.tensor([[KINDS.index(n) for n in names]])
    item = torch.where(kind == KINDS.index("image"), 0, -1)
    layout = Layout(kind, item, torch.zeros_like(kind), torch.zeros(1))
    shown, name = torch.zeros(2, 14, dtype=torch.bool)
    shown[[4, 5]], name[[9, 11]] = True, True
    found = {group: mask.nonzero()[:, 0].tolist() for group, mask in grouped(layout, shown, name).items()}
    assert found == dict(zip(GROUPS, ([2, 3], [4, 5], [6, 7], [0, 1, 8], [9, 11], [10, 12], [13])))
    with pytest.raises(InputError, match="box"):
        grouped(layout, torch.zeros_like(shown), name)


def test_only_the_planted_circuit_recovers() -> None:
    """The object's name fetches from the picture in layer 1, the last token from the name in layer 3."""
    asked = question()
    cup = asked.processor.tokenizer.encode(" cup")[-1]
    model = planted(
        Route(1, 0, WORD, IMAGE, SIGNAL, MIDDLE), Route(3, 2, LAST, WORD, MIDDLE, OUT), answer=cup
    )
    with torch.no_grad():  # the name alone is marked
        others = torch.arange(512) != cup
        model.model.language_model.embed_tokens.weight[others, WORD] = 0
        model.lm_head.weight[cup, OUT] = 3
    with sc.attach(model.double()) as session:
        found = fcct(session, asked, " cup", "cup", (0, 0, 48, 48))
    whole = {("self", 1, "its name"), ("self", 3, "last"), ("layer", 0, "object"), ("layer", 3, "last")}
    whole |= {("layer", 1, "its name"), ("layer", 2, "its name")}
    for part in PARTS:
        for layer in range(4):
            for group in GROUPS:
                recovery = float(found.recovery.at(part=part, layer=layer, group=group))
                assert recovery == pytest.approx(float((part, layer, group) in whole), abs=0.02), (
                    part,
                    layer,
                    group,
                )


def test_calibration_is_the_mean_of_what_the_last_token_recovers() -> None:
    sample = {"question": question(), "answer": " red", "box": BOX}
    model, samples = shared("llava"), [{**sample, "word": word} for word in ("cup", "box")]
    with sc.attach(model) as session:
        kept = IRI().calibrate(session, samples)
        maps = [fcct(session, **sample).recovery for sample in samples]
    for part in ("self", "mlp"):
        made = sum(m.at(part=part, group="last").values for m in maps) / 2
        assert_close(kept[part], made)
        assert made.shape == (4,)


def test_a_calibrated_model_is_steered_by_what_was_traced(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACCADE_HOME", str(tmp_path))
    model, inputs = family("llava").build(), question().inputs(shared("llava"))
    samples = [{"question": question(), "answer": " red", "word": "cup", "box": BOX}]
    with sc.attach(model) as session:
        session.calibrate(IRI(), samples)
        kept = IRI().calibrate(session, samples)
    given = tuple(tuple(kept[part].tolist()) for part in ("self", "mlp"))
    steered = []
    for recovery in ("calibrated", given):
        with sc.attach(model, IRI(**{**EXAMPLE, "recovery": recovery})):
            steered.append(run(model, inputs))
    assert_close(*steered, atol=1e-6, rtol=0)


# ---- injection -----------------------------------------------------------------------------------------------


@contextmanager
def injected(model: Any, plan: dict[str, tuple[dict[int, float], set[int], float]]) -> Iterator[None]:
    """By part: recovery of the sources, targets, lambda. At the last token of every pass."""
    hooks = []

    def steer(part: str, number: int) -> Any:
        sources, targets, lam = plan[part]

        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            o = h[:, -1].clone()
            if number in sources:
                said[part, number] = o
            below = [k for k in sources if k < number]
            if number in targets and below:
                moved = o.clone()
                for k in below:
                    moved += lam * sources[k] * said[part, k]
                h = h.clone()
                h[:, -1] = moved * (o.norm(dim=-1) / moved.norm(dim=-1))[:, None]
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    said: dict[tuple[str, int], Tensor] = {}
    for number, layer in enumerate(model.model.language_model.layers):
        for part, module in (("self", layer.self_attn), ("mlp", layer.mlp)):
            if part in plan:
                hooks.append(module.register_forward_hook(steer(part, number)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "sources", "targets", "plan"),
    [
        (
            "llava",
            0.5,
            1.0,
            {"self": ({2: 0.9, 1: 0.5}, {0, 1, 2, 3}), "mlp": ({0: 0.8, 2: 0.4}, {0, 1, 2, 3})},
        ),
        ("qwen2_5_vl", 0.25, 0.75, {"self": ({2: 0.9}, {0, 1, 2}), "mlp": ({0: 0.8}, {0, 2, 3})}),
    ],
)
def test_it_writes_as_a_model_that_is_injected_by_hand(
    name: str, sources: float, targets: float, plan: dict[str, Any]
) -> None:
    model, inputs = shared(name, DOUBLE), question(name).inputs(shared(name, DOUBLE))
    with injected(model, {part: (*given, lam) for (part, given), lam in zip(plan.items(), (0.7, 0.4))}):
        expected = generated(model, inputs, 4)
    method = IRI(recovery=(ATTENTION, MLP), sources=sources, targets=targets, lam_attention=0.7, lam_mlp=0.4)
    with sc.attach(model, method):
        got = generated(model, inputs, 4)
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-5)


def test_only_the_last_position_changes() -> None:
    for side in ("left", "right"):
        model, inputs = shared("llava"), two(family("llava"), side=side)
        bare = run(model, inputs)
        with sc.attach(model, IRI(**EXAMPLE)):
            changed = (run(model, inputs) != bare).any(-1)
        real = inputs["attention_mask"].bool()
        last = real & (real.flip(1).cumsum(1).flip(1) == 1)
        assert torch.equal(changed & real, last)


def test_a_target_below_all_sources_is_untouched() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    bare = run(model, inputs)
    low = (0.1, 0.2, 0.3, 0.9)  # the source is the last layer
    with sc.attach(model, IRI(**{**EXAMPLE, "recovery": (low, low), "sources": 0.25})):
        assert torch.equal(run(model, inputs), bare)


def test_lengths_stay() -> None:
    noise = torch.Generator().manual_seed(0)
    o, heard = 3 * torch.randn(2, 4, 16, generator=noise, dtype=DOUBLE)
    for lam in (0.1, 1.0, 50.0):
        got = louder(o, heard, lam)
        assert_close(got.norm(dim=-1), o.norm(dim=-1))
        made = o + lam * heard
        assert_close(got / got.norm(dim=-1, keepdim=True), made / made.norm(dim=-1, keepdim=True))


def test_the_papers_layers_of_32() -> None:
    ratios = [float(i % 17) for i in range(32)]
    assert highest(ratios, IRI().sources) == [16, 15, 14]
    assert sorted(highest(ratios, IRI().targets)) == [11, 12, 13, 14, 15, 16, 28, 29, 30, 31]


def test_recoveries_that_are_unknown_or_of_another_depth_are_refused() -> None:
    with pytest.raises(OptionError, match="'traced'"):
        IRI(recovery="traced")
    with (
        sc.attach(shared("llava"), IRI(recovery=((0.5, 0.5), (0.5, 0.5)))),
        pytest.raises(InputError, match="4 layers"),
    ):
        run(shared("llava"), family("llava").inputs())
