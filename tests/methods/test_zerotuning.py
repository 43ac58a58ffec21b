"""ZeroTuning against scaling after the softmax, written by hand; and its calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import enliven, words

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError, OptionError
from saccade.core.method import Method, option
from saccade.steering.zerotuning import GAMMAS, ZeroTuning

from .shared import Inputs, two

EXAMPLE = {"gamma": 3.0}

GAMMA = 3.0
LAYERS, HEADS = 4, 4


def first_of(inputs: Inputs) -> Tensor:
    """The first real token of every sample."""
    return inputs["attention_mask"].argmax(1)


def attentions(model: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """As the model itself returns them, the rows of padding left out: (rows, heads, keys) each."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        return tuple(w.transpose(1, 2)[real] for w in model(**inputs, output_attentions=True).attentions)


def scaled(w: Tensor, first: Tensor, gamma: float) -> Tensor:
    """a_0 gamma / D and a_i / D with D = (gamma - 1) a_0 + 1; `first` (rows,) is the column of a_0."""
    w, old = w.clone(), w
    for row, at in enumerate(first.tolist()):
        for head in range(w.shape[1]):
            d = (gamma - 1) * float(old[row, head, at]) + 1
            w[row, head] = old[row, head] / d
            w[row, head, at] = gamma * old[row, head, at] / d
    return w


