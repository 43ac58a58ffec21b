"""Retrieval and zero-shot kinds, by a model that knows and by one that cannot tell."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saccade.core.errors import InputError
from saccade.evals import embedding
from saccade.world.captions import caption, photo_of
from saccade.world.scenes import closeup, scenes

COUNT = 130  # two groups, and two scenes left over


def of(image):
    return np.asarray(image).tobytes()


class Model(torch.nn.Module):
    """Likes what it has been told of a picture, all of it alike."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, words, seen):
        return SimpleNamespace(
            logits_per_image=torch.tensor([[float(w in self.known.get(s, ())) for w in words] for s in seen])
        )


def processor(text, images, **_):
    return {"words": text, "seen": [of(image) for image in images]}


def knowing():
    known = {}
    for split in embedding.SPLITS:
        for one in scenes(COUNT, split):
            known.setdefault(of(one.picture()), set()).add(caption(one))
            for thing in one.things:
                names = {photo_of(thing.kind), photo_of(thing.kind, thing.colour)}
                known.setdefault(of(closeup(one, thing)), set()).update(names)
    return Model(known)


def test_who_knows_all_finds_all():
    scored = embedding.measure(knowing(), processor, COUNT)
    assert list(scored) == ["test", "broken"]
    for tasks in scored.values():
        assert {name: one.value for name, one in tasks["retrieval"].items()} == {
            "caption of 64": 1.0,
            "scene of 64": 1.0,
        }
        assert tasks["retrieval"]["caption of 64"].count == 128
        assert tasks["zero-shot"]["kind"].value > 0.98  # closeups may be of the same square
        assert tasks["zero-shot"]["colour"].value > 0.98


def test_a_scene_that_fits_every_caption_is_found_for_all():
    model, drawn = knowing(), list(scenes(COUNT, "test"))
    model.known[of(drawn[0].picture())] = {caption(one) for one in drawn}
    found = embedding.retrieval(model, processor, COUNT, "test")
    assert found["caption of 64"].value == 1
    assert found["scene of 64"].value == pytest.approx((1 + 64) / 128, abs=0.02)


def test_who_knows_nothing_is_at_chance():
    shares = embedding.zero_shot(Model({}), processor, 400, "test", 0, 64)
    assert shares["kind"].value < 0.2 and shares["colour"].value < 0.3


def test_too_few_scenes_are_refused():
    with pytest.raises(InputError, match="group of 64"):
        embedding.measure(Model({}), processor, 63)
