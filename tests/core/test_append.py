"""Tokens that are appended in a tower: as if its own layers were run by hand on the longer sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import CLOSE, F64, generate, inputs_of, subject
from helpers import Exact, cast, method, shared, unchanged
from torch import Tensor, nn
from zoo import FAMILIES, run

import saccade as sc
from core.missing import draw
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.tokens import Tokens, TokensCall

TOWERS = [
    ("clip", "vision_model"), ("siglip", "vision_model"), ("dinov2", "layer"), ("blip", "vision_model"),
    ("llava", "vision_tower"), ("timm_vit", "blocks"),
]  # fmt: skip
WITHOUT_MASK = {"dinov2", "blip", "timm_vit"}


def blocks(model: nn.Module, tower: str) -> list[nn.Module]:
    return next(
        list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and tower in path and len(module) >= 3
    )


def registers(batch: int, count: int, width: int) -> Tensor:
    """Others in every sample."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, count, width, generator=generator, dtype=F64)


def appending(new: Tensor, **options: Any) -> Method:
    return method(tokens=lambda call: Tokens(append=new))(**options)


@torch.no_grad()
def by_hand(layers: list[nn.Module], h: Tensor, name: str) -> list[Tensor]:
    """What every layer gives."""
    given = {} if name in WITHOUT_MASK else {"attention_mask": None}
    out = []
    for layer in layers:
        h = layer(h, **given)
        h = h[0] if isinstance(h, tuple) else h
        out.append(h)
    return out


