"""Questions and answers, against a reading of the scene that knows only the words and the boxes."""

import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.world.kinds import COLOURS, KINDS, PLACES
from saccade.world.questions import WEIGHTS, ask, ask_pair, questions
from saccade.world.scenes import Scene, Thing
from world.drawn import drawn, near

NUMBER = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PICTURE = "(?:image|picture|photo)"


def only(scene: Scene, kind: str) -> Thing:
    (thing,) = (thing for thing in scene.things if thing.kind == kind)
    assert not thing.faint, "ambiguous"
    return thing


def number(scene: Scene, kind: str) -> int:
    """What is hardly to be seen is asked for, and never counted."""
    assert not faint(scene, kind), "ambiguous"
    return sum(thing.kind == kind for thing in scene.things)


def faint(scene: Scene, kind: str) -> bool:
    return any(thing.kind == kind and thing.faint for thing in scene.things)


def present(scene: Scene, kind: str) -> str:
    return yes(any(thing.kind == kind for thing in scene.things))


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


def half(scene: Scene, kind: str, *words: str) -> str:
    axis = ["left right", "bottom top"].index(" ".join(sorted(words)))
    low, high = only(scene, kind).box[axis], only(scene, kind).box[axis + 2]
    off = low + high - 96  # twice the distance to the middle
    assert abs(off) > 2 * 4, "ambiguous"
    return (("left", "top") if off < 0 else ("right", "bottom"))[axis]


def relation(scene: Scene, kind: str, one: str, two: str, other: str) -> str:
    axis = ["left right", "above below"].index(" ".join(sorted((one, two))))
    a, b = (only(scene, name).box[axis] + only(scene, name).box[axis + 2] for name in (kind, other))
    assert abs(a - b) >= 2 * 6, "ambiguous"
    return (("left", "above") if a < b else ("right", "below"))[axis]


def odd_colour(scene: Scene) -> str:
    assert not scene.faint(), "ambiguous"
    colours = Counter(thing.colour for thing in scene.things)
    (rare,) = (thing for thing in scene.things if colours[thing.colour] == 1)
    assert len(colours) == 2 and len(scene.things) >= 3 and number(scene, rare.kind) == 1
    return rare.kind


def not_of(scene: Scene, kind: str = "", colour: str = "") -> str:
    (rare,) = (thing for thing in scene.things if thing.kind != kind and thing.colour != colour)
    assert len(scene.things) >= 3
    return rare.kind


def suggested(scene: Scene, kind: str, colour: str) -> str:
    if not number(scene, kind):
        return f"there is no {kind}"
    own = only(scene, kind).colour
    return f"{yes(own == colour)} , it is {own}"


def there(scene: Scene, kind: str) -> str:
    return "yes" if number(scene, kind) else f"there is no {kind}"


def colour_of(scene: Scene, kind: str) -> str:
    return only(scene, kind).colour if number(scene, kind) else f"there is no {kind}"


def sign(scene: Scene) -> str:
    return " ".join(only(scene, "sign").text)


READ = {
    rf"is there a (\w+) in the {PICTURE} \?": present,
    rf"is a (\w+) in this {PICTURE} \?": present,
    r"do you see a (\w+) \?": present,
    r"can you see a (\w+) here \?": present,
    r"what colour is the (\w+) \?": colour_of,
    r"tell me the colour of the (\w+) \.": colour_of,
    r"how many (\w+) are there \?": lambda s, k: NUMBER[number(s, k)],
    rf"how many (\w+) do you see in the {PICTURE} \?": lambda s, k: NUMBER[number(s, k)],
    r"is the (\w+) (?:on|at) the (\w+) or (?:on the |at the )?(\w+) \?": half,
    r"is the (\w+) (\w+) or (\w+) (?:of )?the (\w+) \?": relation,
    r"which thing has another colour \?": odd_colour,
    r"which thing is not a (\w+) \?": lambda s, k: not_of(s, kind=k),
    r"which thing is not (\w+) \?": lambda s, c: not_of(s, colour=c),
    r"what does the sign say \?": sign,
    r"what word is on the sign \?": sign,
    r"read the sign \.": sign,
    rf"there is a (\w+) in the {PICTURE} , right \?": there,
    r"the (\w+) is (\w+) , right \?": suggested,
    r"what place is this \?": lambda s: s.place,
    r"where is this \?": lambda s: s.place,
}


