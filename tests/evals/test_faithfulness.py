"""How faithful a map is, against sums by hand, brute force over pictures, and plain forwards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import method, shared
from PIL import Image
from zoo import family

import saccade as sc
from saccade import looking
from saccade.core.errors import InputError
from saccade.core.faithfulness import Faithfulness
from saccade.core.question import prepare
from saccade.core.record import Recording
from saccade.evals import faithfulness as module
from saccade.evals.faithfulness import blanked, faithfulness, likelihood, order


@pytest.fixture(scope="module")
def seen() -> Recording:
    model, processor = sc.world.load("vlm")
    return sc.look(model, processor, sc.world.scene(9, "test").picture(), "describe the image .")


def trapezoids(p: Sequence[float], at: Sequence[float]) -> float:
    return sum((b - a) * (x + y) / 2 for a, b, x, y in zip(at, at[1:], p, p[1:]))


def test_areas() -> None:
    removed = [0.0, 0.25, 1.0]
    curves = {"map": [[1, 0.2, 0]], "reversed": [[1, 1, 0]], "random": [[1, 0.6, 0], [1, 0.1, 0]]}
    found = Faithfulness([3], "cup", 0, removed, curves)
    map_, reversed_, one, other = (trapezoids(run, removed) for runs in curves.values() for run in runs)
    assert found.deletion() == pytest.approx(map_) and found.insertion() == pytest.approx(reversed_)
    assert found.gain == pytest.approx((one + other) / 2 - map_)
    assert found.beaten == 1 and f"faithfulness {found.gain:+.2f}" in str(found)


def test_places_take_the_mean_colour_of_their_picture() -> None:
    rng = np.random.default_rng(0)
    one, two = (
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in ((8, 12, 3), (6, 6, 3))
    )
    first, second = blanked([one, two], [(2, 3), (3, 3)], np.array([1, 5, 6 + 3]))
    for image, made, boxes in (
        (one, first, [(0, 4, 4, 8), (4, 8, 8, 12)]),
        (two, second, [(2, 0, 4, 2)]),
    ):
        wanted = np.array(image)
        for top, left, bottom, right in boxes:
            wanted[top:bottom, left:right] = np.array(image).mean((0, 1)).round()
        np.testing.assert_array_equal(np.array(made), wanted)


def test_equal_places_come_at_random() -> None:
    heat = np.array([0.0, 2, 0, 1, 0, 0, 0, 0])
    found = [order(heat, seed).tolist() for seed in range(8)]
    assert all(one[:2] == [1, 3] and sorted(one) == [*range(8)] for one in found)
    assert len({tuple(one) for one in found}) > 5


def test_curves_are_what_removing_and_adding_gives(seen: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where p is a sum over the places that are there, each of another worth."""
    picture, word = sc.world.scene(9, "test").picture(), seen.sharpest()
    worth = np.random.default_rng(1).dirichlet(np.ones(144))
    original = np.array(picture)

    def there(image: Image.Image) -> np.ndarray:
        same = (np.array(image) == original).all(-1).reshape(12, -1, 12, original.shape[1] // 12)
        return same.mean((1, 3)).ravel() > 0.5

    def summed(model: Any, processor: Any, pictures: Any, *_: Any) -> np.ndarray:
        return np.array([worth[there(row[0])].sum() for row in pictures])

    monkeypatch.setattr(module, "likelihood", summed)
    found = faithfulness(None, None, [picture], seen, word)
    ranked = seen.map("text.*.self", word=word).grid().ravel().argsort()[::-1]
    removed = [step / 8 for step in range(9)]
    assert found.removed == removed
    steps = [18 * step for step in range(9)]
    assert found.deletion() == pytest.approx(trapezoids([worth[ranked[k:]].sum() for k in steps], removed))
    assert found.insertion() == pytest.approx(trapezoids([worth[ranked[:k]].sum() for k in steps], removed))
    assert found.deletion("reversed") == pytest.approx(
        trapezoids([worth[ranked[: 144 - k]].sum() for k in steps], removed)
    )
    assert len({*found.areas("random")}) == 3 and found.deletion("random") == pytest.approx(0.5, abs=0.1)
    again = faithfulness(None, None, [picture], seen, word)
    assert again == found and faithfulness(None, None, [picture], seen, word, seed=1).curves != found.curves


def direct(
    model: Any, processor: Any, image: Image.Image, seen: Recording, at: list[int], *methods: Any
) -> float:
    """The geometric mean, from one forward over the prompt and the answer."""
    inputs = dict(prepare(processor, [image], seen.prompt))
    ids, said = inputs["input_ids"], seen.ids[:1, seen.answer_start :]  # type: ignore[index]
    for name, value in inputs.items():
        if name == "input_ids":
            inputs[name] = torch.cat([ids, said], 1)
        elif value.shape[:2] == ids.shape:
            inputs[name] = torch.cat([value, torch.full_like(said, int(name == "attention_mask"))], 1)
    with torch.no_grad(), sc.attach(model, *methods):
        p = model(**inputs).logits[0].double().softmax(-1)
    return float(np.prod([float(p[i - 1, inputs["input_ids"][0, i]]) for i in at]) ** (1 / len(at)))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_answer_is_said_again_word_for_word(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, and with the methods at work."""
    model, processor = shared(name), family(name).processor()
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 100, 3), dtype=np.uint8))
        for i in range(3)
    ]
    seen = looking.look(
        model, processor, images[0], "Is the red cup on the box?", max_new_tokens=6, min_new_tokens=6
    )
    at = [seen.answer_start + i for i in (1, 2, 4)]
    half = method(output=lambda call, o: o / 2)(sites="text.*.self")
    monkeypatch.setattr(module, "TOKENS", 2 * seen.ids.shape[1])  # type: ignore[union-attr]
    for methods in ((), (half,)):
        found = likelihood(model, processor, [[image] for image in images], seen, at, methods)
        wanted = [direct(model, processor, image, seen, at, *methods) for image in images]
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_trained_model_depends_on_where_it_looked(seen: Recording) -> None:
    model, processor = sc.world.load("vlm")
    picture, seen = sc.world.scene(9, "test").picture(), copy.deepcopy(seen)
    word = seen.word(seen.sharpest())  # type: ignore[arg-type]
    passes: list[int] = []
    hook = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    looking.weigh(model, processor, picture, seen, word.text)
    hook.remove()
    assert len(passes) == word.positions[-1] - seen.answer_start + 1
    found = seen.measured(word.text)
    assert found is not None and seen.measured() is None
    assert found.deletion("map") < found.deletion("random") < found.deletion("reversed")
    first, *_, last = found.curves["map"][0]
    assert first == pytest.approx(direct(model, processor, picture, seen, [*word.positions]), rel=1e-4)
    mean = np.broadcast_to(np.array(picture).mean((0, 1)).round().astype(np.uint8), np.array(picture).shape)
    flat = direct(model, processor, Image.fromarray(np.ascontiguousarray(mean)), seen, [*word.positions])
    assert last == pytest.approx(flat, rel=1e-4)
    assert str(found) in seen.plain(word.text, 10_000)


def test_it_is_kept_in_the_file(seen: Recording, tmp_path: Any) -> None:
    kept = copy.deepcopy(seen)
    kept.faithfulness = [Faithfulness([1], "a", 0, [0.0, 1.0], {"map": [[1.0, 0.0]]})]
    kept.save(tmp_path / "seen.safetensors")
    assert Recording.load(tmp_path / "seen.safetensors").faithfulness == kept.faithfulness


def test_an_answer_without_words_is_refused(seen: Recording) -> None:
    silent = copy.deepcopy(seen)
    silent.texts[0][silent.answer_start :] = [None] * (len(silent.texts[0]) - silent.answer_start)
    with pytest.raises(InputError, match="no word"):
        faithfulness(None, None, [], silent)
