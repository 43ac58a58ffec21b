"""Tokens that leave between layers: as if their keys were masked from there on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dense import (
    CLOSE,
    F64,
    assert_follows,
    differs,
    everything,
    generate,
    inputs_of,
    oracle,
    positions,
    recompute,
    subject,
)
from helpers import Exact, assert_as_good_as, cast, greedy, method, shared, unchanged
from torch import Tensor, nn
from zoo import FAMILIES, run, select

import saccade as sc
from core.missing import Leave, as_indices, draw, gone, staying
from saccade.core.errors import AttachError, InputError
from saccade.core.tokens import Tokens, TokensCall, dense_rank

TWO = {"images": (1, 2)}
FAST = ("llama", "mistral", "gpt2", "gpt_oss", "llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mllama")
READ_WHOLE = {"gemma3", "paligemma", "molmo2"}  # pictures see themselves both ways: chunks are another model
RAW = {"mllama", "blip2", "instructblip", "qwen2_5_omni", "qwen2_audio", "phi4_multimodal", "llama4"}
"""Their pictures or sounds cannot be cut into chunks."""
RIGID = {"falcon", "bloom", "gemma3n", "gemma4"}


def generating() -> list[Any]:
    """Decoders that let tokens leave; those beyond the fast ones are slow."""
    without = {"encdec", "hybrid"}
    wanted = [f.values[0] for f in select("generates") if not without & f.values[0].tags]
    return [
        pytest.param(f.name, marks=[] if f.name in FAST else [pytest.mark.slow])
        for f in wanted
        if f.name not in RIGID
    ]


def asked(name: str, **options: Any) -> dict[str, Any]:
    """Inputs with padding and other numbers of pictures where the family has them."""
    tags = FAMILIES[name].tags
    inputs = inputs_of(name, **(TWO if "multi_image" in tags else {}), **options)
    if "vlm" not in tags:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :5] = 0
        inputs["attention_mask"] = mask
    return inputs


def two_drops(inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    return {1: staying(inputs, 1, 0.7), 3: staying(inputs, 3, 0.6)}


@pytest.mark.parametrize("name", generating())
@pytest.mark.parametrize("way", ["greedy", "sampling", "chunks", "no cache"])
def test_a_token_that_left_is_a_key_that_is_masked_from_there_on(name: str, way: str) -> None:
    if way == "chunks" and name in READ_WHOLE | RAW:
        pytest.skip(f"{name} does not read its prompt in chunks")
    options: dict[str, Any] = {
        "greedy": {}, "sampling": {"do_sample": True}, "chunks": {"prefill_chunk_size": 11},
        "no cache": {"use_cache": False},
    }[way]  # fmt: skip
    model, inputs = subject(name), asked(name)
    keep = two_drops(inputs)
    prompt = inputs["input_ids"].shape[1]
    torch.manual_seed(5)
    bare = generate(model, inputs, **options)
    torch.manual_seed(5)
    with sc.attach(model, Leave(keep=keep)):
        out = generate(model, inputs, **options)
    assert_follows(out, recompute(oracle(name), inputs, out.sequences[:, prompt:], gone(keep)), prompt)
    assert differs(out, bare)


def follow_beams(
    out: Any, wanted: Callable[[int, Tensor, Tensor], Tensor], prompt: int, samples: int
) -> None:
    """Every returned hypothesis has at every step the logits that `wanted(i, answers, roots)` finds for the
    i-th of each sample, whose rows in the first pass were `roots`."""
    rows = out.sequences.view(samples, -1, out.sequences.shape[1])
    came = out.beam_indices.view(samples, rows.shape[1], -1)
    for i in range(rows.shape[1]):
        expected = wanted(i, rows[:, i, prompt:], came[:, i, 0])
        for step, logits in enumerate(out.logits):
            got = logits[came[:, i, step]]
            assert float((got - expected[:, prompt - 1 + step]).abs().max()) < CLOSE


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "llava", "qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_beams_and_several_answers_go_on_without_it(name: str) -> None:
    model, inputs = subject(name), asked(name)
    keep = two_drops(inputs)
    with sc.attach(model, Leave(keep=keep)):
        out = generate(model, inputs, num_beams=3, num_return_sequences=2)
    follow_beams(
        out,
        lambda i, answers, roots: recompute(oracle(name), inputs, answers, gone(keep)),
        inputs["input_ids"].shape[1],
        inputs["input_ids"].shape[0],
    )
    assert (out.beam_indices[:, 1:] != out.beam_indices[:, :1]).any()  # some beam changed its row


def test_other_tokens_may_leave_for_every_answer() -> None:
    """Rows of one sample may keep different tokens."""
    model, inputs = subject("llama"), asked("llama")
    answers, prompt = 3, inputs["input_ids"].shape[1]
    keeps = [staying(inputs, seed, 0.6) for seed in range(answers)]
    leave = method(tokens=lambda call: Tokens(torch.stack(keeps, 1).flatten(0, 1)))
    with sc.attach(model, leave(sites="text.1.layer", phases=("prefill",))):
        torch.manual_seed(0)
        out = generate(model, inputs, num_return_sequences=answers, do_sample=True)
    for i, keep in enumerate(keeps):
        mine = out.sequences[i::answers, prompt:]
        wanted = recompute(oracle("llama"), inputs, mine, gone({1: keep}))
        got = torch.stack(list(out.logits), 1)[i::answers]
        assert float((got - wanted[:, prompt - 1 : -1]).abs().max()) < CLOSE


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3"])
def test_padding_on_the_right(name: str) -> None:
    inputs = asked(name, side="right")
    keep = two_drops(inputs)
    model = subject(name)
    given = {**inputs, "position_ids": positions(inputs["attention_mask"])}
    with sc.attach(model, Leave(keep=keep)), Exact(), torch.no_grad():
        got = model(**given).logits
    wanted = recompute(oracle(name), inputs, None, gone(keep))
    left = keep[1] & keep[3] & (inputs["attention_mask"] == 1)
    assert float((got - wanted)[left].abs().max()) < CLOSE
    assert float((got - recompute(oracle(name), inputs))[left].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "mistral"])
def test_masks_indices_and_one_choice_for_all_say_the_same(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    keep = {2: staying(inputs, 2).all(0).expand_as(inputs["input_ids"])}

    def logits(form: Callable[[Tensor], Tensor]) -> Tensor:
        change = lambda _, tokens: Tokens(form(tokens.keep))  # noqa: E731
        with sc.attach(model, Leave(keep=keep, change=change)), torch.no_grad():
            return model(**inputs).logits

    by_mask = logits(lambda k: k)
    for form in (as_indices, lambda k: k[0], lambda k: as_indices(k[0]), lambda k: as_indices(k).int()):
        assert torch.equal(by_mask, logits(form))
    padded = logits(lambda k: nn.functional.pad(as_indices(k), (3, 0), value=-1))
    assert float((by_mask - padded).abs().max()) < 1e-4


def keep_all(call: TokensCall) -> Tokens:
    return Tokens(torch.ones(call.h.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gpt2", "llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mllama"]
)
def test_when_all_stay_nothing_changes_by_a_bit(name: str, dtype: torch.dtype) -> None:
    model, inputs = shared(name, dtype), cast(asked(name), dtype)
    stays = method(tokens=keep_all)(sites="text.*.layer")
    bare = generate(model, inputs, tokens=5)
    with unchanged(model), sc.attach(model, stays):
        out = generate(model, inputs, tokens=5)
        forward = model(**inputs).logits
    assert torch.equal(out.sequences, bare.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, bare.logits, strict=True))
    assert torch.equal(forward, model(**inputs).logits)


# ---- merged values, one layer only ---------------------------------------------------------------


@contextmanager
def changed(model: nn.Module, layer: int, before: Any = None, after: Any = None) -> Any:
    """Plain hooks on a decoder layer: `before(h)` and `after(h_in, h_out)` replace its input and output."""
    module = next(m for p, m in model.named_modules() if p.endswith(f"layers.{layer}") and "vision" not in p)
    kept: dict[str, Tensor] = {}

    def pre(_: nn.Module, args: Any, kwargs: Any) -> Any:
        h = before(args[0]) if before else args[0]
        kept["in"] = h
        return (h, *args[1:]), kwargs

    hooks = [module.register_forward_pre_hook(pre, with_kwargs=True)]
    if after:
        hooks.append(module.register_forward_hook(lambda _, __, out: after(kept["in"], out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl"])
def test_values_take_the_place_of_those_that_stay(name: str) -> None:
    """Each token that stays becomes the mean of itself and its right neighbour."""
    model, inputs = subject(name), asked(name)
    keep, prompt = {2: staying(inputs, 4)}, inputs["input_ids"].shape[1]

    def blend(h: Tensor) -> Tensor:
        return torch.cat([(h[:, 1:] + h[:, :-1]) / 2, h[:, -1:]], 1)

    def merge(call: TokensCall, tokens: Tokens) -> Tokens:
        index = tokens.index(*call.h.shape[:2])
        values = blend(call.h).gather(1, index.clamp_min(0)[..., None].expand(-1, -1, call.h.shape[-1]))
        return Tokens(tokens.keep, values=values)

    with sc.attach(model, Leave(keep=keep, change=merge)):
        out = generate(model, inputs)

    def before(h: Tensor) -> Tensor:
        return torch.cat([blend(h[:, :prompt]), h[:, prompt:]], 1)

    plain = oracle(name)
    with changed(plain, 2, before):
        wanted = recompute(plain, inputs, out.sequences[:, prompt:], gone(keep))
    assert_follows(out, wanted, prompt)
    assert (
        float((wanted - recompute(plain, inputs, out.sequences[:, prompt:], gone(keep))).abs().max()) > 1e-3
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "qwen3_vl"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_for_one_layer_only_they_come_back_as_they_were(name: str, layer: int) -> None:
    model, inputs = subject(name), asked(name)
    prompt = inputs["input_ids"].shape[1]
    keep = staying(inputs, 4)

    def after(h_in: Tensor, h_out: Any) -> Any:
        stays = nn.functional.pad(keep, (0, h_in.shape[1] - prompt), value=True)[..., None]
        if isinstance(h_out, tuple):
            return (torch.where(stays, h_out[0], h_in), *h_out[1:])
        return torch.where(stays, h_out, h_in)

    with sc.attach(model, Leave(keep={layer: keep}, options={"only_this_layer": True})):
        out = generate(model, inputs)
        with Exact(), torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states
    plain = oracle(name)
    with changed(plain, layer, None, after):
        wanted = recompute(plain, inputs, out.sequences[:, prompt:], {layer: ~keep[:, None, None]})
    assert_follows(out, wanted, prompt)
    assert all(h.shape[1] == prompt for h in hidden)


def test_one_layer_only_beside_a_removal_that_lasts() -> None:
    """In either order, in one layer, in the layer above, and over features that were taken out."""
    model, inputs = subject("llama"), asked("llama")
    prompt = inputs["input_ids"].shape[1]
    lasting, once = staying(inputs, 4, 0.7), staying(inputs, 5, 0.7)
    plain = oracle("llama")

    def after(h_in: Tensor, h_out: Any) -> Any:
        stays = nn.functional.pad(once, (0, h_in.shape[1] - prompt), value=True)[..., None]
        return torch.where(stays, h_out, h_in)

    for at in (1, 2):
        for swap in (False, True) if at == 1 else (False,):
            methods = [Leave(keep={1: lasting}), Leave(keep={at: once}, options={"only_this_layer": True})]
            with sc.attach(model, *(methods[::-1] if swap else methods)):
                out = generate(model, inputs)
            stays = lasting | ~once if swap else lasting  # who is aside already cannot be told to leave
            hidden = gone({1: stays})
            hidden[at] = hidden[at] | ~once[:, None, None]
            with changed(plain, at, None, after):
                wanted = recompute(plain, inputs, out.sequences[:, prompt:], hidden)
            assert_follows(out, wanted, prompt)


# ---- renumbered positions ------------------------------------------------------------------------


def closed(ids: Tensor, stays: Tensor) -> Tensor:
    """By hand: positions (sections, batch, tokens) of those that stay, without gaps, from the lowest."""
    new = ids.clone()
    for row in range(stays.shape[0]):
        used = sorted({int(p) for section in ids for p in section[row][stays[row]]})
        rank = {p: used[0] + i for i, p in enumerate(used)}
        for section in range(ids.shape[0]):
            for t in stays[row].nonzero()[:, 0].tolist():
                new[section, row, t] = rank[int(ids[section, row, t])]
    return new


def test_positions_close_up_by_dense_rank() -> None:
    ids = torch.tensor([[3, 5, 5, 9, 11], [0, 2, 4, 6, 8]])
    real = torch.tensor([[True, True, True, False, True], [True] * 5])
    new, gap = dense_rank(ids, real)
    assert new[0][real[0]].tolist() == [3, 4, 4, 5]
    assert new[1].tolist() == [0, 1, 2, 3, 4]
    assert gap.tolist() == [6, 4]
    sections = torch.stack([ids, ids.flip(1)])
    new, gap = dense_rank(sections, torch.ones_like(real))
    assert torch.equal(new, closed(sections, torch.ones_like(real)))


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 9}, {"do_sample": True}], ids=["whole", "chunks", "sampled"]
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_renumbered_before_the_first_layer_it_is_the_shorter_prompt(
    name: str, options: dict[str, Any]
) -> None:
    model, inputs = subject(name), asked(name)
    keep = staying(inputs, 6)
    torch.manual_seed(0)
    with sc.attach(model, Leave(keep={0: keep}, options={"positions": "renumber"})):
        out = generate(model, inputs, **options)
    prompt = inputs["input_ids"].shape[1]
    plain = oracle(name)
    for row in range(2):
        left = keep[row] & (inputs["attention_mask"][row] == 1)
        ids = inputs["input_ids"][row][left][None]
        wanted = recompute(plain, {"input_ids": ids}, out.sequences[row : row + 1, prompt:])
        got = torch.stack(list(out.logits), 1)[row : row + 1]
        assert float((got - wanted[:, ids.shape[1] - 1 :][:, : got.shape[1]]).abs().max()) < CLOSE


@contextmanager
def turned(model: nn.Module, first: int, change: Callable[[Tensor], Tensor]) -> Any:
    """From layer `first` on, the plain model's rotations are those of other positions."""
    rotary = next(
        m
        for p, m in model.named_modules()
        if "Rotary" in type(m).__name__ and "vision" not in p and "visual" not in p
    )
    made: dict[str, Any] = {}

    def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        made.setdefault("ids", ids)
        made.setdefault("x", args[0])

    def pre(_: nn.Module, args: Any, kwargs: Any) -> Any:
        ids = made["ids"]
        sections = ids if ids.ndim == 3 else ids[None]
        new = change(sections.expand(-1, made["x"].shape[0], -1))
        with torch.no_grad():
            embeddings = rotary.forward(made["x"], position_ids=new if ids.ndim == 3 else new[0])
        return args, {**kwargs, "position_embeddings": embeddings}

    layers = [
        m for p, m in model.named_modules()
        if not any(word in p for word in ("vis", "video", "image", "audio"))
        and p.rpartition(".")[0].endswith(".layers") and int(p.rpartition(".")[2]) >= first
    ]  # fmt: skip
    hooks = [rotary.register_forward_hook(note, with_kwargs=True)]
    hooks += [layer.register_forward_pre_hook(pre, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "qwen3_vl", "mistral"])
