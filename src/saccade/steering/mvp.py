"""Describe the picture in several ways, and let every way of beginning an answer vote as surely as it ends in one.

    captions   what the model says of the picture from above, from below, and plainly
    paths      the k likeliest first words v of an answer to caption and question, with probability p(v)
    score      of an answer: the sum over captions and paths of
               p(v)                                where v is that answer,
               p(v) * (p_1 - p_2)                  where v leads to it, the two likeliest words there being 1 and 2

The answer with the largest score is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError, OptionError
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.system import option

VIEWS = (
    "Look at the image closely: from its colours, shapes and textures to the objects that they make up, "
    "describe it in detail.",
    "Take in the image as a whole: from its scene, surroundings and context to what is in it, describe it in detail.",
    "Describe this image in detail.",
)


@dataclass(eq=False)
class MVP(Driver):
    card = Card(
        slug="mvp",
        name="MVP",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="Look, Compare, Decide: Alleviating Hallucination in Large Vision-Language Models via "
        "Multi-View Multi-Path Reasoning (Qu et al., 2024)",
        summary="Caption the picture in several ways, and vote over ways to begin the answer",
        needs=("image",),
        neutral={"views": ()},
        code="GasolSun36/MVP",
        choices=(
            "A path without an answer does not vote, as in the paper; the released code counts it for yes, and "
            "loses the votes of all that are continued.",
            "Certainty is that of the model's own probabilities; the released code's are sharpened by the "
            "temperature.",
            "Answers are words of one token; where no path comes to one the question is refused.",
        ),
        tags=("hallucination", "multi-path decoding", "captions", "voting", "certainty"),
    )

    views: tuple[str, ...] = option(
        VIEWS, "what asks for the captions; with none the model answers as it does"
    )
    weights: tuple[float, ...] = option((1.0, 1.0, 1.0), "of the views")
    answers: tuple[str, ...] = option(("Yes", "No"), "the answers that are voted on")
    k: int = option(3, "paths of every view", low=1)
    least: float = option(0.001, "probability of a first word from which it is followed", low=0, high=1)
    temperature: float = option(0.7, "of what follows it; 0 for the likeliest words", low=0)
    tokens: int = option(50, "most tokens of what follows it", low=1)
    words: int = option(512, "most tokens of a caption", low=1)
    prompt: str = option(
        "Here is the caption of the image:\n{caption}\nQuestion: {question}", "the prompt that is answered"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views and len(self.weights) != len(self.views):
            raise OptionError(
                f"MVP has {len(self.views)} views and {len(self.weights)} weights.", "give one of each"
            )

    def run(self, session: Session, question: Question) -> Answer:
        if not self.views:
            return question.ask(session)
        captions, scores = [], dict.fromkeys(self.answers, 0.0)
        for view, weight in zip(self.views, self.weights, strict=True):
            asked = dataclasses.replace(question, options={**question.options, "max_new_tokens": self.words})
            captions.append(asked.ask(session, text=view))
            text = self.prompt.format(caption=captions[-1], question=question.text)
            for answer, vote in self.votes(session, question, text):
                scores[answer] += weight * vote
        if not any(scores.values()):
            raise InputError(
                f"No path of MVP came to {' or '.join(self.answers)}.", "name what is answered, with answers="
            )
        answer = Answer(max(scores, key=scores.__getitem__))
        answer.session_summary, answer.tokens = session.summary(), sum(c.tokens for c in captions)
        answer.found = {"scores": scores, "captions": [*map(str, captions)]}
        return answer

    def votes(self, session: Session, question: Question, text: str) -> Iterator[tuple[str, float]]:
        """Of every path that comes to an answer, that answer and how sure it is."""
        model: Any = session.model
        tokenizer = getattr(question.processor, "tokenizer", question.processor)
        known = {answer.lower(): answer for answer in self.answers}

        def read(token: int) -> str | None:
            return known.get(tokenizer.decode([token]).strip(" .,!\n").lower())

        inputs = dict(question.inputs(model, text=text))
        _, first = written(model, inputs, max_new_tokens=1, do_sample=False)
        how = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        )
        for p, token in zip(*(t.tolist() for t in first[0].topk(self.k)), strict=True):
            if answer := read(token):
                yield answer, p
            elif p >= self.least and token not in tokenizer.all_special_ids:
                ids, chances = written(model, followed(inputs, token), max_new_tokens=self.tokens, **how)
                at = next((i for i, said in enumerate(ids) if read(said)), None)
                if at is not None:
                    best, second = chances[at].topk(2).values.tolist()
                    yield read(ids[at]) or "", p * (best - second)


def written(model: Any, inputs: Mapping[str, Any], **options: Any) -> tuple[list[int], Tensor]:
    """What a prompt is followed by, and the probabilities (tokens, vocabulary) of every word there."""
    made = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return made.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(made.logits).softmax(-1)


def followed(inputs: Mapping[str, Any], token: int) -> dict[str, Any]:
    """The prompt with one word of the answer."""
    shape = inputs["input_ids"].shape
    of_words = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.shape == shape}
    ends = {"input_ids": token, "attention_mask": 1}
    return {**inputs, **{n: F.pad(v, (0, 1), value=ends.get(n, 0)) for n, v in of_words.items()}}
