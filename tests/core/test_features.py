"""Features that stay behind: the answer is that of a prompt without their placeholders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from dense import (
    CLOSE,
    F64,
    assert_follows,
    differs,
    generate,
    inputs_of,
    oracle,
    positions,
    recompute,
    subject,
)
from helpers import Exact, greedy, method, shared, unchanged
from torch import Tensor, nn
from zoo import FAMILIES, select
from zoo.base import words

import saccade as sc
from core.missing import Evict, Leave, draw, entries, evicted, gone, staying, together, visual
from core.test_tokens import FAST, RAW, READ_WHOLE, asked, closed, follow_beams, turned
from saccade.core.errors import AttachError, InputError, SaccadeError
from saccade.core.features import Item
from saccade.core.method import Method
from saccade.core.tokens import Tokens

QUICK = {*FAST, "llava_next", "idefics3"} - {"mllama"}


REFUSED = {"gemma4", "phi4_multimodal"}
"""Late layers read the last token alone; no features are given."""

ELSEWHERE = {"blip2"}
"""Their `generate()` makes the features without `get_image_features`, their forward with it."""


def seeing(*but: str) -> list[Any]:
    names = [f.values[0].name for f in select("vlm", "generates") if "cross" not in f.values[0].tags]
    return [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in names
        if name not in REFUSED.union(but)
    ]


@dataclass(eq=False)
class Choose(Method):
    """Half of the features stay, others of every item."""

    positions: str = "keep"
    share: float = 0.5
    seed: int = 0
    items: list[Item] = field(default_factory=list)

    def features(self, item: Item) -> Tokens:
        self.items.append(item)
        return Tokens(self.stays(item), positions=self.positions)

    def stays(self, item: Item) -> Tensor:
        keep = draw(item.x.shape[0], seed=100 * self.seed + item.index, share=self.share)
        keep[0] = True
        return keep

    def kept(self, slots: Tensor) -> Tensor:
        """Which tokens of the prompt stay (samples, tokens)."""
        keep = torch.ones_like(slots)
        keep[slots] = torch.cat([self.stays(item) for item in self.items])
        return keep


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "sampling": {"do_sample": True}, "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 7},
}  # fmt: skip


@pytest.mark.parametrize("name", seeing(*ELSEWHERE))
@pytest.mark.parametrize("way", WAYS)
def test_features_that_stay_behind_are_never_seen(name: str, way: str) -> None:
    if way == "chunks" and name in READ_WHOLE | RAW:
        pytest.skip(f"{name} does not read its prompt in chunks")
    model, inputs = subject(name), asked(name)
    prompt, choose = inputs["input_ids"].shape[1], Choose()
    torch.manual_seed(1)
    with sc.attach(model, choose):
        out = generate(model, inputs, **WAYS[way])
    keep = choose.kept(visual(name, inputs))
    wanted = recompute(oracle(name), inputs, out.sequences[:, prompt:], gone({0: keep}))
    assert_follows(out, wanted, prompt)
    assert differs(out, generate(model, inputs, **WAYS[way]))
    if way == "greedy":
        held = out.past_key_values.layers[1]
        assert held.keys.shape[2] == int(keep.sum(1).max()) + 3 or held.sliding_window


@pytest.mark.parametrize("name", seeing("gemma3", *ELSEWHERE))
def test_or_their_places_close_up(name: str) -> None:
    """As in a prompt that was made without them."""
    model, inputs = subject(name), asked(name)
    prompt, choose = inputs["input_ids"].shape[1], Choose("renumber", share=0.15)  # so that rows of a grid go
    with sc.attach(model, choose):
        out = generate(model, inputs)
    keep, answer = choose.kept(visual(name, inputs)), out.sequences[:, prompt:]
    stays = keep & (inputs["attention_mask"] == 1)
    stays = nn.functional.pad(stays, (0, answer.shape[1]), value=True)
    plain = oracle(name)
    with turned(plain, 0, lambda ids: closed(ids, stays)):
        wanted = recompute(plain, inputs, answer, gone({0: keep}))
    assert_follows(out, wanted, prompt)
    with sc.attach(model, Choose(share=0.15)):
        assert differs(out, generate(model, inputs))


@pytest.mark.parametrize("positions_", ["keep", "renumber"])
def test_the_reduced_prompt_made_by_hand(positions_: str) -> None:
    """Embeddings of words and of the features that stay, one sample at a time, nothing masked at all."""
    model, inputs = subject("llava"), asked("llava")
    prompt, choose = inputs["input_ids"].shape[1], Choose(positions_)
    with sc.attach(model, choose):
        out = generate(model, inputs)
    plain, slots = oracle("llava"), visual("llava", inputs)
    with Exact(), torch.no_grad():
        features = torch.cat(list(plain.model.get_image_features(inputs["pixel_values"]).pooler_output))
    embeds = plain.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[slots] = features.to(F64)
    keep = choose.kept(slots) & (inputs["attention_mask"] == 1)
    for row in range(2):
        answer = plain.get_input_embeddings()(out.sequences[row, prompt:])
        at = positions(inputs["attention_mask"])[row][keep[row]]
        at = at if positions_ == "keep" else torch.arange(len(at))
        at = torch.cat([at, int(at[-1]) + 1 + torch.arange(len(answer))])
        with Exact(), torch.no_grad():
            short = torch.cat([embeds[row][keep[row]], answer])[None]
            wanted = plain(inputs_embeds=short, position_ids=at[None]).logits[0]
        got = torch.stack([step[row] for step in out.logits])
        first = int(keep[row].sum()) - 1
        assert float((got - wanted[first : first + len(got)]).abs().max()) < CLOSE


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}], ids=["beams"])
@pytest.mark.parametrize(
    "name", ["llava", "qwen2_5_vl", "qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_beams_of_a_sample_share_its_features(name: str, options: dict[str, Any]) -> None:
    model, inputs, choose = subject(name), asked(name), Choose()
    with sc.attach(model, choose):
        out = generate(model, inputs, **options)
    masks = gone({0: choose.kept(visual(name, inputs))})
    plain = oracle(name)
    follow_beams(
        out, lambda i, answers, _: recompute(plain, inputs, answers, masks), inputs["input_ids"].shape[1], 2
    )


@pytest.mark.parametrize("name", seeing())
def test_a_plain_forward_chooses_too(name: str) -> None:
    model, inputs, choose = subject(name), asked(name), Choose()
    given = dict(inputs)
    if not any("grid" in key for key in inputs):
        given["position_ids"] = positions(inputs["attention_mask"])
    with sc.attach(model, choose), Exact(), torch.no_grad():
        got = model(**given).logits
    keep = choose.kept(visual(name, inputs))
    wanted = recompute(oracle(name), inputs, None, gone({0: keep}))
    left = keep & (inputs["attention_mask"] == 1)
    assert got.shape == wanted.shape
    assert float((got - wanted)[left].abs().max()) < CLOSE
    assert float((got - recompute(oracle(name), inputs))[left].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3"])
def test_values_take_the_place_of_features_that_stay(name: str) -> None:
    """What stays behind is added to the first that stays."""
    model, inputs = subject(name), asked(name)
    prompt = inputs["input_ids"].shape[1]
    merged: list[Tensor] = []

    def features(item: Item) -> Tokens:
        keep = torch.arange(item.x.shape[0]) % 2 == 0
        values = item.x[keep].clone()
        values[0] += item.x[~keep].sum(0)
        whole = item.x.clone()
        whole[keep] = values
        merged.append(whole)
        return Tokens(keep, values=values)

    with sc.attach(model, method(features=features)()):
        out = generate(model, inputs)
    slots = visual(name, inputs)
    keep = torch.ones_like(slots)
    keep[slots] = torch.cat([torch.arange(len(t)) % 2 == 0 for t in merged])
    plain = oracle(name)
    embeds = plain.get_input_embeddings()

    def replace(_: nn.Module, args: Any, kwargs: Any) -> Any:
        given = kwargs["inputs_embeds"].clone()
        given[:, :prompt][slots] = torch.cat(merged).to(given)
        return args, {**kwargs, "inputs_embeds": given}

    text = next(
        m
        for p, m in plain.named_modules()
        if p.endswith(("language_model", "text_model")) and "vision" not in p
    )
    hook = text.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        wanted = recompute(plain, inputs, out.sequences[:, prompt:], gone({0: keep}))
    finally:
        hook.remove()
    assert_follows(out, wanted, prompt)
    assert embeds is not None


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_two_methods_choose_from_what_is_there(name: str) -> None:
    """What either leaves behind stays behind."""
    model, inputs = subject(name), asked(name)
    prompt, a, b = inputs["input_ids"].shape[1], Choose(share=0.7), Choose(share=0.7, seed=1)
    with sc.attach(model, a, b):
        out = generate(model, inputs)
    slots = visual(name, inputs)
    masks = gone({0: a.kept(slots) & b.kept(slots)})
    assert_follows(out, recompute(oracle(name), inputs, out.sequences[:, prompt:], masks), prompt)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_then_more_leave_at_depth_and_from_the_cache(name: str) -> None:
    model, inputs = subject(name), asked(name)
    prompt, choose = inputs["input_ids"].shape[1], Choose()
    leave, keep = {0: staying(inputs, 8, 0.8), 2: staying(inputs, 9, 0.8)}, {1: entries(inputs, "ragged")}
    with sc.attach(model, choose, Leave(keep=leave), Evict(keep=keep)):
        out = generate(model, inputs)
    hidden = together(gone({0: choose.kept(visual(name, inputs))}), gone(leave), evicted(keep, prompt))
    assert_follows(out, recompute(oracle(name), inputs, out.sequences[:, prompt:], hidden), prompt)


def test_one_layer_only_over_features_that_stay_behind() -> None:
    """Those come back, these do not."""
    model, inputs = subject("llava"), asked("llava")
    prompt, choose, once = inputs["input_ids"].shape[1], Choose(), staying(inputs, 5, 0.7)
    from core.test_tokens import changed

    def after(h_in: Tensor, h_out: Any) -> Any:
        stays = nn.functional.pad(once, (0, h_in.shape[1] - prompt), value=True)[..., None]
        return torch.where(stays, h_out, h_in)

    with sc.attach(model, choose, Leave(keep={0: once}, options={"only_this_layer": True})):
        out = generate(model, inputs)
    hidden = gone({0: choose.kept(visual("llava", inputs))})
    hidden[0] = hidden[0] | ~once[:, None, None]
    plain = oracle("llava")
    with changed(plain, 0, None, after):
        wanted = recompute(plain, inputs, out.sequences[:, prompt:], hidden)
    assert_follows(out, wanted, prompt)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_picture_of_a_later_turn_is_chosen_from_too(name: str) -> None:
    model, inputs = subject(name), inputs_of(name)
    prompt, choose = inputs["input_ids"].shape[1], Choose()
    more = inputs_of(name)
    plain = oracle(name)
    with sc.attach(model, choose):
        out = generate(model, inputs)
        keep = choose.kept(visual(name, inputs))
        ids = torch.cat([out.sequences, more["input_ids"][:, 1:]], 1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        choose.items.clear()
        again = generate(
            model, {**both, "pixel_values": more["pixel_values"]}, past_key_values=out.past_key_values
        )
        late = choose.kept(visual(name, {"input_ids": more["input_ids"][:, 1:]}))
    whole = torch.cat([keep, torch.ones_like(out.sequences[:, prompt:], dtype=torch.bool), late], 1)
    tiles = (inputs["pixel_values"].unflatten(0, (2, -1)), more["pixel_values"].unflatten(0, (2, -1)))
    pictures = torch.cat(tiles, 1).flatten(0, 1)
    wanted = recompute(
        plain, {**both, "pixel_values": pictures}, again.sequences[:, ids.shape[1] :], gone({0: whole})
    )
    assert_follows(again, wanted, ids.shape[1])


def test_a_loop_by_hand_with_a_picture_in_its_second_step() -> None:
    """Which is not where the first one's was."""
    model, inputs, more, choose = subject("llava"), inputs_of("llava"), inputs_of("llava"), Choose()
    more["input_ids"] = torch.cat([words(2, 7), more["input_ids"][:, 2:]], 1)
    with sc.attach(model, choose), Exact(), torch.no_grad():
        out = model(**inputs, use_cache=True)
        keep = choose.kept(visual("llava", inputs))
        choose.items.clear()
        late = model(
            input_ids=more["input_ids"],
            pixel_values=more["pixel_values"],
            past_key_values=out.past_key_values,
        )
        words_only = model(input_ids=words(2, 3), past_key_values=late.past_key_values)
    ids = torch.cat([inputs["input_ids"], more["input_ids"], words(2, 3)], 1)
    after = torch.ones(2, 3, dtype=torch.bool)
    keep = torch.cat([keep, choose.kept(visual("llava", more)), after], 1)
    pictures = torch.stack([inputs["pixel_values"], more["pixel_values"]], 1).flatten(0, 1)
    wanted = recompute(oracle("llava"), {"input_ids": ids, "pixel_values": pictures}, None, gone({0: keep}))
    assert float((late.logits[:, -1] - wanted[:, -4]).abs().max()) < CLOSE
    assert float((words_only.logits - wanted[:, -3:]).abs().max()) < CLOSE


