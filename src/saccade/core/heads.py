"""What heads scored, and selections of them, which methods take as `heads=`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.core import archive
from saccade.core.errors import InputError, OptionError

if TYPE_CHECKING:
    from PIL.Image import Image

Selection = dict[str, tuple[int, ...]]  # heads by the names of sites

KIND, VERSION = "Heads", "1"
_BEST = re.compile(r"(.+):(\d+)(%?)")


@dataclass(frozen=True, eq=False)
class Heads:
    """What the heads of some sites scored, event by event: of samples, of words, of pairs."""

    name: str
    sites: tuple[str, ...]
    events: Tensor  # (events, sites, heads)

    @property
    def scores(self) -> Tensor:
        """Means over the events: (sites, heads)."""
        if not len(self.events):
            raise InputError(
                f"{self.name}: nothing was seen by which heads could be scored.",
                "give it runs in which the model does what is looked for",
            )
        return self.events.mean(0)

    def top(self, n: int | float) -> Selection:
        """The n best heads, or a share of all."""
        scores = self.scores.flatten()
        count = n if isinstance(n, int) else round(n * len(scores))
        if not 1 <= count <= len(scores):
            raise OptionError(f"{self.name} has {len(scores)} heads, not {count}.", "ask for some of them")
        return self._named(scores.argsort(descending=True, stable=True)[:count])

    def reaching(self, score: float, often: float = 0.0) -> Selection:
        """The heads with at least that score, and with one that is not zero in that share of the events."""
        seen = (self.events != 0).float().mean(0)
        return self._named(((self.scores >= score) & (seen >= often)).flatten().nonzero()[:, 0])

    def random(self, n: int, seed: int = 0, without: Selection | None = None) -> Selection:
        """For comparison, n of the other heads."""
        taken = without or {}
        size = self.events.shape[2]
        others = [
            i for i in range(len(self.sites) * size) if i % size not in taken.get(self.sites[i // size], ())
        ]
        if not 1 <= n <= len(others):
            raise OptionError(f"{self.name} has {len(others)} other heads, not {n}.", "ask for some of them")
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        return self._named(torch.tensor(others)[order[:n]])

    def where(self, events: Tensor) -> Heads:
        """Some of the events, such as those with a right answer."""
        return Heads(self.name, self.sites, self.events[events])

    @staticmethod
    def joined(tables: Iterable[Heads]) -> Heads:
        """The events of several runs in one table."""
        tables = list(tables)
        if len({(table.name, table.sites, table.events.shape[2]) for table in tables}) != 1:
            raise InputError(
                "These tables do not score the same heads in the same way.",
                "join tables of one probe with the same sites, on one model",
            )
        return Heads(tables[0].name, tables[0].sites, torch.cat([table.events for table in tables]))

    def picture(self) -> Image:
        """Sites from top to bottom, heads from left to right."""
        from saccade.report import grid

        return grid.grid(self.scores.numpy(), self.sites, self.name)

    def save(self, path: archive.Path) -> None:
        archive.write(path, KIND, VERSION, vars(self))

    @staticmethod
    def load(path: archive.Path) -> Heads:
        return archive.read(path, KIND, VERSION, lambda data: Heads(**data | {"sites": tuple(data["sites"])}))

    def _named(self, chosen: Tensor) -> Selection:
        """Of places in the flat table."""
        found: dict[str, list[int]] = {}
        for place in chosen.sort().values.tolist():
            site, head = divmod(place, self.events.shape[2])
            found.setdefault(self.sites[site], []).append(head)
        return {site: tuple(heads) for site, heads in found.items()}


def best(text: str) -> Selection:
    """The best heads of a file's table: `heads.safetensors:20`, or `:5%`."""
    found = _BEST.fullmatch(text)
    if not found:
        raise OptionError(
            f"heads={text!r} does not say which heads.",
            "name a file and how many: heads.safetensors:20, or :5%",
        )
    path, number, percent = found.groups()
    return Heads.load(path).top(int(number) / 100 if percent else int(number))
