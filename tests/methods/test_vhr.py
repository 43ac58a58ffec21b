"""VHR against two models run by hand, layer by layer, and against planted heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.method import Method, option
from saccade.steering.vhr import VHR, choose, total_vhd

from .shared import Inputs, alone, generated, numbers, two

EXAMPLE: dict[str, Any] = {}

LAYERS = (1, 2, 3)
"""Of four: the second, and the last 14/32."""
HEADS = 4
DOUBLE = torch.float64


# ---- the paper, with two models -----------------------------------------------------------------------


def attention_of(model: Any, layer: int) -> nn.Module:
    return model.model.language_model.layers[layer].self_attn


def blind(model: Any, inputs: Inputs) -> Inputs:
    """One sample without its picture: the words alone, read by the text tower."""
    words = inputs["input_ids"] != model.config.image_token_id
    return {"input_ids": inputs["input_ids"][words][None]}


@contextmanager
def louder(model: Any, chosen: dict[int, list[int]], alpha: float) -> Iterator[None]:
    """Scale what those heads give, between attention and its output projection."""

    def scale(heads: list[int]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            o = args[0].clone().unflatten(-1, (HEADS, -1))
            o[:, :, heads] *= alpha
            return (o.flatten(-2),)

        return hook

    projections = {layer: attention_of(model, layer).o_proj for layer in chosen}
    hooks = [o_proj.register_forward_pre_hook(scale(chosen[layer])) for layer, o_proj in projections.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_output(model: Any, inputs: Inputs, layer: int) -> Tensor:
    """Of the last position, by head, before the output projection: (heads, dim)."""
    seen: list[Tensor] = []
    hook = attention_of(model, layer).o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, inputs)
    hook.remove()
    return seen[0][0, -1].unflatten(-1, (HEADS, -1))


def by_hand(name: str, inputs: Inputs, alpha: float) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Chosen heads and divergences by layer: two models side by side, the layers below already louder."""
    seeing, unseeing = family(name).build().double(), family(name).build().double()
    words = blind(seeing, inputs)
    chosen: dict[int, list[int]] = {}
    vhd: dict[int, list[float]] = {}
    for layer in LAYERS:
        with louder(seeing, chosen, alpha), louder(unseeing, chosen, alpha):
            with_picture, without = last_output(seeing, inputs, layer), last_output(unseeing, words, layer)
        vhd[layer] = [float(((a - b) ** 2).sum()) ** 0.5 for a, b in zip(with_picture, without)]
        chosen[layer] = by_definition(vhd[layer], [float((b**2).sum()) for b in without])
    return chosen, vhd


