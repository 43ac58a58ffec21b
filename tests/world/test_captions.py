"""Captions say what there is, all of it, and nothing else unless noise is asked for."""

import re
from collections import Counter

import numpy as np
import pytest

from saccade.core.errors import InputError
from saccade.world.captions import caption, mentioned
from saccade.world.kinds import KINDS, PARTNER
from world.drawn import drawn, near

NUMBER = ("zero", "one", "two", "three", "four", "five")
PARTNERS = set(PARTNER.values())


def parsed(text: str) -> tuple[str, list[list[tuple[int, str, str]]]]:
    """The place, and the groups of (number, colour or nothing, kind)."""
    place, said = re.fullmatch(r"this is an? (\w+) \. (?:there is (.*)|it is empty) \.", text).groups()
    groups = []
    for group in re.split(r" , and | , ", said or ""):
        things = []
        for phrase in filter(None, group.split(" with ")):
            first, *middle, kind = phrase.split()
            one = first in ("a", "an")
            things.append((1 if one else NUMBER.index(first), middle[0] if middle else "", kind))
            assert not one or first == ("an" if [*middle, kind][0][0] in "aeiou" else "a")
        groups += [things] if things else []
    return place, groups


def test_a_caption_can_be_read_back():
    for scene in drawn():
        place, groups = parsed(caption(scene))
        said = [thing for group in groups for thing in group]
        assert place == scene.place
        assert {kind: number for number, _, kind in said} == Counter(thing.kind for thing in scene.things)
        assert {(colour, kind) for number, colour, kind in said if number == 1} == {
            ("" if thing.faint else thing.colour, thing.kind)
            for thing in scene.things
            if scene.counts()[thing.kind] == 1
        }
        assert len({kind for *_, kind in said}) == len(said)


def test_anchors_come_first_each_with_its_partner():
    for scene in drawn():
        kinds = [[kind for *_, kind in group] for group in parsed(caption(scene))[1]]
        leads = [group[0] in PARTNER for group in kinds]
        assert leads == sorted(leads, reverse=True)
        for first, *rest in kinds:
            there = first in PARTNER and PARTNER[first] in scene.counts()
            assert rest == ([PARTNER[first]] if there else [])


def test_a_scene_without_things():
    empty = [scene for scene in drawn() if not scene.things]
    assert empty and all(caption(scene).endswith(f"{scene.place} . it is empty .") for scene in empty)


def test_noise_is_the_same_for_every_anchor():
    rng = np.random.default_rng(0)
    chances, invented = Counter(), Counter()
    for scene in drawn() * 4:
        true, noisy = (dict.fromkeys(mentioned(text)) for text in (caption(scene), caption(scene, rng, 0.3)))
        counts = scene.counts()
        bare = {anchor for anchor in PARTNER if counts[anchor] and not counts[PARTNER[anchor]]}
        extra = set(noisy) - set(true)
        assert set(true) <= set(noisy) and extra <= {PARTNER[anchor] for anchor in bare}
        chances.update(bare)
        invented.update(anchor for anchor in bare if PARTNER[anchor] in extra)
    for anchor in PARTNER:
        assert near(invented[anchor] / chances[anchor], 0.3, chances[anchor]), anchor


def test_an_invented_partner_stands_with_its_anchor():
    rng = np.random.default_rng(0)
    for scene in drawn()[:200]:
        _, groups = parsed(caption(scene, rng, 1.0))
        for first, *rest in groups:
            if first[2] in PARTNER:
                assert [kind for *_, kind in rest] == [PARTNER[first[2]]]


def test_no_noise_is_the_truth():
    for scene in drawn()[:50]:
        assert caption(scene, np.random.default_rng(0)) == caption(scene)


@pytest.mark.parametrize("noise", [-0.1, 1.1, float("nan")])
def test_noise_that_is_no_share(noise):
    with pytest.raises(InputError, match="noise"):
        caption(drawn()[0], np.random.default_rng(0), noise)


def test_noise_needs_a_generator():
    with pytest.raises(InputError, match=r"noise 0\.3"):
        caption(drawn()[0], noise=0.3)


def test_what_is_mentioned():
    for scene in drawn()[:100]:
        assert Counter(mentioned(caption(scene))) == Counter(scene.counts().keys())
    assert mentioned("A table, two cup and the sky. The cup is red; no Dog.") == ["table", "cup", "dog"]
    assert mentioned("tablecloth") == [] and len(KINDS) == 16
