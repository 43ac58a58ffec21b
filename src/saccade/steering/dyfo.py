"""Search the picture by zooming in on what a detector finds and out again, and vote over what was seen.

    focus     the box that a detector draws around the target in the current crop
    scatter   the current box, wider and higher by a factor around its middle, within the picture
    next      argmax over children of Q + w * sqrt(ln N(parent) / N(child))         once both actions were tried
    reward    area of the box / area of the picture where the model says that the target is there, else 0
    Q         mean over visits of the largest reward on the way down from there
    answer    the one with the most reward over all boxes that were seen, each asked by itself

Boxes are crops of one picture, and what was asked about one is asked once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from saccade.core.card import Card
from saccade.core.driver import Driver
from saccade.core.errors import InputError
from saccade.core.question import Answer, Question
from saccade.core.session import Session
from saccade.core.system import option
from saccade.steering._parts.detecting import Detector, looked_at
from saccade.steering._parts.masks import whole

Whole = tuple[int, int, int, int]


@dataclass(eq=False)
class DyFo(Driver):
    card = Card(
        slug="dyfo",
        name="DyFo",
        kind="driver",
        family="steering",
        form="method",
        target="vlm",
        paper="DyFo: A Training-Free Dynamic Focus Visual Search for Enhancing LMMs in Fine-Grained Visual "
        "Understanding (Li et al., 2025)",
        summary="Tree search over crops, zooming in with a detector and out again, and a vote over them",
        needs=("image",),
        neutral={"budget": 0},
        sure="abstract",
        choices=(
            "Prompts, the factor of scatter, the scale of the reward, the weights of votes, w and the budget are "
            "reconstructed.",
            "The target is named once, of the question and the whole picture.",
            "Without a detector it is what in the crop raises the asked model's own answer; the paper's is an "
            "open-vocabulary detector.",
            "A roll goes on with focus alone, and backs up the largest reward that it meets.",
            "An action that leaves the box as it is is none; a crop in which nothing is found is not focused further.",
            "Where no box confirms the target the whole picture's answer is given.",
        ),
        tags=("visual search", "monte carlo tree search", "zoom", "high resolution", "voting"),
    )

    budget: int = option(10, "simulations; 0 answers about the whole picture", low=0)
    detector: Detector | None = option(
        None, "(crop, target) to regions; the asked model's own attention unless given"
    )
    target: str = option("", "what is looked for; the model is asked for it unless given")
    name: str = option(
        "Which object does one have to look at to answer this question? {question} Answer with its name.",
        "the prompt that asks for the target",
    )
    confirm: str = option(
        "Is there a {target} in the image? Answer yes or no.", "the prompt that checks a crop"
    )
    yes: tuple[str, ...] = option(("yes",), "how answers begin that confirm it, in small letters")
    scatter: float = option(1.5, "how much wider and higher a box becomes", low=1)
    w: float = option(1.0, "weight of what was seldom visited", low=0)
    roll: int = option(1, "focuses that are tried from a new box on", low=0)

    def run(self, session: Session, question: Question) -> Answer:
        if len(question.images) != 1:
            raise InputError(
                f"DyFo searches one picture, and the question has {len(question.images)}.", "ask about one"
            )
        if not self.budget:
            return question.ask(session)
        search = Search(self, session, question)
        for _ in range(self.budget):
            search.simulate()
        return search.answer()


@dataclass(eq=False)
class Node:
    box: Whole
    parent: Node | None = None
    visits: int = 0
    total: float = 0.0
    children: list[Node] = field(default_factory=list)

    def worth(self, w: float) -> float:
        assert self.parent
        return self.total / self.visits + w * math.sqrt(math.log(self.parent.visits) / self.visits)

    def line(self) -> Iterator[Node]:
        """From here to the root."""
        yield self
        if self.parent:
            yield from self.parent.line()


class Search:
    def __init__(self, driver: DyFo, session: Session, question: Question) -> None:
        self.driver, self.session, self.question = driver, session, question
        self.picture = question.images[0]
        self.root = Node((0, 0, *self.picture.size))
        named = driver.name.format(question=question.text)
        self.target = driver.target or str(question.ask(session, text=named)).strip(" .")
        self.rewards: dict[Whole, float] = {}
        self.found: dict[Whole, Whole | None] = {}
        self.reward(self.root.box)  # which is asked first in the end
        if self.grounding(self.root.box) is None:
            raise InputError(
                f"The detector of DyFo found no {self.target!r} in the picture.",
                "name what is there with target=, or use another detector",
            )

    def simulate(self) -> None:
        node = self.root
        while node.children and len(node.children) == len(self.actions(node.box)):
            node = max(node.children, key=lambda child: child.worth(self.driver.w))
        if untried := self.actions(node.box)[len(node.children) :]:
            node.children.append(Node(untried[0], node))
            node = node.children[-1]
        value = self.rolled(node.box)
        for visited in node.line():
            visited.visits += 1
            visited.total += value

    def rolled(self, box: Whole) -> float:
        best = self.reward(box)
        for _ in range(self.driver.roll):
            inner = self.grounding(box)
            if inner is None or inner == box:
                break
            best, box = max(best, self.reward(inner)), inner
        return best

    def actions(self, box: Whole) -> list[Whole]:
        """Where focus and scatter lead, each if it leads away."""
        return [new for new in (self.grounding(box), self.scattered(box)) if new not in (None, box)]

    def grounding(self, box: Whole) -> Whole | None:
        """The box of the target within a crop, in the picture's coordinates; None where there is none."""
        if box not in self.found:
            crop = self.picture.crop(box)
            asked = dataclasses.replace(self.question, images=[crop])
            detect = self.driver.detector
            regions = detect(crop, self.target) if detect else [looked_at(self.session, asked, crop)]
            best = max(regions, key=lambda region: region.score, default=None)
            if best:
                left, top, right, bottom = whole(best.box, crop.size)
                x, y = box[:2]
            self.found[box] = (x + left, y + top, x + right, y + bottom) if best else None
        return self.found[box]

    def scattered(self, box: Whole) -> Whole:
        """It holds the box, and goes no further than the picture."""
        low, high = [], []
        for start, end, limit in (
            (box[0], box[2], self.picture.width),
            (box[1], box[3], self.picture.height),
        ):
            more = math.ceil((self.driver.scatter - 1) * (end - start) / 2)
            low.append(max(0, start - more))
            high.append(min(limit, end + more))
        return low[0], low[1], high[0], high[1]

    def reward(self, box: Whole) -> float:
        if box not in self.rewards:
            text = self.driver.confirm.format(target=self.target)
            said = self.question.ask(self.session, [self.picture.crop(box)], text).lower()
            share = (box[2] - box[0]) * (box[3] - box[1]) / (self.picture.width * self.picture.height)
            self.rewards[box] = share if said.startswith(self.driver.yes) else 0.0
        return self.rewards[box]

    def answer(self) -> Answer:
        """The vote, in which answers that differ by case or a full stop are one."""
        seen = [box for box, reward in self.rewards.items() if reward] or [self.root.box]
        said = {box: self.question.ask(self.session, [self.picture.crop(box)]) for box in seen}
        votes: dict[str, float] = {}
        for box, one in said.items():
            votes[alike(one)] = votes.get(alike(one), 0.0) + self.rewards[box]
        best = max(votes, key=votes.__getitem__)
        answer = next(one for one in said.values() if alike(one) == best)
        answer.tokens = sum(one.tokens for one in said.values())
        answer.found = {"target": self.target, "rewards": self.rewards, "votes": votes}
        answer.pictures = {f"crop {n}": self.picture.crop(box) for n, box in enumerate(self.rewards)}
        return answer


def alike(answer: str) -> str:
    return answer.lower().strip(" .")
