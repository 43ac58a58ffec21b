"""ACT against the whole map of a head, calibrated by hand row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import method, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.act import ACT

from .shared import Inputs, alone, followed, generated, numbers, two

EXAMPLE = {"alpha": 1.5}

LAYER = 2  # of four: neither the first two nor the last


# ---- the paper, on the map of one head ----------------------------------------------------------------


def by_hand(w: Tensor, beta: float = 0.4, alpha: float = 1.5, threshold: float | None = None) -> Tensor:
    """One head's map (tokens, tokens) of one sample."""
    tokens, w = len(w), w.clone()
    seen_by = [int((w[:, k] > 0).sum()) for k in range(tokens)]
    limit = alpha / tokens if threshold is None else threshold
    sinks = [k for k in range(tokens) if float(w[:, k].sum()) / seen_by[k] > limit][1:]
    others = [k for k in range(tokens) if k not in sinks]
    for row in w:
        freed = (1 - beta) * float(row[sinks].sum())
        left = float(row[others].sum())
        if left == 0:  # its window shows nothing but sinks
            continue
        row[sinks] *= beta
        row[others] *= 1 + freed / left
    return w


def maps(model: Any, inputs: Inputs, *methods: Any) -> tuple[Tensor, ...]:
    with torch.no_grad(), sc.attach(model, *methods):
        return model(**inputs, output_attentions=True).attentions


def eager(name: str = "llama") -> Any:
    return shared(name, torch.float32, "eager")


def real(inputs: Inputs, sample: int) -> Tensor:
    return inputs["attention_mask"][sample].nonzero()[:, 0]


