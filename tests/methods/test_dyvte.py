"""DyVTE against models whose layers are masked by hand, and routers that are told what to say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Look, cast, shared, unchanged
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import family, run
from zoo.base import noise, words

import saccade as sc
from saccade.core import calibration
from saccade.core.errors import InputError
from saccade.reduction.dyvte import Answered, DyVTE, Hear, exits
from saccade.world.questions import questions
from saccade.world.scenes import scenes

from .lockstep import DOUBLE, model_of, sample, told
from .measured import home, keep
from .shared import Inputs, alone, generated, two

EXAMPLE: dict[str, Any] = {}
DISCRETE = ("threshold",)
HERE = ("llava", "qwen2_5_vl", "world/vlm")


def width_of(model: Any) -> int:
    return model.config.get_text_config().hidden_size


def forced(model: Any, *leaving: int) -> dict[str, Tensor]:
    """Routers that say exit behind these layers, whatever they hear, and nothing behind others:
    gelu(a) + gelu(-a) is above 0 for every a but 0."""
    size = 2 * width_of(model)
    first = torch.randn(8, size, generator=torch.Generator().manual_seed(0))
    says = torch.stack([-torch.ones(16), torch.ones(16)])
    found = {}
    for layer in range(model.config.get_text_config().num_hidden_layers - 1):
        found[f"inner.{layer}"] = torch.cat([first, -first])
        found[f"outer.{layer}"] = says * (layer in leaving)
    return found


keep("dyvte", ("llava", "qwen2_5_vl"), lambda model, draw: forced(model, 1))


@contextmanager
def forcing(name: str, *leaving: int) -> Iterator[None]:
    with home():
        calibration.save("dyvte", model_of(name), forced(model_of(name), *leaving))
        yield


def pictured(model: Any, ids: Tensor) -> Tensor:
    return ids == model.config.image_token_id


@contextmanager
def masked(model: Any, layer: int) -> Iterator[None]:
    """In the layers above this one nobody sees visual tokens; samples are not padded."""
    ids: list[Tensor] = []

    def hide(_: Any, args: Any, given: dict[str, Any]) -> Any:
        seen = pictured(model, ids[-1])
        tokens = seen.shape[1]
        hidden = torch.ones(tokens, tokens).triu(1).bool() | seen[:, None]
        lowest = torch.finfo(DOUBLE).min
        mask = torch.zeros(hidden.shape, dtype=DOUBLE).masked_fill(hidden, lowest)[:, None]
        return args, {**given, "attention_mask": mask}

    above = model.model.language_model.layers[layer + 1 :]
    hooks = [each.register_forward_pre_hook(hide, with_kwargs=True) for each in above]
    hooks.append(
        model.register_forward_pre_hook(lambda _, __, kw: ids.append(kw["input_ids"]), with_kwargs=True)
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def counts(model: Any, inputs: Inputs, *methods: Any) -> list[list[int]]:
    """Visual tokens that come to every layer, by sample: (samples, layers)."""
    look = Look(tell=lambda call: call.queries("visual").sum(1).tolist(), sites="text.*.self")
    with sc.attach(model, *methods, look):
        run(model, inputs)
    return [[*of_sample] for of_sample in zip(*(each for _, _, each in look.seen), strict=True)]


# ---- leaving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", HERE)
def test_words_say_what_they_do_where_the_picture_is_masked_above(name: str, layer: int) -> None:
    """In the prompt, and in the answer that is written behind it."""
    model, inputs = model_of(name), sample(name)
    with forcing(name, layer, layer + 1):
        said, logits = told(model, inputs, DyVTE())
        with sc.attach(model, DyVTE()):
            prompt = run(model, inputs)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([said])], 1)}
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = pictured(model, longer["input_ids"]).long()
    with masked(model, layer):
        expected = run(model, longer)
    tokens = inputs["input_ids"].shape[1]
    text = ~pictured(model, inputs["input_ids"])
    assert_close(prompt[text], expected[:, :tokens][text], atol=2e-5, rtol=0)
    assert_close(logits, expected[0, tokens - 1 : -1].double().log_softmax(-1).to(logits), atol=2e-5, rtol=0)
    assert (run(model, inputs)[text] - prompt[text]).abs().max() > 1e-3


@pytest.mark.parametrize("name", HERE)
def test_every_layer_above_has_fewer_tokens_and_a_shorter_cache(name: str) -> None:
    model, inputs = model_of(name), sample(name)
    tokens, visual = inputs["input_ids"].shape[1], int(pictured(model, inputs["input_ids"]).sum())
    depth = model.config.get_text_config().num_hidden_layers
    expected = [tokens, tokens] + [tokens - visual] * (depth - 2)
    look = Look(tell=lambda call: call.q.shape[2], sites="text.*.self")
    with forcing(name, 1), sc.attach(model, DyVTE(), look), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert visual > 0 and [seen for _, _, seen in look.seen] == expected
    assert [layer.keys.shape[2] for layer in cache.layers] == expected


def test_routers_that_keep_change_nothing() -> None:
    for name in ("llava", "qwen2_5_vl"):
        model, inputs = model_of(name), sample(name)
        bare = generated(model, inputs)
        with forcing(name), sc.attach(model, DyVTE()):
            got = generated(model, inputs)
        assert torch.equal(torch.stack(got.logits), torch.stack(bare.logits))


# ---- deciding --------------------------------------------------------------------------------------------


def random_routers(model: Any, seed: int) -> dict[str, Tensor]:
    noise_ = torch.Generator().manual_seed(seed)
    shapes = {"inner": (12, 2 * width_of(model)), "outer": (2, 12)}
    return {
        f"{part}.{layer}": torch.randn(shape, generator=noise_)
        for layer in range(3)
        for part, shape in shapes.items()
    }


def chance(routers: dict[str, Tensor], layer: int, words_: Tensor) -> float:
    """Of exit, by words (tokens, width) of one sample."""
    f = torch.cat([sum(words_[:-1]) / (len(words_) - 1), words_[-1]])
    a = [float(row.double() @ f) for row in routers[f"inner.{layer}"]]
    a = [x * 0.5 * (1 + math.erf(x / 2**0.5)) for x in a]
    keeps, leaves = (sum(w * x for w, x in zip(row.tolist(), a)) for row in routers[f"outer.{layer}"])
    return 1 / (1 + math.exp(keeps - leaves))


@pytest.mark.parametrize("threshold", [0.5, 0.9])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_each_sample_leaves_behind_the_first_layer_whose_router_says_so(name: str, threshold: float) -> None:
    model = model_of(name)
    inputs = two(family(name), DOUBLE)
    found = set()
    for seed in range(3):
        routers, expected = random_routers(model, seed), []
        for row in range(2):
            single = {n: v for n, v in alone(inputs, row).items() if n != "attention_mask"}
            with torch.no_grad():
                states = model(**single, output_hidden_states=True).hidden_states
            seen = pictured(model, single["input_ids"])[0]
            start = int(seen.nonzero()[-1]) + 1
            wishes = [chance(routers, n, states[n + 1][0, start:]) > threshold for n in range(3)]
            behind = wishes.index(True) if any(wishes) else 3
            expected.append([int(seen.sum())] * (behind + 1) + [0] * (3 - behind))
            found.add(behind)
        with home():
            calibration.save("dyvte", model, routers)
            assert counts(model, inputs, DyVTE(threshold=threshold)) == expected
    assert len(found) > 1


def test_a_single_word_behind_the_picture_is_its_own_mean() -> None:
    model, inputs = model_of("llava"), sample("llava")
    ids = inputs["input_ids"]
    last = int(pictured(model, ids)[0].nonzero()[-1])
    inputs = {**inputs, "input_ids": ids[:, : last + 2]}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    for seed in range(3):
        routers = random_routers(model, seed)
        wishes = [chance(routers, n, states[n + 1][0, -1].expand(2, -1)) > 0.5 for n in range(3)]
        with home():
            calibration.save("dyvte", model, routers)
            (found,) = counts(model, inputs, DyVTE())
        assert [count == 0 for count in found] == [False, *(any(wishes[: n + 1]) for n in range(3))]


# ---- training --------------------------------------------------------------------------------------------


def labelled(count: int, seed: int, answer: int = 3) -> Inputs:
    """Prompts about a picture each, with answers."""
    ids = sample("llava")["input_ids"].repeat(count, 1)
    ids[:, -4:] = words(count, 4, seed=seed)
    ids = torch.cat([ids, words(count, answer, seed=seed + 100)], 1)
    labels = ids.clone()
    labels[:, :-answer] = -100
    return {"input_ids": ids, "pixel_values": noise(count, 3, 48, 48, seed=seed), "labels": labels}


def prompts(inputs: Inputs, answer: int = 3) -> Inputs:
    return {"input_ids": inputs["input_ids"][:, :-answer], "pixel_values": inputs["pixel_values"]}


def test_a_label_needs_the_same_words_and_a_loss_that_is_hardly_larger() -> None:
    labels = torch.full((1, 201), -100)
    labels[:, 1:] = 5  # 200 words
    whole = Answered(torch.arange(200)[None], torch.tensor([2.0]))
    for differ, loss, expected in ((0, 2.05, 1), (0, 2.07, 0), (1, 1.0, 1), (2, 1.0, 0)):
        likeliest = whole.likeliest.clone()
        likeliest[0, :differ] = -1
        assert exits(whole, Answered(likeliest, torch.tensor([loss])), labels).tolist() == [expected]
    labels[:, 2:] = -100  # words that are not of the answer do not count
    likeliest[0, 1:] = -1
    likeliest[0, 0] = 0
    assert exits(whole, Answered(likeliest, torch.tensor([1.0])), labels).tolist() == [1]


def test_in_training_routers_hear_nothing_of_the_answer() -> None:
    model, given = model_of("llava"), cast(labelled(2, 0), DOUBLE)
    labels = given.pop("labels")
    hear = Hear(sites="text.1:.layer", starts=torch.full((2,), labels.shape[1] - 3))
    with sc.attach(model) as session:
        session.forward(given, [hear])
    with torch.no_grad():
        states = model(**prompts(given), output_hidden_states=True).hidden_states
    start = int(pictured(model, given["input_ids"])[0].nonzero()[-1]) + 1
    for layer in range(3):
        h = states[layer + 1][:, start:]
        assert_close(hear.by_layer[layer], torch.cat([h[:, :-1].mean(1), h[:, -1]], -1))


def test_routers_learn_the_labels_of_the_masked_model() -> None:
    model = shared("llava")
    given = labelled(4, 0)
    run(model, prompts(given))
    with home(), unchanged(model), sc.attach(model) as session:
        session.calibrate(DyVTE(steps=60, lr=1e-3), [given])
        kept = calibration.load("dyvte", model)
        found = counts(model, prompts(given), DyVTE())
    assert {name: tuple(w.shape) for name, w in kept.items()} == {
        f"{part}.{n}": shape
        for n in range(3)
        for part, shape in (("inner", (2048, 128)), ("outer", (2, 2048)))
    }
    exact, inputs = shared("llava", DOUBLE), cast(given, DOUBLE)
    labels = inputs.pop("labels")[:, -3:]

    def answered(logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits[:, -4:-1]
        return rows.argmax(-1), -rows.log_softmax(-1).gather(2, labels[..., None]).mean((1, 2))

    said, loss = answered(run(exact, inputs))
    leaves = []
    for layer in range(3):
        with masked(exact, layer):
            short, more = answered(run(exact, inputs))
        leaves.append(((short == said).all(1) & (more < 1.03 * loss)).tolist())
    assert {one for layer in leaves for one in layer} == {True, False}
    for row, by_layer in enumerate(found):
        wishes = [layer[row] for layer in leaves]
        assert [count == 0 for count in by_layer] == [False, *(any(wishes[: n + 1]) for n in range(3))]


def reading_in(layer: int) -> nn.Module:
    """A model in which words look at what stands before them in one layer alone."""
    model: Any = family("llava").build()
    for number, each in enumerate(model.model.language_model.layers):
        if number != layer:
            nn.init.zeros_(each.self_attn.o_proj.weight)
    return model


def test_what_is_read_early_is_let_go_earlier_than_what_is_read_late() -> None:
    """On prompts that the routers have not been trained on."""
    behind = []
    for layer in (0, 2):
        model = reading_in(layer)
        with home(), sc.attach(model) as session:
            session.calibrate(DyVTE(steps=60, lr=1e-3), [labelled(4, seed) for seed in range(2)])
            found = counts(model, prompts(labelled(4, 7)), DyVTE())
        behind.append([sum(count > 0 for count in by_layer) - 1 for by_layer in found])
    assert behind == [[0] * 4, [2] * 4]


@pytest.mark.slow
def test_the_embedded_model_learns_when_it_has_seen_enough() -> None:
    """Pictures leave before the last layer, and most of what it answers of other scenes stays the same."""
    model, processor = sc.world.load("vlm")
    rng, options = np.random.default_rng(0), {"do_sample": False, "max_new_tokens": 4}

    def asked(split: str, count: int) -> list[Inputs]:
        return [
            dict(sc.Question(processor, [scene.picture()], one.text).inputs(model))
            for scene in scenes(count, split)
            for one in questions(scene, rng, 2)
        ]

    samples = []
    for inputs in asked("calibration", 30):
        ids = model.generate(**inputs, **options)
        labels = ids.clone()
        labels[:, : inputs["input_ids"].shape[1]] = -100
        samples.append({"input_ids": ids, "pixel_values": inputs["pixel_values"], "labels": labels})
    with home(), sc.attach(model) as session:
        session.calibrate(DyVTE(steps=300, lr=1e-3), samples)
        same, left = [], []
        for inputs in asked("test", 12):
            bare = model.generate(**inputs, **options)
            with sc.attach(model, DyVTE()):
                same.append(torch.equal(model.generate(**inputs, **options), bare))
            left.append(sum(count > 0 for count in counts(model, inputs, DyVTE())[0]))
    print(f"{sum(same)} of {len(same)} answers are the same; layers that see the picture: {left}")
    assert sum(left) < model.config.text_config.num_hidden_layers * len(left)
    assert sum(same) >= 0.7 * len(same)


# ---- refusals --------------------------------------------------------------------------------------------


def test_what_cannot_be_decided_or_learned_from_is_refused() -> None:
    model, inputs = model_of("llava"), sample("llava")
    with forcing("llava", 1), sc.attach(model, DyVTE()):
        with pytest.raises(InputError, match="prefill_chunk_size"):
            generated(model, inputs, prefill_chunk_size=10)
        last = int(pictured(model, inputs["input_ids"])[0].nonzero()[-1])
        with pytest.raises(InputError, match="ends with its picture"):
            run(model, {**inputs, "input_ids": inputs["input_ids"][:, : last + 1]})
    with home(), sc.attach(model) as session:
        none = cast(labelled(1, 0), DOUBLE)
        for samples in ([], [inputs], [{**none, "labels": torch.full_like(none["labels"], -100)}]):
            with pytest.raises(InputError, match="labels"):
                session.calibrate(DyVTE(), samples)
        calibration.save("dyvte", model, {})
        with sc.attach(model, DyVTE()), pytest.raises(InputError, match="no router behind layer 0"):
            run(model, inputs)


def test_a_prompt_of_words_alone_is_left_as_it_is() -> None:
    model, inputs = model_of("llava"), {"input_ids": torch.arange(100, 120)[None]}
    bare = run(model, inputs)
    with forcing("llava", 0), sc.attach(model, DyVTE()):
        assert torch.equal(run(model, inputs), bare)
