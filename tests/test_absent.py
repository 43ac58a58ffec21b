"""Places of a picture whose tokens were removed are told from those that were not looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from torch import Tensor
from zoo import family

import saccade as sc
from saccade import looking
from saccade.core.method import Method
from saccade.core.record import Recording
from saccade.core.tokens import Tokens
from saccade.report.overlay import hatched
from saccade.report.plain import GONE

KEPT = [0, 1, 7, 20, 35]  # of 36 places


class Drop(Method):
    def tokens(self, call: Any) -> Tokens | None:
        if call.phase != "prefill":
            return None
        keep = ~call.tokens("image")
        keep[:, call.tokens("image")[0].nonzero()[KEPT, 0]] = True
        return Tokens(keep)


class Evict(Method):
    """Behind the prompt, heads of the two groups lose other places."""

    def evict(self, call: Any, cache: Any) -> Tensor | None:
        if call.phase != "prefill":
            return None
        first = int(call.columns("image")[0, 0, 0].nonzero()[0])
        entries = range(call.k.shape[2])
        return torch.tensor([[[i for i in entries if i - first not in lost] for lost in ((3, 4), (4, 5))]])


def look(*methods: Method, size: tuple[int, int] = (48, 48), **options: Any) -> Recording:
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    processor, picture = family("llava").processor(), Image.fromarray(noise)
    options |= {"max_new_tokens": 3, "min_new_tokens": 3}
    return looking.look(shared("llava"), processor, picture, "Is the red cup on the box?", methods, **options)


def found(absent: Tensor | np.ndarray) -> list[int]:
    return torch.as_tensor(absent).flatten().nonzero()[:, 0].tolist()


LOST = [i for i in range(36) if i not in KEPT]


@pytest.mark.parametrize("columns", ["all", "image"])
def test_from_the_layer_on_where_they_left(columns: str) -> None:
    seen = look(Drop(sites="text.2.layer"), columns=columns)
    whole = seen.map("text.*.self").mean("head", "row")
    assert [found(layer) for layer in whole.absents()] == [[], [], LOST, LOST]
    assert found(whole.absent()) == [] and found(whole.layers("2:").absent()) == LOST


def test_those_that_never_came() -> None:
    seen = look(Drop(sites="text.0.layer"))
    assert found(seen.seen().absent()) == LOST
    assert found(seen.map("text.*.self").absents()) == LOST  # in all alike


def test_heads_that_hold_different_keys() -> None:
    whole = look(Evict(sites="text.*.self")).map("text.*.self")
    absent = whole.absents()  # (layers, heads, rows, y, x)
    groups = {0: [3, 4], 1: [3, 4], 2: [4, 5], 3: [4, 5]}
    for head, lost in groups.items():
        assert found(absent[1, head, 0]) == []  # the prompt's last row saw them
        assert found(absent[1, head, 1]) == found(absent[1, head, 2]) == lost
    later = whole._choose("row", [1, 2]).mean("row")
    assert found(later.absent()) == [4] and found(later.heads(2, 3).absent()) == [4, 5]


def test_nothing_is_absent_of_what_was_not_removed() -> None:
    """Nor of what the processor cut off."""
    for size in ((48, 48), (100, 60)):
        assert not look(size=size).seen().absent().any()
    assert not look(reduce="topk(2)").seen().absent().any()


def test_they_are_hatched() -> None:
    seen = look(Drop(sites="text.0.layer"))
    drawn, heat = np.asarray(seen.overlay(), float)[:512], seen.seen().grid()
    assert heat.shape == (6, 6)
    stripes = (drawn == 170).all(-1)  # a colour of nothing else
    y, x = np.indices(stripes.shape)
    share = np.array([stripes[(y * 6 // 512 == i // 6) & (x * 6 // 512 == i % 6)].mean() for i in range(36)])
    assert (share[LOST] == pytest.approx(1 / 6, abs=0.03)) and (share[KEPT] < 0.01).all()
    told = seen.plain(width=50)
    assert f"{GONE} 31 of 36 places were removed" in told
    lines = [line[1:-1] for line in told.splitlines() if line.startswith("│")]
    letters = sum(line.count(GONE) for line in lines)
    assert letters == sum(map(len, lines)) * 31 / 36
    assert seen.plain(width=50, colour=True).count(GONE) == letters + 1


def test_hatching_keeps_the_rest() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    gone = np.array([[False, True], [False, False]])
    same = (np.asarray(hatched(picture, gone)) == np.asarray(picture)).all(-1)
    assert same[:, :20].all() and same[15:].all() and same[:15, 20:].mean() < 0.05


def test_it_comes_back_from_the_file(tmp_path: Any) -> None:
    look(Drop(sites="text.0.layer")).save(tmp_path / "seen.safetensors")
    assert found(sc.Recording.load(tmp_path / "seen.safetensors").seen().absent()) == LOST
