"""The small trained model that ships with the package, asked about scenes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from helpers import Look

import saccade as sc
from saccade.core.method import Method
from saccade.core.question import prepare_batch, written
from saccade.world.questions import questions
from saccade.world.scenes import scenes

SCENES = 4


@cache
def trained() -> tuple[Any, Any]:
    return sc.world.load("vlm")


@cache
def asked() -> Any:
    """Inputs of one question about each of some scenes."""
    _, processor = trained()
    rng, shown = np.random.default_rng(0), list(scenes(SCENES, "test"))
    texts = [written(processor, 1, questions(one, rng, 1)[0].text) for one in shown]
    return prepare_batch(processor, [[one.picture()] for one in shown], texts)


def said(*methods: Method) -> list[list[int]]:
    """The ids that it answers with, in one batch."""
    (model, _), inputs = trained(), asked()
    with sc.attach(model, *methods):
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def seen(*methods: Method) -> list[list[int]]:
    """How many visual tokens of every sample come to each layer of its text tower: (layers, samples)."""
    (model, _), inputs = trained(), asked()
    look = Look(tell=lambda call: call.columns("visual").sum(-1)[:, 0, 0].tolist(), sites="text.*.self")
    with sc.attach(model, *methods, look):
        model(**inputs)
    return [told for _, _, told in look.seen]
