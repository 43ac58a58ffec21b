"""Branches: as if base and branches were computed from nothing in every step and then mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dense import CLOSE, assert_follows, generate, oracle, recompute, subject
from helpers import Exact, greedy, method, shared, unchanged
from torch import Tensor, nn
from transformers import DynamicCache
from zoo import FAMILIES
from zoo.base import words

import saccade as sc
from core.missing import EARLY, Leave, as_indices, evicted, gone, together, visual
from core.test_evict import whole_mask
from core.test_features import Choose
from core.test_tokens import asked, follow_beams
from saccade.core.branch import Branch
from saccade.core.errors import InputError, SaccadeError
from saccade.core.method import Method
from saccade.core.tokens import Tokens, TokensCall

Prompt = Mapping[str, Any]


@dataclass(eq=False)
class Mix(Method):
    """`2 base - mean of the branches`, each of which `make(run)` describes."""

    make: Callable[[Any], list[Branch]] = field(default=lambda run: [Branch(run.without_images())])
    seen: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)

    def branches(self, run: Any) -> list[Branch]:
        return self.make(run)

    def prediction(self, base: Tensor, branches: list[Tensor], p: Any) -> Tensor:
        self.seen.append((base.clone(), [b.clone() for b in branches]))
        return mixed(base, branches)


def mixed(base: Tensor, branches: list[Tensor]) -> Tensor:
    return base if not branches else 2 * base - torch.stack(branches).mean(0)


def at_steps(logits: Tensor, prompt: int, steps: int) -> Tensor:
    return logits[:, prompt - 1 : prompt - 1 + steps]


def by_hand(
    name: str,
    prompts: list[Prompt],
    answer: Tensor,
    from_step: list[int] | None = None,
    masks: list[Any] | None = None,
) -> Tensor:
    """Mixed logits (rows, steps, vocabulary): the first prompt is the base, the others are branches."""
    steps, plain = answer.shape[1], oracle(name)
    found = [
        at_steps(
            recompute(plain, prompt, answer, (masks or [None] * len(prompts))[i]),
            prompt["input_ids"].shape[1],
            steps,
        )
        for i, prompt in enumerate(prompts)
    ]
    begins = from_step or [0] * (len(prompts) - 1)
    return torch.stack(
        [
            mixed(found[0][:, t], [f[:, t] for f, first in zip(found[1:], begins) if t >= first])
            for t in range(steps)
        ],
        1,
    )


def assert_mixed(out: Any, wanted: Tensor) -> None:
    got = torch.stack(list(out.logits), 1)
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) < CLOSE


def without_images(name: str, inputs: Prompt) -> dict[str, Tensor]:
    """By hand: the words alone, shorter rows padded on the left."""
    slots = visual(name, inputs)  # type: ignore[arg-type]
    keep = ~slots & (inputs["attention_mask"] == 1)
    index = as_indices(keep)
    ids = torch.where(index < 0, 0, inputs["input_ids"].gather(1, index.clamp_min(0)))
    found = {"input_ids": ids, "attention_mask": (index >= 0).long()}
    for kind in ("token_type_ids", "mm_token_type_ids"):
        if kind in inputs:
            found[kind] = torch.zeros_like(ids)
    return found


def other(tokens: int, seed: int = 9) -> dict[str, Tensor]:
    """Another prompt of two rows, the second padded on the left."""
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": words(2, tokens, seed=seed), "attention_mask": mask}


TEXT = ("llama", "mistral", "gpt2", "gpt_oss", "qwen3")
SEEING = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")


@pytest.mark.parametrize("way", ["greedy", "sampling", "chunks", "several"])
@pytest.mark.parametrize(
    "name", ["llava", "qwen2_5_vl", "qwen3_vl", pytest.param("internvl", marks=pytest.mark.slow)]
)
def test_a_branch_without_the_pictures(name: str, way: str) -> None:
    options: dict[str, Any] = {
        "greedy": {}, "sampling": {"do_sample": True}, "chunks": {"prefill_chunk_size": 11},
        "several": {"do_sample": True, "num_return_sequences": 2},
    }[way]  # fmt: skip
    model, inputs = subject(name), asked(name)
    generate(model, inputs, 2)  # some keep what they measured of a first picture
    torch.manual_seed(2)
    with unchanged(model), sc.attach(model, Mix()):
        out = generate(model, inputs, **options)
    prompt, times = inputs["input_ids"].shape[1], out.sequences.shape[0] // 2
    for i in range(times):
        answer = out.sequences[i::times, prompt:]
        wanted = by_hand(name, [inputs, without_images(name, inputs)], answer)
        got = torch.stack(list(out.logits), 1)[i::times]
        assert float((got - wanted).abs().max()) < CLOSE


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("length", [24, 15, 40], ids=["same", "shorter", "longer"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_branch_of_any_length_at_any_step(name: str, length: int, step: int) -> None:
    model, inputs, prompt = subject(name), asked(name), other(length)
    with sc.attach(model, Mix(make=lambda run: [Branch(prompt, from_step=step)])):
        out = generate(model, inputs, 5)
    assert_mixed(out, by_hand(name, [inputs, prompt], out.sequences[:, 24:], [step]))
    held = out.past_key_values.layers[0]
    assert held.keys.shape[0] == 2 and held.get_seq_length() == 28


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_three_branches_that_begin_at_other_steps(name: str) -> None:
    model, inputs = subject(name), asked(name)
    prompts, steps = [other(30, 1), other(12, 2), other(24, 3)], [0, 3, 1]
    make = lambda run: [Branch(p, from_step=s) for p, s in zip(prompts, steps)]  # noqa: E731
    with sc.attach(model, Mix(make=make)):
        out = generate(model, inputs, 6)
    assert_mixed(out, by_hand(name, [inputs, *prompts], out.sequences[:, 24:], steps))


def test_two_methods_mix_one_after_the_other() -> None:
    model, inputs = subject("llama"), asked("llama")
    a, b = other(30, 1), other(12, 2)
    with sc.attach(model, Mix(make=lambda run: [Branch(a)]), Mix(make=lambda run: [Branch(b, from_step=1)])):
        out = generate(model, inputs)
    answer, plain = out.sequences[:, 24:], oracle("llama")
    base, first, second = (
        at_steps(recompute(plain, p, answer), p["input_ids"].shape[1], 4) for p in (inputs, a, b)
    )  # fmt: skip
    once = 2 * base - first
    wanted = torch.cat([once[:, :1], 2 * once[:, 1:] - second[:, 1:]], 1)
    assert_mixed(out, wanted)


@pytest.mark.parametrize("name", [*TEXT, *SEEING, "falcon", "paligemma", "idefics3", "mllama", "bloom"])
def test_a_branch_of_the_same_prompt_says_the_same(name: str) -> None:
    """For every family, padding and pictures included; or a refusal by name."""
    model, inputs = subject(name), asked(name)
    mix = Mix(make=lambda run: [Branch(run.inputs), Branch(run.inputs, from_step=2)])
    try:
        with sc.attach(model, mix):
            out = generate(model, inputs)
    except SaccadeError as error:
        assert name == "mllama", error
        return
    bare = generate(model, inputs)
    for t, (base, branches) in enumerate(mix.seen):
        assert len(branches) == (1 if t < 2 else 2)
        assert all(float((b - base).abs().max()) < CLOSE for b in branches)
    assert torch.equal(out.sequences, bare.sequences)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("step", [0, 2])
def test_branches_follow_their_beams(name: str, step: int, options: dict[str, Any]) -> None:
    model, inputs = subject(name), asked(name)
    prompt = without_images(name, inputs) if "vlm" in FAMILIES[name].tags else other(17)
    with sc.attach(model, Mix(make=lambda run: [Branch(prompt, from_step=step)])):
        out = generate(model, inputs, 5, **options)
    length = inputs["input_ids"].shape[1]

    def wanted(i: int, answers: Tensor, roots: Tensor) -> Tensor:
        found = by_hand(name, [inputs, prompt], answers, [step])
        return nn.functional.pad(found, (0, 0, length - 1, 0))

    follow_beams(out, wanted, length, 2)


# ---- methods beside branches ---------------------------------------------------------------------


def hide(columns: list[int]) -> type[Method]:
    """An edit: these logical positions are not seen in layer 1 by anyone."""

    def bias(call: Any) -> Tensor:
        mask = torch.zeros(call.q.shape[0], 200, dtype=torch.bool)
        mask[:, columns] = True
        return torch.where(call.at_columns(mask), -1e30, 0.0)

    return method(bias=bias)


def weigh(columns: list[int]) -> type[Method]:
    """The same by weights that are zeroed, which are not normalised again."""

    def weights(call: Any, w: Tensor) -> Tensor:
        mask = torch.zeros(call.q.shape[0], 200, dtype=torch.bool)
        mask[:, columns] = True
        w = w.masked_fill(call.at_columns(mask), 0)
        return w / w.sum(-1, keepdim=True)

    return method(weights=weights)


def hidden_from(columns: list[int], tokens: int, heads: int = 1) -> dict[int, Tensor]:
    mask = torch.zeros(2, heads, 1, tokens, dtype=torch.bool)
    mask[..., columns] = True
    return {1: mask}


@pytest.mark.parametrize("edit", [hide, weigh])
@pytest.mark.parametrize("length", [24, 14, 33])
def test_a_branchs_own_methods_act_on_its_rows_alone(length: int, edit: Any) -> None:
    model, inputs, prompt = subject("llama"), asked("llama"), other(length)
    own = edit([8, 9, 11])(sites="text.1.self")
    with sc.attach(model, Mix(make=lambda run: [Branch(prompt, methods=(own,)), Branch(prompt)])):
        out = generate(model, inputs)
    masks = [None, hidden_from([8, 9, 11], length), None]
    assert_mixed(out, by_hand("llama", [inputs, prompt, prompt], out.sequences[:, 24:], masks=masks))


@pytest.mark.parametrize("edit", [hide, weigh])
@pytest.mark.parametrize("length", [24, 14, 33])
def test_the_sessions_edits_act_on_the_bases_rows_alone(length: int, edit: Any) -> None:
    model, inputs, prompt = subject("llama"), asked("llama"), other(length)
    with sc.attach(model, edit([8, 9, 11])(sites="text.1.self"), Mix(make=lambda run: [Branch(prompt)])):
        out = generate(model, inputs)
    masks = [hidden_from([8, 9, 11], 24), None]
    assert_mixed(out, by_hand("llama", [inputs, prompt], out.sequences[:, 24:], masks=masks))


@pytest.mark.parametrize("length", [24, 14])
def test_hidden_states_are_edited_in_the_bases_rows_alone(length: int) -> None:
    """And by a branch's own method in its rows."""
    model, inputs, prompt = subject("llama"), asked("llama"), other(length)
    add = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    steer = method(hidden=lambda call, h: h + add)(sites="text.2.layer")
    own = method(hidden=lambda call, h: h - add)(sites="text.2.layer")
    with sc.attach(model, steer, Mix(make=lambda run: [Branch(prompt, methods=(own,))])):
        out = generate(model, inputs)
    plain, found = oracle("llama"), []
    for given, sign in ((inputs, 1), (prompt, -1)):
        hook = plain.model.layers[2].register_forward_hook(lambda _, __, h, sign=sign: h + sign * add)
        found.append(at_steps(recompute(plain, given, out.sequences[:, 24:]), given["input_ids"].shape[1], 4))
        hook.remove()
    assert_mixed(out, mixed(found[0], found[1:]))


