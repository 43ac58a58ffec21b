"""Say what fine-tuning moves, concept by concept, and move a model's states alike without any training.

    u_k        concepts of the states h_a of a model at a layer; every sample belongs to its most active one
    d_k        mean over the samples of u_k of h_b - h_a, states of the fine-tuned model
    h       <- h + alpha * s        outputs of the layer;  s = mean h(target answers) - mean h(source answers),
                                    or a difference of two concepts

States are those that predict the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall
from saccade.core.session import Session
from saccade.core.site import match
from saccade.steering._parts.concepts import Concepts, active, decompose, matched
from saccade.steering._parts.prompts import answered

TOLD = ("target", "source")
Sample = Mapping[str, Any]


@dataclass(eq=False)
class XLVLMs(Method):
    card = Card(
        slug="xl_vlms",
        name="xl-vlms shift vectors",
        kind="method",
        family="steering",
        form="method",
        target="vlm",
        paper="Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering alignment "
        "(Khayatan et al., 2025)",
        summary="Add the difference between two kinds of answers, or two concepts, to a layer's states",
        neutral={"alpha": 0.0},
        code="mshukor/xl-vlms",
        choices=(
            "The last layer is steered, as in the released scripts.",
            "A sample's state is the mean over those that predict its answer's tokens; for a single word give "
            "the prompt up to it, and its first id.",
            "Semi-NMF is that of Ding et al.; the released code learns a dictionary with sparse activations.",
            "k-means begins by a seeded draw, and a cluster's activation is 1 / (1 + distance), as in the "
            "released code.",
            "start counts real tokens; padding has no place.",
        ),
        tags=("steering vector", "activation steering", "concepts", "fine-tuning", "representation shift"),
    )

    alpha: float = option(1.0, "factor on the shift; 0 changes nothing")
    shift: str = option("", "name of the calibration, of which a model may have several")
    generated: bool = option(False, "move generated tokens alone")
    start: int = option(0, "the first token that is moved", low=0)
    between: tuple[int, int] | None = option(
        None, "of a calibration: shift from the second to the first of these concepts of all answers"
    )
    concepts: int = option(20, "of a calibration with between: how many concepts", low=1)
    decomposition: str = option(
        "semi_nmf", "of a calibration with between: how they are found", choices=("semi_nmf", "kmeans", "pca")
    )
    sites: Sites = option("text.-1.layer", "layers whose outputs are moved")

    def kept_as(self) -> str:
        return f"{self.card.slug}-{self.shift}" if self.shift else self.card.slug

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        kept = call.run.calibration()
        if call.site.name not in kept:
            raise InputError(
                f"The calibration of XLVLMs has no shift of {call.site.name}.",
                "calibrate with the same sites",
            )
        step = self.alpha * kept[call.site.name].to(h)
        if self.generated:
            return h + step * call.rows("generated", h)
        return h + step * _from(self.start, call, h) if self.start else h + step

    def calibrate(self, session: Session, samples: Iterable[Sample]) -> dict[str, Tensor]:
        """Samples are inputs of a forward for one prompt, with `target`, ids (tokens,) of an answer that is wanted, or
        with `source`, those of one that is not, or with both."""
        samples = list(samples)
        told = {kind: [sample for sample in samples if kind in sample] for kind in TOLD}
        if missing := next((kind for kind in TOLD if not told[kind] and self.between is None), None):
            raise InputError(
                f"XLVLMs shifts from source to target answers, and there is no {missing}.",
                "give samples with target=ids and with source=ids",
            )
        found = {}
        for site in match(self.sites_of("hidden"), session.sites):
            h = {kind: states(session, told[kind], site.name, kind) for kind in TOLD if told[kind]}
            found[site.name] = self._shift(h).float()
        return found

    def _shift(self, h: Mapping[str, Tensor]) -> Tensor:
        """From states (samples, width) by kind of answer: (width,)."""
        if self.between is None:
            return h["target"].mean(0) - h["source"].mean(0)
        if not all(0 <= number < self.concepts for number in self.between):
            raise InputError(
                f"between={self.between} are no two of {self.concepts} concepts.",
                "give numbers below concepts",
            )
        to, origin = self.between
        vectors = decompose(torch.cat([*h.values()]), self.concepts, self.decomposition).vectors
        return vectors[to] - vectors[origin]


def _from(start: int, call: HiddenCall, h: Tensor) -> Tensor:
    """Which states are the real token of that number, or a later one: (batch, tokens, 1)."""
    number = call.pass_.sequence.layout().where("all").cumsum(1) - 1
    removal = call.pass_.removal(call.site)
    if removal is None:
        return (number[:, call.start : call.start + h.shape[1]] >= start)[..., None]
    return (number.gather(1, removal.keep.clamp_min(0) + call.start) >= start)[..., None]


# ---- what fine-tuning moves ------------------------------------------------------------------------------


@dataclass(eq=False)
class Hear(Method):
    h: Tensor = field(default_factory=lambda: torch.empty(0))

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.h = h.detach()
        return h


def states(session: Session, samples: Sequence[Sample], site: str, kind: str = "target") -> Tensor:
    """Of every sample the mean of those that predict its answer's tokens: (samples, width)."""
    found = []
    for sample in samples:
        prompt = {name: value for name, value in sample.items() if name not in TOLD}
        ids = torch.as_tensor(sample[kind], device=prompt["input_ids"].device)
        hear = Hear(sites=site)
        session.forward(answered(prompt, ids), [hear], last_only=True)
        found.append(hear.h[0, -len(ids) - 1 : -1].double().mean(0).cpu())
    return torch.stack(found)


