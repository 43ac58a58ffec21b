"""The list of private names: what has moved is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from zoo import FAMILIES

import saccade as sc
from saccade.core.errors import VersionError
from saccade.core.seams import private
from saccade.core.seams.private import NAMES, Name


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    private.check.cache_clear()
    yield
    private.check.cache_clear()


def test_the_installed_version_has_all_of_them() -> None:
    private.check()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (Name("transformers.nowhere:Thing"), "transformers.nowhere:Thing is gone"),
        (
            Name("transformers.cache_utils:Cache.reorder_rows"),
            "transformers.cache_utils:Cache.reorder_rows is gone",
        ),
        (Name("transformers:PreTrainedConfig()._attention"), "PreTrainedConfig()._attention is gone"),
        (
            Name("transformers.cache_utils:Cache.reorder_cache", ("self", "index")),
            "Cache.reorder_cache takes self, beam_idx instead of self, index",
        ),
        (
            Name("transformers.cache_utils:Cache.get_seq_length", ("self", "layer_idx", "more")),
            "instead of self, layer_idx, more",
        ),
    ],
)
def test_a_name_that_moved_is_named_with_the_versions_that_we_know(
    monkeypatch: pytest.MonkeyPatch, name: Name, problem: str
) -> None:
    monkeypatch.setattr(private, "NAMES", (*NAMES, name))
    model = FAMILIES["llama"].build()
    with pytest.raises(VersionError) as error:
        sc.attach(model)
    assert problem in error.value.problem
    assert private.KNOWN in error.value.remedy
    assert "forward" not in model.__dict__


def test_a_function_may_grow_at_its_end() -> None:
    private.check_names((Name("transformers.cache_utils:Cache.get_seq_length", ("self",)),))