@dataclass(eq=False)
class Thin(Method):
    """Leaves every third token out from layer 1 on, evicts every fourth entry of layer 2."""

    sites: Any = field(default_factory=lambda: {"tokens": "text.1.layer", "evict": "text.2.self"})
    phases: tuple[str, ...] = EARLY

    def tokens(self, call: TokensCall) -> Tokens:
        at = torch.arange(call.h.shape[1]) + call.pass_.start
        return Tokens((at % 3 != 1) | (at == call.h.shape[1] - 1))

    def evict(self, call: Any, cache: Any) -> Tensor:
        pos = cache.positions()[0]
        return (pos % 4 != 2).nonzero()[:, 0]

    @staticmethod
    def masks(prompt: Prompt) -> dict[int, Tensor]:
        tokens = prompt["input_ids"].shape[1]
        at = torch.arange(tokens)
        keep = ((at % 3 != 1) | (at == tokens - 1)).expand(2, -1)
        return together(gone({1: keep}), evicted({2: (at % 4 != 2).expand(2, 1, -1)}, tokens))


@pytest.mark.parametrize("name", ["llama", "mistral", "llava"])
@pytest.mark.parametrize("step", [0, 2])
def test_reductions_act_on_the_prompt_and_on_every_branch(name: str, step: int) -> None:
    model, inputs = subject(name), asked(name)
    prompts = [without_images(name, inputs)] if name == "llava" else [other(30), other(13)]
    length = inputs["input_ids"].shape[1]
    with sc.attach(model, Thin(), Mix(make=lambda run: [Branch(p, from_step=step) for p in prompts])):
        out = generate(model, inputs, 5)
    masks = [Thin.masks(p) for p in (inputs, *prompts)]
    wanted = by_hand(name, [inputs, *prompts], out.sequences[:, length:], [step] * len(prompts), masks)
    assert_mixed(out, wanted)


