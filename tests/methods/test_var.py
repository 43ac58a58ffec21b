"""VAR against a loop over heads and rows, and against planted massive activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.var import VAR

from .shared import Inputs, alone, followed, generated, numbers, two

EXAMPLE = {"dims": (47,), "tau": 1.22, "least": 0.0, "rho": 0.0}
"""Where no activation of the shared checks' prompts is within 5% of tau: bfloat16 then flags the same tokens.
In 64 dimensions no activation exceeds 8 times the root mean square."""

LAYER = 2  # of four: neither the first two nor the last
DIM = 5


# ---- the paper, one row of one head at a time ---------------------------------------------------------


@dataclass
class Paper:
    """What one layer knows of one sample."""

    h: Tensor  # (tokens, width), the layer's input
    image: Tensor  # (tokens,), bool
    prompt: int  # tokens that can be sinks
    first: int  # the first token that is no padding
    p: float = 0.6
    rho: float = 0.5
    least: float = 0.2
    tau: float = 20.0
    dims: tuple[int, ...] | None = None

    def sinks(self) -> list[int]:
        massive = self.h.abs() / self.h.square().mean(-1, keepdim=True).sqrt() > self.tau
        dims = self.dims if self.dims is not None else massive[self.first].nonzero()[:, 0].tolist()
        return [j for j in range(self.first, self.prompt) if any(massive[j, d] for d in dims)]

    def edited(self, w: Tensor) -> Tensor:
        """Weights (heads, rows, keys), row i being token i."""
        sinks, pictures = self.sinks(), self.image.nonzero()[:, 0].tolist()
        useful = [j for j in pictures if j not in sinks]
        w = w.clone()
        if not any(j in sinks for j in pictures):
            return w
        for head in w:
            for i in range(pictures[-1] + 1, w.shape[1]):
                row = head[i].tolist()
                total, on_useful = sum(row[j] for j in pictures), sum(row[j] for j in useful)
                if on_useful == 0 or total < self.least or on_useful / total < self.rho:
                    continue
                freed = (1 - self.p) * sum(row[j] for j in sinks)
                for j in sinks:
                    head[i, j] = self.p * row[j]
                for j in useful:
                    head[i, j] = row[j] + freed * row[j] / on_useful
        return w


def pictures(model: Any, inputs: Inputs) -> Tensor:
    return inputs["input_ids"] == model.config.image_token_id


def attentions(model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """The weights of every layer as the model itself returns them."""
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


def entered(model: Any, inputs: Inputs, layer: int) -> Tensor:
    """The input of a decoder layer."""
    seen: list[Tensor] = []
    layers = model.model.language_model.layers
    hook = layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, inputs)
    hook.remove()
    return seen[0]


def expected(model: Any, inputs: Inputs, w: Tensor, prompt: int | None = None, **options: Any) -> Tensor:
    """All samples: the native weights (samples, heads, rows, keys) of `LAYER` as the paper edits them."""
    h, image = entered(model, inputs, LAYER), pictures(model, inputs)
    firsts = inputs["attention_mask"].argmax(1).tolist()
    papers = [Paper(h[b], image[b], prompt or h.shape[1], firsts[b], **options) for b in range(len(h))]
    return torch.stack([paper.edited(w[b]) for b, paper in enumerate(papers)])


@contextmanager
def spiked(model: Any, tokens: list[int] | slice, dim: int = DIM) -> Iterator[None]:
    """Give these tokens of every pass but the decoding ones a massive activation at the input of `LAYER`."""

    def plant(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        if out.shape[1] > 1:
            out = out.clone()
            out[:, tokens, dim] = 1e3
        return out

    hook = model.model.language_model.layers[LAYER - 1].mlp.register_forward_hook(plant)
    try:
        yield
    finally:
        hook.remove()


def eager(name: str = "llava", dtype: torch.dtype = torch.float32) -> Any:
    return shared(name, dtype, "eager")


def one(f: str = "llava") -> tuple[Inputs, list[int], list[int]]:
    """A sample with a picture, the places of its picture, and those behind it."""
    inputs = alone(two(family(f)), 0)
    places = pictures(eager(f), inputs)[0].nonzero()[:, 0].tolist()
    return inputs, places, list(range(places[-1] + 1, inputs["input_ids"].shape[1]))


def spiked_weights(tokens: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    """Weights of `LAYER` without and with VAR where these tokens are massive: (heads, rows, keys) each."""
    model, (inputs, _, _) = eager(), one()
    with spiked(model, tokens):
        before = attentions(model, inputs)[LAYER][0]
        with sc.attach(model, VAR(**{"dims": (DIM,), "tau": 6, "least": 0, "rho": 0, **options})):
            after = attentions(model, inputs)[LAYER][0]
    return before, after


# ---- the paper's rule ---------------------------------------------------------------------------------


OPTIONS = [
    {"tau": 1.5, "least": 0.0, "rho": 0.0},
    {"tau": 1.5, "least": 0.0, "rho": 0.0, "p": 0.0},
    {"tau": 1.5, "least": 0.5, "rho": 0.2, "p": 0.3},
    {"tau": 1.7, "least": 0.3, "rho": 0.5, "dims": (3, 40)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "side"), [("llava", "left"), ("qwen2_5_vl", "right"), ("qwen3_vl", "left")])
def test_weights_are_the_papers_head_by_head_and_row_by_row(
    name: str, side: str, options: dict[str, Any]
) -> None:
    model, inputs = eager(name), two(family(name), side=side)
    before = attentions(model, inputs)
    with sc.attach(model, VAR(**options)):
        after = attentions(model, inputs)
    real = inputs["attention_mask"].bool()[:, None, :, None]
    wanted = expected(model, inputs, before[LAYER], **options)
    assert (wanted - before[LAYER]).abs().max() > 0.01
    assert_close(after[LAYER] * real, wanted * real, atol=1e-6, rtol=0)
    for layer in (0, 1):
        assert torch.equal(after[layer], before[layer])


def test_the_layers_are_the_third_to_the_last_but_one() -> None:
    sites = VAR().sites
    assert numbers(sites["weights"]) == numbers(sites["hidden"], "input") == [*range(2, 31)]
    with sc.attach(eager(), VAR()) as session:
        assert [site.name for site, plan in session.plans.items() if plan.weights] == ["text.2.self"]


def test_while_decoding_the_sinks_are_those_of_the_prompt() -> None:
    model, (inputs, _, _) = eager(), one()
    prompt = inputs["input_ids"].shape[1]
    with sc.attach(model, VAR(**EXAMPLE)):
        made = generated(model, inputs, 4, output_attentions=True)
    written = made.sequences.shape[1]
    whole = {
        **inputs,
        "input_ids": made.sequences,
        "attention_mask": torch.ones(1, written, dtype=torch.long),
    }  # the third layer's weights depend on the layers below, which are not edited
    native = attentions(model, whole)[LAYER]
    wanted = expected(model, whole, native, prompt, **EXAMPLE)
    for step, weights in enumerate(made.attentions[1:]):
        row = prompt + step
        assert (wanted - native)[0, :, row].abs().max() > 1e-3
        assert_close(weights[LAYER][0, :, 0], wanted[0, :, row, : row + 1], atol=1e-6, rtol=0)


def test_logits_are_those_of_the_edited_weights() -> None:
    """The last row's output in the third layer is exchanged by hand."""
    model, (inputs, _, behind) = eager(), one()
    native = attentions(model, inputs)[LAYER]
    wanted = expected(model, inputs, native, **EXAMPLE)
    attention = model.model.language_model.layers[LAYER].self_attn
    values: list[Tensor] = []
    reading = attention.v_proj.register_forward_hook(lambda _, __, out: values.append(out))
    run(model, inputs)
    reading.remove()
    v = values[0].unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)  # 2 key heads for 4
    by_hand = (wanted @ v).transpose(1, 2).flatten(2)
    swapping = attention.o_proj.register_forward_pre_hook(lambda *_: (by_hand,))
    logits = run(model, inputs)
    swapping.remove()
    with sc.attach(model, VAR(**EXAMPLE)):
        assert_close(run(model, inputs)[:, behind], logits[:, behind], atol=1e-5, rtol=0)


