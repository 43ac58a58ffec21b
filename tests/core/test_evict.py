"""Entries that leave the cache: as if their keys were masked in every later step."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import CLOSE, assert_follows, differs, generate, inputs_of, oracle, positions, recompute, subject
from helpers import Exact, assert_as_good_as, greedy, method, shared, unchanged
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from zoo import FAMILIES
from zoo.base import words

import saccade as sc
from core.missing import FORMS, Evict, Leave, entries, evicted, gone, staying, together
from core.test_tokens import asked, follow_beams, generating
from saccade.core.cache import TrackedLayer
from saccade.core.errors import AttachError, InputError, SaccadeError

HEADS = {"gpt2": 4, "mllama": 2, "deepseek_v3": 1}
"""Heads in the cache: where they are not two. A latent counts as one."""


SHARED = ("gemma3n", "gemma4")
READERS = {2: 0, 3: 1}
"""Of these families, layers that read the entries of another."""


def chosen(
    name: str, inputs: dict[str, Tensor], form: str, layers: tuple[int, ...] = (0, 2)
) -> dict[int, Tensor]:
    return {layer: entries(inputs, form, layer, HEADS.get(name, 2)) for layer in layers}


@pytest.mark.parametrize("name", [*generating(), *(pytest.param(n, marks=pytest.mark.slow) for n in SHARED)])
@pytest.mark.parametrize("form", FORMS)
def test_an_entry_that_left_is_a_key_that_later_steps_do_not_see(name: str, form: str) -> None:
    model, inputs = subject(name), asked(name)
    readers = READERS if name in SHARED else {}
    keep, prompt = chosen(name, inputs, form, (0, 1) if readers else (0, 2)), inputs["input_ids"].shape[1]
    with sc.attach(model, Evict(keep=keep, form=form)):
        out = generate(model, inputs)
    masks = evicted(keep, prompt)
    masks |= {reader: masks[owner] for reader, owner in readers.items()}
    wanted = recompute(oracle(name), inputs, out.sequences[:, prompt:], masks)
    assert_follows(out, wanted, prompt)
    assert differs(out, generate(model, inputs))
    for layer, stays in keep.items():
        held = out.past_key_values.layers[layer]
        if held.sliding_window is None:
            assert held.keys.shape[2] == int(stays.sum(-1).max()) + 3  # the last token was never fed
        assert held.get_seq_length() == prompt + 3


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"prefill_chunk_size": 9}], ids=["sampling", "chunks"]
)
@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "qwen3_vl", "gpt2"])
def test_sampled_and_read_in_chunks(name: str, options: dict[str, Any]) -> None:
    model, inputs = subject(name), asked(name)
    keep, prompt = chosen(name, inputs, "ragged"), inputs["input_ids"].shape[1]
    torch.manual_seed(3)
    with sc.attach(model, Evict(keep=keep)):
        out = generate(model, inputs, **options)
    masks = evicted(keep, prompt, options.get("prefill_chunk_size"))
    assert_follows(out, recompute(oracle(name), inputs, out.sequences[:, prompt:], masks), prompt)


def test_where_a_window_holds_nothing_there_is_nothing_to_judge() -> None:
    """The prompt's last tokens left, and those before are out of sight."""
    model, inputs = subject("mistral"), asked("mistral")
    keep, prompt = entries(inputs, "ragged"), inputs["input_ids"].shape[1]
    stays = torch.arange(prompt).expand(2, -1) < prompt - model.config.sliding_window
    with sc.attach(model, Leave(keep={1: stays}), Evict(keep={1: keep})):
        out = generate(model, inputs)
    masks = together(gone({1: stays}), evicted({1: keep}, prompt))
    wanted = recompute(oracle("mistral"), inputs, out.sequences[:, prompt:], masks)
    assert float((torch.stack(out.logits[1:], 1) - wanted[:, prompt:-1]).abs().max()) < CLOSE