@dataclass(eq=False)
class ThinAndMix(Thin):
    """One method that reduces, edits and contrasts."""

    sites: Any = field(
        default_factory=lambda: {"tokens": "text.1.layer", "evict": "text.2.self", "bias": "text.1.self"}
    )
    phases: tuple[str, ...] = ("prefill", "extend", "decode")
    prompt: Any = None

    def tokens(self, call: TokensCall) -> Tokens | None:  # type: ignore[override]
        return None if call.phase == "decode" else super().tokens(call)

    def evict(self, call: Any, cache: Any) -> Tensor | None:  # type: ignore[override]
        return None if call.phase == "decode" else super().evict(call, cache)

    def bias(self, call: Any) -> Tensor:
        mask = torch.zeros(call.q.shape[0], 200, dtype=torch.bool)
        mask[:, [6, 8]] = True
        return torch.where(call.at_columns(mask), -1e30, 0.0)

    def branches(self, run: Any) -> list[Branch]:
        return [Branch(self.prompt)]

    def prediction(self, base: Tensor, branches: list[Tensor], p: Any) -> Tensor:
        return mixed(base, branches)


def test_one_method_may_reduce_edit_and_contrast() -> None:
    """What it reduces goes from all rows, what it edits is the base's."""
    model, inputs, prompt = subject("llama"), asked("llama"), other(19)
    with sc.attach(model, ThinAndMix(prompt=prompt)):
        out = generate(model, inputs)
    masks = [together(Thin.masks(inputs), hidden_from([6, 8], 24)), Thin.masks(prompt)]
    assert_mixed(out, by_hand("llama", [inputs, prompt], out.sequences[:, 24:], masks=masks))