def shifts(concepts: Concepts, before: Tensor, after: Tensor) -> Tensor:
    """d_k of every concept of the states `before` (samples, width): (concepts, width), 0 of one without samples."""
    moved = (after - before).double()
    mine = torch.nn.functional.one_hot(concepts.of, len(concepts.vectors)).to(moved)  # (samples, concepts)
    return mine.T @ moved / mine.sum(0).clamp_min(1)[:, None]


@dataclass(frozen=True)
class Recovery:
    """How near concepts come to the fine-tuned model's that match them: (concepts,) each."""

    partner: Tensor  # number of the concept that matches
    cosine: Tensor
    distance: Tensor
    words: Tensor  # share of the top words that both have
    samples: Tensor  # share of the most active samples that both have


def recovery(
    session: Session,
    own: Concepts,
    shift: Tensor,
    tuned: Concepts,
    after: Tensor,
    decomposition: str = "semi_nmf",
    words: int = 15,
    samples: int = 5,
) -> tuple[Recovery, Recovery]:
    """Of concepts as they are, and as they are shifted (concepts, width), in the fine-tuned model's states `after`. The
    fine-tuned model's concepts are matched with those that are not shifted; top words are what the session's model
    makes of a concept."""
    order = torch.tensor(matched(own.vectors, tuned.vectors))
    goal = Concepts(tuned.vectors[order], tuned.activations[:, order])
    vectors = own.vectors + shift

    def near(one: Concepts) -> Recovery:
        u, v = one.vectors, goal.vectors
        said = [top_words(session, part, words) for part in (u, v)]
        seen = one.samples(samples), goal.samples(samples)
        cosine, distance = torch.cosine_similarity(u, v, dim=1), (u - v).norm(dim=1)
        return Recovery(order, cosine, distance, _shared(*said), _shared(*seen))

    return near(own), near(Concepts(vectors, active(after, vectors, decomposition)))


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """The share of each row's numbers (rows, n) that are in the other's too: (rows,)."""
    return (a[:, :, None] == b[:, None]).any(-1).double().mean(1)


def top_words(session: Session, vectors: Tensor, n: int) -> Tensor:
    """Ids of the words that the model's head hears most in vectors (concepts, width): (concepts, n)."""
    weight = next(session.model.get_output_embeddings().parameters())
    with torch.no_grad():
        return session.unembed(vectors.to(weight)).topk(n, dim=-1).indices.cpu()
