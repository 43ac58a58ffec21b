"""How much a map is to be believed: what becomes of the answer when what the map shows is taken away.

    deletion(order)  = area under p(answer | the order's first places are removed), over the share removed
    insertion(order) = area under p(answer | only the order's first places are there), over the share added
    gain             = deletion(random) - deletion(map)

Deletion and insertion are those of Petsiuk et al. (2018). What is left when an order's first places are gone is what
is there when the reversed order's were added alone, so insertion(map) = deletion(reversed).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

REVERSE = {"map": "reversed", "reversed": "map", "random": "random"}


@dataclass
class Faithfulness:
    """Of the map of some words, a mean over layers and heads. p is the geometric mean over their tokens."""

    words: list[int]  # in `Recording.words`
    caption: str
    sample: int
    removed: list[float]  # shares of the places of all pictures, from 0 to 1
    curves: dict[str, list[list[float]]]  # p, by order: one run, or several of random places

    def deletion(self, order: str = "map") -> float:
        return float(np.mean(self.areas(order)))

    def insertion(self, order: str = "map") -> float:
        return self.deletion(REVERSE[order])

    def areas(self, order: str) -> list[float]:
        """Under the deletion curve of every run."""
        curves = torch.tensor(self.curves[order], dtype=torch.float64)
        return torch.trapezoid(curves, torch.tensor(self.removed, dtype=torch.float64)).tolist()

    @property
    def gain(self) -> float:
        """Above 0, the answer depends on the places that the map shows more than on others."""
        return self.deletion("random") - self.deletion("map")

    @property
    def beaten(self) -> int:
        """How many of the random orders."""
        return sum(area > self.deletion("map") for area in self.areas("random"))

    def __str__(self) -> str:
        first, *_, last = self.curves["map"][0]
        map_, random, reversed_ = (f"{self.deletion(order):.0%}" for order in ("map", "random", "reversed"))
        beaten = f"{self.beaten} of {len(self.curves['random'])} orders"
        return (
            f"faithfulness {self.gain:+.2f}: p is {first:.0%}, on average {map_} while the brightest places are "
            f"removed first, {random} while random ones are (the map beats {beaten}), {reversed_} while the faintest "
            f"are, and {last:.0%} without any place"
        )
