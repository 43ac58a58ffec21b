"""Questions about scenes, with the answer that is true. What is ambiguous is never asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from saccade.core.errors import InputError, nearest
from saccade.world.kinds import COLOURS, KINDS, NUMBERS, SIZE
from saccade.world.scenes import Scene, Thing

APART = 6  # pixels between two centres, at least, for one to be left of, or above, the other
OFF_MIDDLE = 5  # pixels from a centre to the middle, at least, for it to be in a half
FEWEST = 3  # things of which one is the odd one
DRAWS = 8  # for every question that is wanted
COMPARE = "compare"  # the kind of all questions about two scenes
ORDER = ("first", "second")

T = TypeVar("T")

WEIGHTS = {
    "presence": 3.0,
    "colour": 2.0,
    "count": 2.0,
    "side": 1.0,
    "height": 1.0,
    "relation": 2.0,
    "odd": 1.0,
    "reading": 2.0,
    "leading": 2.0,
    "place": 0.3,
}
"""The kinds of question about one scene, and how often they are asked where the scene admits them."""


@dataclass(frozen=True)
class Question:
    """Words separated by one space. `subjects` are the things that it is about, by their index in the scene;
    those of a second scene count on from the first."""

    kind: str
    text: str
    answer: str
    subjects: tuple[int, ...] = ()


def ask(scene: Scene, rng: np.random.Generator, kind: str, about: str | None = None) -> Question | None:
    """A question of that kind, `about` a kind of thing if given; None where the scene does not admit it."""
    if kind not in WEIGHTS:
        raise InputError(f"There is no kind of question {kind!r}.", f"ask for {', '.join(WEIGHTS)}")
    if about is not None and about not in KINDS:
        near = nearest(about, KINDS)
        raise InputError(
            f"The world has no {about!r}{f': {near}' if near else '.'}", f"ask about {', '.join(KINDS)}"
        )
    return _ASK[kind](scene, rng, about)


def questions(
    scene: Scene, rng: np.random.Generator, count: int, weights: Mapping[str, float] = WEIGHTS
) -> list[Question]:
    """So many different questions; fewer where the scene does not admit them."""
    if count < 1:
        raise InputError(f"{count} questions cannot be asked.", "ask for one at least")
    kinds = list(weights)
    shares = np.cumsum([weights[kind] for kind in kinds])
    asked: dict[str, Question] = {}
    for draw in rng.random(DRAWS * count) * shares[-1]:
        question = ask(scene, rng, kinds[int(np.searchsorted(shares, draw, side="right"))])
        if question:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


def ask_pair(a: Scene, b: Scene, rng: np.random.Generator) -> Question | None:
    """A question that needs both pictures."""
    return _one(_ASK_PAIR, rng)((a, b), rng)


# ---- one scene


def _presence(scene: Scene, rng: np.random.Generator, about: str | None) -> Question:
    counts = scene.counts()
    there = [kind for kind in KINDS if counts[kind]]
    absent = [kind for kind in KINDS if not counts[kind]]
    kind = about or _one(there if there and rng.random() < 0.5 else absent, rng)
    text = _one(
        (
            f"is there a {kind} in the {_picture(rng)} ?",
            f"is a {kind} in this {_picture(rng)} ?",
            f"do you see a {kind} ?",
            f"can you see a {kind} here ?",
        ),
        rng,
    )
    return Question("presence", text, "yes" if counts[kind] else "no", _of(scene, kind))


def _colour(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    thing = _among(scene.unique(), rng, about)
    if thing is None:
        return None
    text = _one((f"what colour is the {thing.kind} ?", f"tell me the colour of the {thing.kind} ."), rng)
    return Question("colour", text, thing.colour, (thing.depth,))


def _count(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    """The number is drawn first, for most kinds are absent, and most that are there are there once."""
    counts = scene.counts()
    faint = scene.faint()
    if about in faint:
        return None
    plain = [kind for kind in KINDS if kind not in faint]
    numbers = sorted({0, *(counts[kind] for kind in plain)})
    number = numbers[0] if rng.random() < 0.15 else _one(numbers[1:] or numbers, rng)
    kind = about or _one([kind for kind in plain if counts[kind] == number], rng)
    text = _one((f"how many {kind} are there ?", f"how many {kind} do you see in the {_picture(rng)} ?"), rng)
    return Question("count", text, NUMBERS[counts[kind]], _of(scene, kind))


def _side(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    return _half(scene, rng, about, "side", 0, "on", ("left", "right"))


def _height(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    return _half(scene, rng, about, "height", 1, "at", ("top", "bottom"))


def _half(
    scene: Scene,
    rng: np.random.Generator,
    about: str | None,
    kind: str,
    axis: int,
    at: str,
    halves: tuple[str, str],
) -> Question | None:
    clear = [thing for thing in scene.unique() if abs(thing.centre[axis] - SIZE / 2) >= OFF_MIDDLE]
    thing = _among(clear, rng, about)
    if thing is None:
        return None
    first, second = _shuffled(halves, rng)
    text = _one(
        (
            f"is the {thing.kind} {at} the {first} or {at} the {second} ?",
            f"is the {thing.kind} {at} the {first} or {second} ?",
        ),
        rng,
    )
    return Question(kind, text, halves[thing.centre[axis] > SIZE / 2], (thing.depth,))


def _relation(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    thing = _among(scene.unique(), rng, about)
    if thing is None:
        return None
    axis = int(rng.integers(2))
    here = thing.centre[axis]
    other = _among([one for one in scene.unique() if abs(one.centre[axis] - here) >= APART], rng)
    if other is None:
        return None
    sides, of = (("left", "right"), "of ") if axis == 0 else (("above", "below"), "")
    first, second = _shuffled(sides, rng)
    text = f"is the {thing.kind} {first} or {second} {of}the {other.kind} ?"
    return Question("relation", text, sides[here > other.centre[axis]], (thing.depth, other.depth))


def _odd(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    """One thing is of another colour than all others, or of another kind, and the only one of its kind."""
    if len(scene.things) < FEWEST or scene.faint():
        return None
    found = []
    for thing in scene.unique():
        others = [other for other in scene.things if other is not thing]
        colours, kinds = {other.colour for other in others}, {other.kind for other in others}
        if len(colours) == 1 and thing.colour not in colours:
            found += [(thing, "has another colour"), (thing, f"is not {colours.pop()}")]
        if len(kinds) == 1:
            found.append((thing, f"is not a {kinds.pop()}"))
    found = [(thing, differs) for thing, differs in found if about in (None, thing.kind)]
    if not found:
        return None
    thing, differs = _one(found, rng)
    return Question("odd", f"which thing {differs} ?", thing.kind, (thing.depth,))


def _reading(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    sign = _among([thing for thing in scene.unique() if thing.text], rng, about)
    if sign is None or sign.text is None:
        return None
    text = _one(("what does the sign say ?", "what word is on the sign ?", "read the sign ."), rng)
    return Question("reading", text, " ".join(sign.text), (sign.depth,))


def _leading(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    """Half of the suggestions are wrong: another colour, a thing that is not there, or the colour of one."""
    wrong, of_colour = rng.random() < 0.5, rng.random() < 0.6
    absent = [kind for kind in KINDS if not scene.counts()[kind] and about in (None, kind)]
    thing = _among(scene.unique(), rng, about)
    if absent and (thing is None or (wrong and rng.random() < 0.6)):
        kind = _one(absent, rng)
        suggested = _one(
            (
                f"there is a {kind} in the {_picture(rng)} , right ?",
                f"the {kind} is {_one(tuple(COLOURS), rng)} , right ?",
                f"what colour is the {kind} ?",
            ),
            rng,
        )
        return Question("leading", suggested, f"there is no {kind}")
    if thing is None:
        return None
    if not wrong and not of_colour:
        text = f"there is a {thing.kind} in the {_picture(rng)} , right ?"
        return Question("leading", text, "yes", (thing.depth,))
    colour = _one([name for name in COLOURS if (name != thing.colour) == wrong], rng)
    text = f"the {thing.kind} is {colour} , right ?"
    return Question("leading", text, f"{'no' if wrong else 'yes'} , it is {thing.colour}", (thing.depth,))


def _place(scene: Scene, rng: np.random.Generator, about: str | None) -> Question | None:
    text = _one(("what place is this ?", "where is this ?"), rng)
    return None if about else Question("place", text, scene.place)


_ASK: dict[str, Callable[[Scene, np.random.Generator, str | None], Question | None]] = {
    "presence": _presence,
    "colour": _colour,
    "count": _count,
    "side": _side,
    "height": _height,
    "relation": _relation,
    "odd": _odd,
    "reading": _reading,
    "leading": _leading,
    "place": _place,
}


# ---- two scenes


def _more(pair: tuple[Scene, Scene], rng: np.random.Generator) -> Question | None:
    a, b = (scene.counts() for scene in pair)
    faint = pair[0].faint() | pair[1].faint()
    kinds = [kind for kind in KINDS if a[kind] != b[kind] and kind not in faint]
    if not kinds:
        return None
    kind = _one(kinds, rng)
    text = f"which {_picture(rng)} has more {kind} , the first or the second ?"
    return Question(COMPARE, text, ORDER[a[kind] < b[kind]], _of_both(pair, kind))


def _there(pair: tuple[Scene, Scene], rng: np.random.Generator) -> Question:
    """Half of what is not there is in the other picture."""
    which = int(rng.integers(2))
    here, elsewhere = pair[which].counts(), pair[1 - which].counts()
    faint = pair[which].faint()
    yes, other = rng.random() < 0.5, rng.random() < 0.5
    plain = [kind for kind in KINDS if kind not in faint]
    kinds = [kind for kind in plain if bool(here[kind]) == yes] or plain
    near = [kind for kind in kinds if elsewhere[kind]] if other and not yes else []
    kind = _one(near or kinds, rng)
    text = f"is there a {kind} in the {ORDER[which]} {_picture(rng)} ?"
    return Question(COMPARE, text, "yes" if here[kind] else "no", _of_both(pair, kind, which))


def _colour_of_one(pair: tuple[Scene, Scene], rng: np.random.Generator) -> Question | None:
    which = int(rng.integers(2))
    thing = _among(pair[which].unique(), rng)
    if thing is None:
        return None
    text = f"what colour is the {thing.kind} in the {ORDER[which]} {_picture(rng)} ?"
    return Question(COMPARE, text, thing.colour, _of_both(pair, thing.kind, which))


def _same_colour(pair: tuple[Scene, Scene], rng: np.random.Generator) -> Question | None:
    """Colours rarely agree, so most of the pairs where none does are passed over."""
    a, b = ({thing.kind: thing.colour for thing in scene.unique()} for scene in pair)
    same = [kind for kind in a if a[kind] == b.get(kind)]
    different = [kind for kind in a if kind in b and a[kind] != b[kind]]
    if not same and rng.random() > 1 / (len(COLOURS) - 1):
        return None
    if not same and not different:
        return None
    kind = _one(same or different, rng)
    text = f"does the {kind} have the same colour in the first and the second {_picture(rng)} ?"
    return Question(COMPARE, text, "yes" if same else "no", _of_both(pair, kind))


_ASK_PAIR = (_more, _there, _colour_of_one, _same_colour)


# ---- parts


def _one(among: Sequence[T], rng: np.random.Generator) -> T:
    return among[int(rng.integers(len(among)))]


def _shuffled(pair: tuple[str, str], rng: np.random.Generator) -> tuple[str, str]:
    return pair if rng.random() < 0.5 else pair[::-1]


def _among(things: Sequence[Thing], rng: np.random.Generator, about: str | None = None) -> Thing | None:
    fitting = [thing for thing in things if about in (None, thing.kind)]
    return _one(fitting, rng) if fitting else None


def _picture(rng: np.random.Generator) -> str:
    return _one(("image", "picture", "photo"), rng)


def _of(scene: Scene, kind: str) -> tuple[int, ...]:
    return tuple(thing.depth for thing in scene.things if thing.kind == kind)


def _of_both(pair: tuple[Scene, Scene], kind: str, which: int | None = None) -> tuple[int, ...]:
    """In both scenes, or in one of them."""
    first, second = (_of(scene, kind) if which in (None, i) else () for i, scene in enumerate(pair))
    return *first, *(len(pair[0].things) + index for index in second)
