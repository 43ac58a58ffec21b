"""VISTA against a model whose mlps and head are changed by hand, and against its formula in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.site import layers
from saccade.steering.vista import VISTA, difference, steered

from .shared import Inputs, alone, followed, generated, replay, two

EXAMPLE: dict[str, Any] = {}
DOUBLE = torch.float64


# ---- the paper, by hooks ---------------------------------------------------------------------------------


def edit(x: np.ndarray, v: np.ndarray, lam: float, plain: bool = False) -> np.ndarray:
    """One state and one vector."""
    length = np.sqrt((x * x).sum())
    if plain:
        y = x + lam * v
    else:
        y = x / length
        if (size := np.sqrt((v * v).sum())) > 0:
            cos = -(x @ v) / (length * size)
            y = y + lam * (1 + max(0.0, cos)) * v / size
    return length * y / np.sqrt((y * y).sum())


def sample(name: str = "llava", index: int = 0) -> Inputs:
    single = alone(two(family(name), DOUBLE), index)
    return {name: value for name, value in single.items() if name != "attention_mask"}


def decoder(model: Any) -> nn.ModuleList:
    return model.model.language_model.layers


def vectors(model: Any, inputs: Inputs) -> list[Tensor]:
    """With the picture less without it, at the last token, of every layer's output."""
    image = inputs["input_ids"] == model.config.image_token_id
    found = []
    for given in (inputs, {"input_ids": inputs["input_ids"][~image][None]}):
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, args, out, into=seen: into.append(out))
            for layer in decoder(model)
        ]
        run(model, given)
        for hook in hooks:
            hook.remove()
        found.append([out[0, -1] for out in seen])
    return [a - b for a, b in zip(*found, strict=True)]


