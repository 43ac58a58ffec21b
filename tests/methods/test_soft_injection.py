"""Soft injection against hooks on the output projections, a training loop by hand, and a planted task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import heads_input, shared, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import run
from zoo.base import words

import saccade as sc
from saccade.core import calibration
from saccade.core.errors import InputError, OptionError
from saccade.steering import soft_injection
from saccade.steering.soft_injection import SoftInjection

from .measured import home, keep
from .planted import ANSWER, LAST, OTHERWISE, OUT, SIGNAL, WORD, Route, marks, planted
from .shared import Inputs, followed, generated

DOUBLE = torch.float64
LAYERS, HEADS, DIM = range(4), 4, 16
PROJECTIONS = {"llama": "model.layers.{}.self_attn.o_proj", "gpt2": "transformer.h.{}.attn.c_proj"}
SITES = [f"text.{layer}.self" for layer in LAYERS]
NAMES = pytest.mark.parametrize("name", PROJECTIONS)

keep(
    "soft_injection-drawn",
    tuple(PROJECTIONS),
    lambda _, draw: (
        {f"mean of {site}": draw(HEADS, DIM) for site in SITES}
        | {f"alpha of {site}": draw(HEADS).sigmoid() for site in SITES}
    ),
)
EXAMPLE: dict[str, Any] = {"task": "drawn"}

SHOWN = [{"input_ids": words(1, length, seed=length)} for length in (9, 14, 11)]
ASKED = {"input_ids": words(1, 6, seed=5), "answer": torch.tensor([150])}
HELD = {"input_ids": words(1, 7, seed=6), "answer": torch.tensor([151])}


# ---- by hand ---------------------------------------------------------------------------------------------


@contextmanager
def by_hand(model: Any, name: str, mean: list[Tensor], alpha: list[Tensor]) -> Iterator[None]:
    """Where several tokens come at once, the last of them is what it is mixed with."""

    def mix(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = args[0]
            if x.shape[1] == 1:
                return None
            last = torch.cat(
                [
                    (1 - alpha[layer][h]) * x[:, -1:, DIM * h : DIM * (h + 1)]
                    + alpha[layer][h] * mean[layer][h]
                    for h in range(HEADS)
                ],
                -1,
            )
            return (torch.cat([x[:, :-1], last], 1),)

        return hook

    hooks = [
        model.get_submodule(PROJECTIONS[name].format(layer)).register_forward_pre_hook(mix(layer))
        for layer in LAYERS
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def heard(model: Any, name: str, prompts: list[Inputs]) -> list[Tensor]:
    """What every head gives the last token, mean over prompts: layers of (heads, dim)."""
    return [
        torch.stack(
            [
                heads_input(model, PROJECTIONS[name].format(n), lambda p=p: run(model, p))[0][0, -1]
                for p in prompts
            ]
        )
        .mean(0)
        .view(HEADS, DIM)
        for n in LAYERS
    ]


def trained(
    model: Any, name: str, mean: list[Tensor], steps: int, lr: float, held: Inputs
) -> list[list[Tensor]]:
    """Alphas after every step on one question, and with them the loss on another: [alphas of layers, loss]."""
    a = torch.zeros(len(LAYERS), HEADS, requires_grad=True)
    adam, found = torch.optim.Adam([a], lr), []

    def loss(batch: Inputs) -> Tensor:
        with by_hand(model, name, mean, list(a.sigmoid())):
            return -model(input_ids=batch["input_ids"]).logits[0, -1].log_softmax(-1)[batch["answer"][0]]

    for _ in range(steps):
        adam.zero_grad()
        loss(ASKED).backward()
        adam.step()
        found.append([*a.detach().sigmoid(), float(loss(held).detach())])
    model.zero_grad()
    return found


def kept(model: Any, mean: Tensor | float, alpha: float) -> None:
    tensors = {f"mean of {site}": torch.zeros(HEADS, DIM) + mean for site in SITES}
    calibration.save(
        "soft_injection", model, tensors | {f"alpha of {s}": torch.full((HEADS,), alpha) for s in SITES}
    )


# ---- what is injected ------------------------------------------------------------------------------------


@NAMES
def test_the_answer_is_that_of_projections_fed_by_hand(name: str) -> None:
    model, inputs = shared(name, DOUBLE), SHOWN[0]
    held = calibration.load("soft_injection-drawn", model)
    mean, alpha = ([held[f"{part} of {site}"].double() for site in SITES] for part in ("mean", "alpha"))
    with sc.attach(model, SoftInjection(strength=0.5, **EXAMPLE)) as session:
        got = generated(model, inputs, 4)
    with by_hand(model, name, mean, [0.5 * a for a in alpha]):
        made = generated(model, inputs, 4)
    assert got.sequences.tolist() == made.sequences.tolist()
    assert_close(torch.cat(got.logits), torch.cat(made.logits), atol=1e-5, rtol=0)
    table = session.results["soft_injection"]
    assert_close(table.scores, torch.stack(alpha).float())


@NAMES
def test_alpha_one_makes_what_is_projected_the_mean_and_touches_nothing_else(name: str) -> None:
    model, inputs = shared(name), SHOWN[0]
    mean = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(1))
    for layer in LAYERS:
        place = PROJECTIONS[name].format(layer)
        bare = heads_input(model, place, lambda: generated(model, inputs, 1))
        with home():
            kept(model, mean, 1.0)
            with sc.attach(model, SoftInjection()):
                got = heads_input(model, place, lambda: generated(model, inputs, 3))
        assert torch.equal(got[0][0, -1], mean.flatten())
        assert_close(got[0][0, :-1], bare[0][0, :-1])
        assert all((later[0, -1] - mean.flatten()).norm() > 0.1 for later in got[1:])


@NAMES
def test_alpha_zero_leaves_the_logits(name: str) -> None:
    model = shared(name)
    with home():
        kept(model, 1.0, 0.0)
        with sc.attach(model, SoftInjection()):
            assert torch.equal(run(model, SHOWN[0]), run(model, SHOWN[0]))
            got = run(model, SHOWN[0])
    assert torch.equal(got, run(model, SHOWN[0]))


def test_a_prompt_in_pieces_is_changed_at_its_end() -> None:
    model = shared("llama", DOUBLE)
    with sc.attach(model, SoftInjection(**EXAMPLE)):
        whole, pieces = (generated(model, SHOWN[1], 3, **how) for how in ({}, {"prefill_chunk_size": 5}))
        later = generated(
            model, followed(SHOWN[1], whole, words(1, 4)), 2, past_key_values=whole.past_key_values
        )
    assert_close(torch.cat(pieces.logits), torch.cat(whole.logits), atol=1e-5, rtol=0)
    assert later.sequences.shape[1] == 14 + 3 + 4 + 2


# ---- how it is learned -----------------------------------------------------------------------------------


def calibrated(model: Any, samples: list[Mapping[str, Any]], **options: Any) -> dict[str, Tensor]:
    with home(), sc.attach(model) as session:
        session.calibrate(SoftInjection(**options), samples)
        return calibration.load("soft_injection", model)


@NAMES
def test_alphas_are_those_of_a_training_loop_by_hand(name: str) -> None:
    model = shared(name)
    with unchanged(model):
        found = calibrated(model, [*SHOWN, ASKED, HELD], steps=4, lr=0.2)
    assert all(p.grad is None for p in model.parameters())
    mean = heard(model, name, SHOWN)
    *alphas, _ = trained(model, name, mean, 4, 0.2, HELD)[-1]
    for layer, site in enumerate(SITES):
        assert_close(found[f"mean of {site}"], mean[layer], atol=1e-5, rtol=1e-5)
        assert_close(found[f"alpha of {site}"], alphas[layer], atol=1e-4, rtol=0)
        assert (found[f"alpha of {site}"] - 0.5).abs().min() > 0.01  # every head has learned
    assert len(found) == 8


def test_the_alphas_of_the_least_loss_on_what_was_held_out_are_kept() -> None:
    model = shared("llama")
    with mock.patch.object(soft_injection, "EVERY", 1):
        found = calibrated(model, [*SHOWN, ASKED, HELD], steps=5, lr=2.0)
    steps = trained(model, "llama", heard(model, "llama", SHOWN), 5, 2.0, HELD)
    losses = [loss for *_, loss in steps]
    best = losses.index(min(losses))
    assert best != 4, losses
    assert_close(
        torch.stack([found[f"alpha of {site}"] for site in SITES]),
        torch.stack(steps[best][:-1]),
        atol=1e-3,
        rtol=0,
    )


def test_on_a_planted_task_it_finds_the_head_without_which_the_task_is_lost() -> None:
    """One head carries the examples' mark to the answer, another where nobody reads it."""
    model = planted(Route(1, 2, LAST, WORD, WORD, OUT), Route(2, 1, LAST, WORD, WORD, SIGNAL))
    with torch.no_grad():
        model.lm_head.weight[ANSWER, OUT] = 1.3  # half of what the examples give is not enough
    mark, last = (sorted(marks()[kind])[0] for kind in (WORD, LAST))

    def prompt(*examples: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[1, 300, *examples, 301, last]])}

    shown = [prompt(mark, n, mark) for n in (310, 320)]
    asked = [{**prompt(n), "answer": torch.tensor([ANSWER])} for n in range(330, 340)]

    def says(batch: Mapping[str, Any]) -> int:
        return int(run(model, {"input_ids": batch["input_ids"]})[0, -1].argmax())

    lost = torch.zeros(4, 4)
    for layer in LAYERS:
        for head in range(HEADS):

            def silence(_: nn.Module, args: tuple[Tensor, ...], head: int = head) -> tuple[Tensor, ...]:
                x = args[0].clone()
                x[..., DIM * head : DIM * (head + 1)] = 0
                return (x,)

            hook = model.model.language_model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
                silence
            )
            lost[layer, head] = sum(says(p) != ANSWER for p in shown)
            hook.remove()
    assert lost.nonzero().tolist() == [[1, 2]]
    assert {says(batch) for batch in asked} == {OTHERWISE}
    with home(), sc.attach(model) as session:
        session.calibrate(SoftInjection(steps=15), [*shown, *asked])
        with sc.attach(model, SoftInjection()) as steered:
            assert {says(batch) for batch in asked} == {ANSWER}
    alpha = steered.results["soft_injection"].scores
    assert alpha[1, 2] > 0.8 and alpha.flatten().sort().values[-2] < 0.6


