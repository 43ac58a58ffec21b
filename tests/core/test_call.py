"""One attention call: it reads what the model computes, and what it edits is read by those after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Exact, Look, assert_as_good_as, cast, discover, greedy, heads_input, method, rms, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from zoo import FAMILIES, run
from zoo.base import words

import saccade as sc
from saccade.core import call as call_module
from saccade.core.call import AttentionCall, put_rows, take_rows
from saccade.core.errors import AttachError, InputError

DECODERS = ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "falcon", "bloom"]


def attentions(name: str, inputs: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model's own, by its eager operator: an output with `attentions`."""
    model = shared(name, dtype, "eager")
    with torch.no_grad(), Exact():
        return model(**cast(inputs, dtype), output_attentions=True)


def looked(name: str, inputs: Any, tell: Any, sites: str = "text.*.self") -> dict[str, Any]:
    look = Look(tell, sites=sites)
    with sc.attach(shared(name), look):
        run(shared(name), inputs)
    return {site: told for site, _, told in look.seen}


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return {"input_ids": words(2, 24), "attention_mask": mask}


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_weights_are_those_of_the_models_eager_operator(name: str, masked: str) -> None:
    inputs = FAMILIES[name].inputs() if masked == "none" else padded(masked)
    real = inputs.get("attention_mask", torch.ones(2, 24)) != 0
    got = looked(name, inputs, lambda call: call.weights())
    plain, exact = attentions(name, inputs).attentions, attentions(name, inputs, torch.float64).attentions
    assert len(got) == len(plain)
    for layer, w in enumerate(got.values()):
        rows = [t.transpose(1, 2)[real] for t in (w, plain[layer], exact[layer])]
        assert_as_good_as(*rows)


def test_a_model_that_is_told_to_attend_by_hand_is_read_there() -> None:
    model, inputs = shared("falcon", implementation="eager"), FAMILIES["falcon"].inputs()
    look = Look(lambda call: call.weights())
    with sc.attach(model, look):
        run(model, inputs)
    told = attentions("falcon", inputs).attentions
    assert len(look.seen) == len(told)
    assert all(torch.equal(w, told[layer]) for layer, (_, _, w) in enumerate(look.seen))


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_weights_of_encoder_decoder_and_cross_attention(name: str) -> None:
    inputs = FAMILIES[name].inputs()
    if name == "t5":
        inputs["attention_mask"] = torch.ones(2, 10, dtype=torch.long)
        inputs["attention_mask"][1, 6:] = 0
    plain, exact = attentions(name, inputs), attentions(name, inputs, torch.float64)
    places = {
        "encoder.*.self": "encoder_attentions",
        "text.*.self": "decoder_attentions",
        "text.*.cross": "cross_attentions",
    }
    for sites, key in places.items():
        got = looked(name, inputs, lambda call: call.weights(), sites)
        assert len(got) == len(plain[key])
        for layer, w in enumerate(got.values()):
            assert_as_good_as(w, plain[key][layer], exact[key][layer])


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl", "paligemma", "pixtral"])
def test_weights_of_a_text_tower_that_sees(name: str) -> None:
    inputs = FAMILIES[name].inputs(images=(1, 2))
    real = inputs["attention_mask"] != 0
    got = looked(name, inputs, lambda call: call.weights())
    plain, exact = attentions(name, inputs).attentions, attentions(name, inputs, torch.float64).attentions
    for layer, w in enumerate(got.values()):
        assert_as_good_as(*[t.transpose(1, 2)[real] for t in (w, plain[layer], exact[layer])])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "t5", "whisper"])
def test_weights_while_decoding(name: str) -> None:
    inputs = FAMILIES[name].inputs()
    if name not in ("t5", "whisper"):
        inputs = dict(padded("left"))
    key = "decoder_attentions" if name in ("t5", "whisper") else "attentions"
    options = {"output_attentions": True, "return_dict_in_generate": True}
    with Exact():
        plain, exact = (
            greedy(shared(name, dtype, "eager"), cast(inputs, dtype), 6, **options)
            for dtype in (torch.float32, torch.float64)
        )
    look = Look(lambda call: call.weights("last"), sites="text.*.self")
    with sc.attach(shared(name), look):
        ids = greedy(shared(name), inputs, 6)
    for out in (plain, exact):
        assert torch.equal(ids[:, -6:], out.sequences[:, -6:])
    layers = len(plain[key][0])
    assert len(look.seen) == layers * len(plain[key])
    for number, (_, _, w) in enumerate(look.seen):
        step, layer = divmod(number, layers)
        theirs, best = (out[key][step][layer][:, :, -1:] for out in (plain, exact))
        keys = min(w.shape[-1], theirs.shape[-1])  # a window's last keys
        assert_as_good_as(w[..., -keys:], theirs[..., -keys:], best[..., -keys:])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5", "gpt2"])
