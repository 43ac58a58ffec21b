"""What an answer keeps when some tokens do not see others: what the words of the prompt have stored of the picture,
and in which layers it is fetched.

    F1 = 2 |A & B| / (|A| + |B|)        objects named with and without the knockout

Where an object is lost, the map of the word that named it says where the model had fetched it from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.boxes import picture_boxes
from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import OptionError
from saccade.core.geometry import cells, on_picture
from saccade.core.method import Method
from saccade.core.passes import Run
from saccade.core.question import Answer, Question
from saccade.core.session import Session, attach
from saccade.core.system import option
from saccade.core.words import find, pieces, words
from saccade.probes._parts.asked import tokenizer_of
from saccade.probes._parts.table import Table
from saccade.probes.attention_knockout import AttentionKnockout

AFTER = "question|generated"
MEASURES = ("f1", "kept", "lost", "new")


@dataclass(eq=False)
class VLMDeepDive(Driver):
    """`answer.found["deep_dive"]` is a `Dive`."""

    card = Card(
        slug="vlm_deep_dive",
        name="VLM Deep-Dive",
        kind="driver",
        family="probes",
        form="probe",
        target="vlm",
        paper="What's in the Image? A Deep-Dive into the Vision of Vision Language Models "
        "(Kaduri et al., 2024)",
        summary="What a description keeps when words do not see the picture, or see it in some layers only",
        needs=("image",),
        choices=(
            "Generated tokens begin with the first that is fed back: the prompt's last still sees.",
            "Objects are those of a list, or all words; the paper lets a language model judge.",
            "Pointing takes the middle of the map's highest cell.",
            "The compressed context (query tokens and a few of the picture's) is left out.",
        ),
        headline="cross-modal flow mostly in the middle ~25% of layers",
        tags=("attention knockout", "information flow", "interpretability", "layers", "description"),
    )

    cuts: tuple[tuple[str, str], ...] = option(
        (
            ("image->generated", ":"),
            ("question->generated", ":"),
            (f"image->{AFTER}", "37%:"),
            (f"image->{AFTER}", ":37%|63%:"),
            (f"image->{AFTER}", ":63%"),
        ),
        "who is not seen by whom, and in which layers; the last three leave early, middle and late ones",
    )
    objects: tuple[str, ...] = option((), "words that count as objects; none for all words")
    looked: str = option("37%:63%", "layers of the maps")

    def __post_init__(self) -> None:
        super().__post_init__()
        for flow, _ in self.cuts:
            if flow.count("->") != 1:
                raise OptionError(f"VLMDeepDive(cuts=): {flow!r} is no pair.", 'write "image->generated"')

    def run(self, session: Session, question: Question) -> Answer:
        without = {}
        for flow, layers in self.cuts:
            source, target = flow.split("->")
            sites = "|".join(f"text.{span}.self" for span in layers.split("|"))
            with attach(session.model, AttentionKnockout(source=source, target=target, sites=sites)):
                without[f"{flow} in {layers}"] = question.ask(session)
        watch = Watch(sites=f"text.{self.looked}.self")
        with attach(session.model, watch):
            answer = question.ask(session)
        there = named(answer, self.objects)
        kept = {cut: named(said, self.objects) for cut, said in without.items()}
        lost = {obj for objects in kept.values() for obj in there - objects}
        answer.found["deep_dive"] = Dive(
            answers={cut: str(said) for cut, said in without.items()},
            table=compared(there, kept),
            maps={obj: self._map(session, question, watch, obj) for obj in sorted(lost)},
        )
        return answer

    def _map(self, session: Session, question: Question, watch: Watch, word: str) -> Tensor:
        """Where it was looked to say the word first: (rows, columns) over the first picture."""
        spoken = words(pieces(tokenizer_of(question), watch.ids), watch.start)
        first = find(word, [w for w in spoken if w.said])[0]
        picture = question.images[0]
        boxes = picture_boxes(session.model, question.processor, picture.size)
        heat = torch.stack(watch.maps[first]).mean(0)[: len(boxes)]
        return on_picture(heat, boxes, picture.size, cells(boxes, picture.size))


@dataclass(frozen=True, repr=False)
class Dive:
    """The answers under each knockout, what they keep of the objects, and maps of those that one of them loses."""

    answers: dict[str, str]
    table: Table  # (cut, measure)
    maps: dict[str, Tensor]

    def __repr__(self) -> str:
        return repr(self.table)


@dataclass(eq=False)
class Watch(Method):
    """Attention on the picture, mean over heads, by the position of the token that is said."""

    maps: dict[int, list[Tensor]] = field(default_factory=dict)
    ids: Sequence[int] = ()
    start: int = 0  # of the answer

    def observe(self, call: AttentionCall) -> None:
        if call.pass_.complete:
            w = call.weights("last")[0].mean(0)[0]
            seen = w[call.columns("image")[0, 0, 0]].float().cpu()
            self.maps.setdefault(call.pass_.sequence.length, []).append(seen)

    def end(self, run: Run) -> None:
        assert run.answer is not None
        self.ids, self.start = run.answer[0].tolist(), run.inputs["input_ids"].shape[1]


def named(text: str, objects: Sequence[str]) -> set[str]:
    """The objects that a text names; all its words where there is no list."""
    spoken = words([text], 1)
    if objects:
        return {obj for obj in objects if find(obj, spoken)}
    return {word.text.lower() for word in spoken if word.text.isalnum()}


def f1(a: set[str], b: set[str]) -> float:
    """Of two sets; 1 where both are empty."""
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def compared(there: set[str], kept: dict[str, set[str]]) -> Table:
    rows = [[f1(there, o), len(there & o), len(there - o), len(o - there)] for o in kept.values()]
    values = torch.tensor(rows, dtype=torch.float64).view(len(kept), len(MEASURES))
    return Table(values, {"cut": tuple(kept), "measure": MEASURES})


def pointing(heat: Tensor, mask: Tensor) -> bool:
    """Whether the middle of the highest cell of a map (rows, columns) is on the mask (height, width)."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    y = int((row + 0.5) / heat.shape[0] * mask.shape[0])
    x = int((column + 0.5) / heat.shape[1] * mask.shape[1])
    return bool(mask[y, x])
