"""What ships: found by name, and checked before it is loaded."""

import json

import pytest

from saccade.core.errors import InputError
from saccade.world import embedded


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "vlm"
    folder.mkdir()
    (folder / embedded.WEIGHTS).write_bytes(b"weights")
    (folder / embedded.CARD).write_text(json.dumps({"sha256": embedded.checksum(folder / embedded.WEIGHTS)}))
    monkeypatch.setattr(embedded, "MODELS", tmp_path)
    return folder


def test_a_model_is_found_by_name(shipped):
    assert embedded.names() == ["vlm"]
    assert embedded.folder("vlm") == shipped


def test_an_unknown_name_says_which_there_are(shipped):
    with pytest.raises(InputError, match=r"'vml'.*vlm"):
        embedded.folder("vml")


def test_damaged_weights_are_refused(shipped):
    (shipped / embedded.WEIGHTS).write_bytes(b"weighty")
    with pytest.raises(InputError, match=r"damaged.*checksum"):
        embedded.folder("vlm")