def test_features_are_asked_of_the_branchs_unreduced_picture() -> None:
    model, inputs, choose = subject("llava"), asked("llava"), Choose()
    with sc.attach(model, choose, Mix(make=lambda run: [Branch(dict(run.inputs))])):
        out = generate(model, inputs)
    assert [item.x.shape[0] for item in choose.items] == [36] * 6
    first, second = choose.items[:3], choose.items[3:]
    assert all(torch.equal(a.x, b.x) and a.sample == b.sample for a, b in zip(first, second, strict=True))
    choose.items[:] = first
    masks = [gone({0: choose.kept(visual("llava", inputs))})] * 2
    prompt = inputs["input_ids"].shape[1]
    assert_mixed(out, by_hand("llava", [inputs, inputs], out.sequences[:, prompt:], masks=masks))


def test_a_branch_has_a_state_of_its_own() -> None:
    """What a method remembers of the conversation is the branch's own in its rows."""
    model, inputs, prompt = shared("llama"), FAMILIES["llama"].inputs(), {"input_ids": words(2, 9)}
    told: list[tuple[int, int]] = []

    def observe(call: Any) -> None:
        call.state["calls"] = call.state.get("calls", 0) + 1
        told.append((call.klayout.shape[1], call.state["calls"]))

    look = method(observe=observe)
    make = lambda run: [Branch(prompt, methods=(look(sites="text.0.self"),))]  # noqa: E731
    with sc.attach(model, look(sites="text.0.self"), Mix(make=make)):
        greedy(model, inputs, 3)
    assert told == [(24, 1), (9, 1), (25, 2), (10, 2), (26, 3), (11, 3)]