def watched(model: Any, inputs: Any, layers: list[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """What every layer of the tower is given and gives in a forward."""
    came: list[Tensor] = []
    went: list[Tensor] = []
    hooks = []
    for layer in layers:
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, a, k: came.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
            layer.register_forward_hook(
                lambda _, __, out: went.append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
    try:
        with Exact(), torch.no_grad():
            run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return came, went


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("name", "inside"), TOWERS, ids=[name for name, _ in TOWERS])
def test_the_layers_see_them_and_they_do_not_come_out(name: str, inside: str, layer: int) -> None:
    model: Any = shared(name, F64)
    inputs = cast(FAMILIES[name].inputs(), F64)
    layers = blocks(model, inside)
    came, bare = watched(model, inputs, layers)
    tokens = came[0].shape[1]
    new = registers(came[0].shape[0], 2, came[0].shape[2])
    with unchanged(model), sc.attach(model, appending(new, sites=f"vision.{layer}.layer")):
        given, got = watched(model, inputs, layers)
    with Exact():
        wanted = by_hand(layers[layer:], torch.cat([came[layer], new], 1), name)
    assert [h.shape[1] for h in given + got] == [tokens] * 2 * len(layers)
    for mine, theirs in zip(got[layer:], wanted, strict=True):
        assert float((mine - theirs[:, :tokens]).abs().max()) < CLOSE
    assert float((got[-1] - bare[-1]).abs().max()) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(watched(model, inputs, layers)[1], bare, strict=True))


@pytest.mark.parametrize("name", ["clip", "timm_vit"])
def test_none_appended_changes_nothing_by_a_bit(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    bare = run(model, inputs)
    none = method(tokens=lambda call: Tokens(append=call.h[:, :0]))(sites="vision.1.layer")
    with sc.attach(model, none):
        assert torch.equal(run(model, inputs), bare)


@pytest.mark.parametrize(("name", "patches"), [("clip", 36), ("timm_vit", 16), ("blip", 36)])
def test_calls_tell_which_they_are(name: str, patches: int) -> None:
    """Of neurons, of hidden states and of attention; before them none are there."""
    model, inputs = shared(name, F64), cast(FAMILIES[name].inputs(), F64)
    seen: dict[str, Any] = {}

    def hidden(call: Any, h: Tensor) -> Tensor:
        seen[call.site.name] = h.shape[1], call.appended, call.rows("image", h)[0, :, 0].tolist()
        return h

    def observe(call: Any) -> None:
        names = [call.columns(kind)[0, 0, 0].tolist() for kind in ("image", "special")]
        seen[call.site.name] = call.weights().shape[-2:], call.appended, *names, call.qpos[..., -3:].tolist()
        seen["last"] = call.resolve("last")

    sites = {
        "tokens": "vision.1.layer",
        "hidden": "vision.*.neurons|vision.1.input|vision.2.layer",
        "observe": "vision.2.self",
    }
    tokens = method(tokens=lambda call: Tokens(append=call.h[:, :2] * 0), hidden=hidden, observe=observe)
    with sc.attach(model, tokens(sites=sites)):
        run(model, inputs)
    own, shown = slice(patches + 1, patches + 3), [False] + [True] * patches
    assert seen["vision.0.neurons"] == (patches + 1, slice(0, 0), shown)
    for site in ("vision.1.input", "vision.1.neurons", "vision.2.neurons", "vision.2.layer"):
        assert seen[site] == (patches + 3, own, shown + [False] * 2)
    shape, there, image, special, last = seen["vision.2.self"]
    assert (tuple(shape), there) == ((patches + 3, patches + 3), own)
    assert image == shown + [False] * 2 and special == [True] + [False] * (patches + 2)
    assert last[0] == [patches, -1, -1]
    assert seen["last"] == slice(patches, patches + 1)


def test_a_later_layer_can_move_something_to_them() -> None:
    """One neuron's activations of all patches go to the register; the oracle does so by hand."""
    model, inputs = shared("clip", F64), cast(FAMILIES["clip"].inputs(), F64)
    layers = blocks(model, "vision_model")
    came, _ = watched(model, inputs, layers)

    def move(h: Tensor, own: slice) -> Tensor:
        h = h.clone()
        h[:, own, 3] = h[:, 1 : own.start, 3].amax(1, keepdim=True)
        h[:, 1 : own.start, 3] = 0
        return h

    zero = torch.zeros(1, 32, dtype=F64)
    shift = method(tokens=lambda call: Tokens(append=zero), hidden=lambda call, h: move(h, call.appended))(
        sites={"tokens": "vision.0.layer", "hidden": "vision.1.neurons"}
    )
    with sc.attach(model, shift):
        _, got = watched(model, inputs, layers)
    hook = layers[1].mlp.fc2.register_forward_pre_hook(lambda _, args: (move(args[0], slice(37, 38)),))
    try:
        wanted = by_hand(layers, torch.cat([came[0], zero.expand(2, 1, -1)], 1), "clip")[-1][:, :37]
    finally:
        hook.remove()
    assert float((got[-1] - wanted).abs().max()) < CLOSE


def test_beside_tokens_that_leave_and_others_that_join() -> None:
    """Other numbers stay in every sample, also for one layer only; what left repeats the token before it."""
    model, inputs = shared("clip", F64), cast(FAMILIES["clip"].inputs(), F64)
    layers = blocks(model, "vision_model")
    came, _ = watched(model, inputs, layers)
    tokens = came[0].shape[1]
    keep, once = draw(2, tokens, seed=1, share=0.6), draw(tokens, seed=2, share=0.7)
    keep[:, 0] = once[0] = once[-1] = True
    new = registers(2, 3, 32)

    def leave(call: TokensCall) -> Tokens:
        assert call.h.shape[1] == tokens
        return Tokens(keep)

    for_one = method(tokens=lambda call: Tokens(call.left(once.expand(2, -1)), only_this_layer=True))
    with sc.attach(
        model,
        appending(new[:, :2], sites="vision.0.layer"),
        method(tokens=leave)(sites="vision.1.layer"),
        for_one(sites="vision.1.layer"),
        appending(new[0, 2:], sites="vision.1.layer"),
    ):
        _, got = watched(model, inputs, layers)
    for row in (0, 1):
        h = torch.cat([came[0][row : row + 1], new[row : row + 1, :2]], 1)
        h = by_hand(layers[:1], h, "clip")[0]
        h = torch.cat([h[:, torch.cat([keep[row], torch.ones(2, dtype=torch.bool)])], new[:1, 2:]], 1)
        inner = torch.cat([once[keep[row]], torch.ones(3, dtype=torch.bool)])
        h[:, inner] = by_hand(layers[1:2], h[:, inner], "clip")[0]
        left = by_hand(layers[2:], h, "clip")[0][0, : int(keep[row].sum())]
        assert float((got[-1][row, keep[row]] - left).abs().max()) < CLOSE
        gap = int((~keep[row]).nonzero()[0])
        assert torch.equal(got[-1][row, gap], got[-1][row, gap - 1])


def test_padding_of_a_picture_stays_unseen() -> None:
    """SigLIP 2 masks what fills up the smaller picture; the appended tokens see it as little as the others do."""
    model, inputs = shared("siglip2", F64), cast(FAMILIES["siglip2"].inputs(), F64)
    new, real = registers(2, 1, 32), int(inputs["pixel_attention_mask"][1].sum())
    assert real < 36
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][1, real:] += 1
    with sc.attach(model, appending(new, sites="vision.1.layer")), Exact(), torch.no_grad():
        a, b = (model.vision_model(**_seen(given)).last_hidden_state for given in (inputs, other))
    with Exact(), torch.no_grad():
        bare = model.vision_model(**_seen(inputs)).last_hidden_state
    assert float((a[1, :real] - b[1, :real]).abs().max()) < CLOSE
    assert float((a - bare)[:, :real].abs().amax((1, 2)).min()) > 1e-3


def _seen(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "pixel_values": inputs["pixel_values"],
        "pixel_attention_mask": inputs["pixel_attention_mask"],
        "spatial_shapes": inputs["spatial_shapes"],
    }


def test_under_generate_with_pictures_of_two_samples() -> None:
    """The answer is that of a model whose tower's features are those made by hand."""
    model, inputs = subject("llava"), inputs_of("llava", images=(1, 2))
    layers, tower = blocks(model, "vision_tower"), model.model.vision_tower
    with Exact(), torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        new = registers(3, 1, states[0].shape[2])
        h = by_hand(layers[1:2], torch.cat([states[1], new], 1), "llava")[0]  # the last layer is not read
        features = model.model.multi_modal_projector(h[:, 1:-1])
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *_: features)
    try:
        wanted = generate(model, inputs)
    finally:
        hook.remove()
    bare = generate(model, inputs)
    with sc.attach(model, appending(new, sites="vision.1.layer")):
        got = generate(model, inputs)
    assert all(float((a - b).abs().max()) < CLOSE for a, b in zip(got.logits, wanted.logits, strict=True))
    assert float((got.logits[0] - bare.logits[0]).abs().max()) > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(generate(model, inputs).logits, bare.logits, strict=True))


