"""POPE: for every thing in a picture that is asked for, one that is absent (Li et al., 2023).

random        any object of the set
popular       the one in most pictures
adversarial   the one that most often stands beside the thing just asked for
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saccade.core.errors import InputError

STRATEGIES = ("random", "popular", "adversarial")
EACH = 3  # present objects of a picture


class Asked(NamedTuple):
    picture: int
    name: str
    present: bool


def questions(
    objects: Sequence[Sequence[str]],
    strategy: str,
    rng: np.random.Generator,
    counted: Sequence[Sequence[str]] | None = None,
) -> Iterator[Asked]:
    """Present and absent by turns, from the objects of every picture, the first of which are asked for.

    What is popular, and what stands together, is counted over these pictures, or over others where a set is
    asked for by another's habits. Pictures with fewer than three objects, which the official set leaves out, are
    asked for those that they have: in a small world they are many.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"POPE has no {strategy!r} negatives.", f"use {', '.join(STRATEGIES)}")
    popular, beside = _counts(objects if counted is None else counted)
    for picture, there in enumerate(objects):
        asked: set[str] = set()
        for name in list(dict.fromkeys(there))[:EACH]:
            yield Asked(picture, name, True)
            left = [other for other in popular if other not in asked and other not in there]
            if not left:
                continue
            near = [other for other in beside[name] if other in left]
            if strategy == "popular":
                absent = left[0]
            elif strategy == "adversarial" and near:
                absent = near[0]
            else:
                absent = left[int(rng.integers(len(left)))]
            asked.add(absent)
            yield Asked(picture, absent, False)


def _counts(objects: Sequence[Sequence[str]]) -> tuple[list[str], dict[str, list[str]]]:
    """Objects by the number of pictures that show them, and for each the others by how often they are beside it."""
    popular: Counter[str] = Counter()
    beside: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for there in objects:
        names = list(dict.fromkeys(there))
        popular.update(names)
        for name in names:
            beside[name].update(other for other in names if other != name)
    order = {name: [other for other, _ in counts.most_common()] for name, counts in beside.items()}
    return [name for name, _ in popular.most_common()], defaultdict(list, order)
