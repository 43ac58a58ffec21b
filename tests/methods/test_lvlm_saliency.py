"""LVLMs-Saliency against draws that are played out, finite differences, and whole passes with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Exact, method, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import words

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.steering._parts.watch import Watch
from saccade.steering.lvlm_saliency import LVLMSaliency, law

from .shared import Inputs, alone, followed, generated, numbers, two

EXAMPLE: dict[str, Any] = {"alpha": 1.0}
DISCRETE = ("alpha", "top")

LAYER = 1  # of four: where all three of the paper's are
DOUBLE = torch.float64


# ---- the law ------------------------------------------------------------------------------------------


def played(
    p: list[float], enough: list[bool], salient: list[float], rounds: int, left: frozenset[int]
) -> list[float]:
    """Chances of the candidates, draw by draw."""
    if rounds == 0 or not left:
        return [float(i == max(range(len(p)), key=salient.__getitem__)) for i in range(len(p))]
    total, said = sum(p[i] for i in left), [0.0] * len(p)
    for i in left:
        chance = p[i] / total
        if enough[i]:
            said[i] += chance
        else:
            rest = played(p, enough, salient, rounds - 1, left - {i})
            said = [s + chance * r for s, r in zip(said, rest, strict=True)]
    return said


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_law_is_that_of_drawing_until_one_is_salient(rounds: int) -> None:
    drawn = torch.Generator().manual_seed(rounds)
    for _ in range(20):
        p = torch.rand(5, generator=drawn, dtype=DOUBLE).exp().pow(3)
        p /= p.sum()
        salient = torch.rand(5, generator=drawn, dtype=DOUBLE)
        enough = salient >= float(torch.rand((), generator=drawn))
        got = law(p, enough, salient, rounds)
        wanted = played(p.tolist(), enough.tolist(), salient.tolist(), rounds, frozenset(range(5)))
        assert_close(got, torch.tensor(wanted, dtype=DOUBLE))


def test_a_rejected_candidate_is_never_said_unless_all_fail() -> None:
    p, salient = (
        torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=DOUBLE),
        torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3]),
    )
    got = law(p, torch.tensor([False, True, False, True, True]), salient, 3)
    assert got[0] == got[2] == 0 and got.sum() == pytest.approx(1)
    none = law(p, torch.zeros(5, dtype=torch.bool), salient, 3)
    assert none.tolist() == [0, 1, 0, 0, 0]


# ---- saliency -----------------------------------------------------------------------------------------


def sample(name: str = "llava", index: int = 0) -> Inputs:
    return alone(two(family(name), DOUBLE), index)


def longer(model: Any, inputs: Inputs, ids: Tensor) -> Inputs:
    """The prompt with words of an answer."""
    more = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids[None]], 1)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = (more["input_ids"] == model.config.image_token_id).long()
    return more


def by_hand(model: Any, inputs: Inputs, said: list[int], candidate: int, row: int) -> float:
    """From a whole pass over the prompt, the answer so far and the candidate, in one layer."""
    watch = Watch(sites=f"text.{LAYER}.self")
    with sc.attach(model) as session:
        whole = longer(model, inputs, torch.tensor([*said, candidate]))
        out = session.forward(whole, [watch], grad=True)
    loss = -out.logits[0, -2].log_softmax(-1)[candidate]
    (w,) = watch.seen
    (slope,) = torch.autograd.grad(loss, watch.seen)
    s = (w * slope).abs()[0].mean(0)[row].tolist()
    length = sum(x * x for x in s) ** 0.5
    start = inputs["input_ids"].shape[1]
    columns = range(start, start + len(said))
    return sum(s[j] for j in columns) / len(said) / length if length else 0.0


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_saliency_is_that_of_the_row_that_predicts_and_the_candidates_own_has_none(name: str) -> None:
    model, inputs = shared(name, DOUBLE), sample(name)
    caught: list[tuple[Tensor, Tensor]] = []
    sgrs = LVLMSaliency(beta=0.0)
    whole = type(sgrs)._saliency
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LVLMSaliency,
            "_saliency",
            lambda self, p, c: caught.append((c, whole(self, p, c))) or caught[-1][1],
        )
        with sc.attach(model, sgrs):
            made = generated(model, inputs, 3)
    said = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert (caught[0][1] == 1).all()
    for step in (1, 2):
        candidates, salient = caught[step][0][0], caught[step][1][0]
        for candidate, got in zip(candidates.tolist(), salient.tolist(), strict=True):
            assert got == pytest.approx(by_hand(model, inputs, said[:step], candidate, -2), abs=1e-8)
            assert by_hand(model, inputs, said[:step], candidate, -1) == 0
    assert (caught[2][1] > 0).all()


def test_slopes_are_finite_differences() -> None:
    model, inputs = shared("llama", DOUBLE), {"input_ids": words(1, 9)}
    watch, step, head, column, word = Watch(sites=f"text.{LAYER}.self", rows="last"), 1e-4, 2, 4, 7

    def loss(session: Any, *methods: Any, grad: bool = False) -> Tensor:
        return -session.forward(inputs, methods, grad=grad).logits[0, -1].log_softmax(-1)[word]

    def moved(by: float) -> Any:
        def edit(call: Any, w: Tensor) -> Tensor:
            w = w.clone()
            w[0, head, -1, column] += by
            return w

        return method(weights=edit)(sites=f"text.{LAYER}.self", rows="last")

    with sc.attach(model) as session, Exact():
        (slope,) = torch.autograd.grad(loss(session, watch, grad=True), watch.seen)
        difference = (loss(session, moved(step)) - loss(session, moved(-step))) / (2 * step)
    assert float(slope[0, head, -1, column]) == pytest.approx(float(difference), rel=1e-4)


# ---- saying -------------------------------------------------------------------------------------------


def test_what_is_said_follows_the_law_of_saliency_and_history() -> None:
    """Beside the candidates' chances, in a loop by hand; and again in a second turn."""
    model, inputs, options = (
        shared("llava", DOUBLE),
        sample(),
        {"alpha": 1.1, "rounds": 2, "history": 2, "beta": 0.0},
    )
    with sc.attach(model, LVLMSaliency(**options)):
        first = generated(model, inputs, 5)
        asked = followed(inputs, first, words(1, 4, seed=9))
        second = generated(model, asked, 3, past_key_values=first.past_key_values)
    rejected = 0
    for made, prompt in ((first, inputs), (second, {**inputs, **asked})):
        start, history = prompt["input_ids"].shape[1], []
        said = made.sequences[0, start:].tolist()
        for step, word in enumerate(said):
            logits = run(model, longer(model, prompt, torch.tensor(said[:step], dtype=torch.long)))[0, -1]
            top = logits.topk(5)
            chances = top.values.softmax(-1)
            salient = [
                by_hand(model, prompt, said[:step], c, -2) if step else 1.0 for c in top.indices.tolist()
            ]
            limit = 1.1 * sum(history[-2:]) / len(history[-2:]) if history else 0.0
            enough = [s >= limit for s in salient]
            rejected += enough.count(False)
            wanted = played(chances.tolist(), enough, salient, 2, frozenset(range(5)))
            got = made.logits[step][0].double().softmax(-1)
            assert_close(got[top.indices], torch.tensor(wanted, dtype=DOUBLE), atol=1e-6, rtol=0)
            assert float(got.sum() - got[top.indices].sum()) == 0
            history.append(salient[top.indices.tolist().index(word)])
    assert rejected > 3