def test_positions_close_up_from_a_layer_on(name: str, layer: int) -> None:
    """In the prompt and in what follows, also where positions have three sections."""
    model, inputs = subject(name), asked(name)
    keep, prompt = staying(inputs, 6), inputs["input_ids"].shape[1]
    with sc.attach(model, Leave(keep={layer: keep}, options={"positions": "renumber"})):
        out = generate(model, inputs)
    answer = out.sequences[:, prompt:]
    stays = torch.cat([keep, torch.ones_like(answer, dtype=torch.bool)], 1)
    plain = oracle(name)
    stays &= torch.cat([inputs["attention_mask"] == 1, torch.ones_like(answer, dtype=torch.bool)], 1)
    with turned(plain, layer, lambda ids: closed(ids, stays)):
        wanted = recompute(plain, inputs, answer, gone({layer: keep}))
    assert_follows(out, wanted, prompt)
    with sc.attach(model, Leave(keep={layer: keep})):
        assert differs(out, generate(model, inputs))


def test_renumbered_twice() -> None:
    model, inputs = subject("llama"), asked("llama")
    keep, prompt = two_drops(inputs), inputs["input_ids"].shape[1]
    with sc.attach(model, Leave(keep=keep, options={"positions": "renumber"})):
        out = generate(model, inputs)
    answer = out.sequences[:, prompt:]
    later = torch.ones_like(answer, dtype=torch.bool)
    real = inputs["attention_mask"] == 1
    one = torch.cat([keep[1] & real, later], 1)
    both = torch.cat([keep[1] & keep[3] & real, later], 1)
    plain = oracle("llama")
    with turned(plain, 1, lambda ids: closed(ids, one)), turned(plain, 3, lambda ids: closed(ids, both)):
        wanted = recompute(plain, inputs, answer, gone(keep))
    assert_follows(out, wanted, prompt)