def each(w: Tensor, inputs: Inputs, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Every head's map of real tokens, edited."""
    new = w.clone()
    for sample in range(len(w)):
        at = real(inputs, sample)
        for head in range(w.shape[1]):
            new[sample, head][at[:, None], at] = edit(w[sample, head][at[:, None], at])
    return new


OPTIONS = [{"alpha": 1.5}, {"alpha": 1.2, "beta": 0.0}, {"threshold": 0.1, "beta": 0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("gpt2", "right"), ("mistral", "left")])
def test_maps_are_the_papers(name: str, side: str, options: dict[str, Any]) -> None:
    """Two samples, padded; one model's keys are shared, one's layers have a window."""
    model, inputs = eager(name), two(family(name), side=side)
    before, after = maps(model, inputs)[LAYER], maps(model, inputs, ACT(**options))[LAYER]
    wanted = each(before, inputs, lambda w: by_hand(w, **options))
    rows = inputs["attention_mask"].bool()[:, None, :, None]
    assert (wanted - before).abs().max() > 0.01
    assert_close(after * rows, wanted * rows, atol=1e-6, rtol=0)


def planted(column: int = 7, tokens: int = 12) -> Tensor:
    """A map whose tokens attend evenly, but for the first one and for a column: (1, 1, tokens, tokens)."""
    w = torch.ones(tokens, tokens).tril()
    w[:, 0] += 5
    w[:, column] *= 9
    return (w / w.sum(-1, keepdim=True))[None, None]


def test_a_planted_sink_is_scaled_by_beta_and_the_first_column_grows() -> None:
    w, inputs = planted(), {"input_ids": words(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    plant = method(weights=lambda call, _: w.expand_as(_))(sites=f"text.{LAYER}.self")
    after = maps(eager(), inputs, plant, ACT(alpha=2.0))[LAYER]
    before = w.expand_as(after)
    assert_close(after[..., 7], 0.4 * before[..., 7], atol=0, rtol=1e-6)
    assert (after[..., 7:, 0] > before[..., 7:, 0]).all()
    assert_close(after[..., :7, :], before[..., :7, :], atol=0, rtol=0)
    assert_close(after[..., 0, 0], torch.ones_like(after[..., 0, 0]), atol=0, rtol=0)


# ---- the statements -----------------------------------------------------------------------------------


def test_rows_sum_to_one_and_what_is_not_seen_stays_zero() -> None:
    model, inputs = eager(), two(family("llama"))
    after = maps(model, inputs, ACT(alpha=1.2, beta=0.0))[LAYER]
    for sample in (0, 1):
        at = real(inputs, sample)
        w = after[sample][:, at[:, None], at]
        assert_close(w.sum(-1), torch.ones_like(w.sum(-1)))
        assert (w.triu(1) == 0).all()


def test_beta_of_one_and_a_threshold_above_one_are_the_dense_model() -> None:
    model, inputs = shared("llama"), two(family("llama"))
    bare = run(model, inputs)
    with sc.attach(model, ACT(beta=1.0, alpha=1.2)):
        assert torch.equal(run(model, inputs), bare)
    before, after = maps(eager(), inputs), maps(eager(), inputs, ACT(threshold=1.1))
    assert torch.equal(after[LAYER], before[LAYER])


@pytest.mark.parametrize("heads", [(1, 2), {f"text.{LAYER}.self": (1, 2)}], ids=str)
def test_heads_outside_the_set_are_bit_identical(heads: Any) -> None:
    model, inputs = eager(), two(family("llama"))
    before, after = maps(model, inputs)[LAYER], maps(model, inputs, ACT(alpha=1.2, heads=heads))[LAYER]
    assert torch.equal(after[:, [0, 3]], before[:, [0, 3]])
    wanted = each(before, inputs, lambda w: by_hand(w, alpha=1.2))
    rows = inputs["attention_mask"].bool()[:, None, :, None]
    assert_close((after * rows)[:, [1, 2]], (wanted * rows)[:, [1, 2]], atol=1e-6, rtol=0)


def test_the_layers_are_the_third_to_the_last_but_one() -> None:
    assert numbers(ACT().sites) == [*range(2, 31)]


def test_while_writing_the_map_goes_on() -> None:
    """Through a second turn."""
    model, inputs = eager(), alone(two(family("llama")), 0)
    with sc.attach(model, ACT(**EXAMPLE)):
        first = generated(model, inputs, 4, output_attentions=True)
        asked = followed(inputs, first, words(1, 3, seed=9))
        second = generated(model, asked, 2, output_attentions=True, past_key_values=first.past_key_values)
    rows = [step[LAYER][0, :, -1] for made in (first, second) for step in made.attentions]
    whole = {"input_ids": second.sequences, "attention_mask": torch.ones_like(second.sequences)}
    native = maps(model, whole)[LAYER][0]  # depends on the layers below, which are not edited
    start, asked_until = inputs["input_ids"].shape[1], asked["input_ids"].shape[1]
    for row, at in zip(
        rows, (*range(start - 1, start + 3), *range(asked_until - 1, asked_until + 1)), strict=True
    ):
        wanted = torch.stack([by_hand(w[: at + 1, : at + 1])[-1] for w in native])
        assert_close(row, wanted, atol=1e-6, rtol=0)


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = eager(), two(family("llama"))
    with sc.attach(model, ACT(**EXAMPLE)):
        at_once = run(model, inputs)[:, -1]
        monkeypatch.setattr("saccade.core.call.CHUNK", 5 * 2 * 4 * 24)  # five rows
        assert_close(run(model, inputs)[:, -1], at_once, atol=1e-5, rtol=0)


# ---- calibration --------------------------------------------------------------------------------------


def labelled() -> list[Inputs]:
    """Prompts, and answers among the words that the model finds likely, so that some are right."""
    model, ids = shared("llama"), words(24, 10, seed=3)
    likely = run(model, {"input_ids": ids})[:, -1].topk(2).indices
    pick = torch.randint(0, 2, (24, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "answer": likely.gather(1, pick)[:, 0]}]


def accuracy(*methods: Any) -> float:
    model, (batch,) = shared("llama"), labelled()
    with sc.attach(model, *methods):
        return float(
            (run(model, {"input_ids": batch["input_ids"]})[:, -1].argmax(-1) == batch["answer"])
            .double()
            .mean()
        )


def test_heads_are_kept_where_accuracy_does_not_fall(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACCADE_HOME", str(tmp_path))
    model, options = shared("llama"), {"alpha": 1.2, "beta": 0.0}
    with sc.attach(model) as session:
        session.calibrate(ACT(**options), labelled())
    kept = [head for head in range(4) if accuracy(ACT(**options, heads=(head,))) >= accuracy()]
    assert 0 < len(kept) < 4
    inputs = two(family("llama"))
    with sc.attach(model, ACT(**options, calibrated=True)):
        got = run(model, inputs)[:, -1]
    with sc.attach(model, ACT(**options, heads=tuple(kept))):
        assert_close(got, run(model, inputs)[:, -1], atol=1e-5, rtol=0)


def test_samples_without_answers_are_refused() -> None:
    with sc.attach(shared("llama")) as session, pytest.raises(InputError, match="answer"):
        ACT().calibrate(session, [{"input_ids": words(2, 6)}])


def test_it_acts_on_the_embedded_model() -> None:
    model, processor = sc.world.load("vlm")
    inputs = sc.Question(processor, [sc.world.scene(9, "test").picture()], "what colour is the car ?").inputs(
        model
    )
    bare = run(model, inputs)
    with sc.attach(model, ACT()):
        assert (run(model, inputs) - bare).abs().max() > 1e-3