def test_a_tower_that_runs_again_in_the_same_pass_begins_without_them() -> None:
    model, inputs = shared("llava", F64), cast(FAMILIES["llava"].inputs(), F64)
    layers, tower = blocks(model, "vision_tower"), model.model.vision_tower
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda *_: tower(inputs["pixel_values"] + 1) and None
    )
    new = registers(2, 1, 32)
    try:
        with sc.attach(model, appending(new, sites="vision.1.layer")):
            _, got = watched(model, inputs, layers)
    finally:
        hook.remove()
    with sc.attach(model, appending(new, sites="vision.1.layer")):
        _, alone = watched(model, {**inputs, "pixel_values": inputs["pixel_values"] + 1}, layers)
    assert all(torch.equal(a, b) for a, b in zip(got[3:], alone, strict=True))


def test_a_picture_of_a_later_turn_is_told_from_them_too() -> None:
    """The tower runs in a pass that begins behind the first turn."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    told: list[Any] = []
    look = method(
        tokens=lambda call: Tokens(append=call.h[:, :1]),
        observe=lambda call: told.append((call.columns("image")[0, 0, 0].tolist(), call.qpos[0].tolist())),
    )
    with sc.attach(model, look(sites={"tokens": "vision.1.layer", "observe": "vision.1.self"})):
        cache = model(**inputs, use_cache=True).past_key_values
        more = {name: inputs[name] for name in ("input_ids", "pixel_values")}
        model(**more, past_key_values=cache)
    assert told == [([False] + [True] * 36 + [False], [*range(37), -1])] * 2


def test_they_are_learned_through_checkpoints() -> None:
    """Gradients are those without checkpointing."""
    model = FAMILIES["clip"].build().double()
    inputs = cast(FAMILIES["clip"].inputs(), F64)
    slopes = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        new = registers(1, 2, 32)[0].requires_grad_()
        with sc.attach(model, appending(new, sites="vision.0.layer")), Exact():
            model.vision_model(inputs["pixel_values"]).last_hidden_state.square().sum().backward()
        assert new.grad is not None
        slopes.append(new.grad)
    assert float(slopes[0].abs().max()) > 1e-6
    assert torch.allclose(*slopes, atol=CLOSE)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tower", "why"),
    [
        ("llama", "text", "by their positions"),
        ("bert", "text", "by their positions"),
        ("dinov3", "vision", "by their positions"),
        ("qwen2_5_vl", "vision", "which none can join"),
    ],
)
def test_where_none_can_join_it_is_said(name: str, tower: str, why: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    bare = run(model, inputs)
    append = method(tokens=lambda call: Tokens(append=call.h[..., :1, :]))(sites=f"{tower}.1.layer")
    with unchanged(model), sc.attach(model, append), pytest.raises(InputError, match=why):
        run(model, inputs)
    assert torch.equal(run(model, inputs), bare)


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (Tokens(append=torch.zeros(1, 31)), r"\(tokens, 32\)"),
        (Tokens(append=torch.zeros(3, 1, 32)), r"\(2, tokens, 32\)"),
        (Tokens(append=torch.zeros(32)), r"\(tokens, 32\)"),
        (Tokens(append=torch.zeros(1, 32), only_this_layer=True), "this layer only"),
    ],
)
def test_what_cannot_be_appended_is_named(tokens: Tokens, why: str) -> None:
    model, inputs = shared("clip"), FAMILIES["clip"].inputs()
    with (
        sc.attach(model, method(tokens=lambda call: tokens)(sites="vision.1.layer")),
        pytest.raises(InputError, match=why),
    ):
        run(model, inputs)


def test_none_can_join_features() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    append = method(features=lambda item: Tokens(append=item.x[:1]))()
    with sc.attach(model, append), pytest.raises(InputError, match="placeholders"):
        model(**inputs)