def test_what_is_asked_for_is_a_part_of_the_whole(name: str) -> None:
    index = torch.tensor([[0, 4], [3, 1]])

    def tell(call: AttentionCall) -> None:
        w, s = call.weights(), call.scores()
        rows = w.shape[2]
        for asked, expected in {
            "all": slice(None),
            "last": slice(-1, None),
            2: slice(2, 3),
            -1: slice(-1, None),
            rows: slice(0, 0),
            -rows - 1: slice(0, 0),
        }.items():
            torch.testing.assert_close(call.weights(asked), w[:, :, expected])
            torch.testing.assert_close(call.scores(asked), s[:, :, expected])
        for asked in (slice(1, 4), slice(None, None, 2), slice(4, 1), slice(-3, None), slice(None, None, -1)):
            expected = torch.arange(rows)[asked] if (asked.step or 1) > 0 else torch.arange(rows).flip(0)
            torch.testing.assert_close(call.weights(asked), w[:, :, expected])
        torch.testing.assert_close(call.weights(torch.tensor([4, 0, -1])), w[:, :, [4, 0, -1]])
        picked = torch.stack([w[b][:, index[b]] for b in range(2)])
        torch.testing.assert_close(call.weights(index), picked)
        for heads in [(1,), [3, 0], torch.tensor([2, 1]), (-1,), range(2)]:
            torch.testing.assert_close(call.weights(heads=heads), w[:, list(map(int, heads))])
            torch.testing.assert_close(call.scores(slice(1, 3), heads), s[:, list(map(int, heads)), 1:3])
            torch.testing.assert_close(call.weights(index, heads), picked[:, list(map(int, heads))])

    assert looked(name, FAMILIES[name].inputs(), tell)


