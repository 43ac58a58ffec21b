"""Tables of heads added up by hand, and selections of them in methods against one method for every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Look, method, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import AttachError, InputError, OptionError
from saccade.core.heads import Heads
from saccade.report.grid import CELL

SITES = ("text.1.self", "text.3.self")
EVENTS = [[[9, 0, 3, 1], [0, 4, 0, 1]], [[9, 0, 3, 1], [8, 4, 0, 1]]]
"""Means 9 0 3 1, 4 4 0 1; the 4s come of one event, and of both."""


def table(events: Any = EVENTS) -> Heads:
    return Heads("sharpness", SITES, torch.tensor(events, dtype=torch.float32))


# ---- tables ----------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_of_its_events() -> None:
    assert table().scores.tolist() == [[9, 0, 3, 1], [4, 4, 0, 1]]


def test_the_best_heads_are_named_by_site() -> None:
    assert table().top(1) == {"text.1.self": (0,)}
    assert table().top(3) == {"text.1.self": (0,), "text.3.self": (0, 1)}
    assert table().top(0.5) == {"text.1.self": (0, 2), "text.3.self": (0, 1)}
    for wrong in (0, 9, 1.5):
        with pytest.raises(OptionError, match="8 heads"):
            table().top(wrong)


def test_a_threshold_may_ask_for_many_events() -> None:
    assert table().reaching(4) == {"text.1.self": (0,), "text.3.self": (0, 1)}
    assert table().reaching(4, often=0.6) == {"text.1.self": (0,), "text.3.self": (1,)}


def test_random_heads_are_others_and_follow_the_seed() -> None:
    chosen = table().top(3)
    for seed in range(5):
        other = table().random(5, seed, without=chosen)
        assert sorted((s, h) for s, heads in (*chosen.items(), *other.items()) for h in heads) == [
            (s, h) for s in SITES for h in range(4)
        ]
    assert table().random(2, 1) == table().random(2, 1)
    assert len({str(table().random(2, seed)) for seed in range(9)}) > 1
    with pytest.raises(OptionError, match="5 other heads, not 6"):
        table().random(6, without=chosen)


def test_runs_join_and_some_of_their_events_are_taken() -> None:
    joined = Heads.joined([table(EVENTS[:1]), table(EVENTS[1:])])
    assert torch.equal(joined.events, table().events)
    assert joined.where(torch.tensor([False, True])).scores.tolist() == EVENTS[1]
    with pytest.raises(InputError, match="do not score the same"):
        Heads.joined([table(), Heads("other", SITES, table().events)])


def test_without_events_there_are_no_scores() -> None:
    with pytest.raises(InputError, match="sharpness: nothing was seen"):
        table().where(torch.tensor([False, False])).top(1)


def test_a_file_keeps_all_and_others_are_refused(tmp_path: Path) -> None:
    table().save(tmp_path / "a.safetensors")
    back = Heads.load(tmp_path / "a.safetensors")
    assert (back.name, back.sites) == ("sharpness", SITES)
    assert torch.equal(back.events, table().events)
    (tmp_path / "b.safetensors").write_text("nothing")
    for name in ("b", "c"):
        with pytest.raises(InputError, match=f"{name}.safetensors cannot be read"):
            Heads.load(tmp_path / f"{name}.safetensors")


def test_in_the_picture_the_best_head_is_the_brightest_and_the_worst_the_darkest() -> None:
    pixels = np.asarray(table().picture()).astype(int).sum(2)
    left = next(x for x in range(pixels.shape[1]) if pixels[CELL : 3 * CELL, x].min() > 70)
    squares = pixels[CELL : 3 * CELL, left : left + 4 * CELL].reshape(2, CELL, 4, CELL).mean((1, 3))
    order = np.argsort(squares.ravel())
    assert order[-1] == 0
    assert set(order[:2]) == {1, 6}


# ---- selections ------------------------------------------------------------------------------------------


def doubled(**options: Any) -> Any:
    return method(weights=lambda call, w: 2 * w)(**options)


def output(*methods: Any) -> Tensor:
    with sc.attach(shared("llama"), *methods):
        return run(shared("llama"), family("llama").inputs())


def test_a_selection_is_a_method_for_every_site_of_it() -> None:
    chosen = {"text.1.self": (0, 3), "text.2.self": (1,)}
    apart = output(*(doubled(sites=site, heads=heads) for site, heads in chosen.items()))
    assert torch.equal(output(doubled(heads=chosen)), apart)
    assert not torch.allclose(apart, output())


def test_at_sites_without_chosen_heads_nothing_is_done() -> None:
    with sc.attach(shared("llama"), doubled(heads={"text.1.self": (0,)})) as session:
        assert [site.name for site in session.plans] == ["text.1.self"]


def test_a_recording_keeps_the_heads_of_each_site() -> None:
    model, inputs = shared("llama"), family("llama").inputs()
    everything, some = sc.Record(rows="all", dtype="float32"), sc.Record(
        rows="all", dtype="float32", heads={"text.1.self": (0, 3), "text.2.self": (1, 2)}
    )  # fmt: skip
    with sc.attach(model, everything) as session:
        run(model, inputs)
    whole = session.results["Record"].map().tensor
    with sc.attach(model, some) as session:
        run(model, inputs)
    assert torch.equal(
        session.results["Record"].map().tensor, torch.stack([whole[1][[0, 3]], whole[2][[1, 2]]])
    )


def test_probes_follow_a_selection() -> None:
    chosen = {f"text.{layer}.self": (layer, 0) for layer in range(4)}
    look = Look(tell=lambda call: call.weights(heads=chosen[call.site.name]).mean(1))
    rollout = sc.AttentionRollout(heads=chosen)
    with sc.attach(shared("llama"), look, rollout) as session:
        run(shared("llama"), family("llama").inputs())
    relevance = torch.eye(24)
    for _, _, mean in look.seen:
        relevance = (mean + torch.eye(24)) / 2 @ relevance
    assert_close(session.results["attention_rollout"]["text"], relevance)


def test_zerotuning_takes_a_selection() -> None:
    chosen = {"text.1.self": (0, 3), "text.2.self": (1,)}
    apart = output(*(sc.ZeroTuning(gamma=9.0, sites=site, heads=heads) for site, heads in chosen.items()))
    assert torch.equal(output(sc.ZeroTuning(gamma=9.0, heads=chosen)), apart)


def test_what_is_no_choice_of_this_model_is_refused() -> None:
    for heads, problem in (
        ({"text.9.self": (0,)}, "No site of this model is named 'text.9.self'"),
        ({"text.0.self": (0,)}, "none of those of sites="),
    ):
        with pytest.raises(AttachError, match=problem):
            sc.attach(shared("llama"), doubled(sites="text.1:.self", heads=heads))
    with pytest.raises(InputError, match="no head 7"):
        output(doubled(heads={"text.0.self": (7,)}))
    with pytest.raises(OptionError, match="no choice of heads"):
        doubled(heads=table())


def test_a_file_is_named_in_a_stack_with_how_many_of_it(tmp_path: Path) -> None:
    file = tmp_path / "found.safetensors"
    table().save(file)
    three = sc.load(f"mute_heads(heads={file}:3)")
    assert three == sc.load(f"mute_heads(heads={file}:38%)")
    assert three[0].heads == table().top(3)
    assert sc.load(str(three)) == three
    with pytest.raises(OptionError, match="does not say which heads"):
        sc.load(f"mute_heads(heads={file})")


def test_a_table_of_the_trained_model_is_used_by_its_file(tmp_path: Path) -> None:
    """As on the command line: a probe in one run, its heads muted in another."""
    model, processor = sc.world.load("vlm")
    picture, question = sc.world.scene(9, "test").picture(), "what colour is the car ?"
    inputs = sc.Question(processor, [picture], question).inputs(model)
    with sc.attach(model, sc.load("visual_head_analysis")) as session:
        bare = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    found = session.results["visual_head_analysis"]["score"]
    found.save(tmp_path / "visual.safetensors")
    stack = sc.load(f"mute_heads(heads={tmp_path}/visual.safetensors:100%)")
    with sc.attach(model, stack):
        assert not torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), bare)
