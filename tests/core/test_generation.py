"""What people run: adapters, compiled and offloaded models, other kernels, training, pipelines, loops."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from dense import (
    CLOSE,
    F64,
    assert_follows,
    generate,
    inputs_of,
    oracle,
    positions,
    recompute,
    spread,
    subject,
    without,
)
from helpers import Exact, greedy, method, shared, unchanged
from torch import Tensor, nn
from transformers import DynamicCache
from zoo import FAMILIES, run
from zoo.base import words
from zoo.words import tokenizer

import saccade as sc
from core.missing import Evict, Leave, entries, evicted, gone, staying, together, visual
from core.test_branches import Mix, assert_mixed, by_hand, hidden_from, hide, other
from core.test_features import Choose
from core.test_tokens import asked
from saccade.core.branch import Branch
from saccade.core.cache import fit_mask
from saccade.core.errors import InputError, SaccadeError
from saccade.core.tokens import Tokens, TokensCall

# ---- all at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_two_reductions_an_edit_and_a_branch_in_one_generation(name: str) -> None:
    """Against every step computed from nothing: features and tokens leave, entries go by head, the base is
    edited, and a prompt without pictures is followed from the second token on."""
    model, inputs = subject(name), asked(name)
    prompt, choose = inputs["input_ids"].shape[1], Choose()
    keep, leave = {3: entries(inputs, "ragged", 2)}, {2: staying(inputs, 3, 0.8)}
    words_alone = other(prompt)  # of the prompt's length, so that one choice fits both
    words_alone["attention_mask"] = inputs["attention_mask"]
    if "mm_token_type_ids" in inputs:
        words_alone["mm_token_type_ids"] = torch.zeros_like(words_alone["input_ids"])
    edit = hide([prompt - 4, prompt - 3])(sites="text.1.self")
    branch = Mix(make=lambda run: [Branch(words_alone, from_step=2)])
    generate(model, inputs, 1)  # some keep what they measured of a first picture
    with unchanged(model), sc.attach(model, choose, Leave(keep=leave), Evict(keep=keep), edit, branch):
        out = generate(model, inputs, 5)
    hidden = together(gone(leave), evicted(keep, prompt))
    mine = together(
        hidden, gone({0: choose.kept(visual(name, inputs))}), hidden_from([prompt - 4, prompt - 3], prompt)
    )
    wanted = by_hand(name, [inputs, words_alone], out.sequences[:, prompt:], [2], [mine, hidden])
    assert_mixed(out, wanted)


@pytest.mark.parametrize("order", [0, 1])
def test_sessions_nest_and_the_order_of_reductions_is_that_of_attachment(order: int) -> None:
    model, inputs = subject("llama"), asked("llama")
    prompt, leave, keep = 24, {1: staying(inputs, 1, 0.7)}, {2: entries(inputs, "heads", 2)}
    methods = [Leave(keep=leave), Evict(keep=keep)]
    first, second = methods if order == 0 else methods[::-1]
    with sc.attach(model, first), sc.attach(model, second):
        out = generate(model, inputs)
    masks = together(gone(leave), evicted(keep, prompt))
    assert_follows(out, recompute(oracle("llama"), inputs, out.sequences[:, prompt:], masks), prompt)


# ---- loops, threads, streams ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_5_vl", "llava"])
def test_a_loop_by_hand(name: str) -> None:
    """Prefill, then one token after another, with a cache of the caller's or the model's own."""
    model, inputs = subject(name), inputs_of(name)
    leave, keep = {1: staying(inputs, 1, 0.7)}, {2: entries(inputs, "ragged", 2)}
    for cache in (None, DynamicCache(config=model.config.get_text_config())):
        steps = []
        with sc.attach(model, Leave(keep=leave), Evict(keep=keep)), Exact(), torch.no_grad():
            out = model(**inputs, past_key_values=cache, use_cache=True)
            answer = []
            for _ in range(4):
                steps.append(out.logits[:, -1])
                answer.append(steps[-1].argmax(-1, keepdim=True))
                out = model(input_ids=answer[-1], past_key_values=out.past_key_values)
        prompt = inputs["input_ids"].shape[1]
        masks = together(gone(leave), evicted(keep, prompt))
        wanted = recompute(oracle(name), inputs, torch.cat(answer, 1), masks)[:, prompt - 1 : -1]
        assert float((torch.stack(steps, 1) - wanted).abs().max()) < CLOSE


def test_a_streaming_thread() -> None:
    from transformers import TextIteratorStreamer

    model, inputs = shared("llama"), {"input_ids": words(1, 24)}
    words_of = tokenizer()
    keep = {1: staying(inputs, 1)}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with sc.attach(model, Leave(keep=keep)):
        wanted = model.generate(**inputs, **options)
        streamer = TextIteratorStreamer(words_of, skip_prompt=True)
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == words_of.decode(wanted[0, 24:])


def test_two_threads_share_one_session() -> None:
    model = subject("llama")
    prompts = [
        {"input_ids": words(2, 24, seed=i), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
        for i in (1, 2)
    ]
    keep = {1: staying(prompts[0], 1)}
    out: dict[int, Any] = {}
    with sc.attach(model, Leave(keep=keep)):
        threads = [
            threading.Thread(target=lambda i=i: out.__setitem__(i, generate(model, prompts[i], 6)))
            for i in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, prompt in enumerate(prompts):
        wanted = recompute(oracle("llama"), prompt, out[i].sequences[:, 24:], gone(keep))
        assert_follows(out[i], wanted, 24)


# ---- training ------------------------------------------------------------------------------------


def gradients(model: Any, inputs: Any, labels: Tensor, exact: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    with Exact() if exact else contextlib.nullcontext():
        model(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def training(name: str) -> tuple[dict[str, Tensor], dict[int, Tensor], Tensor]:
    """Inputs, what stays, and labels where row and target both stay: others repeat the row before."""
    inputs = inputs_of(name)
    keep = {1: staying(inputs, 1, 0.7), 3: staying(inputs, 3, 0.7)}
    stays = keep[1] & keep[3]
    before = nn.functional.pad(stays[:, :-1], (1, 0), value=True)
    return inputs, keep, inputs["input_ids"].masked_fill(~stays | ~before, -100)


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    scale = {key: max(1.0, float(value.abs().max())) for key, value in wanted.items()}
    return got.keys() == wanted.keys() and all(
        float((got[key] - value).abs().max()) < CLOSE * scale[key] for key, value in wanted.items()
    )


@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl"])
def test_gradients_with_tokens_removed_are_those_of_masked_keys(name: str) -> None:
    inputs, keep, labels = training(name)
    plain = copy.deepcopy(oracle(name)).train()
    with without(plain, {layer: spread(t, labels.shape[1]) for layer, t in gone(keep).items()}):
        wanted = gradients(plain, inputs, labels)
    model = copy.deepcopy(subject(name)).train()
    with sc.attach(model, Leave(keep=keep)):
        got = gradients(model, inputs, labels)
    assert close(got, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl"])
def test_layers_may_run_for_the_second_time(name: str, reentrant: bool) -> None:
    """Gradient checkpointing changes no gradient, with features, tokens and an edit."""
    inputs, keep, labels = training(name)
    model = copy.deepcopy(subject(name)).train()
    edit = method(weights=lambda call, w: w**1.1, output=lambda call, o: 1.1 * o)

    def methods() -> list[Any]:
        return [*([Choose()] if name != "llama" else []), Leave(keep=keep), edit(sites="text.2.self")]

    with sc.attach(model, methods()):
        wanted = gradients(model, inputs, labels, exact=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with sc.attach(model, methods()):
        got = gradients(model, inputs, labels, exact=False)
    assert close(got, wanted)


def ranked(call: TokensCall) -> Tokens:
    weights = call.peek().weights("last").mean(1)[:, 0]
    keep = weights >= weights.median(1, keepdim=True).values
    keep[:, -1] = True
    return Tokens(keep)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["once", "peek"])
def test_so_may_layers_that_tokens_leave_once_or_after_a_peek(way: str, reentrant: bool) -> None:
    inputs, keep, labels = training("llama")
    model = copy.deepcopy(subject("llama")).train()
    methods = {
        "once": [Leave(keep=keep, options={"only_this_layer": True})],
        "peek": [Leave(keep={1: keep[1]}), method(tokens=ranked)(sites="text.3.layer")],
    }
    with sc.attach(model, methods[way]):
        wanted = gradients(model, inputs, labels, exact=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with sc.attach(model, methods[way]):
        got = gradients(model, inputs, labels, exact=False)
    assert close(got, wanted)


# ---- models inside of something ------------------------------------------------------------------


class Lora(nn.Module):
    """An adapter as PEFT puts it around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        noise = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=noise).to(base.weight) / 8)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=noise).to(base.weight) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