# ---- what an item knows --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "llava_next"])
def test_an_item_knows_its_question_its_pixels_and_its_sample(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs(images=(1, 2))
    choose = Choose()
    with sc.attach(model, choose):
        greedy(model, inputs, 2)
    slots = visual(name, inputs)
    for row in (0, 1):
        mine = [item for item in choose.items if item.sample == row]
        asked_now = inputs["input_ids"][row]
        told = asked_now[~slots[row] & (inputs["attention_mask"][row] == 1)]
        assert mine and all(torch.equal(item.question, told) for item in mine)
        assert sum(item.x.shape[0] for item in mine) == int(slots[row].sum())
    assert [item.index for item in choose.items] == list(range(len(choose.items)))
    assert all(item.kind == "image" and item.x.shape[1] == 64 for item in choose.items)
    pixels = next(v for k, v in choose.items[0].inputs.items() if k.startswith("pixel"))
    assert torch.equal(pixels, inputs["pixel_values"])
    assert choose.items[0].run.inputs["input_ids"] is inputs["input_ids"]


def test_an_item_knows_its_boxes_once_the_pictures_are_located() -> None:
    from PIL import Image

    model = shared("llava")
    processor = FAMILIES["llava"].processor()
    picture = Image.new("RGB", (48, 48), "red")
    text = FAMILIES["llava"].prompt(1, "what is it ?")
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    choose = Choose()
    with sc.attach(model, choose) as session:
        session.locate(processor, [picture])
        model(**inputs)
    box = choose.items[0].box
    assert box is not None and box.shape == (36, 4)
    assert box[0].tolist() == pytest.approx([0, 0, 8, 8], abs=0.5)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        (lambda item: torch.ones(item.x.shape[0] + 1, dtype=torch.bool), "which of"),
        (lambda item: torch.arange(item.x.shape[0] + 1), "cannot stay"),
        (lambda item: torch.zeros(item.x.shape[0], dtype=torch.bool), "no token at all"),
        (lambda item: torch.empty(0, dtype=torch.long), "no token at all"),
        (lambda item: torch.tensor([3, 1]), "ascending"),
    ],
)
def test_a_choice_that_does_not_fit_is_named(keep: Any, why: str) -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    bare = greedy(model, inputs, 2)
    with unchanged(model), sc.attach(model, method(features=lambda item: Tokens(keep(item)))()):
        for call in (lambda: model(**inputs), lambda: greedy(model, inputs, 2)):
            with pytest.raises(InputError, match=why):
                call()
    assert torch.equal(greedy(model, inputs, 2), bare)


