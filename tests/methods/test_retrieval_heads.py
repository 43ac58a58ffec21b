"""Retrieval heads against loops over the weights that models return, and on a head made to copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.heads import Heads
from saccade.probes.retrieval_heads import RetrievalHeads, find, recalled, score

from .copier import BESIDE, COPIER, PROMPT, copier
from .shared import Inputs, two

EXAMPLE: dict[str, Any] = {}
IDS = torch.tensor([50, 51, 52, 53, 54, 55, 52, 60])
PLACE = torch.tensor([2, 3, 4, 5])  # the needle 52 53 54 55; 52 stands behind it too


def looped(
    attended: Sequence[Sequence[int]], said: Sequence[int], ids: Sequence[int], place: Sequence[int]
) -> list[float]:
    """Of each head, written out."""
    scores = []
    for head in attended:
        copied = {word for at, word in zip(head, said, strict=True) if at in place and ids[at] == word}
        scores.append(len(copied) / len({ids[at] for at in place}))
    return scores


# ---- the score -------------------------------------------------------------------------------------------


def test_a_head_that_copies_the_needle_scores_one_and_no_other_scores() -> None:
    said = torch.tensor([52, 53, 54, 55])
    attended = torch.tensor(
        [
            [2, 3, 4, 5],  # copies
            [3, 4, 5, 2],  # looks at the needle, at other words than are said
            [6, 0, 0, 0],  # at the right word, outside of it
            [0, 1, 7, 7],  # elsewhere
        ]
    )
    assert score(attended[None], said, IDS, PLACE).tolist() == [[1, 0, 0, 0]]


def test_a_word_that_is_said_twice_counts_once_and_raw_twice() -> None:
    attended, said = torch.tensor([[[2, 2, 3]]]), torch.tensor([52, 52, 53])
    assert score(attended, said, IDS, PLACE).item() == 2 / 4
    assert score(attended, said, IDS, PLACE, raw=True).item() == 3 / 4


def test_scores_are_those_of_a_loop_and_lie_between_zero_and_one() -> None:
    noise = torch.Generator().manual_seed(0)
    for _ in range(8):
        ids = torch.randint(0, 6, (12,), generator=noise)
        attended = torch.randint(0, 12, (2, 3, 9), generator=noise)
        said = torch.randint(0, 6, (9,), generator=noise)
        found = score(attended, said, ids, torch.arange(3, 8))
        flat = attended.flatten(0, 1).tolist()
        assert_close(found.flatten(), torch.tensor(looped(flat, said.tolist(), ids.tolist(), range(3, 8))))
        assert found.min() >= 0
        assert found.max() <= 1


def test_the_needle_is_found_where_most_of_its_words_are() -> None:
    assert find(IDS, (52, 53, 54, 55)).tolist() == [2, 3, 4, 5]
    long = torch.arange(100, 140)
    cut = (999, *range(111, 125))  # its first word is another one there
    assert find(long, cut).tolist() == list(range(10, 25))
    for strange in ((70, 71), (53, 60), tuple(range(40, 60))):
        with pytest.raises(InputError, match="not in the prompt"):
            find(IDS, strange)


def test_recall_counts_a_word_as_often_as_the_needle_has_it() -> None:
    needle = torch.tensor([1, 1, 2, 3])
    assert recalled(torch.tensor([1, 3, 3, 3]), needle) == 2 / 4
    assert recalled(torch.tensor([1, 1, 1, 2, 3]), needle) == 1


# ---- on models -------------------------------------------------------------------------------------------


def told(model: Any, inputs: Inputs, words: Tensor, **options: Any) -> Any:
    """Greedy generation of given words (samples, words)."""
    start = inputs["input_ids"].shape[1]

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, words[:, ids.shape[1] - start, None], 0)

    asked = {
        "max_new_tokens": words.shape[1],
        "min_new_tokens": words.shape[1],
        "do_sample": False,
        **options,
    }
    return model.generate(**inputs, logits_processor=[force], **asked)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_follows_the_weights_that_the_model_returns(name: str) -> None:
    """Two prompts of different lengths, made to say words of their own; keys of llama are shared by two heads."""
    inputs = two(family(name))
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    words = ids[:, [-1, -9, -5, -14, -3, -9, -12, -7]]
    out = told(
        shared(name, implementation="eager"),
        inputs,
        words,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    with sc.attach(shared(name), RetrievalHeads()) as session:
        told(shared(name), inputs, words)
    found: Heads = session.results["retrieval_heads"]
    assert found.events.shape == (2, 4, 4)
    assert found.events.any()
    for sample in range(2):
        for layer in range(4):
            best = torch.stack([step[layer][sample, :, -1].argmax(-1) for step in out.attentions], -1)
            place = real[sample].nonzero()[:, 0].tolist()
            expected = looped(best.tolist(), words[sample].tolist(), out.sequences[sample].tolist(), place)
            assert_close(found.events[sample, layer], torch.tensor(expected))


def written(*methods: Any) -> list[int]:
    """What the copier says."""
    ids = torch.tensor([PROMPT])
    with sc.attach(model := copier(), *methods):
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=8, max_new_tokens=8
        )
    return said[0, 8:].tolist()


def scored(**options: Any) -> Heads:
    ids = torch.tensor([PROMPT])
    with sc.attach(model := copier(), RetrievalHeads(**options)) as session:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=8, max_new_tokens=8
        )
    return session.results["retrieval_heads"]


def test_the_head_that_was_made_to_copy_scores_one_and_the_others_nothing() -> None:
    found = scored(needle=PROMPT[2:6])
    assert found.scores.tolist() == [[0, 0], [1, 0]]
    assert found.reaching(0.1) == found.top(1) == COPIER


def test_muting_that_head_ends_the_copying_and_muting_others_does_not() -> None:
    """Recall of the prompt falls to that of one word, and stays under as many other heads."""
    found, bare = scored(needle=PROMPT[2:6]), written()
    assert bare == [*PROMPT]
    for to in ("context", "zero"):
        muted = written(sc.MuteHeads(heads=found.top(1), to=to))
        assert recalled(torch.tensor(muted), torch.tensor(PROMPT)) <= 1 / len(PROMPT)
        for seed in range(3):
            assert written(sc.MuteHeads(heads=found.random(1, seed, without=found.top(1)), to=to)) == bare
    assert written(sc.MuteHeads(heads=BESIDE)) == bare


def test_samples_whose_answer_has_less_of_the_needle_do_not_count() -> None:
    with pytest.raises(InputError, match="nothing was seen"):
        _ = scored(needle=PROMPT[2:6], recall=1.0).scores
    ids = torch.tensor([PROMPT, PROMPT])
    words = torch.tensor([[3, 14, 7, 11, 2], [3, 14, 1, 1, 1]])  # all of it, and half of it
    with sc.attach(model := copier(), RetrievalHeads(needle=PROMPT[2:6])) as session:
        told(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, words)
    assert len(session.results["retrieval_heads"].events) == 1


def test_a_needle_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="not in the prompt"):
        scored(needle=(1, 4, 6))