def test_asking_for_rows_that_a_decoding_step_does_not_have_gives_none() -> None:
    look = Look(lambda call: call.weights("prompt").shape[2], sites="text.0.self")
    with sc.attach(shared("llama"), look):
        greedy(shared("llama"), FAMILIES["llama"].inputs(), 3)
    assert [rows for _, _, rows in look.seen] == [24, 0, 0]


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gpt_oss", "t5", "whisper", "vit", "timm_vit", "sd3", "torch_mha"]
)
def test_weights_times_values_are_the_native_output(name: str) -> None:
    pairs = []

    def tell(call: AttentionCall) -> None:
        assert call.out is not None
        applied = call.apply(call.weights())
        pairs.append((applied, call.native(), call.out))
        q, k, v = (t.double() for t in (call.q, call.k, call.v))
        torch.testing.assert_close(call.native(v=2 * call.v), 2 * call.out, atol=1e-5, rtol=1e-5)
        assert (q.shape[:2], k.shape[:2]) == ((call.out.shape[0], call.out.shape[1]), v.shape[:2])

    sites = "|".join(s.name for s in discover(shared(name)) if s.seam != "module")
    looked(name, FAMILIES[name].inputs(), tell, sites)
    assert len(pairs) >= 1
    for applied, native, out in pairs:
        assert torch.equal(native, out)
        torch.testing.assert_close(applied, out, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_low_precision_reads_and_edits_within_the_rule(name: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build().to(dtype)
    exact_model = FAMILIES[name].build().to(dtype).double()
    inputs = FAMILIES[name].inputs()
    eager = FAMILIES[name].build(attn_implementation="eager").to(dtype)
    key = "decoder_attentions" if name == "t5" else "attentions"
    with torch.no_grad(), Exact():
        plain = eager(**inputs, output_attentions=True)
        exact_eager = FAMILIES[name].build(attn_implementation="eager").to(dtype).double()
        exact = exact_eager(**inputs, output_attentions=True)
    look = Look(lambda call: call.weights(), sites="text.0.self")
    with sc.attach(model, look):
        run(model, inputs)
    assert look.seen[0][2].dtype == torch.float32
    assert_as_good_as(look.seen[0][2], plain[key][0], exact[key][0])
    with Exact():
        bare, best = run(model, inputs), run(exact_model, inputs)
    for event in ("weights", "scores"):
        with sc.attach(model, method(**{event: lambda call, t: t * 1.0})(sites="text.*.self")):
            got = run(model, inputs)
        assert got.dtype == dtype
        assert_as_good_as(got, bare, best)
    with sc.attach(model, method(bias=lambda call: torch.zeros(call.k.shape[2]))(sites="text.*.self")):
        assert_as_good_as(run(model, inputs), bare, best)


def test_packed_pictures_see_only_themselves() -> None:
    """The equation, per picture and window, from the module's own projections."""
    model, inputs = shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(images=(1, 2))
    site = next(s for s in discover(model) if s.name == "vision.1.self")  # attends to whole pictures
    given: list[Any] = []
    hook = site.module.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    look = Look(lambda call: (call.weights(), call.columns("image").shape), sites=site.name)
    try:
        with sc.attach(model, look):
            run(model, inputs)
    finally:
        hook.remove()
    (states,), options = given[0]
    with torch.no_grad():
        q, k, _ = site.module.qkv(states).view(len(states), 3, 4, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *options["position_embeddings"])
        s = torch.einsum("qhd,khd->hqk", q, k).double() * q.shape[-1] ** -0.5
    ends = options["cu_seqlens"].tolist()
    assert ends[1:] == inputs["image_grid_thw"].prod(1).cumsum(0).tolist()
    assert len(look.seen) == len(ends) - 1
    for (_, _, (w, columns)), start, stop in zip(look.seen, ends, ends[1:]):
        expected = s[:, start:stop, start:stop].softmax(-1)
        assert columns == (1, 1, 1, stop - start)
        torch.testing.assert_close(w[0].double(), expected, atol=1e-6, rtol=1e-5)


def plain_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> AttentionCall:
    """A call outside of any model."""
    from types import SimpleNamespace

    pass_: Any = SimpleNamespace(
        logical_end=lambda site, tokens: k.shape[2],
        phase="prefill",
        span=lambda rows, call: slice(0, q.shape[2]),
    )
    site: Any = SimpleNamespace(name="text.0.self", kind="self", tower="text")
    options = {"scale": None, "causal": False, **options}
    return AttentionCall(site, q, k, v, mask, operator=lambda call: call.q, pass_=pass_, **options)


@settings(max_examples=60)
@given(
    batch=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2, 4]),
    queries=st.sampled_from([1, 5, 9]),
    extra=st.integers(0, 4),
    kind=st.sampled_from(["none", "bool", "float", "padding", "segments"]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_equation(
    batch: int, groups: int, queries: int, extra: int, kind: str, causal: bool, window: int | None,
    softcap: float | None, sinks: bool, biased: bool, seed: int,
) -> None:  # fmt: skip
    """Scores, masks, windows, caps, sinks and position terms, against loops in float64."""
    noise = torch.Generator().manual_seed(seed)
    heads, dim = 4, 3
    keys = queries + (0 if kind == "segments" else extra)
    q = torch.randn(batch, heads, queries, dim, generator=noise)
    k = torch.randn(batch, heads // groups, keys, dim, generator=noise)
    sink = torch.randn(heads, generator=noise) if sinks else None
    position = torch.randn(1, heads, queries, keys, generator=noise) if biased else None
    see = torch.ones(batch, queries, keys, dtype=torch.bool)
    term = torch.zeros(batch, queries, keys)
    mask: Tensor | None = None
    segments: Tensor | None = None
    if kind in ("bool", "float"):
        chosen = torch.rand(batch, 1, queries, keys, generator=noise) < 0.7
        chosen[..., -1] = True
        see &= chosen[:, 0]
        mask = chosen
        if kind == "float":
            drawn = torch.randn(batch, 1, queries, keys, generator=noise)
            term = drawn[:, 0]
            mask = drawn.masked_fill(~chosen, torch.finfo(torch.float32).min)
    elif kind == "padding":
        mask = torch.ones(batch, keys, dtype=torch.long)
        mask[0, : keys - queries] = 0
        see[0, :, : keys - queries] = False
    if kind == "segments":
        segments = torch.tensor([0, queries // 2, queries]) if queries > 1 else torch.tensor([0, 1])
        part = (torch.arange(queries) >= segments[1]).long() if queries > 1 else torch.zeros(1)
        see &= part[:, None] == part[None, :]
    if kind not in ("bool", "float"):  # a full mask says it all
        for i in range(queries):
            for j in range(keys):
                at = keys - queries + i
                if (causal and j > at) or (window is not None and j <= at - window):
                    see[:, i, j] = False
    call = plain_call(
        q, k, k, mask, causal=causal, window=window, softcap=softcap, sinks=sink, position_bias=position,
        segments=segments,
    )  # fmt: skip
    got = call.weights()
    s = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(groups, 1)) / dim**0.5
    s = torch.tanh(s / softcap) * softcap if softcap else s
    s = s + term[:, None] + (0 if position is None else position)
    e = s.exp() * see[:, None]
    total = e.sum(-1, keepdim=True) + (0 if sink is None else sink.double().exp()[None, :, None, None])
    rows = see.any(-1)[:, None].expand(-1, heads, -1)  # a row that sees nothing has no right answer
    torch.testing.assert_close(got.double()[rows], (e / total)[rows], atol=1e-6, rtol=1e-4)
    assert got.isfinite().all()


@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True), ragged=st.booleans())
def test_rows_taken_and_put_back_are_where_they_were(rows: list[int], ragged: bool) -> None:
    t = torch.randn(2, 3, 5, 4)
    span: Any = torch.tensor([rows, rows[::-1]]) if ragged else slice(min(rows), max(rows) + 1)
    taken = take_rows(t, span)
    for b in range(2):
        index = span[b] if ragged else torch.arange(5)[span]
        assert torch.equal(taken[b], t[b][:, index])
    changed = put_rows(t, span, taken + 1)
    assert torch.equal(take_rows(changed, span), taken + 1)
    assert torch.equal((changed != t).any(-1).any(1).sum(1), torch.full((2,), taken.shape[2]))
    assert torch.equal(put_rows(changed, span, taken), t)


# ---- columns and rows --------------------------------------------------------------------------------------


def test_columns_and_rows_are_shaped_to_the_scores() -> None:
    inputs = FAMILIES["llava"].inputs(images=(1, 2))
    tokens = inputs["input_ids"].shape[1]
    image = inputs["input_ids"] == 3

    def tell(call: AttentionCall) -> None:
        queries = call.q.shape[2]
        length = tokens + len(look.at("text.0.self"))
        assert call.columns("image").shape == (2, 1, 1, length)
        assert torch.equal(call.columns("image")[:, 0, 0, :tokens], image)
        assert call.rows("image").shape == (2, 1, queries, 1)
        assert torch.equal(
            call.rows("image")[:, 0, :, 0], image if queries > 1 else torch.zeros(2, 1, dtype=torch.bool)
        )
        assert call.rows("generated").all() == (queries == 1)

    look = Look(tell, sites="text.0.self")
    with sc.attach(shared("llava"), look):
        greedy(shared("llava"), inputs, 3)
    assert len(look.seen) == 3


def test_rows_speak_of_the_rows_that_the_event_sees() -> None:
    inputs = FAMILIES["llava"].inputs(images=(1, 1))
    image = inputs["input_ids"] == 3
    seen = []

    def weights(call: AttentionCall, w: Tensor) -> Tensor:
        seen.append((w.shape[2], call.rows("image")))
        return w

    with sc.attach(shared("llava"), method(weights=weights)(sites="text.0.self", rows="image")):
        run(shared("llava"), inputs)
    ((rows, mask),) = seen
    first, last = int(image.any(0).nonzero()[0]), int(image.any(0).nonzero()[-1]) + 1
    assert rows == last - first
    assert torch.equal(mask[:, 0, :, 0], image[:, first:last])


def test_columns_of_a_sliding_cache_are_its_last() -> None:
    look = Look(lambda call: (call.k.shape[2], call.columns("generated").sum().item()), sites="text.0.self")
    with sc.attach(shared("mistral"), look):
        greedy(shared("mistral"), FAMILIES["mistral"].inputs(), 11)
    keys, generated = zip(*[told for _, _, told in look.seen[1:]])
    assert set(keys) == {8}
    assert list(generated) == [2 * min(i, 8) for i in range(1, 11)]


# ---- editing -----------------------------------------------------------------------------------------------


def reference(inputs: Any, edit: Any, name: str = "llama") -> Tensor:
    """Input of the first layer's W_o, by the equation in float64 from its q and k projections."""
    model: Any = shared(name, torch.float64)
    attention = model.model.layers[0].self_attn
    with torch.no_grad(), Exact():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs["input_ids"]))
        batch, tokens, _ = x.shape
        q, k, v = (
            p(x).view(batch, tokens, -1, 16).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = model.model.rotary_emb(x, torch.arange(tokens)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        s = q @ k.transpose(-1, -2) / 4
        s = s.masked_fill(torch.ones(tokens, tokens).tril() == 0, float("-inf"))
        return edit(s, v).transpose(1, 2).reshape(batch, tokens, -1)


def head_outputs(inputs: Any, *methods: Any) -> Tensor:
    model = shared("llama")
    with sc.attach(model, *methods):
        return heads_input(model, "model.layers.0.self_attn.o_proj", lambda: run(model, inputs))[0]


def assert_equation(got: Tensor, inputs: Any, edit: Any) -> None:
    """Against the equation, at most twice the error of plain attention."""
    plain, exact = head_outputs(inputs), reference(inputs, lambda s, v: s.softmax(-1) @ v)
    edited = reference(inputs, edit)
    assert rms(got - edited) / rms(edited) <= 2 * rms(plain - exact) / rms(exact)
    assert rms(exact - edited) > 1e-4  # the edit is one


TERM = torch.linspace(-1, 1, 24)
LLAMA = FAMILIES["llama"].inputs()


def test_a_bias_enters_before_the_softmax() -> None:
    got = head_outputs(LLAMA, method(bias=lambda call: TERM)(sites="text.0.self"))
    assert_equation(got, LLAMA, lambda s, v: (s + TERM).softmax(-1) @ v)


def test_two_biases_add_and_an_editor_of_weights_sees_both() -> None:
    bias = method(bias=lambda call: TERM[None, None, None])
    heads = torch.arange(4.0).view(1, 4, 1, 1)
    other = method(bias=lambda call: heads * TERM)
    edit = method(weights=lambda call, w: w.square())
    got = head_outputs(
        LLAMA, bias(sites="text.0.self"), other(sites="text.0.self"), edit(sites="text.0.self")
    )
    assert_equation(got, LLAMA, lambda s, v: (s + TERM + heads * TERM).softmax(-1).square() @ v)


def test_a_bias_under_padding_keeps_what_is_masked_masked() -> None:
    inputs = padded("left")
    look = Look(lambda call: call.weights(), sites="text.*.self")
    with sc.attach(shared("llama"), method(bias=lambda call: TERM * 3)(sites="text.*.self"), look):
        out = run(shared("llama"), inputs)
    assert out.isfinite().all()
    for _, _, w in look.seen:
        assert (w[1, :, 7:, :7] == 0).all()


def test_weights_include_the_bias_and_native_ones_do_not() -> None:
    bare = looked("llama", LLAMA, lambda call: call.weights(), "text.0.self")["text.0.self"]
    look = Look(lambda call: (call.weights(), call.weights(native=True), call.scores()), sites="text.0.self")
    with sc.attach(shared("llama"), method(bias=lambda call: TERM)(sites="text.0.self"), look):
        run(shared("llama"), LLAMA)
    edited, native, scores = look.seen[0][2]
    assert torch.equal(native, bare)
    expected = bare * TERM.exp()
    torch.testing.assert_close(edited, expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(scores.softmax(-1), edited)


def test_native_weights_are_from_before_changed_inputs() -> None:
    bare = looked("llama", LLAMA, lambda call: call.weights(), "text.0.self")["text.0.self"]
    look = Look(lambda call: (call.weights(), call.weights(native=True)), sites="text.0.self")
    with sc.attach(
        shared("llama"), method(inputs=lambda call, q, k, v: (2 * q, k, v))(sites="text.0.self"), look
    ):
        run(shared("llama"), LLAMA)
    edited, native = look.seen[0][2]
    assert torch.equal(native, bare)
    expected = bare.square() / bare.square().sum(-1, keepdim=True)
    torch.testing.assert_close(edited, expected)


def test_a_later_observer_reads_edited_weights_of_the_rows_and_heads_that_were_edited() -> None:
    first = method(weights=lambda call, w: w * 2)(sites="text.0.self", rows="last", heads=(1,))
    second = method(weights=lambda call, w: w + 1)(sites="text.0.self", rows=3, heads=(0, 1))
    look = Look(
        lambda call: {
            "all": call.weights(), "last": call.weights("last"), "one": call.weights(3, heads=(1, 2)),
            "index": call.weights(torch.tensor([[23, 3], [3, 5]])), "native": call.weights(native=True),
        },
        sites="text.0.self",
    )  # fmt: skip
    with sc.attach(shared("llama"), first, second, look):
        run(shared("llama"), LLAMA)
    told = look.seen[0][2]
    expected = told["native"].clone()
    expected[:, 1, -1] *= 2
    expected[:, :2, 3] += 1
    torch.testing.assert_close(told["all"], expected)
    torch.testing.assert_close(told["last"], expected[:, :, -1:])
    torch.testing.assert_close(told["one"], expected[:, [1, 2], 3:4])
    torch.testing.assert_close(told["index"], torch.stack([expected[0][:, [23, 3]], expected[1][:, [3, 5]]]))


def test_two_editors_with_their_own_rows_and_heads() -> None:
    first = method(weights=lambda call, w: w * 2)(sites="text.0.self", rows="last", heads=(1,))
    second = method(scores=lambda call, s: s * 3)(sites="text.0.self", rows=4, heads=(0, 2))

    def edit(s: Tensor, v: Tensor) -> Tensor:
        s = s.clone()
        s[:, [0, 2], 4] *= 3
        w = s.softmax(-1)
        w[:, 1, -1] *= 2
        return w @ v

    for methods in ((first, second), (second, first)):
        got = head_outputs(LLAMA, *methods)
        assert_equation(got, LLAMA, edit)
        bare = head_outputs(LLAMA)
        differs = (got != bare).view(2, 24, 4, 16).any(-1).any(0)
        assert not differs[:, 3].any()  # nobody's head


def test_editors_act_in_the_order_of_attachment() -> None:
    double, add = method(weights=lambda call, w: w * 2), method(weights=lambda call, w: w + 1)
    got = head_outputs(LLAMA, double(sites="text.0.self"), add(sites="text.0.self"))
    assert_equation(got, LLAMA, lambda s, v: (s.softmax(-1) * 2 + 1) @ v)
    got = head_outputs(LLAMA, add(sites="text.0.self"), double(sites="text.0.self"))
    assert_equation(got, LLAMA, lambda s, v: ((s.softmax(-1) + 1) * 2) @ v)


def test_editors_with_equal_options_are_two() -> None:
    from dataclasses import dataclass

    from saccade.core.method import Method

    @dataclass
    class Add(Method):  # compared by its options, as a plain dataclass is
        sites: Any = "text.0.self"

        def weights(self, call: AttentionCall, w: Tensor) -> Tensor:
            return w + 1

    got = head_outputs(LLAMA, Add(), Add())
    assert_equation(got, LLAMA, lambda s, v: (s.softmax(-1) + 2) @ v)


def test_the_last_row_is_each_samples_last_real_one() -> None:
    inputs = padded("right")
    model = shared("llama")
    path = "model.layers.0.self_attn.o_proj"
    bare = heads_input(model, path, lambda: run(model, inputs))[0]
    with sc.attach(model, method(weights=lambda call, w: w * 2)(sites="text.0.self", rows="last")):
        got = heads_input(model, path, lambda: run(model, inputs))[0]
    differs = (got != bare).any(-1)
    expected = torch.zeros(2, 24, dtype=torch.bool)
    expected[0, 23] = expected[1, 16] = True
    assert torch.equal(differs, expected)
    torch.testing.assert_close(got[expected], 2 * bare[expected])


def test_ragged_and_common_rows_together() -> None:
    inputs = padded("right")
    last = method(weights=lambda call, w: w * 2)(sites="text.0.self", rows="last")
    one = method(weights=lambda call, w: w * 3)(sites="text.0.self", rows=16)
    look = Look(lambda call: call.weights(), sites="text.0.self")
    model, path = shared("llama"), "model.layers.0.self_attn.o_proj"
    bare = heads_input(model, path, lambda: run(model, inputs))[0]
    with sc.attach(model, last, one, look):
        got = heads_input(model, path, lambda: run(model, inputs))[0]
    expected = bare.clone()
    expected[0, 23] *= 2
    expected[1, 16] *= 6
    expected[0, 16] *= 3
    torch.testing.assert_close(got, expected)
    sums = look.seen[0][2].sum(-1)
    assert torch.allclose(sums[0, :, [16, 23]], torch.tensor([3.0, 2.0]))
    assert torch.allclose(sums[1, :, 16], torch.tensor(6.0))


@pytest.mark.parametrize("rows", ["all", "last"])
@pytest.mark.parametrize("heads", [None, (0, 3)])
def test_edits_in_pieces_equal_edits_at_once(monkeypatch: pytest.MonkeyPatch, rows: str, heads: Any) -> None:
    def edits() -> list[Any]:
        return [
            method(scores=lambda call, s: s * 1.5 + call.rows("text"))(
                sites="text.*.self", rows=rows, heads=heads
            ),
            method(weights=lambda call, w: w / (1 + w))(sites="text.*.self"),
            Look(lambda call: call.weights(slice(3, 20)), sites="text.*.self"),
        ]

    whole = edits()
    with sc.attach(shared("mistral"), whole):
        expected = run(shared("mistral"), LLAMA)
    sizes = []
    apply = AttentionCall.apply
    monkeypatch.setattr(AttentionCall, "apply", lambda call, w: (sizes.append(w.shape[2]), apply(call, w))[1])
    monkeypatch.setattr(call_module, "CHUNK", 5 * 2 * 4 * 24)
    pieces = edits()
    with sc.attach(shared("mistral"), pieces):
        got = run(shared("mistral"), LLAMA)
    assert max(sizes) == 5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for (_, _, a), (_, _, b) in zip(whole[2].seen, pieces[2].seen):
        torch.testing.assert_close(a, b)


def test_too_many_scores_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_module, "SCORES_LIMIT", 2 * 4 * 24 * 24 - 1)
    with pytest.raises(InputError, match=r"Scores of 24 rows at text\.0\.self would hold .* GiB"):
        looked("llama", LLAMA, lambda call: call.weights())
    assert looked("llama", LLAMA, lambda call: call.weights(slice(0, 23)))
    walked = looked(
        "llama", LLAMA, lambda call: torch.cat([call.weights(rows) for rows in call.chunks(limit=999)], 2)
    )
    monkeypatch.undo()
    whole = looked("llama", LLAMA, lambda call: call.weights())
    torch.testing.assert_close(walked, whole)


# ---- replace -----------------------------------------------------------------------------------------------


def test_replacing_operators_stand_over_each_other() -> None:
    order: list[str] = []

    def over(name: str, factor: float, times: int = 1) -> Any:
        def replace(call: AttentionCall) -> Tensor:
            order.append(name)
            outs = [call.next() for _ in range(times)]
            assert all(torch.equal(out, outs[0]) for out in outs)
            assert "who" not in call.state or call.state["who"] == name
            call.state["who"] = name
            return factor * outs[-1]

        return method(replace=replace)(sites="text.0.self")

    got = head_outputs(LLAMA, over("inner", 2.0), over("outer", 3.0, times=2))
    assert order == ["outer", "inner", "inner"]
    torch.testing.assert_close(got, 6 * head_outputs(LLAMA))


def test_the_operator_below_has_bias_and_inputs_and_none_passes_on() -> None:
    methods = [
        method(inputs=lambda call, q, k, v: (q, k, 2 * v)),
        method(bias=lambda call: TERM),
        method(replace=lambda call: None),
        method(replace=lambda call: call.next() + 1),
        method(output=lambda call, o: 3 * o),
    ]
    got = head_outputs(LLAMA, *[m(sites="text.0.self") for m in methods])
    assert_equation(got, LLAMA, lambda s, v: 3 * ((s + TERM).softmax(-1) @ (2 * v) + 1))


@pytest.mark.parametrize("event", ["scores", "weights"])
@pytest.mark.parametrize("together", [True, False])
def test_replacing_beside_editing_is_refused_at_attach(event: str, together: bool) -> None:
    model = shared("llama")
    replace = method(replace=lambda call: call.next())(sites="text.2:.self")
    edit = method(**{event: lambda call, t: t})(sites="text.:3.self")
    with pytest.raises(AttachError, match=r"text\.2\.self"):
        if together:
            sc.attach(model, replace, edit)
        else:
            with sc.attach(model, replace):
                sc.attach(model, edit)
    assert "forward" not in model.__dict__
    narrowed = method(**{event: lambda call, t: t})(sites="text.:2.self")
    with sc.attach(model, replace, narrowed):
        run(model, LLAMA)


# ---- what costs --------------------------------------------------------------------------------------------


def test_what_is_not_edited_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    scores = AttentionCall._scores

    def counting(call: AttentionCall, span: Any, heads: Any, **options: Any) -> Tensor:
        s = scores(call, span, heads, **options)
        rows.append(s.shape[2])
        return s

    monkeypatch.setattr(AttentionCall, "_scores", counting)
    quiet = [Look(lambda call: None), method(bias=lambda call: TERM)(), method(output=lambda call, o: o)()]
    with sc.attach(shared("llama"), quiet):
        run(shared("llama"), LLAMA)
    assert rows == []
    with sc.attach(shared("llama"), method(weights=lambda call, w: w)(rows="last")):
        run(shared("llama"), LLAMA)
    assert rows == [1] * 4


def test_eager_models_return_edited_weights() -> None:
    model = FAMILIES["llama"].build(attn_implementation="eager")
    edit = method(weights=lambda call, w: w * 2)(sites="text.1.self", rows="last", heads=(2,))
    with torch.no_grad():
        bare = model(**LLAMA, output_attentions=True).attentions
        with sc.attach(model, edit):
            got = model(**LLAMA, output_attentions=True).attentions
    expected = bare[1].clone()
    expected[:, 2, -1] *= 2
    assert torch.equal(got[0], bare[0])
    torch.testing.assert_close(got[1], expected)


def test_torchs_module_gives_the_weights_it_is_asked_for() -> None:
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        out, mean = attention(x, x, x, mask, True)
        _, single = attention(x, x, x, key_padding_mask=mask, average_attn_weights=False)
        with sc.attach(attention, Look(sites="*.self")):
            for given in [(x, x, x, mask, True), (x, x, x, mask)]:
                got, weights = attention(*given)
                torch.testing.assert_close(got, out)
                torch.testing.assert_close(weights, mean)
            assert attention(x, x, x, mask, False)[1] is None
            torch.testing.assert_close(
                attention(x, x, x, key_padding_mask=mask, average_attn_weights=False)[1], single
            )
        with sc.attach(attention, method(weights=lambda call, w: w * 2)()):
            got, weights = attention(x, x, x, mask)
        torch.testing.assert_close(weights, 2 * mean)


@pytest.mark.parametrize("name", ["bert", "torch_encoder"])
def test_editing_keeps_the_dropout_of_training(name: str) -> None:
    """Dropping is unbiased: the mean over many passes is that of evaluation, and two passes differ."""
    model = FAMILIES[name].build()
    site = next(s for s in discover(model) if s.name == "text.0.self")
    inputs = FAMILIES[name].inputs()
    seen: list[Tensor] = []
    edit = method(weights=lambda call, w: w * 1.0, output=lambda call, o: (seen.append(o), o)[1])
    with sc.attach(model, edit(sites=site.name)):
        run(model, inputs)
        site.module.train()
        for number in range(200):
            torch.manual_seed(number)
            run(model, inputs)
    exact, drawn = seen[0], torch.stack(seen[1:])
    assert not torch.equal(drawn[0], drawn[1])
    spread = drawn.std(0) / 200**0.5
    assert ((drawn.mean(0) - exact).abs() / (spread + 1e-3)).mean() < 1.5


def test_values_of_attention_by_hand_are_refused_by_name() -> None:
    model, inputs = shared("bloom"), FAMILIES["bloom"].inputs()
    for tell in (lambda call: call.apply(call.weights()), lambda call: call.native()):
        with (
            sc.attach(model, Look(tell, sites="text.0.self")),
            pytest.raises(InputError, match=r"text\.0\.self .* by hand"),
        ):
            run(model, inputs)
