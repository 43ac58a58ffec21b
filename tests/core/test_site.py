"""Names of places, the patterns that choose them, and the errors that help."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from helpers import discover, shared
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo import FAMILIES, Family, select

from saccade.core.errors import AttachError
from saccade.core.site import Site, layers, match


def sites_of(tower: str, attending: list[int], depth: int, kind: str = "self") -> list[Site]:
    module = nn.Identity()
    return [
        Site(f"{tower}.{i}.{kind}", f"m.{i}", module, tower, i, kind, "interface", depth) for i in attending
    ]


MODEL = [*sites_of("vision", [0, 1, 2], 3), *sites_of("text", list(range(8)), 8)]
MODEL += sites_of("text", list(range(8)), 8, "layer")


def names(pattern: str | tuple[str, ...], sites: list[Site] = MODEL) -> list[str]:
    return [site.name for site in match(pattern, sites)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("text.3.self", [3]),
        ("text.-1.self", [7]),
        ("text.-8.self", [0]),
        ("text.2:4.self", [2, 3]),
        ("text.:2.self", [0, 1]),
        ("text.6:.self", [6, 7]),
        ("text.-2:.self", [6, 7]),
        ("text.:-6.self", [0, 1]),
        ("text.25%:75%.self", [2, 3, 4, 5]),
        ("text.50%:.self", [4, 5, 6, 7]),
        ("text.50%.self", [4]),
        ("text.-25%:.self", [6, 7]),
        ("text.-25%.self", [6]),
        ("text.:.self", list(range(8))),
        ("text.*.self", list(range(8))),
        ("text.[12].self", [1, 2]),
        ("text.6:99.self", [6, 7]),
    ],
)
def test_a_pattern_names_layers_as_python_counts(pattern: str, expected: list[int]) -> None:
    assert names(pattern) == [f"text.{i}.self" for i in expected]


def test_alternatives_and_tuples_keep_the_order_of_the_model_and_name_once() -> None:
    expected = ["vision.1.self", "text.0.self", "text.7.self"]
    assert names("text.-1.self|text.0.self|vision.1.self|text.7.self") == expected
    assert names(("text.-1.self", "vision.1.self|text.0.self")) == expected


def test_wildcards_go_through_towers_and_kinds() -> None:
    assert names("*.0.self") == ["vision.0.self", "text.0.self"]
    assert names("*.-1.self") == ["vision.2.self", "text.7.self"]
    assert names("text.-1.*") == ["text.7.self", "text.7.layer"]


def test_depth_counts_layers_that_do_not_attend() -> None:
    hybrid = sites_of("text", [1, 3, 5], 8)
    assert names("text.50%:.self", hybrid) == ["text.5.self"]
    assert names("text.-3.self", hybrid) == ["text.5.self"]
    with pytest.raises(AttachError, match=r"text\.-1\.self"):
        match("text.-1.self", hybrid)


@given(depth=st.integers(1, 12), start=st.integers(-15, 15), stop=st.integers(-15, 15))
def test_spans_are_slices(depth: int, start: int, stop: int) -> None:
    found = [i for i in layers(f"{start}:{stop}", depth) if 0 <= i < depth]
    assert found == list(range(depth))[start:stop]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("text.3.slef", "text.3.self"), ("txt.0.self", "text.0.self"), ("vision.3.self", "vision")],
)
def test_a_pattern_that_names_nothing_is_an_error_with_the_nearest_name(pattern: str, hint: str) -> None:
    with pytest.raises(AttachError) as error:
        match(f"vision.0.self|{pattern}", MODEL)
    assert repr(pattern) in error.value.problem
    assert hint in error.value.remedy


@pytest.mark.parametrize("f", select())
def test_names_are_unique_and_speak_of_the_tower(f: Family) -> None:
    model = shared(f.name)
    sites = discover(model)
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        assert site.name.startswith(site.tower + ".")
        assert site.name.endswith(site.kind)
        assert model.get_submodule(site.path) is site.module
        assert site.index is None or 0 <= site.index < site.depth
        assert match(site.name, sites) == [site]


EXPECTED = {
    "llama": {"text.*.self": 4, "text.*.layer": 4, "text.*.mlp": 4, "text.*.neurons": 4, "text.embed": 1},
    "t5": {"encoder.*.self": 3, "text.*.self": 3, "text.*.cross": 3, "encoder.embed": 1},
    "whisper": {"encoder.*.self": 3, "text.*.self": 3, "text.*.cross": 3},
    "clip": {"vision.*.self": 3, "text.*.self": 3},
    "mllama": {"text.*.cross": 2, "text.[02].self": 2},
    "blip2": {"vision.*.self": 3, "qformer.*.self": 3, "qformer.*.cross": 2, "text.*.self": 4},
    "qwen2_5_vl": {"vision.*.self": 3, "text.*.self": 4},
    "unet": {"unet.down.0.*.self": 1, "unet.mid.*.cross": 1, "unet.up.*.cross": 2, "unet.*": 8},
    "sd3": {"dit.*.joint": 2},
    "flux": {"dit.[01].joint": 2, "dit.single.*.joint": 2},
    "torch_mha": {"text.0.self": 1},
    "siglip_vision": {"vision.[012].self": 3, "vision.attention.*": 1},
    "bert": {"text.*.self": 3},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_family_offers(name: str) -> None:
    sites = discover(shared(name))
    assert {pattern: len(match(pattern, sites)) for pattern in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("attending", [[1], [1, 3]])
def test_the_last_layers_of_a_hybrid_count_where_they_do_not_attend(attending: list[int]) -> None:
    kinds = ["full_attention" if i in attending else "conv" for i in range(6)]
    config = T.Lfm2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, layer_types=kinds,
    )  # fmt: skip
    with torch.device("meta"):
        sites = discover(T.Lfm2ForCausalLM(config))
    selves = [site for site in sites if site.kind == "self"]
    assert [site.index for site in selves] == attending
    assert {site.depth for site in selves} == {6}


def test_a_model_without_attention_is_refused_by_name() -> None:
    import saccade as sc

    with pytest.raises(AttachError, match="Linear has no attention"):
        sc.attach(nn.Linear(2, 2))


def test_every_family_is_known_here() -> None:
    assert set(EXPECTED) <= set(FAMILIES)
