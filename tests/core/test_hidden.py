"""Hidden states: layers, mlps, neurons, embeddings are the model's own quantities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import discover, greedy, method, shared, unchanged
from torch import Tensor, nn
from zoo import FAMILIES, Family, run, select

import saccade as sc
from saccade.core.errors import AttachError, InputError

LLAMA = FAMILIES["llama"].inputs()
PRENORM = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "vit",
    "clip",
    "siglip_vision",
    "timm_vit",
    "t5",
    "whisper",
]


def states(name: str, *kinds: str) -> dict[str, Tensor]:
    """Hidden states by site, of one forward."""
    model, seen = shared(name), {}

    def hidden(call: Any, h: Tensor) -> Tensor:
        seen[call.site.name] = h.clone()  # some families add to it in place
        return h

    sites = [site.name for site in discover(model) if site.kind in kinds]
    with sc.attach(model, method(hidden=hidden)(sites="|".join(sites))):
        run(model, FAMILIES[name].inputs())
    assert set(seen) == set(sites)
    return seen


def norm_inputs(layer: nn.Module, forward: Callable[[], Any]) -> list[Tensor]:
    """What the norms of a layer are given, in order, by the test's own hooks."""
    given: list[Tensor] = []
    norms = [m for m in layer.modules() if "norm" in type(m).__name__.lower()]
    hooks = [m.register_forward_pre_hook(lambda _, args: given.append(args[0])) for m in norms]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return given


@pytest.mark.parametrize("name", PRENORM)
def test_an_mlp_is_what_its_layer_adds_after_attention(name: str) -> None:
    """The stream after a layer, less the mlp, is the stream that the mlp's norm was given."""
    model = shared(name)
    mlps = [site for site in discover(model) if site.kind == "mlp"]
    assert mlps
    got = states(name, "mlp", "layer")
    for mlp in mlps:
        layer = model.get_submodule(
            next(s.path for s in discover(model) if s.name == f"{mlp.tower}.{mlp.index}.layer")
        )
        given = norm_inputs(layer, lambda: run(model, FAMILIES[name].inputs()))
        stream = got[f"{mlp.tower}.{mlp.index}.layer"]
        inside = [x for x in given if x.shape == stream.shape][-1]
        torch.testing.assert_close(stream - got[mlp.name], inside, atol=1e-5, rtol=1e-4)


def test_experts_are_an_mlp_without_neurons() -> None:
    kinds = {site.kind for site in discover(shared("gpt_oss"))}
    assert "mlp" in kinds
    assert "neurons" not in kinds
    model, inputs = FAMILIES["gpt_oss"].build(), FAMILIES["gpt_oss"].inputs()
    with sc.attach(model, method(hidden=lambda call, h: h * 0)(sites="text.2.mlp")):
        got = run(model, inputs)
    with torch.no_grad():
        for parameter in model.model.layers[2].mlp.experts.parameters():
            parameter.zero_()
    torch.testing.assert_close(got, run(model, inputs), atol=0, rtol=0)


@pytest.mark.parametrize("f", select())
def test_neurons_through_the_last_linear_are_the_mlp(f: Family) -> None:
    sites = {site.name: site for site in discover(shared(f.name))}
    neurons = [name for name in sites if name.endswith(".neurons")]
    if not neurons or f.name in ("video_llava", "phi4_multimodal"):
        pytest.skip(f"{f.name} has no neurons, or a tower that this forward does not use")
    if f.name == "torch_encoder":
        pytest.skip("the last linear is the mlp")
    got = states(f.name, "neurons", "mlp")
    for name in neurons:
        with torch.no_grad():
            expected = sites[name].module(got[name])
        torch.testing.assert_close(expected, got[name.replace("neurons", "mlp")])


@pytest.mark.parametrize("f", select("llm"))
def test_layers_and_embeddings_are_the_models_hidden_states(f: Family) -> None:
    model = shared(f.name)
    with torch.no_grad():
        theirs = model(**f.inputs(), output_hidden_states=True).hidden_states
    got = states(f.name, "layer", "embed")
    torch.testing.assert_close(got["text.embed"], theirs[0], atol=0, rtol=0)
    for index in range(len(theirs) - 2):  # the last one is normalised
        torch.testing.assert_close(got[f"text.{index}.layer"], theirs[index + 1], atol=0, rtol=0)