# ---- the statements -----------------------------------------------------------------------------------


def test_every_row_still_sums_to_one() -> None:
    for p in (0.0, 0.3, 0.9):
        before, after = spiked_weights([4, 9, 1], p=p)
        assert (after - before).abs().max() > 1e-4
        assert_close(after.sum(-1), torch.ones_like(after.sum(-1)), atol=1e-6, rtol=0)


def test_a_spike_flags_exactly_its_token() -> None:
    _, places, behind = one()
    for token in (places[0], places[7], places[-1]):
        before, after = spiked_weights([token], p=0.0)
        emptied = (before[:, behind] > 0) & (after[:, behind] == 0)
        assert emptied.all(dim=(0, 1)).nonzero()[:, 0].tolist() == [token]
        assert emptied.any(dim=(0, 1)).nonzero()[:, 0].tolist() == [token]


def test_a_spike_below_tau_or_in_another_dimension_flags_nothing() -> None:
    _, places, _ = one()
    for options in ({"tau": 7.9999}, {"dims": (DIM + 1,)}):
        before, after = spiked_weights([places[3]], **options)
        assert torch.equal(before, after)


def test_sinks_of_text_are_emptied_too_and_the_picture_gets_their_share() -> None:
    _, places, behind = one()
    text, visual = 0, places[3]
    before, after = spiked_weights([text, visual], p=0.0)
    assert (after[:, behind][..., [text, visual]] == 0).all()
    others = [j for j in places if j != visual]
    gained = (after - before)[:, behind][..., others].sum(-1)
    assert_close(gained, before[:, behind][..., [text, visual]].sum(-1))


