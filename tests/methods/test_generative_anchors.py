"""Generative anchors against layers that are edited by hand, and the formula in numpy."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering._parts.drawing import PipelineDrawer, drawer
from saccade.steering.generative_anchors import GenerativeAnchors, pulled

from .lockstep import DOUBLE, driven, model_of, question

EXAMPLE: dict[str, Any] = {"draw": "world", "alpha": 0.5, "beta": 0.5, "words": 2}
ASKED, DESCRIBE = "is there a cup ?", "describe the image ."
NOISE = np.random.default_rng(1).integers(0, 255, (70, 60, 3), dtype=np.uint8)
DRAWN = Image.fromarray(NOISE)
NAMES = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])


def driver(**options: Any) -> GenerativeAnchors:
    return GenerativeAnchors(**{"draw": lambda text: DRAWN, "describe": DESCRIBE, "words": 5, **options})


def anchor(name: str, picture: Image.Image) -> np.ndarray:
    """The model's own features of a picture, mean over tokens, as a unit vector."""
    inputs, model = question(name).inputs(model_of(name), [picture], DESCRIBE), model_of(name)
    given = {n: v for n, v in inputs.items() if n in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        found = model.model.get_image_features(**given)
    parts = getattr(found, "pooler_output", found)
    mean = torch.cat([p.view(-1, p.shape[-1]) for p in parts]).mean(0).numpy()
    return mean / np.sqrt((mean * mean).sum())


def by_hand(name: str, asked: sc.Question, d: np.ndarray, late: list[int]) -> Tensor:
    """Logits with which the model answers while the states of single tokens are edited: (tokens, words)."""
    model = model_of(name)

    def edit(_: nn.Module, __: Any, out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        if h.shape[1] > 1:
            return out
        x = h[0, 0].numpy()
        y = x + np.sqrt((x * x).sum()) * d
        y = torch.tensor(np.sqrt((x * x).sum()) * y / np.sqrt((y * y).sum()))[None, None]
        return (y, *out[1:]) if isinstance(out, tuple) else y

    hooks = [model.model.language_model.layers[n].register_forward_hook(edit) for n in late]
    inputs = asked.inputs(model)
    try:
        made = model.generate(
            **inputs, do_sample=False, return_dict_in_generate=True, output_logits=True, **asked.options
        )
    finally:
        for hook in hooks:
            hook.remove()
    end = model.generation_config.eos_token_id
    logits = torch.cat(made.logits)
    logits[:, end] = -torch.inf
    return logits


@NAMES
def test_the_answer_is_that_of_layers_edited_by_hand(name: str) -> None:
    asked, (alpha, beta) = question(name, ASKED), (0.3, 0.2)
    answer, written, logits = driven(name, driver(alpha=alpha, beta=beta), asked)
    d = alpha * anchor(name, asked.images[0]) - beta * anchor(name, DRAWN)
    depth = len(model_of(name).model.language_model.layers)
    made = by_hand(name, asked, d, list(range(round(depth * 0.67), depth)))
    assert written == made.argmax(-1).tolist()
    assert_close(logits, made.double().log_softmax(-1), atol=1e-4, rtol=0)
    assert answer.pictures["drawn"].tobytes() == DRAWN.tobytes()


def test_one_caption_one_drawing_and_two_encodings_come_before_the_answer() -> None:
    model, asked = model_of("llava"), question("llava", ASKED)
    order: list[str] = []
    said: list[str] = []

    def draw(text: str) -> Image.Image:
        order.append("draw")
        said.append(text)
        return DRAWN

    tower = model.model.vision_tower.register_forward_hook(lambda *_: order.append("encode"))
    with sc.attach(model) as session:
        caption = dataclasses.replace(asked, text=DESCRIBE, options={"max_new_tokens": 5}).ask(session)
        order.clear()
        answer = session.run(driver(draw=draw), asked)
    tower.remove()
    assert order == ["encode", "draw", "encode", "encode"]
    assert said == [caption] and answer.found == {"caption": caption}
    assert answer.tokens == caption.tokens + 4


def test_a_drawing_that_is_the_picture_changes_nothing() -> None:
    asked = question("llava", ASKED)
    bare = driven("llava", driver(alpha=0.0, beta=0.0), asked)
    same = driver(alpha=0.4, beta=0.4, draw=lambda text: asked.images[0])
    assert torch.equal(driven("llava", same, asked)[2], bare[2])
    assert not torch.equal(driven("llava", driver(alpha=0.4, beta=0.3), asked)[2], bare[2])


def test_states_keep_their_length_and_turn_towards_the_direction() -> None:
    noise = torch.Generator().manual_seed(0)
    h, own, drawn = (torch.randn(*shape, generator=noise) for shape in ((2, 3, 64), (64,), (64,)))
    away = nn.functional.normalize(own, dim=0) - nn.functional.normalize(drawn, dim=0)
    cosines = []
    for weight in (0.0, 0.1, 0.2, 0.5, 1.0):
        new = pulled(h, weight * away)
        assert_close(new.norm(dim=-1), h.norm(dim=-1), rtol=1e-5, atol=0)
        cosines.append(torch.cosine_similarity(new, away, dim=-1))
    assert all((later > sooner).all() for sooner, later in itertools.pairwise(cosines))
    assert_close(pulled(h.to(DOUBLE), 0 * away.to(DOUBLE)), h.to(DOUBLE))


def test_the_world_draws_what_its_model_says() -> None:
    answer, _, _ = driven("world/vlm", driver(draw="world", words=30), question("world/vlm", ASKED))
    drawn = sc.world.illustrate(answer.found["caption"])
    assert drawn.things and answer.pictures["drawn"].tobytes() == drawn.picture().tobytes()


def test_a_pipeline_draws_and_other_models_are_refused(tmp_path: Any) -> None:
    def pipe(text: str, generator: torch.Generator) -> Any:
        return SimpleNamespace(images=[(text, int(torch.randint(99, (), generator=generator)))])

    seeded = int(torch.randint(99, (), generator=torch.Generator().manual_seed(3)))
    assert PipelineDrawer(pipe, 3)("a cup") == ("a cup", seeded)
    sc.world.load("vlm")[0].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="draws nothing"):
        drawer(str(tmp_path))
    with sc.attach(model_of("llava")) as session, pytest.raises(InputError, match="returned a str"):
        session.run(driver(draw=lambda text: text), question("llava", ASKED))
    with sc.attach(model_of("llava")) as session, pytest.raises(InputError, match="not describe"):
        silent = dataclasses.replace(question("llava", ASKED), processor=Silent(question("llava").processor))
        session.run(driver(), silent)


class Silent:
    """A processor whose tokenizer reads nothing back."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = SimpleNamespace(decode=lambda *_, **__: "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.processor(*args, **options)
