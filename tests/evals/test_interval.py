"""Intervals against their definitions, and against how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.evals.interval import bootstrap, share, wilson
from saccade.evals.task import Sample, accuracy


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (1, 5), (5, 5), (8, 10), (500, 1000), (999, 1000)])
def test_the_ends_of_wilson_are_where_the_share_is_just_likely_enough(hits: int, count: int) -> None:
    found, p = wilson(hits, count), hits / count
    assert found.value == p and found.count == count
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-9)
    assert (found.low == 0) == (hits == 0) and (found.high == 1) == (hits == count)


def test_nothing_gives_no_number() -> None:
    assert all(map(math.isnan, (wilson(0, 0).value, wilson(0, 0).low, wilson(0, 0).high)))
    assert math.isnan(share([0, 0], [0, 0]).value) and share([0, 0], [0, 0]).count == 0


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap([values, np.ones(400)], lambda t: t[..., 0] / t[..., 1])
    assert found.value == pytest.approx(values.mean()) and found.count == 400
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert found == bootstrap([values, np.ones(400)], lambda t: t[..., 0] / t[..., 1])


def test_copies_of_a_question_do_not_narrow_the_interval() -> None:
    """Six equal answers of a picture are one."""
    hits = (np.random.default_rng(1).random(200) < 0.7).astype(float)
    once, six = share(hits, np.ones(200)), share(6 * hits, np.full(200, 6))
    assert six.value == pytest.approx(once.value) and (once.count, six.count) == (200, 1200)
    assert six.high - six.low == pytest.approx(once.high - once.low, rel=0.08)
    assert wilson(6 * hits.sum(), 1200).high - wilson(6 * hits.sum(), 1200).low < 0.5 * (six.high - six.low)


@pytest.mark.parametrize("hits", [0, 1])
def test_where_all_are_alike_the_pictures_count(hits: int) -> None:
    found, one = share(np.full(50, 6 * hits), np.full(50, 6)), wilson(50 * hits, 50)
    assert (found.value, found.low, found.high, found.count) == (hits, one.low, one.high, 300)


def test_nineteen_in_twenty_hold_the_truth() -> None:
    rng, held = np.random.default_rng(2), 0
    for _ in range(200):
        likely = rng.beta(8, 2, 60)  # of being right, by picture
        of = rng.integers(1, 7, 60)
        found = share(rng.binomial(of, likely), of)
        held += found.low <= 0.8 <= found.high
    assert 0.91 <= held / 200 <= 0.98


def test_accuracy_is_told_of_all_and_of_every_group() -> None:
    rows = [
        (Sample("0", (), "", "a", "one", "p"), "a"),
        (Sample("1", (), "", "a", "two", "p"), "b"),
        (Sample("2", (), "", "a", "two", "q"), "a"),
        (Sample("3", (), "", "a"), "b"),
    ]
    found = accuracy(rows, lambda sample, text: text == sample.truth)
    assert {name: (e.value, e.count) for name, e in found.items()} == {
        "accuracy": (0.5, 4),
        "one": (1.0, 1),
        "two": (0.5, 2),
    }
    with pytest.raises(InputError, match="no answers"):
        accuracy([], lambda sample, text: 1)