def test_without_a_sink_in_the_picture_the_layer_stays() -> None:
    before, after = spiked_weights([0])  # a word
    assert torch.equal(before, after)


def test_rows_of_the_system_prompt_and_of_the_picture_stay() -> None:
    _, places, behind = one()
    before, after = spiked_weights([places[3]])
    ahead = list(range(behind[0]))
    assert_close(after[:, ahead], before[:, ahead], atol=1e-6, rtol=0)
    assert ((after - before)[:, behind].abs().amax(-1) > 0).all()


def test_ratios_among_the_pictures_other_tokens_stay() -> None:
    _, places, behind = one()
    others = [j for j in places if j != places[3]]
    before, after = (w[:, behind][..., others] for w in spiked_weights([places[3]]))
    assert ((after - before).abs() > 0).all()
    assert_close(after / after.sum(-1, keepdim=True), before / before.sum(-1, keepdim=True))


@pytest.mark.parametrize("option", ["least", "rho"])
def test_rows_and_heads_that_fail_a_condition_stay(option: str) -> None:
    _, places, behind = one()
    others = [j for j in places if j != places[3]]
    before, _ = spiked_weights([places[3]])
    total = before[:, behind][..., places].sum(-1)
    measured = total if option == "least" else before[:, behind][..., others].sum(-1) / total
    below, above = measured.flatten().sort().values[measured.numel() // 2 :][:2].tolist()
    limit = (below + above) / 2
    _, after = spiked_weights([places[3]], **{option: limit})
    changed = (after - before)[:, behind].abs().amax(-1) > 0
    assert torch.equal(changed, measured >= limit)
    assert changed.any() and not changed.all()


def test_p_of_one_gives_identical_logits() -> None:
    model, (inputs, places, _) = eager(), one()
    with spiked(model, [places[3]]):
        bare = run(model, inputs)
        with sc.attach(model, VAR(p=1.0, dims=(DIM,), tau=6, least=0, rho=0)):
            assert_close(run(model, inputs), bare, atol=1e-6, rtol=0)


def test_the_first_token_tells_which_dimensions_are_massive() -> None:
    """Without `dims`, a token is a sink only where the first token is massive too."""
    _, places, behind = one()
    model, (inputs, _, _) = eager(), one()
    for first, flagged in ((DIM, [places[3]]), (DIM + 1, [])):
        with spiked(model, [places[3]]), spiked(model, [0], first):
            before = attentions(model, inputs)[LAYER][0]
            with sc.attach(model, VAR(p=0.0, tau=5, least=0, rho=0)):
                after = attentions(model, inputs)[LAYER][0]
        emptied = ((before > 0) & (after == 0))[:, behind].all(dim=(0, 1)).nonzero()[:, 0].tolist()
        assert emptied == ([0, *flagged] if flagged else [])


def test_in_a_later_turn_words_of_the_question_are_sinks_and_words_of_the_answer_are_not() -> None:
    """With p=0, and a spike in every token of the second turn: its first is the answer's last."""
    model, (inputs, places, _) = eager(), one()
    with sc.attach(model, VAR(p=0.0, dims=(DIM,), tau=6, least=0, rho=0)):
        with spiked(model, [places[3]]):
            first = generated(model, inputs)
        question = followed(inputs, first, torch.full((1, 4), 150))
        with spiked(model, slice(None)):
            second = generated(
                model, question, 1, past_key_values=first.past_key_values, output_attentions=True
            )
    last_row = second.attentions[0][LAYER][0, :, -1]
    emptied = (last_row == 0).all(0).nonzero()[:, 0].tolist()
    end = first.sequences.shape[1]
    assert emptied == [places[3], *range(end, end + 4)]


def test_it_is_attached_before_the_prompt_is_read() -> None:
    model, (inputs, _, _) = eager(), one()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with sc.attach(model, VAR(**EXAMPLE)), pytest.raises(InputError):
        model(input_ids=torch.full((1, 1), 150), past_key_values=cache)