# ---- what is refused -------------------------------------------------------------------------------------


def test_alphas_of_another_task_are_used_with_the_means_of_this_one() -> None:
    model = shared("llama")
    with home(), sc.attach(model) as session:
        session.calibrate(SoftInjection(task="mean"), SHOWN)
        session.calibrate(SoftInjection(task="both", steps=2), [*SHOWN[:1], ASKED, HELD])
        with sc.attach(model, SoftInjection(task="mean")), pytest.raises(InputError, match="no alpha"):
            run(model, SHOWN[0])
        with sc.attach(model, SoftInjection(task="mean", heads_of="both")):
            got = run(model, SHOWN[0])
        mean, alpha = (calibration.load(f"soft_injection-{name}", model) for name in ("mean", "both"))
    parts = [mean[f"mean of {s}"] for s in SITES], [alpha[f"alpha of {s}"] for s in SITES]
    with by_hand(model, "llama", *parts):
        assert_close(got, run(model, SHOWN[0]), atol=1e-5, rtol=1e-5)


def test_a_calibration_of_another_model_is_refused() -> None:
    model, other = shared("llama"), shared("gpt2")
    with home():
        kept(other, 0.0, 0.0)
        with (
            sc.attach(model, SoftInjection()),
            pytest.raises(InputError, match="only been calibrated for other models"),
        ):
            run(model, SHOWN[0])
        (path,) = calibration.folder().glob("*")
        path.rename(path.with_name(f"soft_injection-{calibration.fingerprint(model)}.safetensors"))
        with (
            sc.attach(model, SoftInjection()),
            pytest.raises(InputError, match="another model, a GPT2LMHeadModel"),
        ):
            run(model, SHOWN[0])


def test_samples_that_teach_nothing_are_refused() -> None:
    with home(), sc.attach(shared("llama")) as session:
        for samples, said in (([ASKED], "by examples"), ([*SHOWN, ASKED], "one question")):
            with pytest.raises(InputError, match=said):
                session.calibrate(SoftInjection(), samples)
        with pytest.raises(OptionError, match="called"):
            session.calibrate(SoftInjection(task="a/b"), SHOWN)