def test_pictures_stand_among_the_embeddings() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    got = states("llava", "embed")["text.embed"]
    with torch.no_grad():
        image = model.get_image_features(pixel_values=inputs["pixel_values"])
        features = torch.cat(list(getattr(image, "pooler_output", image))).flatten(0, -2)
        words = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["input_ids"] == 3
    torch.testing.assert_close(got[mask], features, atol=0, rtol=0)
    torch.testing.assert_close(got[~mask], words[~mask], atol=0, rtol=0)


def test_an_edited_embedding_is_an_edited_input() -> None:
    model = shared("llama")
    shift = torch.linspace(-1, 1, 64)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(LLAMA["input_ids"])
        expected = model(inputs_embeds=embeds + shift).logits
    with sc.attach(model, method(hidden=lambda call, h: h + shift)(sites="text.embed")):
        assert torch.equal(run(model, LLAMA), expected)
    assert not torch.equal(run(model, LLAMA), expected)


def test_an_mlp_taken_away_is_one_without_its_weights() -> None:
    model = FAMILIES["llama"].build()
    with sc.attach(model, method(hidden=lambda call, h: h * 0)(sites="text.1.mlp")):
        one = run(model, LLAMA)
    with sc.attach(model, method(hidden=lambda call, h: h * 0)(sites="text.1.neurons")):
        two = run(model, LLAMA)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    expected = run(model, LLAMA)
    torch.testing.assert_close(one, expected, atol=0, rtol=0)
    torch.testing.assert_close(two, expected, atol=0, rtol=0)


def test_rows_of_hidden_states_and_their_start() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs(images=(1, 2))
    tokens = inputs["input_ids"].shape[1]
    told: list[tuple[int, int]] = []

    def hidden(call: Any, h: Tensor) -> Tensor:
        told.append((call.start, h.shape[1]))
        image = call.rows("image", h)
        assert image.shape == (*h.shape[:2], 1)
        if call.phase == "prefill":
            assert torch.equal(image[..., 0], inputs["input_ids"] == 3)
        else:
            assert not image.any()
            assert call.rows("generated", h).all()
        return h

    with sc.attach(model, method(hidden=hidden)(sites="text.2.layer")):
        greedy(model, inputs, 3)
    assert told == [(0, tokens), (tokens, 1), (tokens + 1, 1)]


def test_an_edit_of_image_rows_leaves_the_others() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    seen: list[Tensor] = []
    double = method(hidden=lambda call, h: torch.where(call.rows("image", h), 2 * h, h))
    look = method(hidden=lambda call, h: (seen.append(h), h)[1])
    with sc.attach(
        model, look(sites="text.0.layer"), double(sites="text.0.layer"), look(sites="text.0.layer")
    ):
        run(model, inputs)
    before, after = seen
    image = inputs["input_ids"] == 3
    assert torch.equal(after[image], 2 * before[image])
    assert torch.equal(after[~image], before[~image])


def test_an_event_that_a_place_does_not_have_is_refused_by_name() -> None:
    model = shared("bloom")
    with unchanged(model), pytest.raises(AttachError) as error:
        sc.attach(model, method(hidden=lambda call, h: h)())
    assert "'hidden' at text.0.self" in error.value.problem
    assert "text." in error.value.remedy
    model = shared("llama")
    with unchanged(model), pytest.raises(AttachError, match=r"'observe' at text\.0\.mlp"):
        sc.attach(model, method(observe=lambda call: None)(sites="text.0.mlp"))


def test_an_unknown_row_name_is_an_input_error() -> None:
    with (
        sc.attach(
            shared("llama"), method(hidden=lambda call, h: call.rows("imagee", h))(sites="text.0.layer")
        ),
        pytest.raises(InputError, match="imagee"),
    ):
        run(shared("llama"), LLAMA)
