"""Features before the projector: as if the projector were called by hand on what the methods left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import CLOSE, assert_follows, differs, generate, oracle, recompute, subject
from helpers import Exact, greedy, method, shared, unchanged
from torch import Tensor, nn
from zoo import FAMILIES

import saccade as sc
from core.missing import draw, gone, visual
from core.test_features import Choose
from core.test_tokens import asked
from saccade.core.errors import InputError, OptionError
from saccade.core.features import Item
from saccade.core.method import Method
from saccade.core.tokens import Tokens

PROJECTORS = {
    "llava": "model.multi_modal_projector", "internvl": "model.multi_modal_projector",
    "paligemma": "model.multi_modal_projector", "gemma3": "model.multi_modal_projector",
    "idefics3": "model.connector", "qwen2_vl": "model.visual.merger", "qwen3_vl": "model.visual.merger",
}  # fmt: skip
ALONE = ["llava", "internvl", "paligemma"]


def before(**events: Any) -> Method:
    kind = method(**events)
    kind.stage = "before"
    return kind()


class With:
    """A plain model whose projector is given other tokens: `change(flat tokens)`."""

    def __init__(self, model: nn.Module, name: str, change: Any) -> None:
        self.module, self.change = model.get_submodule(PROJECTORS[name]), change

    def __enter__(self) -> None:
        def given(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (self.change(args[0].flatten(0, -2)).view_as(args[0]), *args[1:]), kwargs
            name, x = next(iter(kwargs.items()))
            return args, {**kwargs, name: self.change(x.flatten(0, -2)).view_as(x)}

        self.hook = self.module.register_forward_pre_hook(given, with_kwargs=True)

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()


def scaled(x: Tensor) -> Tensor:
    """Every token by another factor, and one feature less in each."""
    x = x * torch.linspace(0.2, 2, x.shape[0], dtype=x.dtype)[:, None]
    x[:, 0] = 0
    return x


@pytest.mark.parametrize("name", PROJECTORS)
def test_values_are_projected_in_the_place_of_others(name: str) -> None:
    """Of every token, also where the projector makes one feature of several; two pictures beside one, padding."""
    model, inputs = subject(name), asked(name)
    prompt = inputs["input_ids"].shape[1]
    whole: list[Tensor] = []
    items: list[Item] = []

    def features(item: Item) -> Tokens:
        items.append(item)
        whole.append(scaled(item.x))
        return Tokens(values=whole[-1])

    bare = generate(model, inputs)
    with unchanged(model), sc.attach(model, before(features=features)):
        out = generate(model, inputs)
    plain = oracle(name)
    with With(plain, name, lambda x: torch.cat(whole)):
        wanted = recompute(plain, inputs, out.sequences[:, prompt:])
    assert_follows(out, wanted, prompt)
    assert differs(out, bare)
    given: list[Tensor] = []
    with With(plain, name, lambda x: given.append(x) or x):
        recompute(plain, inputs)
    assert float((torch.cat([item.x for item in items]) - given[0]).abs().max()) < CLOSE


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("way", ["generate", "forward"])
def test_what_leaves_is_added_to_the_first_that_stays(name: str, way: str) -> None:
    """Merged before the projector, dropped behind it; and a second method behind it sees what was projected."""
    model, inputs = subject(name), asked(name)
    prompt, slots = inputs["input_ids"].shape[1], visual(name, inputs)
    whole: list[Tensor] = []
    keeps: list[Tensor] = []
    seen: list[Tensor] = []

    def features(item: Item) -> Tokens:
        keep = draw(item.x.shape[0], seed=item.index)
        keep[0] = True
        values = item.x[keep].clone()
        values[0] += item.x[~keep].sum(0) / 8
        keeps.append(keep)
        whole.append(item.x.clone())
        whole[-1][keep] = values
        return Tokens(keep, values=values)

    late = method(features=lambda item: seen.append(item.x))()
    with sc.attach(model, late, before(features=features)):
        if way == "generate":
            out = generate(model, inputs)
            answer = out.sequences[:, prompt:]
        else:
            with Exact(), torch.no_grad():
                mask = inputs["attention_mask"]
                out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
            answer = None
    plain, keep = oracle(name), torch.ones_like(slots)
    keep[slots] = torch.cat(keeps)
    made: list[Tensor] = []
    hook = plain.get_submodule(PROJECTORS[name]).register_forward_hook(
        lambda *given: made.append(given[-1].flatten(0, -2))
    )
    try:
        with With(plain, name, lambda x: torch.cat(whole)):
            wanted = recompute(plain, inputs, answer, gone({0: keep}))
    finally:
        hook.remove()
    if way == "generate":
        assert_follows(out, wanted, prompt)
    else:
        left = keep & (inputs["attention_mask"] == 1)
        assert float((out - wanted)[left].abs().max()) < CLOSE
    assert float((torch.cat(seen) - made[0]).abs().max()) < CLOSE


@pytest.mark.parametrize("name", ALONE)
def test_a_choice_alone_is_the_same_on_either_side(name: str) -> None:
    """To the bit; the projector runs for the features, and to see whether it leaves every token alone."""
    model, inputs = shared(name), FAMILIES[name].inputs(images=(1, 2))
    out, runs = [], {"before": 0, "after": 0}
    for stage in runs:
        choose = Choose()
        choose.stage = stage

        def count(*_: Any, stage: str = stage) -> None:
            runs[stage] += 1

        hook = model.get_submodule(PROJECTORS[name]).register_forward_hook(count)
        with sc.attach(model, choose), torch.no_grad():
            out.append(model(**inputs).logits)
        hook.remove()
        assert {item.stage for item in choose.items} == {stage}
    assert torch.equal(*out)
    assert runs == {"before": 2, "after": 1}


def test_an_item_before_the_projector_knows_what_one_behind_it_knows() -> None:
    model, inputs = shared("llava"), FAMILIES["llava"].inputs(images=(1, 2))
    early, late = Choose(), Choose()
    early.stage = "before"
    with sc.attach(model, early, late):
        greedy(model, inputs, 2)
    width = model.config.vision_config.hidden_size
    assert len(early.items) == len(late.items) == 3
    for a, b in zip(early.items, late.items, strict=True):
        assert a.x.shape == (36, width) and b.x.shape == (36, model.config.text_config.hidden_size)
        assert (a.kind, a.index, a.sample, a.first) == (b.kind, b.index, b.sample, b.first)
        assert torch.equal(a.question, b.question) and torch.equal(a.grid(), b.grid())
        assert a.inputs["pixel_values"] is inputs["pixel_values"]


def test_only_named_stages_are_taken() -> None:
    kind = method(features=lambda item: None)
    kind.stage = "beside"
    with pytest.raises(OptionError, match="beside"):
        kind()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("idefics3", "Idefics3Connector makes 48 features of 192 tokens"),
        ("qwen2_vl", "PatchMerger makes 40 features of 160 tokens"),
        ("gemma3", "Gemma3MultiModalProjector makes 48 features of 192 tokens"),
    ],
)
def test_merged_tokens_cannot_leave_one_by_one(name: str, why: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs(images=(1, 2))
    bare = greedy(model, inputs, 2)
    half = before(features=lambda item: Tokens(torch.arange(item.x.shape[0]) % 2 == 0))
    where = before(features=lambda item: item.grid() and None)
    for asking, does in ((half, "drops tokens"), (where, "rows and columns")):
        with unchanged(model), sc.attach(model, asking), pytest.raises(InputError) as refusal:
            greedy(model, inputs, 2)
        assert why in refusal.value.problem and does in refusal.value.problem
        assert "stage='after'" in refusal.value.remedy
    assert torch.equal(greedy(model, inputs, 2), bare)


def test_a_projector_that_mixes_as_many_tokens_is_told_from_one_that_does_not() -> None:
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs()
    half = before(features=lambda item: Tokens(torch.arange(item.x.shape[0]) % 2 == 0))
    model.model.multi_modal_projector.act = Neighbours()
    with sc.attach(model, half), pytest.raises(InputError, match="makes every feature of several tokens"):
        model(**inputs)


class Neighbours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.roll(1, -2)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llava_next", "rearranges what LlavaNextMultiModalProjector makes"),
        ("qwen2_5_vl", "rearranges what Qwen2_5_VLPatchMerger makes"),
        ("chameleon", "no module behind the vision tower"),
    ],
)
def test_features_that_are_not_what_a_projector_made_are_named(name: str, why: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    scale = before(features=lambda item: Tokens(values=item.x * 2))
    greedy(model, inputs, 2)
    with unchanged(model), sc.attach(model, scale), pytest.raises(InputError, match=why):
        greedy(model, inputs, 2)


@pytest.mark.parametrize("event", ["features", "hidden"])
def test_what_fails_in_a_method_leaves_no_trace(event: str) -> None:
    """Behind the tower, and in it while it is watched."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    bare = greedy(model, inputs, 2)

    def fail(*_: Any) -> Any:
        raise KeyError("mine")

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    counts, failing = hooks(), method(**{event: fail})(sites="vision.0.layer")
    failing.stage = "before"
    with (
        unchanged(model),
        sc.attach(model, failing, before(features=lambda item: None)),
        pytest.raises(KeyError, match="mine"),
    ):
        greedy(model, inputs, 2)
    assert hooks() == counts
    assert torch.equal(greedy(model, inputs, 2), bare)