@pytest.mark.parametrize("watched", [False, True])
def test_entries_are_judged_by_the_weights_as_edited(watched: bool) -> None:
    """Whether or not somebody looks on."""
    told: list[tuple[Tensor, Tensor]] = []
    edit = method(weights=lambda call, w: w * 2)(sites="text.1.self", rows="last", heads=(1,))
    judge = method(evict=lambda call, cache: told.append((call.weights(), call.weights(native=True))))
    watch = [method(observe=lambda call: None)(sites="text.1.self")] if watched else []
    with sc.attach(shared("llama"), edit, judge(sites="text.1.self"), *watch), torch.no_grad():
        shared("llama")(**FAMILIES["llama"].inputs(), use_cache=True)
    ((edited, native),) = told
    wanted = native.clone()
    wanted[:, 1, -1] *= 2
    torch.testing.assert_close(edited, wanted)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_beams_keep_what_their_sample_kept(name: str) -> None:
    model, inputs = subject(name), asked(name)
    keep, prompt = chosen(name, inputs, "ragged"), inputs["input_ids"].shape[1]
    with sc.attach(model, Evict(keep=keep)):
        out = generate(model, inputs, num_beams=3, num_return_sequences=2)
    plain, masks = oracle(name), evicted(keep, prompt)
    follow_beams(
        out,
        lambda i, answers, _: recompute(plain, inputs, answers, masks),
        prompt,
        inputs["input_ids"].shape[0],
    )


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_each_beam_evicts_goes_with_it_when_beams_change_places(name: str) -> None:
    """In every step every row drops another entry of another head; the oracle follows the rows' history."""
    model, inputs = subject(name), asked(name)
    samples, prompt = inputs["input_ids"].shape
    first, span = (2, 20) if name == "llama" else (prompt - 5, 8)

    def drop(row: int, step: int) -> tuple[int, int]:
        """Head and position that a row drops after a step."""
        return (row + step) % 2, first + (7 * row + 3 * step) % span

    def evict(call: Any, cache: TrackedLayer) -> Tensor:
        step = call.pass_.start - prompt + 1
        pos = cache.positions()
        pos = (pos[:, None] if pos.ndim == 2 else pos).expand(-1, 2, -1)
        slots = torch.arange(pos.shape[-1]).expand_as(pos).clone()
        for row in range(pos.shape[0]):
            head, position = drop(row, step)
            slots[row, head][pos[row, head] == position] = -1
            assert bool((pos[row] >= 0).any())
        return slots

    thin = method(evict=evict)(sites="text.1.self", phases=("decode",))
    steps = 7
    with sc.attach(model, thin):
        out = generate(model, inputs, steps, num_beams=3, num_return_sequences=3)
    came = out.beam_indices.view(samples, -1, steps)
    plain = oracle(name)

    def wanted(i: int, answers: Tensor, _: Tensor) -> Tensor:
        hidden = torch.zeros(samples, 2, prompt + steps, prompt + steps, dtype=torch.bool)
        for row in range(samples):
            for step in range(1, steps):
                head, position = drop(int(came[row, i, step]), step)
                hidden[row, head, prompt + step :, position] = True
        return recompute(plain, inputs, answers, {1: hidden})

    follow_beams(out, wanted, prompt, samples)
    moved = (came[:, :, 1:] != came[:, :, :-1]).sum()
    assert moved > samples


@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "qwen2_5_vl", "gemma3"])
def test_later_turns_go_on_without_them(name: str) -> None:
    """Tokens leave between layers, entries leave by head; then more is said, twice."""
    model, inputs = subject(name), asked(name)
    prompt = inputs["input_ids"].shape[1]
    leave, keep = {1: staying(inputs, 1, 0.7)}, chosen(name, inputs, "ragged")
    plain = oracle(name)
    masks = together(gone(leave), evicted(keep, prompt))
    with sc.attach(model, Leave(keep=leave), Evict(keep=keep)):
        out = generate(model, inputs)
        assert_follows(out, recompute(plain, inputs, out.sequences[:, prompt:], masks), prompt)
        for turn in (1, 2):
            said = torch.cat([out.sequences, words(2, 5, seed=turn)], 1)
            asked_now = {"input_ids": said, "attention_mask": whole_mask(inputs, said)}
            for kind in ("token_type_ids", "mm_token_type_ids"):
                if kind in inputs:
                    asked_now[kind] = nn.functional.pad(inputs[kind], (0, said.shape[1] - prompt))
            out = generate(model, asked_now, past_key_values=out.past_key_values)
            wanted = recompute(plain, inputs, out.sequences[:, prompt:], masks)
            assert_follows(out, wanted, said.shape[1])