def same(pair: tuple[Scene, Scene], kind: str) -> str:
    a, b = pair
    return yes(only(a, kind).colour == only(b, kind).colour)


def more(pair: tuple[Scene, Scene], kind: str) -> str:
    a, b = pair
    assert number(a, kind) != number(b, kind), "ambiguous"
    return "first" if number(a, kind) > number(b, kind) else "second"


ORDER = {"first": 0, "second": 1}
READ_PAIR = {
    rf"which {PICTURE} has more (\w+) , the first or the second \?": more,
    rf"is there a (\w+) in the (\w+) {PICTURE} \?": lambda p, k, n: yes(number(p[ORDER[n]], k) > 0),
    rf"what colour is the (\w+) in the (\w+) {PICTURE} \?": lambda p, k, n: only(p[ORDER[n]], k).colour,
    rf"does the (\w+) have the same colour in the first and the second {PICTURE} \?": same,
}


def read(rules: dict, of: object, text: str) -> tuple[str, str]:
    """The rule that reads a question, and its answer."""
    ((rule, found),) = [(rule, found) for rule in rules if (found := re.fullmatch(rule, text))]
    return rule, rules[rule](of, *found.groups())


def test_every_answer_is_true():
    used = Counter()
    for scene in drawn():
        rng = np.random.default_rng(scene.seed)
        for kind in WEIGHTS:
            for question in filter(None, (ask(scene, rng, kind) for _ in range(2))):
                rule, answer = read(READ, scene, question.text)
                assert question.answer == answer, (scene.seed, question)
                assert question.kind == kind
                used[rule] += 1
    assert set(used) == set(READ)


def test_every_answer_about_two_is_true():
    used, rng = Counter(), np.random.default_rng(0)
    scenes = drawn()
    for pair in pairwise(scenes):
        for question in filter(None, (ask_pair(*pair, rng) for _ in range(3))):
            rule, answer = read(READ_PAIR, pair, question.text)
            assert question.answer == answer, question
            assert question.kind == "compare"
            used[rule] += 1
    assert set(used) == set(READ_PAIR) and min(used.values()) > 40


def test_the_subjects_are_the_things_that_are_named():
    asked = []
    for scene in drawn()[:300]:
        rng = np.random.default_rng(scene.seed)
        for question in questions(scene, rng, 8):
            asked.append(question)
            named = set(question.text.split()) | set(question.answer.split())
            if question.kind == "odd":
                named = {question.answer}
            expected = [i for i, thing in enumerate(scene.things) if thing.kind in named]
            assert sorted(question.subjects) == expected
    assert {question.kind for question in asked} == set(WEIGHTS)


def test_the_subjects_of_two_scenes_count_on():
    rng = np.random.default_rng(1)
    for a, b in zip(drawn()[:300], drawn()[300:600]):
        question = ask_pair(a, b, rng)
        if question is None:
            continue
        (kind,) = (word for word in question.text.split() if word in KINDS)
        things = [(0, thing.kind) for thing in a.things] + [(1, thing.kind) for thing in b.things]
        number = re.search(r"in the (first|second)", question.text)
        both = not number or "same colour" in question.text
        where = (0, 1) if both else (ORDER[number.group(1)],)
        assert list(question.subjects) == [
            i for i, (scene, own) in enumerate(things) if own == kind and scene in where
        ]


@pytest.fixture(scope="module")
def answers():
    """Answers by kind of question, one question of each kind a scene."""
    found = defaultdict(Counter)
    for scene in drawn():
        rng = np.random.default_rng([7, scene.seed])
        for kind in WEIGHTS:
            if question := ask(scene, rng, kind):
                found[kind][question.answer] += 1
    return found


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [("presence", "yes", "no"), ("side", "left", "right"), ("height", "top", "bottom")]
    + [("relation", "left", "right"), ("relation", "above", "below")],
)
def test_answers_are_balanced(answers, kind, one, other):
    count = answers[kind][one] + answers[kind][other]
    assert count > 300 and near(answers[kind][one] / count, 0.5, count)


