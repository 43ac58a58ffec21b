"""What a caption says is drawn, and nothing else."""

from collections import Counter

import numpy as np

from saccade.world.captions import caption
from saccade.world.illustrate import illustrate
from saccade.world.scenes import scenes


def test_what_is_drawn_is_captioned_alike() -> None:
    for scene in scenes(40, "test"):
        again = illustrate(caption(scene))
        assert again.place == scene.place and not again.faint()
        assert not again.counts() - scene.counts()
        if len(again.things) == len(scene.things):  # all found room
            faint = scene.faint()
            named = {(t.kind, t.colour) for t in scene.things if scene.counts()[t.kind] == 1} - {
                (t.kind, t.colour) for t in scene.things if t.kind in faint
            }
            assert named <= {(t.kind, t.colour) for t in again.things}
            assert again.counts() == scene.counts()


def test_the_seed_decides_the_rest_and_foreign_words_show_nothing() -> None:
    one, other = illustrate("A red cup, two chairs."), illustrate("a red cup and two xyz")
    assert one.counts() == other.counts() == Counter({"cup": 1})
    assert np.array_equal(one.image, illustrate("A red cup, two chairs.").image)
    assert not np.array_equal(one.image, illustrate("A red cup, two chairs.", 1).image)
    assert not illustrate("nothing at all").things