class Adapted(nn.Module):
    """What stands around a model with adapters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        return self.base_model.generation_config


def adapted(model: Any) -> Any:
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_inside_and_around(wrapped: bool) -> None:
    inputs, keep = asked("llama"), {1: staying(asked("llama"), 1)}
    model: Any = adapted(subject("llama"))
    model = Adapted(model) if wrapped else model
    with sc.attach(model, Leave(keep=keep), Mix(make=lambda run: [Branch(run.inputs)])):
        out = generate(model, inputs)
    plain = adapted(oracle("llama"))
    wanted = recompute(plain, inputs, out.sequences[:, 24:], gone(keep))
    assert_follows(out, wanted, 24)
    assert (
        float((wanted - recompute(oracle("llama"), inputs, out.sequences[:, 24:], gone(keep))).abs().max())
        > 1e-2
    )


def test_peft_itself() -> None:
    peft = pytest.importorskip("peft")
    inputs, keep = asked("llama"), {1: staying(asked("llama"), 1)}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(subject("llama")), config)
    plain = copy.deepcopy(oracle("llama"))
    with sc.attach(model, Leave(keep=keep)):
        out = generate(model, inputs)
    merged = model.merge_and_unload()
    plain.load_state_dict(merged.state_dict())
    assert_follows(out, recompute(plain, inputs, out.sequences[:, 24:], gone(keep)), 24)


@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk"])
def test_a_model_that_accelerate_has_dispatched(how: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = copy.deepcopy(shared("llama")), FAMILIES["llama"].inputs()
    leave, keep = {1: staying(inputs, 1)}, {2: entries(inputs, "ragged")}
    methods = [
        Leave(keep=leave),
        Evict(keep=keep),
        Mix(make=lambda run: [Branch({"input_ids": words(2, 9)})]),
    ]
    with sc.attach(shared("llama"), *methods):
        wanted = generate(shared("llama"), inputs)
    if how == "device_map":
        model = accelerate.dispatch_model(
            model, device_map={"model": "cpu", "lm_head": "cpu"}, force_hooks=True
        )
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    bare = generate(model, inputs)
    methods = [
        Leave(keep=leave),
        Evict(keep=keep),
        Mix(make=lambda run: [Branch({"input_ids": words(2, 9)})]),
    ]
    with sc.attach(model, *methods):
        out = generate(model, inputs)
    assert torch.equal(out.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, wanted.logits, strict=True))
    again = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, bare.logits, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model(when: str) -> None:
    """Attached through the compiled object or its inside; what is compiled sees it."""
    torch._dynamo.reset()
    model, inputs = copy.deepcopy(shared("llama")), FAMILIES["llama"].inputs()
    keep = {1: staying(inputs, 1)}
    with sc.attach(shared("llama"), Leave(keep=keep)), torch.no_grad():
        wanted = shared("llama")(**inputs, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if when == "after":
            compiled(**inputs, use_cache=False)
        with sc.attach(compiled, Leave(keep=keep)) as session:
            assert session.model is model
            got = compiled(**inputs, use_cache=False).logits
            out = compiled.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        bare = compiled(**inputs, use_cache=False).logits
    assert float((got - wanted).abs().max()) < 1e-4
    assert out.shape == (2, 27)
    assert float((bare - shared("llama")(**inputs).logits).abs().max()) < 1e-4
    torch._dynamo.reset()


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "qwen3_vl"])
def test_on_eager_attention(name: str) -> None:
    model, inputs = subject(name, "eager"), asked(name)
    prompt, leave, keep = (
        inputs["input_ids"].shape[1],
        {1: staying(inputs, 1, 0.7)},
        {2: entries(inputs, "ragged")},
    )
    with sc.attach(model, Leave(keep=leave), Evict(keep=keep)):
        out = generate(model, inputs, output_attentions=True)
    masks = together(gone(leave), evicted(keep, prompt))
    assert_follows(out, recompute(oracle(name), inputs, out.sequences[:, prompt:], masks), prompt)
    assert len(out.attentions[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "evict"])
def test_block_masks_of_flex_attention_are_refused_by_name(kind: str) -> None:
    try:
        model = shared("llama", implementation="flex_attention")
        inputs = FAMILIES["llama"].inputs()
        bare = greedy(model, inputs, 2)
    except Exception as error:
        pytest.skip(f"flex attention does not run here: {error}")
    reduce: Any = (
        Leave(keep={1: staying(inputs, 1)}) if kind == "tokens" else Evict(keep={1: entries(inputs, "heads")})
    )
    with unchanged(model), sc.attach(model, reduce), pytest.raises(InputError, match="BlockMask"):
        greedy(model, inputs, 2)
    assert torch.equal(greedy(model, inputs, 2), bare)


@pytest.mark.slow
def test_flex_attention_is_read_and_its_weights_are_changed() -> None:
    inputs = FAMILIES["llama"].inputs()
    try:
        flex = shared("llama", implementation="flex_attention")
        run(flex, inputs)
    except Exception as error:
        pytest.skip(f"flex attention does not run here: {error}")
    eager, seen = shared("llama", implementation="eager"), list[Tensor]()
    look = method(observe=lambda call: seen.append(call.weights()))(sites="text.*.self")
    with sc.attach(flex, look):
        run(flex, inputs)
    with torch.no_grad():
        told = eager(**inputs, output_attentions=True).attentions
    for mine, theirs in zip(seen, told, strict=True):
        assert (mine - theirs).abs().max() < 1e-5
    gains = torch.tensor([0.5, 1.0, 1.5, 2.0]).view(1, -1, 1, 1)
    edit = method(weights=lambda call, w: w * gains)(sites="text.1.self")
    bare = run(eager, inputs)
    with sc.attach(flex, edit), sc.attach(eager, edit):
        assert (run(flex, inputs) - run(eager, inputs)).abs().max() < 1e-4
        assert (run(eager, inputs) - bare).abs().max() > 1e-2
    bias = method(bias=lambda call: gains * call.columns("first"))(sites="text.1.self")
    with unchanged(flex), sc.attach(flex, bias), pytest.raises(InputError, match="flex attention"):
        run(flex, inputs)


def test_flash_attention_gets_masks_of_padding_only() -> None:
    """What its kernel could not be told is refused by name."""
    rest = {
        "queries": 1,
        "groups": 2,
        "keep": None,
        "start": 5,
        "causal": True,
        "dtype": F64,
        "padding_only": True,
    }
    shared_pos, heads = torch.tensor([[0, 2, 4], [-1, 1, 4]]), torch.zeros(2, 2, 3, dtype=torch.long)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert fit_mask(padding, pos=shared_pos, ragged=True, **rest).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert fit_mask(None, pos=shared_pos, ragged=True, **rest).tolist() == [[1, 1, 1], [0, 1, 1]]
    assert fit_mask(None, pos=shared_pos, ragged=False, **rest) is None
    for mask in (padding, None):
        with pytest.raises(InputError, match="Heads hold other entries"):
            fit_mask(mask, pos=heads, ragged=False, **rest)


def test_flash_attention_where_it_is_not_installed() -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("it is installed")
    with pytest.raises(ImportError, match=r"(?i)flash"):
        FAMILIES["llama"].build(attn_implementation="flash_attention_2")


def test_dynamically_quantised_weights() -> None:
    """8-bit linear layers on the CPU; error beside that of the same model, masked."""
    with contextlib.suppress(Exception):
        torch.backends.quantized.engine = "fbgemm"
    try:
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(copy.deepcopy(shared("llama")), {nn.Linear}, dtype=torch.qint8)
        plain = quantize_dynamic(
            copy.deepcopy(shared("llama", torch.float32, "dense")), {nn.Linear}, dtype=torch.qint8
        )
        inputs = FAMILIES["llama"].inputs()
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        pytest.skip(f"torch quantises nothing here: {error}")
    keep = {1: staying(inputs, 1)}
    with sc.attach(model, Leave(keep=keep)), torch.no_grad():
        got = model(**inputs).logits
        with without(plain, {layer: spread(t, 24) for layer, t in gone(keep).items()}):
            wanted = plain(**inputs).logits
        full = plain(**inputs).logits
    # Activations are quantised by the range of all rows, so the two agree as far as that.
    assert float((got - wanted)[keep[1]].abs().mean()) < 0.25 * float((full - wanted)[keep[1]].abs().mean())


# ---- pipelines -----------------------------------------------------------------------------------


def test_a_text_pipeline() -> None:
    from transformers import pipeline

    model = shared("llama")
    talk = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_tensors": True}

    def leave(call: Any) -> Tokens:
        keep = torch.arange(call.h.shape[1]) % 3 != 1
        keep[-1] = True
        return Tokens(keep)

    prompt = "what is on the table in front of the window"
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]
    with sc.attach(model, method(tokens=leave)(sites="text.1.layer", phases=("prefill",))):
        got = talk(prompt, **options)[0]["generated_token_ids"]
        wanted = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]
    assert list(got)[-4:] == wanted[-4:].tolist()
    assert list(got)[: ids.shape[1]] == ids[0].tolist()


def test_a_picture_pipeline() -> None:
    from PIL import Image
    from transformers import pipeline

    model, processor = shared("llava"), FAMILIES["llava"].processor()
    see = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    picture = Image.new("RGB", (48, 48), "red")
    choose = Choose()
    text = FAMILIES["llava"].prompt(1, "what is it ?")
    with sc.attach(model, choose):
        got = see(images=[picture], text=text, max_new_tokens=3, generate_kwargs={"do_sample": False})
    assert [item.x.shape[0] for item in choose.items] == [36]
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    keep = choose.kept(visual("llava", inputs))
    with sc.attach(model, Leave(keep={0: keep})):
        wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = got[0]["generated_text"]
    tail = processor.batch_decode(wanted[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert answer.endswith(tail)


# ---- states that must not leak -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_nothing_of_a_generation_is_left_for_the_next(name: str) -> None:
    model, inputs = subject(name), asked(name)
    bare = generate(model, inputs)
    choose, branch = Choose("renumber"), Mix()
    with sc.attach(model, choose, branch):
        first = generate(model, inputs)
        second = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(bare.logits, generate(model, inputs).logits, strict=True))


def test_a_session_on_another_model_may_begin_and_end_meanwhile() -> None:
    a, b = subject("llama"), subject("qwen3")
    inputs = asked("llama")
    keep = {1: staying(inputs, 1)}
    outer = sc.attach(a, Leave(keep=keep))
    inner = sc.attach(b, Leave(keep=keep))
    one = generate(a, inputs)
    outer.detach()
    two = generate(b, inputs)
    inner.detach()
    for name, out in (("llama", one), ("qwen3", two)):
        assert_follows(out, recompute(oracle(name), inputs, out.sequences[:, 24:], gone(keep)), 24)


def test_a_pause_in_the_middle_is_for_other_caches() -> None:
    model, inputs = subject("llama"), asked("llama")
    bare = generate(model, inputs)
    with sc.attach(model, Leave(keep={1: staying(inputs, 1)})) as session:
        thin = generate(model, inputs)
        with session.paused():
            free = generate(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(free.logits, bare.logits, strict=True))
        with pytest.raises(SaccadeError), session.paused():
            model(input_ids=words(2, 1), past_key_values=thin.past_key_values)
    assert positions(inputs["attention_mask"]).shape == (2, 24)
