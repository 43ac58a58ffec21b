"""Asking in batches: what is said is what the model says to every sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from zoo import Family, family, select

from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.question import prepare_batch, written
from saccade.evals.asking import answers
from saccade.evals.task import Sample
from saccade.looking import ask

QUESTIONS = ("Is the red cup on the box?", "Where?", "What is on the green chair near the door?")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def sample(number: int, pictures: int = 1, earlier: Sequence[str] = ()) -> Sample:
    images = [picture(10 * number + i) for i in range(pictures)]
    return Sample(str(number), images, QUESTIONS[number % 3], None, earlier=tuple(earlier))


@pytest.mark.parametrize("f", select("vlm", "processor", "generates"))
def test_every_family_says_in_a_batch_what_it_says_alone(f: Family) -> None:
    model, processor = shared(f.name), f.processor()
    samples = [sample(i) for i in range(3)]
    alone = [str(ask(model, processor, s.images, s.question, max_new_tokens=5)) for s in samples]
    assert answers(model, processor, samples, max_new_tokens=5) == alone


def test_batches_of_any_size_keep_the_order() -> None:
    """Samples with none, one and two pictures, asked for together."""
    model, processor = shared("llava"), family("llava").processor()
    samples = [sample(i, pictures=i % 3) for i in range(7)]
    alone = [str(ask(model, processor, s.images, s.question, max_new_tokens=4)) for s in samples]
    assert len(set(alone)) > 3
    for size in (1, 2, 64):
        assert answers(model, processor, samples, batch=size, max_new_tokens=4) == alone
    assert answers(model, processor, []) == []


def test_a_later_question_is_asked_behind_the_answers_to_the_earlier_ones() -> None:
    model, processor = shared("llava"), family("llava").processor()
    samples = [sample(0, earlier=QUESTIONS[1:]), sample(1), sample(2, earlier=QUESTIONS[:1])]
    said = answers(model, processor, samples, max_new_tokens=4)
    for one, text in zip(samples, said, strict=True):
        prompt = "user: <image>"
        for question in one.earlier:
            prompt += f"{question}\nassistant: "
            prompt += f"{_said(model, processor, prompt.removesuffix(' '), one.images)}\nuser: "
        prompt += f"{one.question}\nassistant:"
        assert text == _said(model, processor, prompt, one.images)
    assert said[0] != answers(model, processor, [sample(0)], max_new_tokens=4)[0]


def _said(model: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> str:
    inputs = processor(images=list(images), text=prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return str(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


@dataclass(eq=False, kw_only=True)
class Away(Method):
    sites: str = "text.*.self"

    def bias(self, call: AttentionCall) -> torch.Tensor:
        return -9.0 * call.columns("image")


def test_methods_are_at_work_while_it_is_asked() -> None:
    model, processor = shared("llava"), family("llava").processor()
    samples = [sample(i) for i in range(4)]
    bare = answers(model, processor, samples, max_new_tokens=6)
    steered = [str(ask(model, processor, s.images, s.question, Away(), max_new_tokens=6)) for s in samples]
    assert answers(model, processor, samples, [Away()], max_new_tokens=6) == steered != bare
    assert answers(model, processor, samples, max_new_tokens=6) == bare


def test_a_tokenizer_alone_is_asked_without_pictures() -> None:
    model, tokenizer = shared("llama"), family("llava").processor().tokenizer
    samples = [Sample(str(i), (), text, None) for i, text in enumerate(QUESTIONS)]
    said = answers(model, tokenizer, samples, max_new_tokens=3)
    for one, text in zip(samples, said, strict=True):
        ids = tokenizer(one.question, return_tensors="pt")["input_ids"]
        made = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_processor_is_left_as_it_was() -> None:
    processor = family("llava").processor()
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        inputs = prepare_batch(processor, [[], []], ["a cup", "a cup on the table"])
        assert processor.tokenizer.padding_side == side
        assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_a_conversation_without_a_template_is_refused() -> None:
    processor = family("llava").processor()
    processor.chat_template = None
    assert written(processor, 1, "Where?") == "Where?"
    with pytest.raises(InputError, match="no chat template"):
        written(processor, 1, "Where?", [("What is it?", "a cup")])