def test_learned_positions_cannot_be_renumbered() -> None:
    model, inputs = shared("gpt2"), asked("gpt2")
    with (
        sc.attach(model, Leave(keep={1: staying(inputs)}, options={"positions": "renumber"})),
        pytest.raises(InputError, match="no rotary positions"),
    ):
        model(**inputs)


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llava", "mistral", "qwen3_vl", "mllama"])
def test_logits_keep_their_shape_and_what_left_repeats_the_token_before_it(name: str) -> None:
    model, inputs = subject(name), asked(name)
    keep = two_drops(inputs)
    with sc.attach(model, Leave(keep=keep)), Exact(), torch.no_grad():
        got = model(**inputs).logits
    wanted = recompute(oracle(name), {**inputs}, None, gone(keep))
    stays = keep[1] & keep[3]
    if "position_ids" not in inputs:  # the plain forward does not count padding out
        real = stays & (inputs["attention_mask"] == 1)
    assert got.shape == wanted.shape
    for row in range(got.shape[0]):
        last = None
        for t in range(got.shape[1]):
            last = t if real[row, t] else last
            if last is not None:
                assert float((got[row, t] - wanted[row, last]).abs().max()) < CLOSE


def test_the_loss_on_the_text_is_that_of_the_reduced_prompt() -> None:
    """Pictures carry no label and may leave; the text's loss is that of a prompt without them."""
    model, inputs = subject("llava"), inputs_of("llava")
    picture = inputs["input_ids"] == model.config.image_token_index
    keep = draw(*picture.shape, seed=3) | ~picture
    labels = inputs["input_ids"].masked_fill(picture, -100)
    with sc.attach(model, Leave(keep={0: keep})), Exact(), torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    total, count = 0.0, 0
    plain = oracle("llava")
    with Exact(), torch.no_grad():
        features = plain.model.get_image_features(inputs["pixel_values"]).pooler_output
    for row in range(2):
        ids, stays = inputs["input_ids"][row], keep[row]
        embeds = plain.get_input_embeddings()(ids).clone()
        embeds[picture[row]] = features[row].to(F64)
        with Exact(), torch.no_grad():
            at = torch.arange(len(ids))[stays][None]
            logits = plain(inputs_embeds=embeds[stays][None], position_ids=at).logits[0]
        targets = labels[row][stays][1:]
        total += float(nn.functional.cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    assert abs(float(loss) - total / count) < CLOSE


@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl", "gemma3", "gpt2"])
def test_hidden_states_of_all_layers_have_their_length_and_values(name: str) -> None:
    model, inputs = subject(name), asked(name)
    keep = two_drops(inputs)
    given = {**inputs}
    if FAMILIES[name].tags.isdisjoint({"mrope"}):
        given["position_ids"] = positions(inputs["attention_mask"])
    with sc.attach(model, Leave(keep=keep)), Exact(), torch.no_grad():
        got = model(**given, output_hidden_states=True)
        plainly = model(**given)
    wanted = everything(oracle(name), inputs, None, gone(keep), output_hidden_states=True)
    assert len(got.hidden_states) == len(wanted.hidden_states)
    real = inputs["attention_mask"] == 1
    for layer, (a, b) in enumerate(zip(got.hidden_states, wanted.hidden_states, strict=True)):
        assert a.shape == b.shape
        left = real.clone()
        for drop, stays in keep.items():
            if layer > drop:
                left &= stays
        assert float((a - b)[left].abs().max()) < CLOSE, layer
    assert float((got.logits - plainly.logits)[real].abs().max()) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "mistral"])