# ---- other models --------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("step", [0, 2])
def test_a_branch_on_another_model_keeps_its_own_cache(beams: int, step: int) -> None:
    model, inputs, prompt = subject("llama"), asked("llama"), other(11)
    second = subject("qwen2")
    with (
        unchanged(second),
        sc.attach(model, Mix(make=lambda run: [Branch(prompt, model=second, from_step=step)])),
    ):
        out = generate(model, inputs, num_beams=beams)

    def wanted(answer: Tensor) -> Tensor:
        base = at_steps(recompute(oracle("llama"), inputs, answer), 24, 4)
        theirs = at_steps(recompute(oracle("qwen2"), prompt, answer), 11, 4)
        return torch.stack([mixed(base[:, t], [theirs[:, t]] if t >= step else []) for t in range(4)], 1)

    if beams == 1:
        assert_mixed(out, wanted(out.sequences[:, 24:]))
    else:
        follow_beams(out, lambda i, answers, _: nn.functional.pad(wanted(answers), (0, 0, 23, 0)), 24, 2)


# ---- what the caller sees ------------------------------------------------------------------------


class Streamer:
    """Collects tokens as they come."""

    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.clone())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_answer_alone() -> None:
    model, streamer = subject("llama"), Streamer()
    inputs = {name: t[:1] for name, t in asked("llama").items()}
    prompt = {name: t[:1] for name, t in other(33).items()}
    with sc.attach(model, Mix(make=lambda run: [Branch(prompt)])):
        out = generate(model, inputs, streamer=streamer)
    assert streamer.ended
    assert torch.cat([t.flatten() for t in streamer.got]).tolist() == out.sequences[0].tolist()
    assert all(t.numel() == 1 for t in streamer.got[1:])


