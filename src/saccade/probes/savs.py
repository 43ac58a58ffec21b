"""Classify by what a few heads say of a picture and its question. A few labelled examples are enough, nothing is
trained.

    x_h  = output of head h at the last token of the prompt
    m_hc = mean of x_h over the examples of class c
    v_h  = argmax_c cos(x_h, m_hc)                the vote of head h

The heads whose votes are right for most of the examples are kept. The class that most of them vote for wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from saccade.core.call import AttentionCall, take_rows
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError, OptionError
from saccade.core.heads import Heads
from saccade.core.method import Method
from saccade.core.question import Answer, Question, pictures_of
from saccade.core.session import Session, attach
from saccade.core.system import option


@dataclass(eq=False)
class SAVs(Driver):
    """Answers with the label; `answer.found["savs"]` are the `Votes`. For many questions, each with words of its
    own, take `Voters.of(said(session, examples), labels)` once and `voters.vote(said(session, questions))`."""

    card = Card(
        slug="savs",
        name="SAVs",
        kind="driver",
        family="probes",
        form="method",
        target="vlm",
        paper="Sparse Attention Vectors: Generative Multimodal Model Features Are Discriminative "
        "Vision-Language Classifiers (Mitra et al., 2024)",
        summary="Classify pictures by the votes of a few heads, from about twenty examples of each class",
        needs=("image",),
        neutral={"keep": 0},
        code="chancharikmitra/SAVs",
        choices=(
            "Of heads that are right equally often the later one goes first, as in the release.",
            "Heads are judged by the examples that their means were made of, none left out, as in the release.",
            "The width of a head is what the head gives; the release divides the model's width by the heads.",
            "The answer is the label alone, with keep=0 the model's own.",
        ),
        headline="under 1% of the heads suffice",
        tags=("classification", "few-shot", "heads", "features", "head scores", "sparse"),
    )

    examples: tuple[tuple[str | Image.Image, str], ...] = option(
        (), "pictures, or files of them, each with its label; about 20 of every label"
    )
    keep: int = option(
        20, "heads that vote, those that are right most often; with 0 the model answers", low=0
    )
    ties: str = option(
        "first",
        "to whom a tie goes: first, the class of the best head among those that tie; similar, the class to which "
        "the heads are more similar in sum",
        choices=("first", "similar"),
    )
    sites: str = option("text.*.self", "layers whose heads are tried")

    def run(self, session: Session, question: Question) -> Answer:
        if not self.keep:
            return question.ask(session)
        if not self.examples:
            raise InputError(
                "SAVs has no examples to learn the classes from.",
                "give examples=, pictures with their labels, about 20 of every label",
            )
        shown = [replace(question, images=[opened(picture)]) for picture, _ in self.examples]
        labels = [label for _, label in self.examples]
        voters = Voters.of(said(session, shown, self.sites), labels, self.keep)
        (votes,) = voters.vote(said(session, [question], self.sites), self.ties)
        answer = Answer(votes.label)
        answer.session_summary, answer.found["savs"] = session.summary(), votes
        return answer


@dataclass(frozen=True, eq=False)
class Said:
    """What every head gives at the last token of each of some prompts."""

    sites: tuple[str, ...]
    vectors: Tensor  # (prompts, sites, heads, dim)


@dataclass(frozen=True, repr=False)
class Votes:
    """How many heads vote for each label, the winner first."""

    counts: dict[str, int]

    @property
    def label(self) -> str:
        return next(iter(self.counts))

    def __repr__(self) -> str:
        return "  ".join(f"{label} {count}" for label, count in self.counts.items())


@dataclass(frozen=True, eq=False)
class Voters:
    """The heads that vote, and what each of them gives for the classes on average."""

    labels: tuple[str, ...]
    right: Heads  # whether each head was right, by example
    chosen: tuple[int, ...]  # of the heads of all sites, the best first
    means: Tensor  # (classes, voters, dim)

    @staticmethod
    def of(examples: Said, labels: Sequence[str], keep: int = 20) -> Voters:
        """Every example with its label. Of heads that are right equally often the later goes first."""
        classes = tuple(dict.fromkeys(labels))
        x, truth = examples.vectors, torch.tensor([classes.index(label) for label in labels])
        means = torch.stack([x[truth == c].mean(0) for c in range(len(classes))])
        votes = similarity(x, means).argmax(-1)  # (examples, sites, heads)
        right = Heads("savs", examples.sites, (votes == truth[:, None, None]).float())
        scores = right.scores.flatten()
        if keep > len(scores):
            raise OptionError(f"There are {len(scores)} heads, not {keep}.", "keep= some of them")
        chosen = len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)[:keep]
        return Voters(classes, right, tuple(chosen.tolist()), means.flatten(1, 2)[:, chosen])

    @property
    def heads(self) -> tuple[tuple[str, int], ...]:
        """Site and number of each, the best first."""
        places = (divmod(place, self.right.events.shape[2]) for place in self.chosen)
        return tuple((self.right.sites[site], head) for site, head in places)

    def vote(self, asked: Said, ties: str = "first") -> list[Votes]:
        """For every prompt."""
        near = similarity(asked.vectors.flatten(1, 2)[:, list(self.chosen)], self.means)
        return [self._counted(one, ties) for one in near]

    def _counted(self, near: Tensor, ties: str) -> Votes:
        """Of similarities (voters, classes)."""
        counts = Counter(near.argmax(-1).tolist())  # in the order in which they were first voted for
        total = near.sum(0).tolist() if ties == "similar" else [0.0] * len(self.labels)
        order = sorted(counts, key=lambda c: (-counts[c], -total[c]))
        return Votes({self.labels[c]: counts[c] for c in order})


@dataclass(eq=False)
class Listen(Method):
    """What heads give at the last token, before it is mixed."""

    given: dict[str, list[Tensor]] = field(default_factory=dict)

    def observe(self, call: AttentionCall) -> None:
        assert call.out is not None
        last = take_rows(call.out, call.resolve("last"))[0, :, 0]
        self.given.setdefault(call.site.name, []).append(last.float().cpu())


@torch.no_grad()
def said(session: Session, questions: Sequence[Question], sites: str = "text.*.self") -> Said:
    """With the methods of the session at work."""
    listen = Listen(sites=sites)
    with attach(session.model, listen):
        for question in questions:
            session.model(**question.inputs(session.model))
    shapes = {tuple(heads[0].shape) for heads in listen.given.values()}
    if len(shapes) != 1:
        raise InputError(
            f"The layers have heads of different number or width: {sorted(shapes)}.",
            "narrow with sites= to layers that are alike",
        )
    by_site = [torch.stack(heads) for heads in listen.given.values()]
    return Said(tuple(listen.given), torch.stack(by_site, 1))


def similarity(x: Tensor, means: Tensor) -> Tensor:
    """Cosines of (prompts, ..., dim) and the means of classes (classes, ..., dim): (prompts, ..., classes)."""
    return torch.einsum("n...d,c...d->n...c", F.normalize(x, dim=-1), F.normalize(means, dim=-1))


def opened(picture: str | Image.Image) -> Image.Image:
    if isinstance(picture, str):
        try:
            picture = Image.open(Path(picture).expanduser())
        except OSError as e:
            raise InputError(f"The example {picture} cannot be read: {e}.", "name a picture file") from e
    return pictures_of(picture)[0]
