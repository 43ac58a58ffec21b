"""SAVs against counting by hand, on what the models' output projections are given, and on the trained model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import heads_input, shared
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from zoo.base import noise

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.probes.savs import Said, SAVs, Voters, said
from saccade.world.questions import ask
from saccade.world.scenes import scenes

from .planted import question

FOLDER = tempfile.TemporaryDirectory()
SITES, HEADS, DIM = 4, 8, 5
PLANTED = {(0, 3), (2, 0), (3, 7)}
CLASSES = ("cat", "dog", "cow", "hen")


def file(name: str, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    path = Path(FOLDER.name) / f"{name}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


EXAMPLE: dict[str, Any] = {"examples": ((file("a", 1), "red"), (file("b", 2), "blue")), "keep": 3}


def names(count: int = SITES) -> tuple[str, ...]:
    return tuple(f"text.{i}.self" for i in range(count))


def made(labels: Sequence[str], seed: int, planted: set[tuple[int, int]] = PLANTED) -> Said:
    """Noise, and in planted heads a code of the class."""
    x = noise(len(labels), SITES, HEADS, DIM, seed=seed)
    for site, head in planted:
        for row, label in enumerate(labels):
            x[row, site, head] = torch.eye(DIM)[CLASSES.index(label)]
    return Said(names(), x)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    return sum(p * q for p, q in zip(x, y)) / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


def nearest(x: Tensor, examples: Tensor, labels: Sequence[str]) -> str:
    """The class whose mean is nearest to one vector, of one head."""
    means = {
        c: torch.stack([e for e, label in zip(examples, labels) if label == c]).sum(0) / labels.count(c)
        for c in CLASSES
    }
    return max(means, key=lambda c: cosine(x, means[c]))


LABELS = [CLASSES[i % 4] for i in range(8)]


# ---- which heads vote ------------------------------------------------------------------------------------


def test_heads_that_carry_the_class_are_chosen_and_are_always_right() -> None:
    many = [CLASSES[i % 4] for i in range(80)]
    voters = Voters.of(made(many, seed=0), many, keep=3)
    assert set(voters.heads) == {(f"text.{site}.self", head) for site, head in PLANTED}
    asked = LABELS[::-1]
    assert [votes.label for votes in voters.vote(made(asked, seed=1))] == asked


def test_twenty_are_kept_and_the_best_go_first_and_of_equal_ones_the_later() -> None:
    examples = made(LABELS, seed=0)
    voters = Voters.of(examples, LABELS)
    share = {
        (f"text.{s}.self", h): sum(
            nearest(x, examples.vectors[:, s, h], LABELS) == label
            for x, label in zip(examples.vectors[:, s, h], LABELS)
        )
        for s in range(SITES)
        for h in range(HEADS)
    }
    assert len(set(share.values())) < len(share) / 2  # many are equal
    in_order = sorted(share, key=lambda head: (share[head], names().index(head[0]), head[1]), reverse=True)
    assert list(voters.heads) == in_order[:20] and SAVs().keep == 20
    assert_close(voters.right.scores[2, 0], torch.tensor(1.0))


# ---- how they vote ---------------------------------------------------------------------------------------


def test_one_voter_is_the_nearest_mean_by_cosine() -> None:
    examples, asked = made(LABELS, seed=0, planted=set()), made(LABELS, seed=1, planted=set())
    voters = Voters.of(examples, LABELS, keep=1)
    ((site, head),) = voters.heads
    place = (slice(None), names().index(site), head)
    expected = [nearest(x, examples.vectors[place], LABELS) for x in asked.vectors[place]]
    assert [votes.label for votes in voters.vote(asked)] == expected
    assert len(set(expected)) > 1


def test_the_size_of_what_a_head_gives_does_not_matter() -> None:
    examples, asked = made(LABELS, seed=0, planted=set()), made(LABELS, seed=1, planted=set())
    factors = torch.linspace(0.01, 50, SITES * HEADS).view(SITES, HEADS, 1)
    louder = [Said(names(), one.vectors * factors) for one in (examples, asked)]
    plain, scaled = Voters.of(examples, LABELS), Voters.of(louder[0], LABELS)
    assert plain.heads == scaled.heads
    assert [v.counts for v in plain.vote(asked)] == [v.counts for v in scaled.vote(louder[1])]


def test_a_tie_goes_to_the_best_heads_class_or_to_the_more_similar() -> None:
    """Two voters: the better says cat, nearly as surely dog; the other says dog for certain."""
    means = torch.eye(2)[:, None].expand(2, 2, 2)
    right = Voters.of(made(LABELS, seed=0), LABELS, 2).right
    voters = Voters(("cat", "dog"), right, (4, 9), means)
    x = torch.zeros(1, SITES, HEADS, 2)
    x.flatten(1, 2)[0, 4], x.flatten(1, 2)[0, 9] = torch.tensor([0.8, 0.6]), torch.tensor([0.0, 1.0])
    told = {ties: voters.vote(Said(names(), x), ties)[0] for ties in ("first", "similar")}
    assert told["first"].counts == told["similar"].counts == {"cat": 1, "dog": 1}
    assert (told["first"].label, told["similar"].label) == ("cat", "dog")
    assert repr(told["similar"]) == "dog 1  cat 1"


# ---- on models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_heads_together_give_what_the_output_projection_is_given(name: str) -> None:
    model, asked = shared(name), question(name)
    with sc.attach(model) as session:
        got = said(session, [asked])
    for layer, heads in enumerate(got.vectors[0]):
        projection = f"model.language_model.layers.{layer}.self_attn.o_proj"
        (given,) = heads_input(model, projection, partial(model, **asked.inputs(model)))
        assert torch.equal(heads.flatten(), given[0, -1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_question_is_answered_with_the_label_of_the_picture_that_it_shows(name: str) -> None:
    model, asked = shared(name), question(name)
    for path, label in EXAMPLE["examples"]:
        same = sc.Question(asked.processor, [Image.open(path)], asked.text)
        with sc.attach(model) as session:
            answer = session.run(SAVs(**EXAMPLE), same)
        assert answer == label and answer.found["savs"].counts == {label: 3}


def test_what_it_cannot_do_is_refused() -> None:
    with sc.attach(shared("llava")) as session:
        with pytest.raises(InputError, match="examples"):
            session.run(SAVs(), question())
        with pytest.raises(OptionError, match="16 heads, not 17"):
            session.run(SAVs(**{**EXAMPLE, "keep": 17}), question())
        with pytest.raises(InputError, match=r"none\.png"):
            session.run(SAVs(examples=(("none.png", "red"),)), question())


def test_the_trained_model_tells_colours_by_a_few_examples() -> None:
    """Six of each of four colours, or fewer, of things of any kind; a quarter would be right by chance."""
    model, processor = sc.world.load("vlm")
    colours, rng = ("red", "blue", "green", "yellow"), np.random.default_rng(0)

    def some(split: str, each: int) -> tuple[list[sc.Question], list[str]]:
        found: dict[str, list[sc.Question]] = {colour: [] for colour in colours}
        for scene in scenes(40, split):
            asked = ask(scene, rng, "colour")
            if asked and len(found.get(asked.answer, range(each))) < each:
                found[asked.answer].append(sc.Question(processor, [scene.picture()], asked.text))
        shown = [(one, colour) for colour, of in found.items() for one in of]
        return [one for one, _ in shown], [colour for _, colour in shown]

    (examples, labels), (asked, truth) = some("calibration", 6), some("test", 4)
    with sc.attach(model) as session:
        voters = Voters.of(said(session, examples), labels)
        votes = voters.vote(said(session, asked))
    right = sum(vote.label == label for vote, label in zip(votes, truth, strict=True))
    assert len(truth) >= 12 and right >= 0.8 * len(truth)