@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "gemma3"])
@pytest.mark.parametrize("length", [15, 60])
def test_no_row_of_a_branch_is_ever_seen(name: str, length: int) -> None:
    model, inputs = subject(name, "eager"), asked(name)
    tokens = inputs["input_ids"].shape[1]
    prompt = other(length)
    if "token_type_ids" in inputs:
        prompt["token_type_ids"] = torch.zeros_like(prompt["input_ids"])
    asks = {"output_hidden_states": True, "output_attentions": True}
    with sc.attach(model, Mix(make=lambda run: [Branch(prompt)])):
        out = generate(model, inputs, 4, **asks)
    bare = generate(model, inputs, 4, **asks)
    for mine, theirs in ((out.hidden_states, bare.hidden_states), (out.attentions, bare.attentions)):
        assert [[t.shape for t in step] for step in mine] == [[t.shape for t in step] for step in theirs]
    for mine, theirs in zip(out.past_key_values.layers, bare.past_key_values.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape and mine.get_seq_length() == theirs.get_seq_length()
    # The hidden states of the prompt, and of what follows, are those of the base alone.
    answer = out.sequences[:, tokens:]
    from dense import everything

    wanted = everything(oracle(name), inputs, answer, None, output_hidden_states=True).hidden_states
    for step in range(1, 4):
        for mine, whole in zip(out.hidden_states[step], wanted, strict=True):
            assert float((mine[:, 0] - whole[:, tokens + step - 1]).abs().max()) < CLOSE


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("length", [12, 40])
def test_a_second_turn_goes_on_with_or_without_the_session(name: str, length: int) -> None:
    model, inputs, prompt = subject(name), asked(name), other(length)
    with sc.attach(model, Mix(make=lambda run: [Branch(prompt)])):
        out = generate(model, inputs)
        ids = torch.cat([out.sequences, words(2, 5)], 1)
        later = {"input_ids": ids, "attention_mask": whole_mask(inputs, ids)}
        kept = copy.deepcopy(out.past_key_values)
        again = generate(model, later, past_key_values=out.past_key_values)
    answer = again.sequences[:, ids.shape[1] :]
    assert_mixed(again, by_hand(name, [later, prompt], answer))
    alone = generate(model, later, past_key_values=kept)
    assert_follows(alone, recompute(oracle(name), later, alone.sequences[:, ids.shape[1] :]), ids.shape[1])


def test_an_answer_may_end_early() -> None:
    """One row after two tokens, the other later; then the whole generation."""
    model, inputs, prompt = subject("llama"), asked("llama"), other(12)

    def run(**options: Any) -> Any:
        with sc.attach(model, Mix(make=lambda run: [Branch(prompt)])), Exact():
            return model.generate(
                **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True,
                pad_token_id=0, **options,
            )  # fmt: skip

    whole = run(eos_token_id=None).sequences[:, 24:]
    first, second = int(whole[0, 1]), int(whole[1, 3])
    out = run(eos_token_id=[first, second])
    ends = [next(i for i, t in enumerate(row.tolist()) if t in (first, second)) for row in whole]
    assert out.sequences.shape[1] == 24 + max(ends) + 1
    for row, end in enumerate(ends):
        assert out.sequences[row, 24 : 24 + end + 1].tolist() == whole[row, : end + 1].tolist()
        assert not out.sequences[row, 24 + end + 1 :].any()
    held = out.past_key_values.layers[0]
    assert held.keys.shape[0] == 2


@pytest.mark.parametrize("when", ["prediction", "layer", "branch", "streamer"])
def test_an_error_in_the_middle_leaves_model_and_cache_clean(when: str) -> None:
    model, inputs, prompt = shared("llama"), FAMILIES["llama"].inputs(), {"input_ids": words(2, 40)}

    class Stop(Exception):
        pass

    class Failing(Streamer):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.got) == 3:
                raise Stop

    @dataclass(eq=False)
    class Breaks(Mix):
        def prediction(self, base: Tensor, branches: list[Tensor], p: Any) -> Tensor:
            if when == "prediction" and len(self.seen) == 2:
                raise Stop
            return super().prediction(base, branches, p)

    def observe(call: Any) -> None:
        if call.pass_.start == 26 and when == "layer":
            raise Stop

    def broken(call: Any) -> None:
        if when == "branch":
            raise Stop

    own = method(observe=broken)(sites="text.2.self")
    look = method(observe=observe)(sites="text.2.self")
    cache = DynamicCache(config=model.config)
    rows = slice(0, 1) if when == "streamer" else slice(None)
    inputs = {"input_ids": inputs["input_ids"][rows]}
    options: dict[str, Any] = {"streamer": Failing()} if when == "streamer" else {}
    bare = greedy(model, inputs, 4)
    with unchanged(model):
        session = sc.attach(
            model,
            look,
            Breaks(make=lambda run: [Branch({"input_ids": prompt["input_ids"][rows]}, methods=(own,))]),
        )
        with session:
            with pytest.raises(Stop):
                greedy(model, inputs, 6, past_key_values=cache, **options)
            assert {layer.keys.shape[0] for layer in cache.layers} == {inputs["input_ids"].shape[0]}
            if when != "layer":  # a layer that broke leaves those below one step ahead, as without us
                assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    assert torch.equal(greedy(model, inputs, 4), bare)
    if when in ("prediction", "streamer"):
        seen = cache.get_seq_length()
        with torch.no_grad():
            got = model(input_ids=words(inputs["input_ids"].shape[0], 1), past_key_values=cache).logits
        assert got.isfinite().all() and cache.get_seq_length() == seen + 1


