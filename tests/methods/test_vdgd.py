"""VDGD against a description and an answer that are read by hand, and its formula in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.core.errors import InputError
from saccade.steering.vdgd import VDGD, Grounded

from .lockstep import Reader, assert_answers, cut, driven, lockstep, log_softmax, model_of, question, reader

EXAMPLE: dict[str, Any] = {"words": 5, "alpha": 0.0}
WORDS = 6
ASKED = "is there a cup ?"


def described(name: str) -> tuple[str, np.ndarray]:
    """A description of so many words, greedily, and their log-probabilities."""
    asking = question(name)
    inputs = dict(asking.inputs(model_of(name), text="describe the image ."))
    said, logits = lockstep([reader(model_of(name), inputs)], lambda row, step: row, WORDS)
    tokenizer = asking.processor.tokenizer
    assert not set(said) & set(tokenizer.all_special_ids)
    return tokenizer.decode(said).strip(), log_softmax(logits)


def answering(name: str, description: str) -> Reader:
    text = f"the picture : {description} {ASKED}"
    return reader(model_of(name), dict(question(name).inputs(model_of(name), text=text)))


def driver(**options: Any) -> VDGD:
    return VDGD(
        words=WORDS,
        describe="describe the image .",
        prefix="the picture : {description} {question}",
        **options,
    )


@pytest.mark.parametrize(
    ("name", "distance", "alpha"),
    [("llava", "min", 0.01), ("llava", "mean", 0.1), ("qwen2_5_vl", "sum", 0.01), ("world/vlm", "min", 0.0)],
)
def test_the_answer_is_that_of_the_loop(name: str, distance: str, alpha: float) -> None:
    description, p = described(name)
    over = {"min": np.min, "mean": np.mean, "sum": np.sum}[distance]

    def mix(base: np.ndarray, step: int) -> np.ndarray:
        return cut(np.array([-over(-p[:, v]) for v in range(p.shape[1])]), base, alpha)

    found = driver(alpha=alpha, distance=distance)
    answer = assert_answers(name, found, question(name, ASKED), [answering(name, description)], mix)
    assert answer.found == {"description": description}
    assert answer.tokens == WORDS + 4


def candidates(base: Tensor, **options: Any) -> Tensor:
    said = torch.randn(5, base.shape[-1], generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    return Grounded(said, **options).prediction(base, [], None).isfinite()  # type: ignore[arg-type]


def test_candidates_are_those_of_the_threshold_or_of_the_nucleus() -> None:
    base = 2 * torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    p = base.softmax(-1)
    assert torch.equal(candidates(base, alpha=0.1), p >= 0.1 * p.amax(-1, keepdim=True))
    for row, found in zip((base / 0.5).softmax(-1).tolist(), candidates(base, nucleus=0.5), strict=True):
        expected, total = set(), 0.0
        for v in sorted(range(40), key=lambda v: -row[v]):
            if total < 0.5:
                expected.add(v)
            total += row[v]
        assert set(found.nonzero()[:, 0].tolist()) == expected


def test_at_alpha_one_the_answer_is_the_models_own_to_the_same_prompt() -> None:
    description, _ = described("llava")
    _, written, _ = driven("llava", driver(alpha=1.0), question("llava", ASKED))
    said, _ = lockstep([answering("llava", description)], lambda row, step: row)
    assert written == said


def test_where_the_description_could_have_said_the_same_the_ranking_is_the_models() -> None:
    base = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    found = Grounded(base.log_softmax(-1).repeat(5, 1), 0.0).prediction(base, [], None)  # type: ignore[arg-type]
    assert torch.equal(found.argsort(-1), base.argsort(-1))


def test_of_two_plausible_words_the_described_one_is_said() -> None:
    """The model would rather say 0; the description said 1."""
    base = torch.tensor([[2.0, 1.5, -3.0, -3.0]])
    said = torch.tensor([[-2.0, 4.0, 0.0, 0.0], [-2.0, 0.0, 3.0, 0.0], [-2.0, 0.0, 0.0, 3.0]]).log_softmax(-1)
    assert int(base.argmax()) == 0
    assert int(Grounded(said).prediction(base, [], None).argmax()) == 1  # type: ignore[arg-type]


def test_the_end_of_the_description_is_no_word_of_it() -> None:
    """The embedded model ends what it says."""
    asked = question("world/vlm", "is there a cup ?", words=1)
    with sc.attach(model_of("world/vlm")) as session:
        description, said = VDGD(describe="is there a cup ?", words=50)._described(session, asked)
    ids = asked.processor.tokenizer(description, add_special_tokens=False)["input_ids"]
    assert 0 < len(ids) < 50 and said.argmax(-1).tolist() == ids


def test_a_model_that_describes_nothing_is_told_of() -> None:
    model, end = model_of("llava"), model_of("llava").generation_config.eos_token_id
    head = model.lm_head.register_forward_hook(
        lambda _, __, out: out.index_fill(-1, torch.tensor([end]), 1e3)
    )
    try:
        with sc.attach(model) as session, pytest.raises(InputError, match="did not describe"):
            session.run(VDGD(), question("llava"))
    finally:
        head.remove()
