"""DyFo with a picture in which one small thing is planted, a detector that sees it, and a model that is made up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import shared
from PIL import Image, ImageDraw

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.question import Answer, Question
from saccade.steering._parts.detecting import Region
from saccade.steering.dyfo import DyFo, Node, Search

from .lockstep import model_of, question

EXAMPLE: dict[str, Any] = {"budget": 1, "roll": 0, "target": "cup", "yes": ("",)}
SIZE = (400, 300)
PLANTED = (310, 60, 330, 75)


def scene() -> Image.Image:
    image = Image.new("RGB", SIZE, (120, 120, 120))
    ImageDraw.Draw(image).rectangle((310, 60, 329, 74), fill=(255, 0, 0))
    return image


def red(picture: Image.Image) -> tuple[int, int, int, int] | None:
    y, x = np.nonzero((np.asarray(picture) == (255, 0, 0)).all(-1))
    return (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1) if len(x) else None


def detector(picture: Image.Image, text: str) -> list[Region]:
    """It sees what is red, and draws its box too large by half of the way to the borders."""
    assert text == "red thing"
    box = red(picture)
    if box is None:
        return []
    wide = (box[0] // 2, box[1] // 2, (box[2] + picture.width) // 2, (box[3] + picture.height) // 2)
    return [Region((0, 0, 1, 1), score=0.1), Region(wide, score=0.9)]


class MadeUp(Question):
    """A model that sees red only where it is a fiftieth of what it is shown."""

    def ask(self, session: Any, images: Any = None, text: str | None = None) -> Answer:
        (picture,) = images or self.images
        box = red(picture)
        seen = box and (box[2] - box[0]) * (box[3] - box[1]) >= picture.width * picture.height / 50
        asked = self.text if text is None else text
        if "name" in asked:
            return Answer("red thing.")
        if "there" in asked:
            return Answer("Yes, it is." if seen else "No.")
        return Answer("Square." if seen else "round")


def search(**options: Any) -> Search:
    driver = DyFo(name="name {question}", confirm="there {target}", **{"detector": detector, **options})
    with sc.attach(shared("llava")) as session:
        return Search(driver, session, MadeUp(None, [scene()], "Which shape?"))


def nodes(node: Node) -> list[Node]:
    return [node, *(below for child in node.children for below in nodes(child))]


def inside(inner: Any, outer: Any) -> bool:
    return all(inner[i] >= outer[i] for i in (0, 1)) and all(inner[i] <= outer[i] for i in (2, 3))


@pytest.mark.parametrize("budget", [1, 7, 20])
def test_visits_add_up_and_boxes_stay_where_they_may(budget: int) -> None:
    found = search()
    for _ in range(budget):
        found.simulate()
    assert found.root.visits == budget == sum(child.visits for child in found.root.children)
    tree = nodes(found.root)
    assert len(tree) == 1 + budget or all(len(n.children) == len(found.actions(n.box)) for n in tree)
    for node in tree[1:]:
        assert node.parent and inside(node.box, (0, 0, *SIZE))
        assert inside(node.box, node.parent.box) or inside(node.parent.box, node.box)
        assert node.visits >= sum(child.visits for child in node.children)
    zoomed = [node for node in tree if node.parent and inside(node.box, node.parent.box)]
    assert zoomed and all(inside(node.box, grounded(node.parent.box)) for node in zoomed)  # type: ignore[union-attr]


def grounded(box: Any) -> tuple[int, ...]:
    found = detector(scene().crop(box), "red thing")[1].box
    return tuple(int(edge) + box[i % 2] for i, edge in enumerate(found))


@pytest.mark.parametrize("box", [(0, 0, 10, 300), (310, 60, 330, 75), (390, 280, 400, 300), (7, 9, 12, 12)])
@pytest.mark.parametrize("scatter", [1.0, 1.5, 3.0])
def test_scatter_holds_the_box_and_stays_in_the_picture(box: Any, scatter: float) -> None:
    new = search(scatter=scatter).scattered(box)
    assert inside(box, new) and inside(new, (0, 0, *SIZE))
    wide, high = (scatter * (box[i + 2] - box[i]) for i in (0, 1))
    if min(box[:2]) > 2 * wide and box[2] + wide < 400 and box[3] + high < 300:
        assert wide <= new[2] - new[0] <= wide + 2 and high <= new[3] - new[1] <= high + 2


def test_the_next_child_is_that_of_the_formula() -> None:
    parent = Node((0, 0, 9, 9), visits=9)
    a, b = Node((0, 0, 5, 5), parent, 7, 2.8), Node((0, 0, 6, 6), parent, 2, 0.4)
    for w in (0.0, 0.3, 2.0):
        q = [2.8 / 7 + w * math.sqrt(math.log(9) / 7), 0.4 / 2 + w * math.sqrt(math.log(9) / 2)]
        assert [a.worth(w), b.worth(w)] == pytest.approx(q)


def test_a_reward_is_the_share_of_the_picture_where_the_target_is_confirmed() -> None:
    found = search()
    assert found.target == "red thing"
    assert found.reward((0, 0, *SIZE)) == 0
    assert found.reward((300, 50, 340, 85)) == pytest.approx(40 * 35 / (400 * 300))
    assert found.reward((0, 0, 40, 40)) == 0


def test_what_is_planted_is_found_and_the_vote_is_right() -> None:
    asked = MadeUp(None, [scene()], "Which shape?")
    driver = DyFo(budget=8, detector=detector, name="name {question}", confirm="there {target}")
    with sc.attach(shared("llava")) as session:
        assert asked.ask(session) == "round"
        answer = session.run(driver, asked)
    assert answer == "Square."
    rewarded = {box: reward for box, reward in answer.found["rewards"].items() if reward}
    assert rewarded and all(inside(PLANTED, box) for box in rewarded)
    assert answer.found["votes"] == {"square": pytest.approx(sum(rewarded.values()))}
    assert len(answer.pictures) == len(answer.found["rewards"])


def test_votes_weigh_by_reward_and_like_answers_are_one() -> None:
    """Two small boxes outvote a larger one."""
    said = {
        (0, 0, 200, 150): "Cup",
        (0, 0, 160, 120): "a ball.",
        (0, 0, 150, 120): "A ball",
        (0, 0, 20, 20): "Cup",
    }
    found = search()
    found.rewards = {box: 0.25 if box[2] == 200 else 0.15 for box in said} | {
        (0, 0, 20, 20): 0.0,
        (0, 0, *SIZE): 0.0,
    }

    class Tells(Question):
        def ask(self, session: Any, images: Any = None, text: str | None = None) -> Answer:
            return Answer(next(one for box, one in said.items() if images[0].size == (box[2], box[3])))

    found.question = Tells(None, [scene()], "What?")
    answer = found.answer()
    assert answer == "a ball." and answer.found["votes"] == pytest.approx({"cup": 0.25, "a ball": 0.3})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])
def test_without_a_budget_it_is_the_models_answer_and_with_one_a_crops(name: str) -> None:
    asked = question(name, "what colour is the cup ?")
    with sc.attach(model_of(name)) as session:
        assert session.run(DyFo(budget=0), asked) == asked.ask(session)
        answer = session.run(DyFo(**EXAMPLE), asked)
        shares = {box: (box[2] - box[0]) * (box[3] - box[1]) for box in answer.found["rewards"]}
        said = {box: asked.ask(session, [asked.images[0].crop(box)]) for box in shares}
    votes: dict[str, float] = {}
    for box, one in said.items():
        key = one.lower().strip(" .")
        votes[key] = votes.get(key, 0) + shares[box] / (asked.images[0].width * asked.images[0].height)
    assert answer.found["votes"] == pytest.approx(votes)
    assert len(shares) > 1 and answer.lower().strip(" .") == max(votes, key=votes.__getitem__)


def test_where_nothing_is_confirmed_the_whole_picture_answers() -> None:
    asked = question("llava", "is there a cup ?")
    with sc.attach(shared("llava")) as session:
        assert session.run(DyFo(budget=2, yes=("never",)), asked) == asked.ask(session)


def test_a_detector_that_finds_nothing_and_two_pictures_are_refused() -> None:
    asked = question("llava", "is there a cup ?")
    with sc.attach(shared("llava")) as session:
        with pytest.raises(InputError, match=r"found no 'cup' in the picture"):
            session.run(DyFo(detector=lambda picture, text: [], target="cup"), asked)
        with pytest.raises(InputError, match="the question has 2"):
            session.run(DyFo(), Question(asked.processor, asked.images * 2, asked.text))