# ---- refusals ------------------------------------------------------------------------------------


def refused(model: Any, inputs: Prompt, match: str, make: Any = None, **options: Any) -> None:
    mix = Mix(make=make or (lambda run: [Branch({"input_ids": words(2, 8)})]))
    with unchanged(model), sc.attach(model, mix), pytest.raises(InputError, match=match):
        greedy(model, inputs, 4, **options)


def test_candidates_that_may_be_taken_back_are_refused() -> None:
    model, one = shared("llama"), {"input_ids": words(1, 24)}
    make = lambda run: [Branch({"input_ids": words(1, 8)})]  # noqa: E731
    refused(model, one, "not yet decided", make, prompt_lookup_num_tokens=3)
    refused(model, one, "not yet decided", make, assistant_model=FAMILIES["llama"].build())
    old = model.generation_config
    model.generation_config = copy.deepcopy(old)
    model.generation_config.prompt_lookup_num_tokens = 3
    try:
        refused(model, one, "not yet decided", make)
    finally:
        model.generation_config = old
    with (
        sc.attach(model, Leave(keep={}, sites="text.1.layer")),
        pytest.raises(InputError, match="not yet decided"),
    ):
        greedy(model, one, 4, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"inputs_embeds": torch.zeros(2, 5, 64)}, "no input_ids"),
        ({"input_ids": words(3, 8)}, "rows"),
        ({"input_ids": words(1, 8)}, "rows"),
        ({"input_ids": words(2, 0)}, "no tokens"),
    ],
)
def test_a_branch_whose_prompt_does_not_fit_is_refused(inputs: Any, match: str) -> None:
    refused(shared("llama"), FAMILIES["llama"].inputs(), match, lambda run: [Branch(inputs)])


def test_a_forward_alone_takes_no_steps() -> None:
    model = shared("llama")
    with (
        sc.attach(model, Mix(make=lambda run: [Branch(run.inputs)])),
        pytest.raises(InputError, match="generate"),
    ):
        model(**FAMILIES["llama"].inputs())


def test_without_a_cache_there_is_no_place_for_a_branch() -> None:
    model = subject("llama")
    refused(model, asked("llama"), "cache", use_cache=False)


@pytest.mark.parametrize("name", ["t5", "whisper", "blip"])
def test_an_encoder_decoder_takes_no_branch(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    mix = Mix(make=lambda run: [Branch(run.inputs)])
    with unchanged(model), pytest.raises(SaccadeError, match="branch"), sc.attach(model, mix):
        model.generate(**inputs, max_new_tokens=3)


def test_a_mix_of_another_shape_is_named() -> None:
    wrong = method(prediction=lambda base, branches, p: base[:, :5])
    with sc.attach(shared("llama"), wrong()), pytest.raises(InputError, match="prediction"):
        greedy(shared("llama"), FAMILIES["llama"].inputs(), 2)