def whole_mask(inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    mask = inputs["attention_mask"]
    return nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


def test_entries_of_later_turns_leave_too() -> None:
    model, inputs = subject("llama"), asked("llama")
    prompt = inputs["input_ids"].shape[1]
    keep = {1: entries(inputs, "ragged", 5)}
    with sc.attach(model, Evict(keep=keep)):
        out = generate(model, inputs)
        said = torch.cat([out.sequences, words(2, 5)], 1)
        wider = nn.functional.pad(keep[1], (0, said.shape[1] - prompt), value=True)
        wider[:, 0, prompt + 2] = wider[1, 1, prompt + 5] = False
        after = {1: wider}
    with sc.attach(model, Evict(keep=after)):
        asked_now = {"input_ids": said, "attention_mask": whole_mask(inputs, said)}
        out = generate(model, asked_now, past_key_values=out.past_key_values)
    masks = spread_to(evicted(keep, prompt), said.shape[1])
    masks = together(masks, evicted(after, said.shape[1]))
    wanted = recompute(oracle("llama"), {"input_ids": said, "attention_mask": whole_mask(inputs, said)},
                       out.sequences[:, said.shape[1] :], masks)  # fmt: skip
    assert_follows(out, wanted, said.shape[1])


def spread_to(masks: dict[int, Tensor], tokens: int) -> dict[int, Tensor]:
    """The same for a longer prompt, with its further last row."""
    found = {}
    for layer, hidden in masks.items():
        missing = tokens - hidden.shape[3]
        hidden = nn.functional.pad(hidden, (0, missing))
        found[layer] = torch.cat([hidden, hidden[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_words_may_be_taken_back(name: str) -> None:
    """A loop by hand takes back three tokens of a thinned cache and says others."""
    model, inputs = subject(name), asked(name)
    prompt = inputs["input_ids"].shape[1]
    keep = chosen(name, inputs, "ragged")
    with sc.attach(model, Evict(keep=keep)), Exact(), torch.no_grad():
        out = generate(model, inputs)
        cache = out.past_key_values
        cache.crop(-2)
        answer = torch.cat([out.sequences[:, prompt : prompt + 1], words(2, 3)], 1)
        asked_now = {"input_ids": torch.cat([inputs["input_ids"], answer], 1)}
        asked_now["attention_mask"] = whole_mask(inputs, asked_now["input_ids"])
        if "mm_token_type_ids" in inputs:
            asked_now["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, 4))
        again = generate(model, asked_now, past_key_values=cache)
    wanted = recompute(oracle(name), inputs, again.sequences[:, prompt:], evicted(keep, prompt))
    assert_follows(again, wanted, prompt + 4)


@pytest.mark.parametrize("picked", [[1], [1, 0], [0, 0, 1]])
def test_rows_of_a_thinned_cache_may_be_chosen(picked: list[int]) -> None:
    model, inputs = subject("llama"), asked("llama")
    prompt = inputs["input_ids"].shape[1]
    keep, leave = chosen("llama", inputs, "ragged"), {1: staying(inputs, 1)}
    rows = torch.tensor(picked)
    new = words(len(picked), 1)
    with sc.attach(model, Leave(keep=leave), Evict(keep=keep)), Exact(), torch.no_grad():
        at = positions(inputs["attention_mask"])
        cache = model(**inputs, position_ids=at, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        cache.batch_select_indices(rows)
        mask = nn.functional.pad(inputs["attention_mask"][rows], (0, 1), value=1)
        got = model(
            input_ids=new, attention_mask=mask, position_ids=at[rows][:, -1:] + 1, past_key_values=cache
        ).logits
        copied.batch_repeat_interleave(2)
        twice = torch.tensor([0, 0, 1, 1])
        mask = nn.functional.pad(inputs["attention_mask"][twice], (0, 1), value=1)
        other = model(
            input_ids=words(4, 1),
            attention_mask=mask,
            position_ids=at[twice][:, -1:] + 1,
            past_key_values=copied,
        ).logits
    masks = together(gone(leave), evicted(keep, prompt))
    for index, ids, logits in ((rows, new, got), (twice, words(4, 1), other)):
        mine = {name: value[index] for name, value in inputs.items()}
        wanted = recompute(
            oracle("llama"), mine, ids, {layer: hidden[index] for layer, hidden in masks.items()}
        )
        assert float((logits[:, -1] - wanted[:, -1]).abs().max()) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eviction_loses_no_precision(dtype: torch.dtype) -> None:
    """Of the step after it: the error beside that of the masked computation in the same precision."""
    from dense import spread, without

    inputs = asked("llama")
    prompt = inputs["input_ids"].shape[1]
    keep, new = chosen("llama", inputs, "ragged"), words(2, 1)
    exact = recompute(oracle("llama"), inputs, new, evicted(keep, prompt))[:, -1]
    at = positions(inputs["attention_mask"])
    mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    model, plain = shared("llama", dtype), shared("llama", dtype, "dense")
    with torch.no_grad():
        with sc.attach(model, Evict(keep=keep)):
            cache = model(**inputs, position_ids=at, use_cache=True).past_key_values
            later = {"input_ids": new, "attention_mask": mask, "position_ids": at[:, -1:] + 1}
            got = model(**later, past_key_values=cache).logits[:, -1]
        hidden = {layer: spread(t, prompt + 1) for layer, t in evicted(keep, prompt).items()}
        ids = torch.cat([inputs["input_ids"], new], 1)
        with without(plain, hidden):
            theirs = plain(ids, attention_mask=mask, position_ids=torch.cat([at, at[:, -1:] + 1], 1)).logits[
                :, -1
            ]
    assert_as_good_as(got, theirs, exact)


# ---- memory --------------------------------------------------------------------------------------


def held_bytes(cache: Any) -> int:
    """What the cache's own memory takes, views counted with all that they hold alive."""
    storages = {}
    for layer in cache.layers:
        for t in (layer.keys, layer.values):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("form", FORMS)
def test_eviction_frees_the_bytes_that_it_says(form: str) -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs(length=200)
    keep = {layer: entries(inputs, form, layer) for layer in range(4)}
    with sc.attach(model, Evict(keep=keep, form=form)), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        slots = sum(int(k.sum(-1).max()) for k in keep.values())
        per_slot = 2 * 2 * 16 * 4 * 2  # rows, key heads, width, bytes of a number, keys and values
        assert held_bytes(cache) == slots * per_slot
        full = model(**FAMILIES["llama"].inputs(length=1), past_key_values=cache).past_key_values
        assert held_bytes(full) == (slots + 4) * per_slot


@pytest.mark.skipif(sys.platform != "linux", reason="the process's memory is read from /proc")
def test_the_process_shrinks_by_the_bytes_that_the_count_says() -> None:
    # Else glibc moves its own thresholds, and keeps what was freed.
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("freed.py")
    done = subprocess.run(
        [sys.executable, script], env=os.environ | fixed | paths, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    (came, went), (full, left) = told["grown"], told["said"]
    assert full == 8 * 8 * 512 * 128 * 4 * 2 * 4  # rows, heads, tokens, width, bytes, keys and values, layers
    assert came == pytest.approx(full, rel=0.03)
    assert -went == pytest.approx(full - left, rel=0.03) and left < 0.52 * full


def test_nothing_keeps_what_was_evicted_alive() -> None:
    import gc
    import weakref

    model, inputs = shared("llama"), FAMILIES["llama"].inputs(length=50)
    before: list[Any] = []

    def evict(call: Any, cache: TrackedLayer) -> Tensor:
        before.append(weakref.ref(cache.keys.untyped_storage()))
        return torch.arange(10)

    with sc.attach(model, method(evict=evict)(sites="text.*.self")) as session, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        gc.collect()
        assert held_bytes(cache) == 4 * 10 * 2 * 2 * 16 * 4 * 2
        alive = [
            t for t in gc.get_objects() if isinstance(t, Tensor) and t.shape[-2:] == (50, 16) and t.ndim == 4
        ]
        assert not alive
        assert session.sites


# ---- outside of a session, and caches that cannot lose entries -----------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "llava", "gemma3"])
@pytest.mark.parametrize("kind", ["tokens", "evict"])
def test_a_thinned_cache_is_refused_outside_of_a_session(name: str, kind: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    reduce: Any = (
        Leave(keep={2: staying(inputs, 1)})
        if kind == "tokens"
        else Evict(keep=chosen(name, inputs, "heads", (3,)))
    )
    with sc.attach(model, reduce) as session:
        out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, words(2, 3)], 1)
        kept = copy.deepcopy(out.past_key_values)
        with session.paused(), pytest.raises(SaccadeError, match="missing from this cache"):
            model.generate(ids, past_key_values=copy.deepcopy(kept), max_new_tokens=2)
        greedy(model, {"input_ids": ids}, 2, past_key_values=copy.deepcopy(kept))
    for _ in range(2):
        with pytest.raises(SaccadeError, match="missing from this cache"):
            model(input_ids=words(2, 1), past_key_values=kept)
    look = method(observe=lambda call: None)(sites="text.*.self")
    with sc.attach(model, look), pytest.raises(SaccadeError, match="missing from this cache"):
        model.generate(ids, past_key_values=kept, max_new_tokens=2)
    with sc.attach(model, reduce):  # nothing was lost by asking
        again = greedy(model, {"input_ids": ids}, 2, past_key_values=kept)
    assert again.shape[1] == ids.shape[1] + 2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_a_cache_from_which_nothing_left_goes_on_without_us(name: str) -> None:
    """Also where a window has forgotten its first entries."""
    model, inputs = subject(name), asked(name)
    stays = method(tokens=lambda call: None, evict=lambda call, cache: None)(
        sites={"tokens": "text.*.layer", "evict": "text.*.self"}
    )
    bare = generate(model, inputs)
    with sc.attach(model, stays):
        out = generate(model, inputs)
    ids = torch.cat([out.sequences, words(2, 5)], 1)
    later = {"input_ids": ids, "attention_mask": whole_mask(inputs, ids)}
    if "token_type_ids" in inputs:
        later["token_type_ids"] = nn.functional.pad(
            inputs["token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1])
        )
    wanted = generate(model, later, past_key_values=bare.past_key_values)
    got = generate(model, later, past_key_values=out.past_key_values)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(float((a - b).abs().max()) < CLOSE for a, b in zip(got.logits, wanted.logits, strict=True))
    once_more = torch.cat([got.sequences, words(2, 3)], 1)  # and back inside
    back = {"input_ids": once_more, "attention_mask": whole_mask(inputs, once_more)}
    if "token_type_ids" in inputs:
        back["token_type_ids"] = nn.functional.pad(
            later["token_type_ids"], (0, once_more.shape[1] - ids.shape[1])
        )
    wanted = generate(model, back, past_key_values=wanted.past_key_values)
    with sc.attach(model, stays):
        got = generate(model, back, past_key_values=got.past_key_values)
    assert all(float((a - b).abs().max()) < CLOSE for a, b in zip(got.logits, wanted.logits, strict=True))


def half(call: Any, cache: TrackedLayer) -> Tensor:
    return torch.arange(0, cache.keys.shape[2], 2)


THIN = method(evict=half)


def made_of(layer: str) -> Any:
    """A cache whose layers are of a class of transformers that is no plain one."""
    import transformers.cache_utils as C

    kinds = {
        "DynamicIndexedLayer": lambda: C.DynamicIndexedLayer(),
        "LinearAttentionLayer": lambda: C.LinearAttentionLayer(),
        "LinearAttentionAndFullAttentionLayer": lambda: C.LinearAttentionAndFullAttentionLayer(),
    }
    cache = DynamicCache()
    cache.layers = [C.DynamicLayer(), *(kinds[layer]() for _ in range(3))]
    return cache


@pytest.mark.parametrize(
    "kind", ["DynamicIndexedLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"]
)
def test_layers_of_other_kinds_are_refused_by_name(kind: str) -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    cache = made_of(kind)
    before = [type(layer) for layer in cache.layers]
    with unchanged(model), sc.attach(model, THIN(sites="text.*.self")), pytest.raises(InputError, match=kind):
        model(**inputs, past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == before


def test_static_and_offloaded_caches_are_refused_by_name() -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    slow = shared("mistral"), FAMILIES["mistral"].inputs()
    with sc.attach(model, THIN(sites="text.*.self")):
        with pytest.raises(InputError, match="StaticLayer"):
            model(**inputs, past_key_values=StaticCache(model.config, max_cache_len=64))
        with pytest.raises(InputError, match="StaticLayer"):
            greedy(model, inputs, 2, cache_implementation="static")
        with pytest.raises(InputError, match="offloaded"):
            offloaded = DynamicCache(config=model.config)
            offloaded.offloading = True  # what the constructor sets where it finds a GPU
            model(**inputs, past_key_values=offloaded)
    with (
        sc.attach(slow[0], THIN(sites="text.*.self")),
        pytest.raises(InputError, match="StaticSlidingWindowLayer"),
    ):
        slow[0](**slow[1], past_key_values=StaticCache(slow[0].config, max_cache_len=64))
    greedy(model, inputs, 2, cache_implementation="static")  # as before


def test_a_paged_cache_is_refused_by_name() -> None:
    class PagedAttentionCache:
        """As a batching that began before gives it to every forward."""

    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    with unchanged(model), sc.attach(model):
        with pytest.raises(InputError, match="paged cache"):
            model.generate_batch(inputs=[[150, 151], [152]], max_new_tokens=2)
        with pytest.raises(InputError, match="paged cache"):
            model(**inputs, cache=PagedAttentionCache())


def test_a_quantised_cache_is_refused_by_name() -> None:
    from transformers.cache_utils import DynamicLayer

    class QuantizedLayer(DynamicLayer):
        """As those of the library, which want a package of their own."""

    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    cache = DynamicCache()
    cache.layers = [QuantizedLayer() for _ in range(4)]
    with sc.attach(model, THIN(sites="text.*.self")), pytest.raises(InputError, match="QuantizedLayer"):
        model(**inputs, past_key_values=cache)


@pytest.mark.parametrize(
    ("slots", "why"),
    [
        (torch.ones(24, dtype=torch.bool), "says nothing"),
        (torch.arange(24).expand(3, -1), "says nothing"),
        (torch.arange(24).expand(2, 3, -1), "says nothing"),
        (torch.empty(0, dtype=torch.long), "says nothing"),
        (torch.tensor([3, 24]), "cannot stay"),
    ],
)
def test_slots_that_make_no_sense_are_named(slots: Tensor, why: str) -> None:
    model, inputs = shared("llama"), FAMILIES["llama"].inputs()
    with (
        sc.attach(model, method(evict=lambda call, cache: slots)(sites="text.1.self")),
        pytest.raises(InputError, match=why),
    ):
        model(**inputs, use_cache=True)


def test_two_methods_cannot_thin_out_one_layer() -> None:
    with unchanged(shared("llama")), pytest.raises(AttachError, match="both thin out"):
        sc.attach(shared("llama"), THIN(sites="text.*.self"), THIN(sites="text.1.self"))


# ---- encoder-decoders ----------------------------------------------------------------------------


def test_whispers_own_cache_loses_entries() -> None:
    model, inputs = subject("whisper"), inputs_of("whisper")
    drop = {1, 2}

    def evict(call: Any, cache: TrackedLayer) -> Tensor | None:
        if call.phase == "prefill":
            return None
        pos = cache.positions()[0].tolist()
        return torch.tensor(
            [slot for slot, p in enumerate(pos) if p not in drop or p >= call.pass_.start - 1]
        )

    ids = inputs["decoder_input_ids"]
    given = {"input_features": inputs["input_features"], "decoder_input_ids": ids}
    with sc.attach(model, method(evict=evict)(sites="text.*.self")):
        out = generate(model, given, 5)
    prompt, plain = ids.shape[1], oracle("whisper")
    answers = out.sequences[:, -5:]
    tokens = prompt + 5
    hidden = torch.zeros(2, 1, tokens, tokens, dtype=torch.bool)
    hidden[:, :, prompt + 1 :, sorted(drop)] = True  # seen by the first step that decodes, then gone
    modules = {
        m.layer_idx: m
        for p, m in plain.named_modules()
        if p.startswith("model.decoder") and p.endswith("self_attn")
    }
    for layer, module in modules.items():
        module.gone = hidden
        assert layer in range(3)
    try:
        with Exact(), torch.no_grad():
            wanted = plain(
                input_features=inputs["input_features"],
                decoder_input_ids=torch.cat([ids, answers], 1),
                use_cache=False,
            ).logits
    finally:
        for module in modules.values():
            del module.gone
    assert_follows(out, wanted, prompt)


def test_a_term_for_every_distance_must_be_told_how_many_keys_there_were() -> None:
    model: Any = FAMILIES["t5"].build()
    for module in model.modules():
        if hasattr(module, "compute_bias"):
            module.compute_bias = lambda query_length, key_length: None
    with pytest.raises(AttachError, match="position_bias"):
        sc.attach(model, THIN(sites="text.*.self"))
    sc.attach(model, THIN(sites="text.*.cross")).detach()


CROSSED = ("mllama", "t5", "whisper")


def crossing(name: str) -> dict[str, Any]:
    """Inputs with padding of the prompt and of what the encoder reads, the first id being the one that starts."""
    if name == "mllama":
        return asked(name)
    inputs = inputs_of(name)
    if name == "t5":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :3] = 0
        inputs["decoder_input_ids"] = nn.functional.pad(words(2, 7), (1, 0))
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        inputs["decoder_attention_mask"][1, 1:3] = 0
    return inputs


def at_once(
    name: str,
    inputs: dict[str, Any],
    answers: Tensor,
    across: dict[int, Tensor],
    own: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits of a prompt and its answer read together, where keys (samples, key heads, queries, keys) are masked
    that are gone `across`, in attention to another sequence by layer, or that are gone of their `own`."""
    plain, masks = oracle(name), {}
    for path, module in plain.named_modules():
        if path.endswith(("cross_attn", "EncDecAttention", "encoder_attn")):
            masks[module] = across[module.layer_idx]
        if own and path.startswith("decoder") and path.endswith("SelfAttention"):
            masks[module] = own[module.layer_idx]
    try:
        for module, mask in masks.items():
            module.gone = mask
        if name == "mllama":
            return recompute(plain, inputs, answers, own)
        given = {**inputs, "decoder_input_ids": torch.cat([inputs["decoder_input_ids"], answers], 1)}
        if "decoder_attention_mask" in inputs:
            longer = (0, answers.shape[1])
            given["decoder_attention_mask"] = nn.functional.pad(
                inputs["decoder_attention_mask"], longer, value=1
            )
        with Exact(), torch.no_grad():
            return plain(**given, use_cache=False).logits
    finally:
        for module in masks:
            del module.gone


def left_of(keep: dict[int, Tensor], prompt: int, steps: int) -> dict[int, Tensor]:
    """For the oracle: entries that left with the prompt are missing for each query behind it."""
    later = torch.arange(prompt + steps)[:, None] >= prompt
    return {layer: ~stays[:, :, None] & later for layer, stays in keep.items()}


def cross_of(cache: Any) -> dict[int, TrackedLayer]:
    """What a cache holds of another sequence, by layer."""
    if hasattr(cache, "cross_attention_cache"):
        return dict(enumerate(cache.cross_attention_cache.layers))
    return {layer: cache.layers[layer] for layer in (1, 3)}


def seen(out: Any, form: str) -> dict[int, Tensor]:
    """What stays of another sequence (samples, key heads, entries), in every layer another choice."""
    shapes = {layer: held.keys.shape for layer, held in cross_of(out.past_key_values).items()}
    sized = {layer: {"input_ids": torch.zeros(2, shape[2])} for layer, shape in shapes.items()}
    return {layer: entries(sized[layer], form, layer, shape[1]) for layer, shape in shapes.items()}


@pytest.mark.parametrize(("form", "implementation"), [*((form, None) for form in FORMS), ("ragged", "eager")])
@pytest.mark.parametrize("name", CROSSED)
def test_an_entry_of_another_sequence_that_left_is_not_seen_later(
    name: str, form: str, implementation: str | None
) -> None:
    model, inputs = subject(name, implementation), crossing(name)
    ids = inputs["input_ids" if name == "mllama" else "decoder_input_ids"]
    bare = generate(model, inputs, 5)
    keep = seen(bare, form)
    with sc.attach(model, Evict(keep=keep, form=form, sites="text.*.cross")):
        out = generate(model, inputs, 5)
    masks = left_of(keep, ids.shape[1], 5)
    assert_follows(out, at_once(name, inputs, out.sequences[:, -5:], masks), ids.shape[1])
    assert differs(out, bare)
    for layer, held in cross_of(out.past_key_values).items():
        assert held.keys.shape[2] == int(keep[layer].sum(-1).max())
        if name != "whisper":  # whose generate() gives back a copy of its cache
            assert held.get_seq_length() == keep[layer].shape[2]


def test_words_and_what_they_see_leave_together() -> None:
    """Words before a layer that attends to pictures, and entries behind it."""
    model, inputs = subject("mllama"), crossing("mllama")
    prompt, keep = inputs["input_ids"].shape[1], seen(generate(model, inputs, 1), "ragged")
    leave = {1: staying(inputs, 1, 0.7), 2: staying(inputs, 2, 0.7)}
    with sc.attach(model, Leave(keep=leave), Evict(keep=keep, sites="text.*.cross")):
        out = generate(model, inputs, 5)
    masks = left_of(keep, prompt, 5)
    wanted = at_once("mllama", inputs, out.sequences[:, prompt:], masks, gone(leave))
    assert_follows(out, wanted, prompt)


@pytest.mark.parametrize("name", ["mllama", "t5"])
def test_beams_see_of_another_sequence_what_their_sample_kept(name: str) -> None:
    model, inputs = subject(name), crossing(name)
    prompt = inputs["input_ids" if name == "mllama" else "decoder_input_ids"].shape[1]
    keep = seen(generate(model, inputs, 1), "ragged")
    with sc.attach(model, Evict(keep=keep, sites="text.*.cross")):
        out = generate(model, inputs, 5, num_beams=3, num_return_sequences=2)
    masks = left_of(keep, prompt, 5)
    follow_beams(out, lambda i, answers, _: at_once(name, inputs, answers, masks), prompt, 2)
    assert (out.beam_indices[:, 1:] != out.beam_indices[:, :1]).any()


@pytest.mark.parametrize("layers", [(0, 2), (0,), (1,)])
def test_t5_knows_the_distance_to_each_entry_that_is_left(layers: tuple[int, ...]) -> None:
    """Its first layer makes a term for every distance, which the others take over."""
    model, inputs = subject("t5"), crossing("t5")
    prompt = inputs["decoder_input_ids"].shape[1]
    keep = {
        layer: entries({"input_ids": inputs["decoder_input_ids"]}, "ragged", layer, 4) for layer in layers
    }
    across = seen(generate(model, inputs, 1), "heads")
    whole = torch.ones(2, 4, prompt, dtype=torch.bool)
    with sc.attach(model, Evict(keep=keep), Evict(keep=across, sites="text.*.cross")):
        out = generate(model, inputs, 6)
    answers = out.sequences[:, -6:]
    hidden = left_of({layer: keep.get(layer, whole) for layer in range(3)}, prompt, 6)
    hidden = {layer: nn.functional.pad(mask, (0, 6)) for layer, mask in hidden.items()}
    wanted = at_once("t5", inputs, answers, left_of(across, prompt, 6), hidden)
    assert_follows(out, wanted, prompt)


@pytest.mark.parametrize("name", CROSSED)
def test_a_cache_thinned_of_another_sequence_is_refused_outside_of_a_session(name: str) -> None:
    """Also where a forward that stands alone has made it; columns are those that are left."""
    model, inputs = shared(name), FAMILIES[name].inputs()
    columns = method(
        evict=half, observe=lambda call: shapes.append((call.columns("all").shape, call.k.shape))
    )
    shapes: list[Any] = []
    new = {"input_ids" if name == "mllama" else "decoder_input_ids": words(2, 1)}
    if name != "mllama":
        new["encoder_outputs"] = (torch.zeros(2, 20, 32),)
    with torch.no_grad():
        with unchanged(model), sc.attach(model, columns(sites="text.*.cross")):
            cache = model(**inputs, use_cache=True).past_key_values
            whole = shapes[-1][1][2]
            model(**new, past_key_values=cache)
        with pytest.raises(InputError, match="missing from this cache"):
            model(**new, past_key_values=cache)
    assert all(mask[-1] == keys[2] for mask, keys in shapes)
    assert shapes[-1][1][2] == (whole + 1) // 2