def weights(name: str, gamma: float = GAMMA, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first layer, bare and tuned (rows, heads, keys), and every row's first token."""
    model, inputs = shared(name, torch.float32, "eager"), two(family(name))
    before = attentions(model, inputs)[0]
    with sc.attach(model, ZeroTuning(gamma=gamma, sites="text.0.self", **options)):
        after = attentions(model, inputs)[0]
    rows = inputs["attention_mask"].sum(1)
    return before, after, first_of(inputs).repeat_interleave(rows)


def column(w: Tensor, first: Tensor) -> Tensor:
    """a_0 of every row and head."""
    return w.gather(2, first[:, None, None].expand(-1, w.shape[1], 1))[..., 0]


@dataclass(eq=False)
class AfterSoftmax(Method):
    """The other form: weights of one sample scaled and divided by their sum."""

    gamma: float = option(GAMMA, "factor")
    sites: str = option("text.*.self", "where")

    def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
        w = w.clone()
        w[..., 0] *= self.gamma
        return w / w.sum(-1, keepdim=True)


# ---- the equation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.25, 3.0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "gemma2"])
def test_weights_are_scaled_and_divided_by_d(name: str, gamma: float) -> None:
    before, after, first = weights(name, gamma)
    assert_close(after, scaled(before, first, gamma), atol=1e-6, rtol=0)
    assert_close(after.sum(-1), torch.ones_like(after.sum(-1)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [None, (0, 3)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bias_agrees_with_scaling_after_the_softmax(name: str, heads: tuple[int, ...] | None) -> None:
    """In every layer, and so in the logits; keys are shared by two heads in one, by none in the other."""
    model, inputs = shared(name, torch.float64), family(name).inputs()
    answers = []
    for method in (ZeroTuning, AfterSoftmax):
        with sc.attach(model, method(gamma=GAMMA, heads=heads)):
            answers.append(run(model, inputs))
    assert_close(answers[0], answers[1], atol=1e-6, rtol=0)
    assert (answers[0] - run(model, inputs)).abs().max() > 0.01


def test_gamma_of_one_is_the_dense_model_to_the_bit() -> None:
    model, inputs = shared("llama"), two(family("llama"))
    bare = run(model, inputs)
    with sc.attach(model, ZeroTuning(gamma=1.0)):
        assert torch.equal(run(model, inputs), bare)


@pytest.mark.parametrize("gamma", [0.2, 4.0])
def test_ratios_among_the_other_tokens_stay(gamma: float) -> None:
    before, after, first = weights("llama", gamma)
    for w in (before, after):
        w.scatter_(2, first[:, None, None].expand(-1, HEADS, 1), 0)
    some = before.sum(-1) > 1e-3  # the first token's own row has no others
    assert_close((after / after.sum(-1, keepdim=True))[some], (before / before.sum(-1, keepdim=True))[some])


@pytest.mark.parametrize("gamma", [0.2, 4.0])
def test_differences_among_the_other_tokens_shrink_by_d(gamma: float) -> None:
    before, after, first = weights("llama", gamma)
    d = ((gamma - 1) * column(before, first) + 1)[..., None, None]
    others = torch.arange(before.shape[2]) != first[:, None]
    pairs = (others[:, :, None] & others[:, None, :])[:, None]

    def differences(w: Tensor) -> Tensor:
        return (w[..., :, None] - w[..., None, :]).abs() * pairs

    assert_close(differences(after), differences(before) / d, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_chosen_heads_change(name: str) -> None:
    before, after, _ = weights(name, heads=(1, 2))
    changed = (after - before).abs().amax((0, 2)) > 1e-3
    assert changed.tolist() == [False, True, True, False]
    assert_close(after[:, [0, 3]], before[:, [0, 3]], atol=1e-6, rtol=0)


def test_the_first_tokens_weight_rises_with_gamma() -> None:
    """Rows that see another token, of a model whose first token is a sink in the first place."""
    columns = []
    for gamma in GAMMAS:
        _, after, first = weights("llama", gamma)
        columns.append(column(after, first))
    starts = (columns[0] < 1 - 1e-6).all(-1)
    assert int((~starts).sum()) == 2  # one row of each sample sees itself alone
    rising = torch.stack(columns)[:, starts].diff(dim=0)
    assert (rising > 0).all()


def test_it_stays_on_the_fused_kernel() -> None:
    assert ZeroTuning.events() == ("bias",)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_a_factor_that_has_no_logarithm_is_refused(gamma: float) -> None:
    with pytest.raises(OptionError, match="gamma"):
        ZeroTuning(gamma=gamma)


# ---- calibration --------------------------------------------------------------------------------------


def labelled(seed: int = 0) -> list[Inputs]:
    """Prompts, and answers among the words that the model finds likely, so that some are right."""
    model = shared("llama")
    batches = []
    for number in range(2):
        ids = words(8, 6, seed=100 + number)
        likely = run(model, {"input_ids": ids})[:, -1].topk(2).indices
        pick = torch.randint(0, 2, (8,), generator=torch.Generator().manual_seed(seed + number))
        batches.append({"input_ids": ids, "answer": likely.gather(1, pick[:, None])[:, 0]})
    return batches


def accuracy(model: Any, batches: list[Inputs]) -> float:
    right = [run(model, {"input_ids": b["input_ids"]})[:, -1].argmax(-1) == b["answer"] for b in batches]
    return float(torch.cat(right).double().mean())


def certainty(model: Any, batches: list[Inputs]) -> float:
    """Mean probability of the answers."""
    each = []
    for b in batches:
        p = run(model, {"input_ids": b["input_ids"]})[:, -1].softmax(-1)
        each.append(p.gather(1, b["answer"][:, None]))
    return float(torch.cat(each).double().mean())


def calibration(batches: list[Inputs]) -> dict[str, Tensor]:
    method = ZeroTuning()
    with sc.attach(shared("llama")) as session:
        return method.calibrate(session, batches)


def after_softmax(gamma: float, heads: Tensor) -> list[Method]:
    """On those heads (layers, heads) alone."""
    chosen = [tuple(row.nonzero()[:, 0].tolist()) for row in heads]
    return [AfterSoftmax(gamma=gamma, sites=f"text.{at}.self", heads=h) for at, h in enumerate(chosen) if h]


def test_heads_are_classed_by_what_scaling_them_alone_does() -> None:
    """Up-effective where accuracy, or at a draw the answers' probability, is better above one than below."""
    model, batches = shared("llama"), labelled()
    lean = torch.zeros(LAYERS, HEADS)
    for layer in range(LAYERS):
        for head in range(HEADS):
            found = []
            for gamma in (2.0, 0.5):
                with sc.attach(model, AfterSoftmax(gamma=gamma, sites=f"text.{layer}.self", heads=(head,))):
                    found.append((accuracy(model, batches), certainty(model, batches)))
            up, down = found
            lean[layer, head] = (up[0] - down[0]) or (up[1] - down[1])
    up_effective = int((lean > 0).sum()) >= int((lean < 0).sum())
    expected = lean > 0 if up_effective else lean < 0
    assert torch.equal(calibration(batches)["heads"], expected)


@pytest.mark.parametrize("seed", range(3))
def test_calibrated_it_is_never_less_right_than_the_model(
    seed: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACCADE_HOME", str(tmp_path))
    model, batches = shared("llama"), labelled(seed)
    bare = accuracy(model, batches)
    with sc.attach(model) as session:
        session.calibrate(ZeroTuning(), batches)
    with sc.attach(model, ZeroTuning(calibrated=True)):
        tuned = accuracy(model, batches)
    assert tuned >= bare


def test_its_gamma_is_the_best_of_the_grid_on_those_heads() -> None:
    model, batches = shared("llama"), labelled()
    found = calibration(batches)
    scores = {}
    for gamma in GAMMAS:
        with sc.attach(model, *after_softmax(gamma, found["heads"])):
            scores[gamma] = (accuracy(model, batches), certainty(model, batches))
    assert 1.0 in GAMMAS
    best = max(GAMMAS, key=lambda gamma: scores[gamma])
    assert float(found["gamma"]) == pytest.approx(best)


def test_without_labels_it_lowers_the_entropy_of_the_next_token() -> None:
    model = shared("llama")
    batches = [{"input_ids": b["input_ids"]} for b in labelled()]
    found = calibration(batches)

    def entropy() -> float:
        rows = torch.cat([run(model, b)[:, -1] for b in batches]).double().log_softmax(-1)
        return float(-(rows.exp() * rows).sum(-1).mean())

    bare = entropy()
    with sc.attach(model, *after_softmax(float(found["gamma"]), found["heads"])):
        assert entropy() < bare


def test_a_calibration_is_found_for_equal_weights_and_for_no_others(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACCADE_HOME", str(tmp_path))
    inputs = family("llama").inputs()
    first = family("llama").build()
    with sc.attach(first) as session:
        path = session.calibrate(ZeroTuning(), labelled())
    assert path.is_relative_to(tmp_path)
    bare = run(first, inputs)
    for model in (first, family("llama").build()):
        with sc.attach(model, ZeroTuning(calibrated=True)):
            assert (run(model, inputs) - bare).abs().max() > 1e-3
    other = enliven(family("llama").build(), seed=1)
    with sc.attach(other, ZeroTuning(calibrated=True)), pytest.raises(InputError, match="calibrate"):
        run(other, inputs)