@contextmanager
def by_hand(
    model: Any, v: list[Tensor], lam: float, place: str = "mlp", **form: Any
) -> Iterator[list[Tensor]]:
    """Steer every token; gives the newest output of every layer."""
    states: list[Tensor] = [torch.empty(0)] * len(v)

    def steer(vector: Tensor) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            rows = [edit(x.numpy(), vector.numpy(), lam, **form) for x in out[0].detach()]
            return torch.tensor(np.stack(rows))[None]

        return hook

    def keep(number: int) -> Any:
        return lambda _, args, out: states.__setitem__(number, out)

    hooks = []
    for number, layer in enumerate(decoder(model)):
        module = layer.mlp if place == "mlp" else layer
        hooks.append(module.register_forward_hook(steer(v[number])))
        hooks.append(layer.register_forward_hook(keep(number)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def expected(
    model: Any, inputs: Inputs, written: Tensor, gamma: float, late: list[int], norm: bool, **how: Any
) -> Tensor:
    """Logits of the written tokens: (tokens, words)."""
    v = vectors(model, inputs)
    start = inputs["input_ids"].shape[1]
    rest = {n: x for n, x in inputs.items() if n not in ("input_ids", "mm_token_type_ids")}
    ids = torch.cat([inputs["input_ids"], written[:, :-1]], 1)
    if "mm_token_type_ids" in inputs:
        rest["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    with by_hand(model, v, **how) as states, torch.no_grad():
        final = run(model, {**rest, "input_ids": ids})[0, start - 1 :]
        into = [states[n][0, start - 1 :] for n in late]
        early = [model.lm_head(model.model.language_model.norm(h) if norm else h) for h in into]
    return (1 - gamma) * final + gamma * sum(early) / len(early)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "late"),
    [
        ("llava", {}, [3]),
        ("llava", {"lam": 0.5, "gamma": 0.8, "late": "1:3"}, [1, 2]),
        ("qwen2_5_vl", {"lam": 0.5, "late": "1:4"}, [1, 2, 3]),
        ("llava", {"form": "plain", "sites": "text.*.layer", "late": "2:4"}, [2, 3]),
    ],
)
def test_the_answer_is_that_of_a_model_changed_by_hand(
    name: str, options: dict[str, Any], late: list[int], norm: bool
) -> None:
    model, inputs = shared(name, DOUBLE), sample(name)
    method = VISTA(norm=norm, **options)
    with sc.attach(model, method):
        got = generated(model, inputs, 4)
    written = got.sequences[:, inputs["input_ids"].shape[1] :]
    how = {"lam": method.lam, "plain": method.form == "plain", "place": method.sites.rsplit(".", 1)[-1]}
    made = expected(model, inputs, written, method.gamma, late, norm, **how)
    assert_close(torch.stack(got.logits, 1)[0], made.float(), atol=2e-5, rtol=1e-5)


def test_states_are_steered_before_anything_is_mixed() -> None:
    """With gamma=0, by a model whose mlps are changed by hand."""
    model, inputs = shared("llava", DOUBLE), sample()
    with by_hand(model, vectors(model, inputs), 0.3):
        made = run(model, inputs)
    with sc.attach(model, VISTA(lam=0.3, gamma=0.0)) as session:
        assert_close(run(model, inputs), made, atol=1e-5, rtol=0)  # norms are in float32
    for number, v in enumerate(vectors(model, inputs)):
        assert_close(session.results["vista"][number][0], v, atol=1e-5, rtol=0)


def test_at_gamma_one_the_late_layers_speak_alone() -> None:
    model, inputs = shared("llava", DOUBLE), sample()
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    made = sum(states[1 + n][0, -1] @ model.lm_head.weight.T for n in (1, 2)) / 2
    with sc.attach(model, VISTA(lam=0.0, gamma=1.0, late="1:3")):
        assert_close(run(model, inputs)[0, -1], made, atol=1e-10, rtol=0)


# ---- the formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["opposing", "plain"])
@pytest.mark.parametrize("lam", [0.0, 0.01, 0.17, 3.0])
def test_the_edit_is_its_formula_and_keeps_lengths(form: str, lam: float) -> None:
    noise = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(3, 7, 16, generator=noise, dtype=DOUBLE)
    v = torch.randn(3, 1, 16, generator=noise, dtype=DOUBLE)
    got = steered(x, v, lam, form)
    made = [[edit(s, w[0], lam, form == "plain") for s in row] for row, w in zip(x.numpy(), v.numpy())]
    assert_close(got, torch.tensor(np.array(made)))
    single = steered(x.float(), v.float(), lam, form)
    assert_close(single.norm(dim=-1), x.float().norm(dim=-1), atol=0, rtol=1e-5)


def test_only_what_opposes_the_picture_is_moved_further() -> None:
    v = torch.tensor([[[0.0, 3.0]]])
    along, across, against = torch.tensor([[[0.6, 0.8], [1.0, 0.0], [0.6, -0.8]]])[0]
    for x, factor in ((along, 1.0), (across, 1.0), (against, 1.8)):
        moved = x + 0.1 * factor * torch.tensor([0.0, 1.0])
        assert_close(steered(x[None, None], v, 0.1, "opposing")[0, 0], moved / moved.norm())


def test_without_a_direction_nothing_moves() -> None:
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    for form in ("opposing", "plain"):
        assert_close(steered(x, torch.zeros(1, 1, 8), 0.5, form), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_no_direction(dtype: torch.dtype) -> None:
    h = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    off = h + h * torch.finfo(dtype).eps
    assert not torch.equal(off, h)
    assert (difference(h, off) == 0).all()
    assert_close(difference(h, 2 * h), -h.to(torch.promote_types(dtype, torch.float32)))


# ---- the statements --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_picture_that_nobody_sees_changes_nothing(dtype: torch.dtype) -> None:
    """The picture stands first and is masked: with and without it are then the same, but for rounding."""
    model, inputs = shared("llava", dtype), alone(two(family("llava"), dtype), 0)
    image = inputs["input_ids"][0] == model.config.image_token_id
    order = torch.cat([image.nonzero()[:, 0], (~image).nonzero()[:, 0]])
    inputs["input_ids"] = inputs["input_ids"][:, order]
    inputs["attention_mask"] = (~image[order]).long()[None]
    bare = run(model, inputs)[:, -1]
    with sc.attach(model, VISTA(lam=0.5, gamma=0.0)) as session:
        assert_close(run(model, inputs)[:, -1], bare)
    assert all((v == 0).all() for v in session.results["vista"].values())
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with sc.attach(model, VISTA(lam=0.5, gamma=0.0)) as session:
        run(model, inputs)
    assert all((v.norm(dim=-1) > 0.1).all() for v in session.results["vista"].values())


def test_neutral_writes_the_same_tokens() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = shared("llava", dtype), two(family("llava"), dtype)
        bare = generated(model, inputs, 8).sequences
        with sc.attach(model, VISTA(lam=0.0, gamma=0.0)):
            assert torch.equal(generated(model, inputs, 8).sequences, bare)


def test_a_later_turn_is_steered_by_the_first_prompts_vectors() -> None:
    model, inputs = shared("llava", DOUBLE), sample()
    with sc.attach(model, VISTA(lam=0.5, gamma=0.0)):
        first = generated(model, inputs)
        more = torch.full((1, 4), 150)
        got = generated(model, followed(inputs, first, more), past_key_values=first.past_key_values)
    everything = got.sequences[:, :-1]
    with by_hand(model, vectors(model, inputs), 0.5):
        made = run(model, {**inputs, "input_ids": everything})[0, -3:]
    assert_close(torch.stack(got.logits, 1)[0], made.float(), atol=1e-5, rtol=0)


def test_the_papers_layers_of_32() -> None:
    assert [*layers(VISTA().late, 32)] == list(range(25, 31))
    with sc.attach(shared("llava"), VISTA()) as session:
        assert {s.name for s, plan in session.plans.items() if plan.hidden} == {
            *(f"text.{n}.mlp" for n in range(4)), "text.3.layer",
        }  # fmt: skip


def test_a_prompt_without_a_picture_is_refused() -> None:
    model = shared("llava")
    with sc.attach(model, VISTA()), pytest.raises(InputError, match="picture"):
        model(input_ids=torch.full((1, 6), 150))


# ---- a model that guesses --------------------------------------------------------------------------------

THINGS, GUESS, FILLER, ASKED = list(range(30, 36)), 40, list(range(50, 56)), 20


@pytest.mark.slow
def test_what_is_seen_wins_against_what_is_guessed() -> None:
    """Taught to name the picture's thing and, behind other words, to say the same word to two pictures of three."""
    model = family("llava").build()
    image, sight = model.config.image_token_id, two(family("llava"))["pixel_values"].shape[1:]
    patches = int((two(family("llava"))["input_ids"] == image).sum()) // 3
    pictures = torch.randn(len(THINGS), *sight, generator=torch.Generator().manual_seed(0))
    prompt = [1] + [image] * patches + [ASKED]

    rng = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        shown = torch.randint(len(THINGS), (24,), generator=rng)
        guesses = torch.rand(24, generator=rng) < 0.65
        said = [GUESS if guess else THINGS[k] for k, guess in zip(shown, guesses, strict=True)]
        ids = torch.tensor([[*prompt, THINGS[k], *FILLER, word] for k, word in zip(shown, said, strict=True)])
        labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        loss = model.train()(input_ids=ids, pixel_values=pictures[shown], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    grounded, invented = [], []
    for lam in (0.0, 0.05, 0.1, 0.17, 0.3):
        late = []
        with sc.attach(model.eval(), VISTA(lam=lam, gamma=0.0)):
            for k, thing in enumerate(THINGS):
                given = {"input_ids": torch.tensor([prompt]), "pixel_values": pictures[k : k + 1]}
                late.append(replay(model, given, torch.tensor([thing, *FILLER, thing]))[-1])
        p = torch.stack(late).softmax(-1)
        grounded.append(p[range(len(THINGS)), THINGS])
        invented.append(float((p.argmax(-1) != torch.tensor(THINGS)).float().mean()))
    assert bool((torch.stack(grounded).diff(dim=0) > 0).all())
    assert invented[-1] < invented[0] and invented == sorted(invented, reverse=True)