def by_definition(vhd: list[float], strength: list[float]) -> list[int]:
    def limit(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return mean + (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5

    surging = [v > limit(vhd) and s > limit(strength) for v, s in zip(vhd, strength)]
    left = [0.0 if out else v for v, out in zip(vhd, surging)]
    ordered, half = sorted(left), len(left) // 2
    median = ordered[half] if len(left) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return [head for head, v in enumerate(left) if v > median]


def sample(name: str, index: int = 0) -> Inputs:
    return alone(two(family(name), DOUBLE), index)


def as_lists(chosen: dict[int, Tensor], row: int = 0) -> dict[int, list[int]]:
    return {layer: heads[row].nonzero()[:, 0].tolist() for layer, heads in chosen.items()}


@pytest.mark.parametrize("alpha", [2.0, 0.5])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_heads_and_divergences_are_those_of_two_models_in_lockstep(name: str, alpha: float) -> None:
    model = shared(name, DOUBLE)
    inputs = two(family(name), DOUBLE)
    with sc.attach(model, VHR(alpha=alpha)) as session:
        run(model, inputs)
    found = session.results["vhr"]
    for row in (0, 1):
        chosen, vhd = by_hand(name, alone(inputs, row), alpha)
        assert as_lists(found["chosen"], row) == chosen
        for layer, values in vhd.items():
            assert_close(found["vhd"][layer][row], torch.tensor(values), atol=1e-5, rtol=0)


def test_the_answer_is_that_of_the_model_with_those_heads_louder() -> None:
    model, inputs = shared("llava", DOUBLE), sample("llava")
    bare = run(model, inputs)
    chosen, _ = by_hand("llava", inputs, 2.0)
    with louder(model, chosen, 2.0):
        expected = run(model, inputs)
    with sc.attach(model, VHR()):
        got = run(model, inputs)
    assert_close(got, expected, atol=1e-10, rtol=0)
    assert ((got - bare).abs().amax(-1) > 1e-3).all()  # at every position


def test_scaling_heads_is_scaling_columns_of_the_output_projection() -> None:
    model, inputs = family("llava").build().double(), sample("llava")
    with sc.attach(model, VHR(alpha=3.0)) as session:
        got = generated(model, inputs).logits
    for layer, heads in as_lists(session.results["vhr"]["chosen"]).items():
        with torch.no_grad():
            attention_of(model, layer).o_proj.weight.unflatten(1, (HEADS, -1))[:, heads] *= 3.0
    assert_close(generated(model, inputs).logits, got, atol=1e-10, rtol=0)


# ---- the choice ---------------------------------------------------------------------------------------


def heads(*values: float) -> Tensor:
    return torch.tensor([values], dtype=DOUBLE)


MODEST = (1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9)


def chosen_of(vhd: Tensor, strength: Tensor) -> list[int]:
    return choose(vhd, strength)[0].nonzero()[:, 0].tolist()


def test_a_head_that_surges_without_the_picture_is_left_out() -> None:
    assert chosen_of(heads(*MODEST[:7], 50.0), heads(*MODEST[:7], 90.0)) == [1, 3, 6]


def test_it_is_kept_where_only_its_divergence_is_huge() -> None:
    assert chosen_of(heads(*MODEST[:7], 50.0), heads(*MODEST)) == [1, 3, 6, 7]


def test_a_strong_head_with_an_ordinary_divergence_is_kept() -> None:
    vhd = heads(1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 1.15)
    assert chosen_of(vhd, heads(*MODEST[:7], 90.0)) == [1, 3, 6, 7]


@pytest.mark.parametrize("count", [1, 2, 5, 8, 32])
def test_the_choice_is_above_the_median_without_outliers(count: int) -> None:
    noise = torch.Generator().manual_seed(count)
    vhd, strength = torch.randn(2, 100, count, generator=noise, dtype=DOUBLE).exp() ** 2
    got = choose(vhd, strength)
    assert got.sum(1).max() <= count // 2
    for row in range(100):
        assert got[row].nonzero()[:, 0].tolist() == by_definition(vhd[row].tolist(), strength[row].tolist())


# ---- the statements -----------------------------------------------------------------------------------


def test_a_picture_that_nobody_sees_makes_no_difference() -> None:
    """The picture stands first and is masked: both streams are then equal."""
    model, inputs = shared("llava", DOUBLE), sample("llava")
    image = inputs["input_ids"][0] == model.config.image_token_id
    order = torch.cat([image.nonzero()[:, 0], (~image).nonzero()[:, 0]])
    inputs["input_ids"] = inputs["input_ids"][:, order]
    seen: dict[bool, dict[int, Tensor]] = {}
    for masked in (True, False):
        mask = (~image[order]).long() if masked else torch.ones_like(order)
        with sc.attach(model, VHR()) as session:
            run(model, {**inputs, "attention_mask": mask[None]})
        seen[masked] = session.results["vhr"]["vhd"]
    for layer in LAYERS:
        assert (seen[True][layer] < 1e-5).all()
        assert (seen[False][layer] > 0.1).all()


@dataclass(eq=False)
class Note(Method):
    """Head outputs as they are before or after the methods beside it."""

    sites: str = option("text.*.self", "where")
    seen: list[tuple[int | None, Tensor]] = field(default_factory=list)

    def output(self, call: AttentionCall, o: Tensor) -> Tensor:
        self.seen.append((call.site.index, o))
        return o


def test_the_heads_of_a_later_step_are_those_of_the_first() -> None:
    model, inputs = shared("llava", DOUBLE), two(family("llava"), DOUBLE)
    before, after = Note(), Note()
    with sc.attach(model, before, VHR(alpha=3.0), after) as session:
        generated(model, inputs, 6)
    found = session.results["vhr"]["chosen"]
    assert len(before.seen) == 6 * 4
    for (layer, plain), (_, scaled) in zip(before.seen, after.seen, strict=True):
        factor = torch.where(found[layer], 3.0, 1.0) if layer in LAYERS else torch.ones(2, HEADS)
        assert_close(scaled, plain * factor[:, :, None, None].double())


def test_in_a_later_turn_the_heads_are_those_of_the_first() -> None:
    """The picture came with the first turn and is not given again."""
    model, inputs = shared("llava", DOUBLE), sample("llava")
    with sc.attach(model, VHR()) as session:
        first = generated(model, inputs)
        chosen = session.results["vhr"]["chosen"]
        ids = torch.cat([first.sequences, torch.full((1, 4), 150)], 1)
        generated(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            past_key_values=first.past_key_values,
        )
        again = session.results["vhr"]["chosen"]
    assert as_lists(again) == as_lists(chosen)


def test_alpha_of_one_is_the_dense_model() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    bare = run(model, inputs)
    with sc.attach(model, VHR(alpha=1.0)):
        assert torch.equal(run(model, inputs), bare)


def test_the_papers_layers_of_32() -> None:
    assert numbers(VHR().sites) == [1, *range(18, 32)]
    with sc.attach(shared("llava"), VHR()) as session:
        assert [s.index for s, plan in session.plans.items() if plan.output] == [*LAYERS]


def test_a_prompt_without_a_picture_is_refused() -> None:
    model = shared("llava")
    with sc.attach(model, VHR()), pytest.raises(InputError, match="picture"):
        model(input_ids=torch.full((1, 6), 150))


def test_t_vhd_sums_the_largest_divergences_of_every_layer() -> None:
    vhd = {1: heads(1, 5, 2, 4), 2: heads(8, 0, 3, 1)}
    assert total_vhd(vhd, 2).tolist() == [5 + 4 + 8 + 3]
    assert total_vhd(vhd, 99).tolist() == [12 + 12]