def test_counts_are_spread(answers):
    numbers, total = answers["count"], answers["count"].total()
    assert set(numbers) == set(NUMBER[:6])
    assert 0.1 < numbers["zero"] / total < 0.25
    assert sum(numbers[word] for word in NUMBER[2:]) / total > 0.25


def test_no_colour_and_no_place_prevails(answers):
    assert set(answers["colour"]) == set(COLOURS) and set(answers["place"]) == set(PLACES)
    for kind, names in (("colour", COLOURS), ("place", PLACES)):
        total = answers[kind].total()
        assert all(near(answers[kind][name] / total, 1 / len(names), total) for name in names)


def test_half_of_the_suggestions_are_wrong(answers):
    right = sum(count for answer, count in answers["leading"].items() if answer.startswith("yes"))
    assert abs(right / answers["leading"].total() - 0.5) < 0.08
    assert any(answer.startswith("no ,") for answer in answers["leading"])
    assert any(answer.startswith("there is no") for answer in answers["leading"])


def test_the_rare_questions_are_asked_often_enough(answers):
    assert answers["odd"].total() > 0.2 * len(drawn())
    assert answers["reading"].total() > 0.15 * len(drawn())


def test_answers_about_two_are_balanced():
    found, rng = Counter(), np.random.default_rng(2)
    scenes = drawn()
    for step in range(1, 4):
        for pair in zip(scenes, scenes[step:]):
            if question := ask_pair(*pair, rng):
                found[question.text.split()[0], question.answer] += 1
    for asked, one, other in (("is", "yes", "no"), ("which", "first", "second"), ("does", "yes", "no")):
        count = found[asked, one] + found[asked, other]
        assert near(found[asked, one] / count, 0.5, count), (asked, found)


def test_what_a_scene_does_not_admit():
    rng = np.random.default_rng(0)
    for scene in drawn()[:300]:
        kinds = Counter(thing.kind for thing in scene.things)
        if kinds["sign"] != 1:
            assert ask(scene, rng, "reading") is None
        if not [thing for thing in scene.things if kinds[thing.kind] == 1 and not thing.faint]:
            assert ask(scene, rng, "colour") is ask(scene, rng, "relation") is None
        if len(scene.things) < 3:
            assert ask(scene, rng, "odd") is None


def test_about_a_kind():
    rng = np.random.default_rng(0)
    for scene in drawn()[:60]:
        for about in KINDS:
            for kind in WEIGHTS:
                question = ask(scene, rng, kind, about)
                if question is not None:
                    assert about in f"{question.text} {question.answer}".split()
                    assert question.answer == read(READ, scene, question.text)[1]
            for kind in ("presence", "count", "leading"):
                unclear = faint(scene, about)
                never = {"presence": False, "count": unclear}.get(kind, unclear or number(scene, about) > 1)
                assert (ask(scene, rng, kind, about) is None) == never
            single = not faint(scene, about) and number(scene, about) == 1
            assert (ask(scene, rng, "colour", about) is None) != single


def test_questions_differ_and_follow_the_weights():
    rng = np.random.default_rng(0)
    for scene in drawn()[:100]:
        asked = questions(scene, rng, 10)
        assert len({question.text for question in asked}) == len(asked) == 10
        counted = questions(scene, rng, 3, {"count": 1.0, "colour": 0.0})
        assert {question.kind for question in counted} == {"count"}
    assert len(questions(drawn()[0], rng, 5, {"place": 1.0})) == 2  # there are no more


def test_the_generator_decides():
    scene = drawn()[3]
    first, again = (questions(scene, np.random.default_rng(4), 10) for _ in range(2))
    assert first == again != questions(scene, np.random.default_rng(5), 10)


def test_what_the_vocabulary_lacks():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="no 'cap': did you mean cup") as caught:
        ask(drawn()[0], rng, "presence", about="cap")
    assert "table, car, dog" in caught.value.remedy
    with pytest.raises(InputError, match="no kind of question 'taste'") as caught:
        ask(drawn()[0], rng, "taste")
    assert "presence, colour" in caught.value.remedy
    with pytest.raises(InputError, match="0 questions"):
        questions(drawn()[0], rng, 0)