def test_alpha_of_zero_is_top_k_sampling_with_the_same_seed() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    torch.manual_seed(3)
    plain = generated(model, inputs, 6, do_sample=True, top_k=5).sequences
    torch.manual_seed(3)
    with sc.attach(model, LVLMSaliency(alpha=0.0, beta=0.0)):
        drawn = generated(model, inputs, 6, do_sample=True, top_k=0).sequences
    assert torch.equal(drawn, plain)


def test_beta_of_zero_is_the_dense_model() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    bare = generated(model, inputs, 4)
    with sc.attach(model, LVLMSaliency(alpha=0.0, beta=0.0, top=0)):
        got = generated(model, inputs, 4)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, bare.logits, strict=True))


def test_locore_scales_the_last_words_of_the_answer() -> None:
    """In the first layer, whose weights are else the model's own."""
    model, inputs = shared("llava", torch.float32, "eager"), alone(two(family("llava")), 0)
    options: dict[str, Any] = {
        "alpha": 0.0,
        "top": 0,
        "beta": 0.5,
        "window": 2,
        "sites": "text.0.self",
    }
    for renormalise in (False, True):
        with sc.attach(model, LVLMSaliency(**options, renormalise=renormalise)):
            made = generated(model, inputs, 5, output_attentions=True)
        start = inputs["input_ids"].shape[1]
        whole = {**inputs, "input_ids": made.sequences, "attention_mask": torch.ones_like(made.sequences)}
        with torch.no_grad():
            native = model(**whole, output_attentions=True).attentions[0][0]
        for step, weights in enumerate(made.attentions):
            row = start - 1 + step
            factor = torch.ones(row + 1)
            factor[[j for j in (row - 2, row - 1) if j >= start]] = 1.5
            wanted = native[:, row, : row + 1] * factor
            wanted = wanted / wanted.sum(-1, keepdim=True) if renormalise else wanted
            assert_close(weights[0][0, :, -1], wanted, atol=1e-6, rtol=1e-5)
        assert renormalise == bool((weights[0].sum(-1) - 1).abs().max() < 1e-5)


def test_the_papers_layers_of_32() -> None:
    assert numbers(LVLMSaliency().layers) == [6, 7, 8]


def test_all_words_cannot_be_measured() -> None:
    with pytest.raises(OptionError, match="every word"):
        LVLMSaliency(top=0)


def test_beside_other_prompts_it_is_refused() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    with sc.attach(model, sc.load("damro+lvlm_saliency")), pytest.raises(InputError, match="other prompts"):
        generated(model, inputs, 3)


def test_it_writes_with_the_embedded_model() -> None:
    model, processor = sc.world.load("vlm")
    picture = sc.world.scene(9, "test").picture()
    said = [
        sc.ask(model, processor, picture, "describe the picture .", stack, max_new_tokens=8)
        for stack in (None, "lvlm_saliency(alpha=1.2, rounds=1, beta=0.5)")
    ]
    assert said[0] and said[1] and said[0] != said[1]
