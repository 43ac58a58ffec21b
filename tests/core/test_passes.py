"""What a pass is called, when a run begins and ends, and what extra passes leave behind: nothing."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import Look, greedy, method, shared, unchanged
from torch import Tensor
from zoo import FAMILIES, run, select
from zoo.base import words

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.seams import transformers as seam

LLAMA = FAMILIES["llama"].inputs()


def phases(model: Any, forward: Any, site: str = "text.0.self") -> list[tuple[str, int]]:
    look = Look(lambda call: call.q.shape[2], sites=site)
    with sc.attach(model, look):
        forward(model)
    return [(phase, queries) for _, phase, queries in look.seen]


# ---- phases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "llava", "qwen2_5_vl", "mllama"])
def test_a_generation_is_a_prefill_and_decoding(name: str) -> None:
    inputs = FAMILIES[name].inputs()
    seen = phases(shared(name), lambda model: greedy(model, inputs, 4))
    assert seen == [("prefill", inputs["input_ids"].shape[1])] + [("decode", 1)] * 3


def test_without_a_cache_every_pass_is_a_prefill() -> None:
    seen = phases(shared("llama"), lambda model: greedy(model, LLAMA, 3, use_cache=False))
    assert seen == [("prefill", 24), ("prefill", 25), ("prefill", 26)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_prefill_in_chunks_is_extended(name: str) -> None:
    seen = phases(shared(name), lambda model: greedy(model, LLAMA, 3, prefill_chunk_size=10))
    assert seen == [("prefill", 10), ("extend", 10), ("extend", 4), ("decode", 1), ("decode", 1)]


@pytest.mark.parametrize("where", ["call", "config of the call", "config of the model"])
def test_chunks_that_the_library_reads_without_pictures_are_refused(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam.transformers, "__version__", "5.22.9")
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs()
    config: Any = copy.deepcopy(model.generation_config)
    config.prefill_chunk_size = 10
    options = {"call": {"prefill_chunk_size": 10}, "config of the call": {"generation_config": config}}
    if where == "config of the model":
        model.generation_config = config
    words_alone = {key: inputs[key][:, -3:] for key in ("input_ids", "attention_mask")}
    with unchanged(model), sc.attach(model):
        greedy(model, words_alone, 2, **options.get(where, {}))
        with pytest.raises(InputError, match="without its pictures"):
            model.generate(**inputs, **options.get(where, {}))


def test_a_chunk_of_one_token_is_still_of_the_prompt() -> None:
    inputs = {"input_ids": words(2, 21)}
    seen = phases(shared("llama"), lambda model: greedy(model, inputs, 2, prefill_chunk_size=10))
    assert seen == [("prefill", 10), ("extend", 10), ("extend", 1), ("decode", 1)]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"num_beams": 3}, 6),
        ({"num_beams": 4, "num_return_sequences": 2}, 8),
        ({"do_sample": True, "num_return_sequences": 3}, 6),
        ({"do_sample": True, "num_beams": 2}, 4),
    ],
)
def test_beams_and_samples_are_rows_of_one_generation(options: dict[str, Any], rows: int) -> None:
    look = Look(lambda call: (call.q.shape[0], call.qlayout.sample.tolist()), sites="text.0.self")
    with sc.attach(shared("llama"), look):
        torch.manual_seed(0)
        shared("llama").generate(**LLAMA, max_new_tokens=3, min_new_tokens=3, **options)
    assert look.phases_seen == ["prefill", "decode", "decode"]
    samples = sorted([0, 1] * (rows // 2))
    assert all(told == (rows, samples) for _, _, told in look.seen)


def test_later_turns_extend_the_conversation() -> None:
    model = shared("llama")
    look = Look(lambda call: (call.q.shape[2], call.qlayout), sites="text.0.self")
    bare = model.generate(**LLAMA, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    with sc.attach(model, look):
        out = model.generate(**LLAMA, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        assert torch.equal(out.sequences, bare.sequences)
        for turn in (1, 2):
            ids = torch.cat([out.sequences, words(2, 5, seed=turn)], 1)
            look.seen.clear()
            out = model.generate(
                ids, past_key_values=out.past_key_values, max_new_tokens=3, min_new_tokens=3,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert [(phase, q) for _, phase, (q, _) in look.seen] == [
                ("extend", 6),
                ("decode", 1),
                ("decode", 1),
            ]
            layout = look.seen[-1][2][1]
            expected = [0] * 27 + [1] * 8 + [2] * 8
            assert layout.turn[0].tolist() == expected[: 27 + 8 * turn - 1]
            generated = [False] * 24 + [True] * 3 + ([False] * 5 + [True] * 3) * 2
            assert layout.where("generated")[0].tolist() == generated[: 27 + 8 * turn - 1]
            question = layout.where("question")[1].nonzero()[:, 0].tolist()
            assert question == list(range(27 + 8 * (turn - 1), 32 + 8 * (turn - 1)))


def test_a_generation_that_goes_on_without_new_words_stays_in_its_turn() -> None:
    model = shared("llama")
    look = Look(lambda call: call.klayout, sites="text.0.self")
    with sc.attach(model, look):
        out = model.generate(**LLAMA, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2, min_new_tokens=2)
    layout = look.seen[-1][2]
    assert layout.where("generated")[0].tolist() == [False] * 24 + [True] * 4
    assert layout.turn.max() == 0


def test_a_loop_by_hand_with_a_cache() -> None:
    model = shared("llama")
    begun = Counter()

    @dataclass(eq=False)
    class Begins(Method):
        sites: Any = "text.0.self"

        def begin(self, run: Any) -> None:
            begun["begin"] += 1

        def observe(self, call: AttentionCall) -> None:
            call.run.state.setdefault("phases", []).append((call.phase, call.q.shape[2]))

        def end(self, run: Any) -> Any:
            return list(run.state["phases"])

    with sc.attach(model, Begins()) as session, torch.no_grad():
        out = model(**LLAMA, use_cache=True)
        out = model(input_ids=words(2, 1), past_key_values=out.past_key_values)
        out = model(input_ids=words(2, 3), past_key_values=out.past_key_values)
        assert session.results["Begins"] == [("prefill", 24), ("decode", 1), ("extend", 3)]
        model(**LLAMA)
        assert session.results["Begins"] == [("prefill", 24)]
    assert begun["begin"] == 2


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_encoder_runs_once_and_its_decoder_decodes(name: str) -> None:
    inputs = FAMILIES[name].inputs()
    inputs.pop("decoder_input_ids")
    look = Look(lambda call: call.q.shape[2], sites="encoder.0.self|text.0.self|text.0.cross")
    with sc.attach(shared(name), look):
        shared(name).generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    seen = [(site, phase) for site, phase, _ in look.seen]
    assert seen[0] == ("encoder.0.self", "prefill")
    assert [p for s, p in seen if s == "text.0.self"] == ["prefill"] + ["decode"] * 3
    assert [p for s, p in seen if s == "text.0.cross"] == ["prefill"] + ["decode"] * 3
    assert len(seen) == 9


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_tower_alone_is_a_pass(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    look = Look(
        lambda call: (call.columns("image").sum().item(), call.q.shape[2]),
        sites="vision.[012].self|text.*.self",
    )
    jobs = {
        "vision": [lambda: model.get_image_features(pixel_values=pixels), lambda: model.vision_model(pixels)],
        "text": [lambda: model.get_text_features(input_ids=ids), lambda: model.text_model(ids)],
    }
    with unchanged(model), sc.attach(model, look), torch.no_grad():
        for tower, forwards in jobs.items():
            for forward in forwards:
                look.seen.clear()
                forward()
                assert [(site, phase) for site, phase, _ in look.seen] == [
                    (f"{tower}.{i}.self", "prefill") for i in range(3)
                ]
                for _, _, (columns, queries) in look.seen:
                    assert columns == (2 * 36 if tower == "vision" else 0)
                    assert queries == {"vision": 36 + (name == "clip"), "text": 10}[tower]


def test_a_method_acts_in_its_phases_only() -> None:
    model = shared("llama")
    acted: dict[str, list[str]] = {"decode": [], "prefill": []}

    def noting(phase: str) -> Any:
        return method(output=lambda call, o: (acted[phase].append(call.phase), o)[1])(
            phases=(phase,), sites="text.0.self"
        )

    with sc.attach(model, noting("decode"), noting("prefill")):
        greedy(model, LLAMA, 4)
    assert acted == {"decode": ["decode"] * 3, "prefill": ["prefill"]}


# ---- runs --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ledger(Method):
    """Counts its events, and returns what it was given."""

    sites: Any = "text.0.self"

    def begin(self, run: Any) -> None:
        assert run.state == {}
        run.state["log"] = ["begin"]

    def observe(self, call: AttentionCall) -> None:
        call.run.state["log"].append(call.phase)

    def end(self, run: Any) -> Any:
        return {"log": run.state["log"], "inputs": run.inputs, "samples": run.samples}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"prefill_chunk_size": 9}, {"num_return_sequences": 2, "do_sample": True}],
)
def test_begin_and_end_stand_once_around_a_generation(options: dict[str, Any]) -> None:
    model = shared("llama")
    with sc.attach(model, Ledger()) as session:
        for _ in range(2):
            model.generate(**LLAMA, max_new_tokens=3, min_new_tokens=3, **options)
            told = session.results["Ledger"]
            assert told["log"][0] == "begin"
            assert told["log"].count("begin") == 1
            assert told["log"].count("decode") == 2
            assert torch.equal(told["inputs"]["input_ids"], LLAMA["input_ids"])
            assert told["samples"] == 2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_samples_are_rows_of_the_prompt_also_where_pictures_come_first(name: str) -> None:
    inputs = FAMILIES[name].inputs(images=(1, 2))
    first = {key: inputs[key] for key in sorted(inputs, key=lambda k: k != "pixel_values")}
    assert next(iter(first)) == "pixel_values"
    look = Look(lambda call: call.qlayout.sample.tolist(), sites="text.0.self")
    with sc.attach(shared(name), Ledger(), look) as session:
        greedy(shared(name), first, 2, num_beams=2)
    assert session.results["Ledger"]["samples"] == 2
    assert all(told == [0, 0, 1, 1] for _, _, told in look.seen)


def test_ids_as_the_first_argument_are_the_prompt() -> None:
    with sc.attach(shared("llama"), Ledger()) as session:
        shared("llama").generate(LLAMA["input_ids"], max_new_tokens=2, min_new_tokens=2)
    assert torch.equal(session.results["Ledger"]["inputs"]["input_ids"], LLAMA["input_ids"])


# ---- extra passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["begin", "observe", "end"])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "t5", "gemma3"])
def test_extra_passes_leave_no_trace(name: str, when: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    others = (
        FAMILIES[name].inputs(images=(2, 1))
        if "vlm" in FAMILIES[name].tags
        else FAMILIES[name].inputs(batch=3)
    )
    with torch.no_grad():
        model(**inputs)  # state that every forward leaves, such as `rope_deltas`
    bare = greedy(model, inputs, 4)
    with torch.no_grad():
        expected = model(**others).logits
    logits: list[Tensor] = []
    inner = Look(lambda call: call.run.state.setdefault("mine", 1), sites="text.*.self")

    def extra(run: Any) -> None:
        logits.append(run.forward(others).logits)
        logits.append(run.forward(others, [inner]).logits)

    @dataclass(eq=False)
    class Extra(Method):
        sites: Any = "text.1.self"

        def begin(self, run: Any) -> None:
            if when == "begin":
                extra(run)

        def observe(self, call: AttentionCall) -> None:
            seen.append((call.phase, call.q.shape[0]))
            if when == "observe":
                extra(call.run)
                assert call.run.state_of(self) is call.run.state

        def end(self, run: Any) -> None:
            if when == "end":
                extra(run)

    seen: list[Any] = []
    with unchanged(model), sc.attach(model, Extra()):
        assert torch.equal(greedy(model, inputs, 4), bare)
        steps = list(seen)
        assert torch.equal(greedy(model, inputs, 4), bare)
    assert steps == [("prefill", 2)] + [("decode", 2)] * 3
    assert {phase for _, phase, _ in inner.seen} == {"prefill"}
    assert len(logits) >= 2
    for got in logits:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_extra_pass_between_steps_does_not_move_positions(name: str) -> None:
    """These families keep the offset of their positions on the model, between a prompt and its answer."""
    model, inputs = shared(name), FAMILIES[name].inputs(images=(1, 2))
    others = FAMILIES[name].inputs(images=(2, 1))

    def step(between: Any) -> Tensor:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            between()
            return model(input_ids=words(2, 1), past_key_values=cache).logits

    bare = step(lambda: None)
    with sc.attach(model) as session:
        assert torch.equal(step(lambda: session.forward(others)), bare)
    assert not torch.equal(step(lambda: model(**others)), bare)  # else this could not fail


def test_an_extra_pass_has_gradients_when_asked() -> None:
    model = FAMILIES["llama"].build()
    grads = []

    def observe(call: AttentionCall) -> None:
        out = call.run.forward(LLAMA, grad=True).logits
        with torch.enable_grad():
            grads.append(torch.autograd.grad(out.sum(), model.lm_head.weight)[0])
        assert not call.run.forward(LLAMA).logits.requires_grad

    with sc.attach(model, method(observe=observe)(sites="text.0.self", phases=("prefill",))):
        greedy(model, LLAMA, 2)
    model(**LLAMA).logits.sum().backward()
    torch.testing.assert_close(grads[0], model.lm_head.weight.grad)


def test_after_an_extra_pass_the_last_answer_is_still_known_in_the_next_turn() -> None:
    model = shared("llama")

    @dataclass(eq=False)
    class AtEnd(Method):
        def end(self, run: Any) -> None:
            run.forward(LLAMA)

    look = Look(lambda call: call.klayout, sites="text.0.self")
    with sc.attach(model, AtEnd(), look):
        out = model.generate(**LLAMA, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, words(2, 5)], 1)
        model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=1)
    assert look.seen[-1][2].where("generated")[0].tolist() == [False] * 24 + [True] * 3 + [False] * 5


SHORT, LONG = "What is it?", "Is the red cup to the left of the box?"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_without_images_is_the_prompt_written_without_them(name: str, batch: int) -> None:
    from PIL import Image

    f = FAMILIES[name]
    assert f.processor and f.prompt
    processor, model = f.processor(), shared(name)
    pictures = [Image.new("RGB", (64, 48), "red"), Image.new("RGB", (48, 80), "blue")][:batch]
    questions = [SHORT, LONG][:batch]
    text = [f.prompt(1, q) for q in questions]
    inputs = dict(
        processor(
            images=[[p] for p in pictures], text=text, padding=True, padding_side="left", return_tensors="pt"
        )
    )
    got: list[Tensor] = []

    @dataclass(eq=False)
    class Blind(Method):
        def begin(self, run: Any) -> None:
            got.append(run.forward(run.without_images()).logits[:, -1])

    with sc.attach(model, Blind()):
        greedy(model, inputs, 1)
    for row in range(batch):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row] != 0]
        kept = ids[None, ids != model.config.image_token_id]
        with torch.no_grad():
            if name.startswith("qwen"):
                model.model.rope_deltas = None
            expected = model(input_ids=kept).logits[:, -1]
        torch.testing.assert_close(got[0][row : row + 1], expected, atol=1e-4, rtol=1e-4)


# ---- padding and batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bloom", "llava"])
def test_the_last_row_in_a_padded_batch_is_that_of_the_sample_alone(name: str, side: str) -> None:
    model = shared(name)
    if name == "llava":
        inputs = FAMILIES[name].inputs(images=(1, 2), side=side)
        pixels = [inputs["pixel_values"][:1], inputs["pixel_values"][1:]]
    else:
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
        inputs, pixels = {"input_ids": words(2, 24), "attention_mask": mask}, None

    def told(call: AttentionCall) -> tuple[Tensor, Tensor]:
        return call.weights("last"), call.columns("all")[:, 0, 0]

    batch = Look(told, sites="text.*.self")
    with sc.attach(model, batch):
        run(model, inputs)
    for row in range(2):
        real = inputs["attention_mask"][row] != 0
        alone = {"input_ids": inputs["input_ids"][row : row + 1, real]}
        if pixels:
            alone["pixel_values"] = pixels[row]
        single = Look(told, sites="text.*.self")
        with sc.attach(model, single):
            run(model, alone)
        for (_, _, (w, columns)), (_, _, (expected, _)) in zip(batch.seen, single.seen):
            assert torch.equal(columns[row], real)
            torch.testing.assert_close(w[row][..., real], expected[0], atol=1e-5, rtol=1e-4)
            assert (w[row][..., ~real] == 0).all()


def test_an_edit_of_the_last_row_in_a_padded_batch_is_that_of_the_sample_alone() -> None:
    model = shared("llama")
    for side in ("left", "right"):
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
        inputs = {"input_ids": words(2, 24), "attention_mask": mask}
        edit = method(scores=lambda call, s: s * 2)
        with sc.attach(model, edit(sites="text.*.self", rows="last")):
            both = run(model, inputs)
            for row in range(2):
                real = mask[row] != 0
                alone = run(model, {"input_ids": inputs["input_ids"][row : row + 1, real]})
                torch.testing.assert_close(both[row : row + 1, real], alone, atol=1e-4, rtol=1e-4)


# ---- training ----------------------------------------------------------------------------------------------


def grads(model: Any, *methods: Method) -> list[Tensor]:
    model.train()
    model.zero_grad()
    ids = words(2, 12)
    with sc.attach(model, *methods):
        model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_checkpointed_training_is_that_without(name: str, reentrant: bool) -> None:
    plain, saving = FAMILIES[name].build(), FAMILIES[name].build()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        saving.enable_input_require_grads()
    bare = grads(saving)
    edits = {
        "observing": lambda: [Look(lambda call: call.weights("last"), sites="text.*.self")],
        "bias": lambda: [method(bias=lambda call: torch.linspace(0, 1, call.k.shape[2]))()],
        "weights": lambda: [method(weights=lambda call, w: w.square())(rows=5, heads=(1,))],
        "output": lambda: [method(output=lambda call, o: o * ~call.rows("first"))()],
        "mlp": lambda: [method(hidden=lambda call, h: h * 0.5)(sites="text.*.mlp")],
        "layer": lambda: [method(hidden=lambda call, h: h * 0.5)(sites="text.*.layer")],
    }
    for what, make in edits.items():
        expected, methods = grads(plain, *make()), make()
        got = grads(saving, *methods)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        same = all(torch.equal(a, b) for a, b in zip(got, bare))
        assert same == (what == "observing")
        if what == "observing":
            assert len(methods[0].seen) == 4  # once for every layer, not again in backward


def test_weights_are_on_the_graph() -> None:
    model = FAMILIES["llama"].build()
    leaves: list[Tensor] = []

    def weights(call: AttentionCall, w: Tensor) -> Tensor:
        leaves.append(w)
        w.retain_grad()
        return w

    with sc.attach(model, method(weights=weights)(sites="text.1.self")):
        model(**LLAMA).logits[:, -1, 5].sum().backward()
    (w,) = leaves
    assert w.grad is not None
    index = (0, 2, -1, 3)
    step = 1e-3

    def nudged(by: float) -> float:
        def edit(call: AttentionCall, w: Tensor) -> Tensor:
            w = w.clone()
            w[index] += by
            return w

        with sc.attach(model, method(weights=edit)(sites="text.1.self")):
            return float(run(model, LLAMA)[:, -1, 5].sum())

    slope = (nudged(step) - nudged(-step)) / (2 * step)
    assert abs(slope - float(w.grad[index])) < 0.02 * abs(slope) + 1e-3


@pytest.mark.parametrize("f", select("vlm", "generates"))
def test_a_left_padded_generation_is_seen_whole(f: Any) -> None:
    """Every pass of every vision-language family: weights of real rows sum to one and avoid padding."""
    model, inputs = shared(f.name), f.inputs(images=(1, 2) if "multi_image" in f.tags else (1, 1))
    padding = inputs["attention_mask"] == 0

    def told(call: AttentionCall) -> None:
        w = call.weights("last")
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
        assert call.columns("all").shape[-1] == call.k.shape[2]
        pad = call.columns("pad")[:, 0, 0]
        if padding.shape[1] <= pad.shape[1]:
            assert torch.equal(pad[:, : padding.shape[1]], padding)
            assert not pad[:, padding.shape[1] :].any()
            assert (w[:, :, 0][pad[:, None].expand(-1, w.shape[1], -1)] == 0).all()

    look = Look(told, sites="text.*.self")
    with sc.attach(model, look):
        got = greedy(model, inputs, 3)
    assert torch.equal(got, greedy(model, inputs, 3))
    assert len(look.seen) == 3 * len({site for site, _, _ in look.seen})