def test_removal_loses_no_precision(name: str, dtype: torch.dtype) -> None:
    inputs = cast(asked(name), dtype)
    keep = two_drops(inputs)
    exact = recompute(oracle(name), asked(name), None, gone(keep))
    with torch.no_grad():
        given = {**inputs}
        if "qwen" not in name:
            given["position_ids"] = positions(inputs["attention_mask"])
        with sc.attach(shared(name, dtype), Leave(keep=keep)):
            got = shared(name, dtype)(**given).logits
        plain_model = shared(name, dtype, "dense")
        from dense import spread, without

        with without(plain_model, {k: spread(v, got.shape[1]) for k, v in gone(keep).items()}):
            plain = plain_model(**given).logits
    left = keep[1] & keep[3] & (inputs["attention_mask"] == 1)
    assert_as_good_as(got[left], plain[left], exact[left])


# ---- peeking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 9}, {"use_cache": False}], ids=["whole", "chunks", "no cache"]
)
@pytest.mark.parametrize("name", ["llama", "mistral", "llava"])
def test_a_peek_is_the_call_that_comes(name: str, options: dict[str, Any]) -> None:
    """After another removal below, in every chunk."""
    model, inputs = subject(name), asked(name) if name != "llama" else inputs_of(name)  # without padding
    keep = {1: staying(inputs, 1)}
    keep[1][:, :9] = True  # so that a later chunk is the first in which samples differ
    pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    ahead: list[Any] = []

    def peek(call: TokensCall) -> None:
        seen = call.peek()
        ahead.append((seen.weights(), seen.v, seen.columns("all")))

    def look(call: Any) -> None:
        weights, values, columns = ahead.pop(0)
        pairs.append((weights, call.weights(), values, call.v))
        assert torch.equal(columns, call.columns("all"))

    phases = ("prefill", "extend", "decode")
    looking = method(tokens=peek, observe=look)(
        sites={"tokens": "text.2.layer", "observe": "text.2.self"}, phases=phases
    )
    bare = Leave(keep=keep)
    with sc.attach(model, bare):
        wanted = generate(model, inputs, **options)
    with sc.attach(model, Leave(keep=keep), looking):
        out = generate(model, inputs, **options)
    assert len(pairs) >= 4 and not ahead
    for weights, later, values, v in pairs:
        assert weights.shape == later.shape
        assert float((weights - later).abs().max()) < CLOSE
        assert torch.equal(values, v)
    assert torch.equal(out.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, wanted.logits, strict=True))


