"""Path patching against two runs by hand, and on a circuit of two planted heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look, shared
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import run
from zoo.words import tokenizer

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.site import match
from saccade.probes._parts.tracing import Patch, trace
from saccade.probes.circuit_component_reuse import CircuitReuse, Paths, Repair, overlap, paths, reuse

from .planted import IMAGE, LAST, MIDDLE, OUT, QUESTION, SIGNAL, WORD, Route, planted, question
from .test_notice import difference, pair

MODELS = ("llava", "qwen2_5_vl")  # they have a processor
EXAMPLE: dict[str, Any] = {
    "other": "Is the blue cup on the box?", "correct": " red", "incorrect": " blue", "rows": 16
}  # fmt: skip
DOUBLE = torch.float64
NAMES = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])


def found(model: Any, asked: sc.Question, **options: Any) -> Paths:
    with sc.attach(model) as session:
        return session.run(CircuitReuse(**{**EXAMPLE, **options}), asked).found["paths"]


def mixers(model: Any) -> list[nn.Module]:
    """What mixes the heads of every layer of the text."""
    ends = ("self_attn.o_proj", "attn.c_proj")
    return [m for name, m in model.named_modules() if name.endswith(ends) and "vision" not in name]


def by_hand(
    model: Any, asked: sc.Question, sender: tuple[int, int], receiver: tuple[int, int] | None
) -> float:
    """Logit difference when one head, others frozen, tells the answer, or the queries of another."""
    clean, other = pair(model, asked)
    ends = mixers(model)
    kept: list[list[Tensor]] = [[], []]
    for inputs, into in zip((clean, other), kept):
        hooks = [
            end.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0])) for end in ends
        ]
        run(model, inputs)
        for hook in hooks:
            hook.remove()

    def speak(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[:, -1] = kept[0][layer][:, -1]
            if layer == sender[0]:
                part = slice(16 * sender[1], 16 * sender[1] + 16)
                z[:, -1, part] = kept[1][layer][:, -1, part]
            return (z,)

        return hook

    heard: list[Tensor] = []
    hooks = [end.register_forward_pre_hook(speak(i)) for i, end in enumerate(ends)]
    if receiver:
        project = model.model.language_model.layers[receiver[0]].self_attn.q_proj
        hooks.append(project.register_forward_hook(lambda _, __, out: heard.append(out)))
    logits = run(model, clean)[0, -1]
    for hook in hooks:
        hook.remove()
    if receiver:
        part = slice(16 * receiver[1], 16 * receiver[1] + 16)

        def listen(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[..., part] = heard[0][..., part]
            return out

        hook = project.register_forward_hook(listen)
        logits = run(model, clean)[0, -1]
        hook.remove()
    return float(difference(logits, asked))


@NAMES
def test_effects_are_those_of_two_runs_by_hand(name: str) -> None:
    model, asked = shared(name, DOUBLE), question(name)
    before, after = (float(difference(run(model, inputs)[0, -1], asked)) for inputs in pair(model, asked))
    direct, queries = found(model, asked, rows=5), found(model, asked, receivers=((2, 1),))
    assert (direct.clean, direct.other) == (pytest.approx(before), pytest.approx(after))
    assert direct.change.values.shape == (4, 4) and queries.change.values.shape == (2, 4)
    for sender, receiver, table in [
        ((1, 2), None, direct),
        ((3, 0), None, direct),
        ((0, 3), (2, 1), queries),
        ((1, 0), (2, 1), queries),
    ]:
        made = -100 * (by_hand(model, asked, sender, receiver) - before) / (after - before)
        got = float(table.change.at(layer=sender[0], head=sender[1]))
        assert got == pytest.approx(made, rel=1e-3, abs=1e-3), (sender, receiver)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_is_asked_without_a_picture(name: str) -> None:
    model, words = shared(name, DOUBLE), tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    asked = sc.Question(words, [], QUESTION, {"max_new_tokens": 2})
    before, after = (float(difference(run(model, inputs)[0, -1], asked)) for inputs in pair(model, asked))
    table = found(model, asked).change
    for layer, head in ((0, 3), (2, 1), (3, 0)):
        made = -100 * (by_hand(model, asked, (layer, head), None) - before) / (after - before)
        assert float(table.at(layer=layer, head=head)) == pytest.approx(made, rel=1e-3, abs=1e-3)


@NAMES
def test_a_heads_own_output_changes_nothing_and_the_final_residual_everything(name: str) -> None:
    model, asked = shared(name, DOUBLE), question(name)
    clean, other = pair(model, asked)
    last = clean["input_ids"].shape[1] - 1
    with sc.attach(model) as session:
        senders = [(site, head) for site in match("text.:.self", session.sites) for head in range(4)]
        for receivers in ([], senders[8:9]):
            mine = [s for s in senders if not receivers or s[0].layer < 2]
            own = paths(session, clean, clean, mine, receivers, lambda x: difference(x, asked), place=last)
            assert_close(own.patched, own.clean.expand_as(own.patched), atol=1e-6, rtol=0)
        residual = Patch(match("text.-1.layer", session.sites)[0], torch.arange(last + 1) == last)
        whole = trace(session, other, clean, [residual], lambda x: difference(x, asked), 1)
    assert_close(whole.recovery, torch.ones(1, dtype=DOUBLE), atol=1e-6, rtol=0)


def two_heads() -> Any:
    """1.0 takes red or blue to the last token, and 3.2 looks at the picture where it was red."""
    model = planted(Route(1, 0, LAST, WORD, SIGNAL, MIDDLE), Route(3, 2, MIDDLE, IMAGE, SIGNAL, OUT))
    words = question().processor.tokenizer
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[:, WORD] = 0
        for word, sign in ((" red", 1.0), (" blue", -1.0)):
            token = words.encode(word)[-1]
            model.model.language_model.embed_tokens.weight[token, [WORD, SIGNAL]] = torch.tensor(
                [1.0, 3 * sign]
            )
            model.lm_head.weight[token, OUT] = 10 * sign
    return model.double()


def test_only_the_true_heads_and_their_path_matter() -> None:
    model, asked = two_heads(), question()
    direct = found(model, asked).change.values
    assert float(direct[3, 2]) == pytest.approx(-100, abs=2)
    direct[3, 2] = 0
    assert direct.abs().max() < 2
    queries = found(model, asked, receivers=((3, 2),)).change.values
    assert float(queries[1, 0]) == pytest.approx(-100, abs=2)
    queries[1, 0] = 0
    assert queries.abs().max() < 1e-9
    assert found(model, asked, receivers=((3, 2),)).circuit(0.08) == {"text.1.self": (0,)}
    nobody = found(model, asked, receivers=((3, 1), (2, 0))).change.values
    assert (nobody == 0).all()  # nothing that these read reaches the answer


def test_receivers_never_send() -> None:
    table = found(shared("llava"), question(), receivers=((2, 1), (3, 0))).change
    assert table.axes["layer"] == ("0", "1")


@pytest.mark.parametrize("reads", ["k", "v"])
def test_keys_and_values_hear_at_the_senders_place(reads: str) -> None:
    """A word before the last: what it says is heard by who looks at it."""
    model, asked = shared("llava", DOUBLE), question()
    at_cup = found(model, asked, receivers=((3, 0),), reads=reads, at="cup")
    assert at_cup.change.values.abs().max() > 1e-4
    assert not torch.equal(
        at_cup.change.values, found(model, asked, receivers=((3, 0),), reads="q").change.values
    )


def test_with_frozen_mlps_only_the_direct_way_is_left() -> None:
    """In a model without mlps it is the same."""
    model, asked = two_heads(), question()
    live, frozen = (found(model, asked, freeze_mlps=freeze).change.values for freeze in (False, True))
    assert_close(live, frozen, atol=1e-6, rtol=0)
    random = shared("llava", DOUBLE)
    live, frozen = (found(random, asked, freeze_mlps=freeze).change.values for freeze in (False, True))
    assert (live - frozen).abs().max() > 0.1
    assert_close(live[3] * 0, frozen[3] * 0)


def test_reuse_and_overlap_count_heads() -> None:
    a, b = (
        {"text.1.self": (0, 2), "text.3.self": (1,)},
        {"text.1.self": (2,), "text.2.self": (0,), "text.3.self": (1,)},
    )
    assert reuse(a, b) == pytest.approx(2 / 3)
    assert overlap(a, b) == pytest.approx(2 / 4)


def test_repaired_rows_sum_to_one_and_nothing_below_changes() -> None:
    model, asked = shared("llava"), question()
    inputs = asked.inputs(model)
    before, after = Look(lambda call: call.weights()), Look(lambda call: (call.weights(), call.q))
    with sc.attach(model, before):
        run(model, inputs)
    with sc.attach(model, Repair(sites="text.2.self", heads=(1, 3), places=(40, 42)), after):
        run(model, inputs)
    for layer in range(3):
        plain, (w, _) = before.at(f"text.{layer}.self")[0], after.at(f"text.{layer}.self")[0]
        changed = ((w - plain).abs() > 1e-5).any(-1).nonzero()
        if layer < 2:
            assert len(changed) == 0
        else:
            assert {tuple(place[1:]) for place in changed.tolist()} == {
                (1, w.shape[2] - 1),
                (3, w.shape[2] - 1),
            }
            assert_close(w.sum(-1), torch.ones_like(w.sum(-1)))
            assert w[0, 1, -1].nonzero()[:, 0].tolist() == [40, 42] and w[0, 1, -1, 40] == 0.5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"other": ""}, "other="),
        ({"other": "Is the blue and white cup on the box?"}, "tokens"),
        ({"other": QUESTION}, "nothing to recover"),
        ({"receivers": ((4, 0),)}, "4.0"),
        ({"receivers": ((0, 0),)}, "0.0"),
        ({"at": "dog"}, "'dog'"),
    ],
)
def test_what_cannot_be_patched_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        found(shared("llava"), question(), **options)