def test_no_values_without_as_many_features() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()

    def features(item: Item) -> Tokens:
        return Tokens(torch.arange(5), values=item.x[:4])

    with sc.attach(model, method(features=features)()), pytest.raises(SaccadeError, match="values"):
        model(**inputs)


def test_fillers_choose_nothing() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    plain = method(features=lambda item: Tokens(torch.tensor([2, 5, 8])))
    filled = method(features=lambda item: Tokens(torch.tensor([-1, -1, 2, 5, 8])))
    out = []
    for kind in (plain, filled):
        with sc.attach(model, kind()), torch.no_grad():
            out.append(model(**inputs).logits)
    assert torch.equal(*out)


def test_embeddings_in_place_of_ids_are_refused() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with sc.attach(model, Choose()), pytest.raises(InputError, match="input_ids"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = embeds.clone()
    embeds[visual("llava", inputs)] = torch.cat(list(features))
    with sc.attach(model, Choose()):
        for call in (
            lambda: model(inputs_embeds=embeds),
            lambda: greedy(model, {"inputs_embeds": embeds}, 2),
        ):
            with pytest.raises(InputError, match="inputs_embeds"):
                call()


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "chunks"])
def test_features_that_generate_makes_elsewhere_are_refused(name: str, way: str) -> None:
    """Attaching does not know it: the forward gives features to choose from."""
    model, inputs, choose = subject(name), asked(name), Choose()
    bare = generate(model, inputs).sequences
    with unchanged(model), sc.attach(model, choose):
        with pytest.raises(InputError, match="which this call never made") as refusal:
            generate(model, inputs, **WAYS[way])
        assert "its generate() makes them without get_image_features" in refusal.value.remedy
        with Exact(), torch.no_grad():
            model(**inputs)
    assert choose.items
    assert torch.equal(generate(model, inputs).sequences, bare)


def test_too_few_placeholders_are_named() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    short = {
        **inputs,
        "input_ids": inputs["input_ids"][:, :20],
        "attention_mask": inputs["attention_mask"][:, :20],
    }
    with sc.attach(model, Choose()), pytest.raises(InputError, match="do not fill"):
        model(**short)


@pytest.mark.parametrize("name", ["llama", "mllama", "t5", "clip", "timm_vit"])
def test_a_model_without_features_among_its_words_is_refused_when_attached(name: str) -> None:
    with unchanged(shared(name)), pytest.raises(AttachError, match="feature"):
        sc.attach(shared(name), Choose())


def test_text_alone_has_nothing_to_choose() -> None:
    model, choose = shared("llava"), Choose()
    ids = {"input_ids": words(2, 12)}
    bare = greedy(model, ids, 3)
    with sc.attach(model, choose):
        assert torch.equal(greedy(model, ids, 3), bare)
    assert not choose.items