# ---- other towers --------------------------------------------------------------------------------


def blocks(model: nn.Module, tower: str) -> list[nn.Module]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and tower in path and len(module) >= 2:
            return list(module)
    raise AssertionError(tower)


LOOKING = [
    ("clip", "vision_model"), ("siglip", "vision_model"), ("siglip_vision", "layers"), ("dinov2", "layer"),
    ("vit", "layer"), ("bert", "layer"), ("llava", "vision_tower"), ("internvl", "vision_tower"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inside"), LOOKING, ids=[name for name, _ in LOOKING])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_in_a_tower_without_masks_the_layers_see_the_rest_alone(name: str, inside: str, layer: int) -> None:
    """The oracle runs the tower's own layers, one by one, on what is left of each sample."""
    model: Any = shared(name, F64)
    inputs = cast(FAMILIES[name].inputs(), F64)
    layers = blocks(model, inside)
    tower = "text" if name == "bert" else "vision"
    came: list[Tensor] = []
    hook = layers[layer].register_forward_pre_hook(
        lambda _, a, k: came.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with Exact(), torch.no_grad():
        run(model, inputs)
    hook.remove()
    h = came[0]
    keep = draw(*h.shape[:2], seed=layer, share=0.6)
    keep[:, 0] = True
    given: list[Tensor] = []
    whole: list[Tensor] = []
    hooks = [
        layers[-1].register_forward_hook(
            lambda _, __, out: whole.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    leave = method(tokens=lambda call: Tokens(keep))(sites=f"{tower}.{layer}.layer")
    wide = method(tokens=lambda call: given.append(call.h))(sites=f"{tower}.2.layer")
    with sc.attach(model, leave, wide), Exact(), torch.no_grad():
        run(model, inputs)
    for each in hooks:
        each.remove()
    assert whole[0].shape == h.shape
    assert given[0].shape[1] == int(keep.sum(1).max())
    for row in range(h.shape[0]):
        left = h[row : row + 1, keep[row]]
        with Exact(), torch.no_grad():
            for module in layers[layer:]:
                out = module(
                    left, **({"attention_mask": None} if name not in ("vit", "dinov2", "internvl") else {})
                )
                left = out[0] if isinstance(out, tuple) else out
        assert float((whole[0][row, keep[row]] - left[0]).abs().max()) < CLOSE


def test_a_timm_tower_loses_tokens_too() -> None:
    pytest.importorskip("timm")
    model: Any = shared("timm_vit", F64)
    (pixels,) = cast(FAMILIES["timm_vit"].inputs(), F64)
    came: list[Tensor] = []
    hook = model.blocks[1].register_forward_pre_hook(lambda _, a: came.append(a[0]))
    model(pixels)
    hook.remove()
    keep = draw(came[0].shape[1], seed=0, share=0.6)
    keep[0] = True
    with sc.attach(model, method(tokens=lambda call: Tokens(keep))(sites="vision.1.layer")), torch.no_grad():
        got = model(pixels)
        features = model.forward_features(pixels)
    left = came[0][:, keep]
    for block in model.blocks[1:]:
        left = block(left)
    assert float((features[:, keep] - model.norm(left)).abs().max()) < CLOSE
    assert got.shape == model(pixels).shape


def test_features_of_an_earlier_layer_keep_their_number() -> None:
    """LLaVA reads the last layer but one; tokens that left there repeat those before them."""
    model, inputs = subject("llava"), inputs_of("llava")
    keep = draw(37, seed=0)
    keep[0] = keep[-1] = True
    out: dict[str, Tensor] = {}
    for where in (1, 2):
        with (
            sc.attach(model, method(tokens=lambda call: Tokens(keep))(sites=f"vision.{where}.layer")),
            Exact(),
            torch.no_grad(),
        ):
            out[where] = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    with Exact(), torch.no_grad():
        bare = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [f.shape for f in out[1]] == [f.shape for f in bare]
    assert torch.equal(torch.cat(list(out[2])), torch.cat(list(bare)))  # the last layer is not read
    last = 0
    for token in range(37):
        last = token if keep[token] else last
        if token:
            assert torch.equal(out[1][0][token - 1], out[1][0][last - 1]) or last == 0
    assert float((out[1][0] - bare[0]).abs().max()) > 1e-3


def test_what_is_left_of_a_tower_is_still_told_apart() -> None:
    """Two samples lose different patches, and the class token stays where it is."""
    model, inputs = shared("clip", F64), cast(FAMILIES["clip"].inputs(), F64)
    told: list[Any] = []

    def leave(call: TokensCall) -> Tokens:
        keep = torch.ones(call.h.shape[:2], dtype=torch.bool)
        keep[0, 3:5] = False
        return Tokens(keep)

    def tell(call: Any) -> None:
        told.append([call.columns(name)[:, 0, 0].tolist() for name in ("special", "image")])

    sites = {"tokens": "vision.1.layer", "observe": "vision.1.self"}
    with sc.attach(model, method(tokens=leave, observe=tell)(sites=sites)):
        run(model, inputs)
    ((special, image),) = told
    tokens = len(special[0])
    assert special[0] == [i == 2 for i in range(tokens)] and special[1] == [i == 0 for i in range(tokens)]
    assert image[0] == [i > 2 for i in range(tokens)] and image[1] == [i > 0 for i in range(tokens)]


# ---- refusals ------------------------------------------------------------------------------------


def half(call: TokensCall) -> Tokens:
    return Tokens(torch.arange(call.h.shape[1]) % 2 == 0)


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("falcon", "text.1.layer", "alibi"),
        ("bloom", "text.1.layer", "alibi"),
        ("deberta_v2", "text.1.layer", "relative_pos"),
        ("t5", "text.0.layer", "position_bias"),
        ("t5", "encoder.0.layer", "position_bias"),
        ("swin", "vision.1.layer", "input_dimensions"),
        ("mllama", "vision.1.layer", "more than one stack"),
        ("blip", "text.1.layer", "interface"),
    ],
)
def test_layers_that_cannot_lose_tokens_say_so_when_attached(name: str, site: str, why: str) -> None:
    model = shared(name)
    with unchanged(model), pytest.raises(AttachError, match=why):
        sc.attach(model, method(tokens=half)(sites=site))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "sam_vision"])
def test_packed_and_gridded_towers_say_so(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    run(model, inputs)  # some keep what they measured of a first picture
    with (
        unchanged(model),
        sc.attach(model, method(tokens=half)(sites="vision.1.layer")),
        pytest.raises(InputError, match="grid"),
    ):
        run(model, inputs)


@pytest.mark.parametrize(
    ("name", "tower"), [("blip", "vision"), ("timm_vit", "vision"), ("torch_encoder", "text")]
)
def test_where_nothing_can_be_masked_every_sample_keeps_as_many(name: str, tower: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()

    def ragged(call: TokensCall) -> Tokens:
        keep = torch.ones(call.h.shape[:2], dtype=torch.bool)
        keep[0, 3:5] = False
        return Tokens(keep)

    with (
        sc.attach(model, method(tokens=ragged)(sites=f"{tower}.1.layer")),
        pytest.raises(InputError, match="as many"),
    ):
        run(model, inputs)
    with sc.attach(model, method(tokens=half)(sites=f"{tower}.1.layer")):
        assert run(model, inputs).isfinite().all()


BAD: list[tuple[Callable[[TokensCall], Tensor], str]] = [
    (lambda call: torch.ones(call.h.shape[1] - 1, dtype=torch.bool), "which of"),
    (lambda call: torch.arange(call.h.shape[1] + 1), "cannot stay"),
    (lambda call: torch.zeros(call.h.shape[1], dtype=torch.bool), "no token at all"),
    (lambda call: torch.empty(0, dtype=torch.long), "no token at all"),
    (lambda call: torch.full((2, 3), -1), "no token at all"),
    (lambda call: torch.tensor([4, 2, 7]), "ascending"),
    (lambda call: torch.tensor([2, 2, 7]), "ascending"),
    (lambda call: torch.tensor([2, -1, 7]), "ascending"),
    (lambda call: torch.ones(3, call.h.shape[1], dtype=torch.bool), "3 samples"),
]


@pytest.mark.parametrize(("keep", "why"), BAD)
def test_a_choice_that_makes_no_sense_is_named(keep: Callable[[TokensCall], Tensor], why: str) -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    bare = run(model, inputs)
    leave = method(tokens=lambda call: Tokens(keep(call)))
    with sc.attach(model, leave(sites="text.1.layer")), pytest.raises(InputError, match=why):
        model(**inputs)
    assert torch.equal(run(model, inputs), bare)


def test_a_chunk_may_lose_all_of_a_samples_tokens() -> None:
    """What no whole prompt may, a chunk may: the others remain."""
    model, inputs = subject("llama"), asked("llama")
    keep = staying(inputs, 3)
    keep[1, 8:16] = False
    keep[:, 16:20] = False
    prompt = inputs["input_ids"].shape[1]
    for size in (4, 8):
        with sc.attach(model, Leave(keep={1: keep})):
            out = generate(model, inputs, prefill_chunk_size=size)
        wanted = recompute(oracle("llama"), inputs, out.sequences[:, prompt:], gone({1: keep}))
        assert_follows(out, wanted, prompt)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lfm2", "one state of all that was read"),
        pytest.param("gemma4", "only the tokens whose logits are asked for", marks=pytest.mark.slow),
        pytest.param("gemma3n", "keeps its tokens in a grid", marks=pytest.mark.slow),
        pytest.param("depth_anything", "a later part does not take fewer", marks=pytest.mark.slow),
    ],
)
def test_where_none_can_leave_it_is_said(name: str, reason: str) -> None:
    model, f = shared(name), FAMILIES[name]
    if name == "gemma4" and not hasattr(model.model.language_model, "_maybe_slice_kv_shared_inputs"):
        pytest.skip("gemma4 reads all tokens in every layer in this version")
    half = method(tokens=lambda call: Tokens(torch.arange(call.h.shape[1]) % 4 < 3))
    site = "text.1.layer" if "generates" in f.tags else "vision.1.layer"
    with unchanged(model), sc.attach(model, half(sites=site)), pytest.raises(InputError, match=reason):
        greedy(model, f.inputs(), 2) if "generates" in f.tags else run(model, f.inputs())
