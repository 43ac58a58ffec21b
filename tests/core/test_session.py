"""Sessions: in any order, in threads, on parts, and never half."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Look, everywhere, greedy, method, shared, unchanged
from torch import Tensor, nn
from zoo import FAMILIES, run

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import AttachError, OptionError
from saccade.core.method import Method
from saccade.core.runtime import Runtime

LLAMA = FAMILIES["llama"].inputs()


@pytest.fixture(autouse=True)
def nothing_stays() -> Any:
    yield
    assert Runtime._of == {}


def scaled(factor: float, sites: str = "text.*.self") -> Method:
    return method(output=lambda call, o: o * factor)(sites=sites)


# ---- nesting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bloom", "timm_vit", "torch_encoder"])
def test_three_sessions_leave_in_every_order(name: str) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    edits = [method(weights=lambda call, w, f=f: w * f)(sites="*.self") for f in (1.1, 1.2, 1.3)]
    bare = run(model, inputs)

    def expected(left: list[int]) -> Tensor:
        with sc.attach(model, [edits[i] for i in left]):
            return run(model, inputs)

    outcomes = {
        left: expected(list(left))
        for n in (1, 2, 3)
        for left in permutations(range(3), n)
        if list(left) == sorted(left)
    }
    with unchanged(model):
        for order in permutations(range(3)):
            sessions = [sc.attach(model, edit) for edit in edits]
            left = [0, 1, 2]
            for i in order:
                torch.testing.assert_close(run(model, inputs), outcomes[tuple(left)], atol=0, rtol=0)
                sessions[i].detach()
                left.remove(i)
            assert torch.equal(run(model, inputs), bare)


def test_nested_sessions_act_in_the_order_of_attachment_and_keep_their_results_apart() -> None:
    class Ends(Method):
        def end(self, run: Any) -> Any:
            return self

    one, two = Ends(), Ends()
    model = shared("llama")
    with sc.attach(model, one) as outer, sc.attach(model, two) as inner:
        run(model, LLAMA)
    assert outer.results == {"Ends": one}
    assert inner.results == {"Ends": two}


def test_one_object_is_attached_once_and_two_with_equal_options_are_fine() -> None:
    model = shared("llama")
    edit = scaled(2.0)
    with unchanged(model):
        with pytest.raises(AttachError, match="twice"):
            sc.attach(model, edit, edit)
        with sc.attach(model, edit):
            with pytest.raises(AttachError, match="twice"):
                sc.attach(model, edit)
            with sc.attach(model, scaled(2.0)):
                both = run(model, LLAMA)
    with sc.attach(model, scaled(4.0)):
        torch.testing.assert_close(run(model, LLAMA), both)


def test_detaching_twice_does_not_touch_a_later_session() -> None:
    model = shared("llama")
    first = sc.attach(model, scaled(2.0))
    first.detach()
    with sc.attach(model, scaled(3.0)):
        expected = run(model, LLAMA)
        first.detach()
        assert torch.equal(run(model, LLAMA), expected)
        with sc.attach(model, scaled(1.0)):
            torch.testing.assert_close(run(model, LLAMA), expected)


def test_a_session_still_says_what_it_did_when_it_is_over() -> None:
    with sc.attach(shared("llama"), scaled(2.0)) as session:
        during, plans = session.summary(), dict(session.plans)
    session.detach()
    assert "text.3.self" in during and session.summary() == during and session.plans == plans


def test_a_paused_session_is_the_model_alone_and_its_neighbour_goes_on() -> None:
    model = shared("llama")
    bare = run(model, LLAMA)
    with sc.attach(model, scaled(2.0)) as one:
        first = run(model, LLAMA)
        with one.paused():
            assert torch.equal(run(model, LLAMA), bare)
            with one.paused():
                assert torch.equal(run(model, LLAMA), bare)
            assert torch.equal(run(model, LLAMA), bare)
            with sc.attach(model, scaled(3.0)):
                third = run(model, LLAMA)
        assert torch.equal(run(model, LLAMA), first)
    with sc.attach(model, scaled(3.0)):
        assert torch.equal(run(model, LLAMA), third)
    assert not torch.equal(third, first)


def test_an_exception_in_the_block_detaches() -> None:
    model = shared("llama")
    with unchanged(model), pytest.raises(ZeroDivisionError), sc.attach(model, scaled(2.0)):
        raise ZeroDivisionError


# ---- threads -----------------------------------------------------------------------------------------------


def in_threads(*jobs: Any) -> list[Any]:
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        try:
            results[number] = jobs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_two_threads_with_two_models() -> None:
    names = ["llama", "qwen2"]
    expected = []
    for name in names:
        with sc.attach(shared(name), scaled(1.5)):
            expected.append(greedy(shared(name), FAMILIES[name].inputs()))

    def job(name: str) -> Any:
        def work() -> list[Tensor]:
            outs = []
            for _ in range(4):
                with sc.attach(shared(name), scaled(1.5)):
                    outs.append(greedy(shared(name), FAMILIES[name].inputs()))
            return outs

        return work

    for name_outs, ids in zip(in_threads(*map(job, names)), expected):
        assert all(torch.equal(out, ids) for out in name_outs)


def test_two_threads_with_one_model_keep_their_passes_and_states_apart() -> None:
    model = shared("llama")
    batches = [{"input_ids": FAMILIES["llama"].inputs(batch=2, length=n)["input_ids"]} for n in (9, 24)]

    @dataclass(eq=False)
    class Count(Method):
        sites: Any = "text.0.self"

        def begin(self, run: Any) -> None:
            run.state["lengths"] = []

        def observe(self, call: AttentionCall) -> None:
            call.run.state["lengths"].append(call.k.shape[2])

        def end(self, run: Any) -> None:
            told.append(run.state["lengths"])

    bare = [greedy(model, batch, 6) for batch in batches]
    told: list[list[int]] = []
    with sc.attach(model, Count()):
        outs = in_threads(*[lambda b=b: [greedy(model, b, 6) for _ in range(4)] for b in batches])
    for out, ids in zip(outs, bare):
        assert all(torch.equal(o, ids) for o in out)
    assert sorted(told) == [list(range(9, 15))] * 4 + [list(range(24, 30))] * 4


def test_one_instance_on_two_models() -> None:
    look = Look(lambda call: call.state.setdefault("first", call.q), sites="text.0.self")
    with sc.attach(shared("llama"), look), sc.attach(shared("qwen2"), look):
        run(shared("llama"), LLAMA)
        run(shared("qwen2"), LLAMA)
    (_, _, a), (_, _, b) = look.seen
    assert not torch.equal(a, b)


# ---- parts and objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "sites"),
    [
        ("llama", "model", "text.*.self"),
        ("bloom", "transformer", "text.*.self"),
        ("timm_vit", "blocks.0", "vision.0.self"),
    ],
)
def test_a_part_of_an_attached_model_is_refused_and_nothing_is_half_attached(
    name: str, part: str, sites: str
) -> None:
    model, inputs = shared(name), FAMILIES[name].inputs()
    inner = model.get_submodule(part)
    double = method(weights=lambda call, w: w * 2)
    with sc.attach(model, double(sites=sites)):
        expected = run(model, inputs)
        with unchanged(model), pytest.raises(AttachError, match="attached already"):
            sc.attach(inner, double())
        assert torch.equal(run(model, inputs), expected)
    with sc.attach(inner, double()):
        with unchanged(model), pytest.raises(AttachError, match="attached already"):
            sc.attach(model, double(sites=sites))
        run(model, inputs)


def test_a_part_may_be_attached_by_itself() -> None:
    model = shared("llava")
    tower = next(m for p, m in model.named_modules() if p.endswith("vision_tower"))
    look = Look(lambda call: call.weights("last"))
    pixels = FAMILIES["llava"].inputs()["pixel_values"]
    with unchanged(model), sc.attach(tower, look), torch.no_grad():
        tower(pixels)
    assert len(look.seen) == 3


def test_a_failing_install_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.core import runtime

    model = shared("llama")
    original = runtime.installer
    count = [0]

    def failing(site: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("no")
        return original(site)

    monkeypatch.setattr(runtime, "installer", failing)
    with unchanged(model), pytest.raises(RuntimeError, match="no"):
        sc.attach(model, scaled(2.0))


@pytest.mark.parametrize("wrong", ["var", 3, None, Look, [[Look]], {"a": 1}])
def test_what_is_no_method_is_refused(wrong: Any) -> None:
    with unchanged(shared("llama")), pytest.raises(AttachError, match="no method"):
        sc.attach(shared("llama"), wrong)


@pytest.mark.parametrize("wrong", ["llama", None, 3, LLAMA])
def test_what_is_no_module_is_refused(wrong: Any) -> None:
    with pytest.raises(AttachError, match="no torch module"):
        sc.attach(wrong, scaled(2.0))


def test_a_method_that_a_seam_cannot_serve_names_site_and_remedy() -> None:
    model = shared("bloom")
    with unchanged(model), pytest.raises(AttachError) as error:
        sc.attach(model, method(bias=lambda call: None)())
    assert "'bias' at text.0.self" in error.value.problem
    with unchanged(model), pytest.raises(AttachError, match="'hidden' at text"):
        sc.attach(model, method(hidden=lambda call, h: h)())


def test_misspelt_phases_and_events_are_refused() -> None:
    with pytest.raises(OptionError, match="'prefil'"):
        method(observe=lambda call: None)(phases=("prefil",))
    with pytest.raises(OptionError, match="'wieghts'"):
        method(weights=lambda call, w: w)(sites={"wieghts": "*.self"})


def test_a_compiled_object_is_attached_through_its_original() -> None:
    model = FAMILIES["llama"].build()
    compiled = torch.compile(model, backend="eager")
    look = Look(lambda call: call.weights("last"), sites="text.0.self")
    with unchanged(model), sc.attach(compiled, look) as session:
        assert session.model is model
        run(model, LLAMA)
    assert len(look.seen) == 1


@pytest.mark.parametrize("name", ["llama", "llava", "t5"])
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_another_implementation_while_attached_is_refused_and_taken_back(name: str, how: str) -> None:
    FAMILIES[name].build().set_attn_implementation("eager")  # the library notes on its classes that it can
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs()
    bare = run(model, inputs)
    call = (lambda: run(model, inputs)) if how == "forward" else (lambda: greedy(model, inputs, 2))
    with unchanged(model), sc.attach(model, Look(sites=everywhere(model))):
        model.set_attn_implementation("eager")
        with pytest.raises(AttachError, match=r"set_attn_implementation\('eager'\) was called"):
            call()
        assert torch.equal(run(model, inputs), bare)
    model.set_attn_implementation("eager")
    eager = Look(lambda call: call.run.runtime.model.config._attn_implementation, sites="text.0.self")
    with sc.attach(model, eager):
        run(model, inputs)
    assert eager.seen[0][2] == "eager"


def test_a_detached_model_copies_and_pickles() -> None:
    model = FAMILIES["llama"].build()
    with sc.attach(model, Look(sites=everywhere(model))):
        bare = run(model, LLAMA)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(run(copied, LLAMA), bare, atol=0, rtol=0)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(run(torch.load(buffer, weights_only=False), LLAMA), bare)
    assert pickle.dumps(model.config)


def test_a_cache_that_a_session_saw_copies_and_pickles() -> None:
    model = FAMILIES["llama"].build()
    bare = greedy(model, LLAMA, 6)
    state = Look(lambda call: call.state.setdefault("passes", []).append(call.phase), sites="text.0.self")
    with sc.attach(model, state), torch.no_grad():
        cache = model(**LLAMA, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        cont = {"input_ids": bare[:, :25]}
        assert torch.equal(greedy(model, cont, 5, past_key_values=copied), bare)
        assert torch.equal(greedy(model, cont, 5, past_key_values=copy.deepcopy(cache)), bare)
    loaded = pickle.loads(pickle.dumps(copied))
    assert type(loaded).__name__ == "DynamicCache"
    assert loaded.get_seq_length() == 29
    with torch.no_grad():
        assert torch.equal(greedy(model, cont, 5, past_key_values=copy.deepcopy(cache)), bare)


@pytest.mark.parametrize("name", ["llama", "bloom", "timm_vit", "llava"])
def test_a_detached_model_is_freed(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs()
    with sc.attach(model, Look(lambda call: call.state.setdefault("x", 1), sites=everywhere(model))):
        run(model, inputs)
        if "generates" in FAMILIES[name].tags:
            greedy(model, inputs, 2)
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None


def test_another_librarys_attention_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    original = F.scaled_dot_product_attention
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    model, inputs = shared("timm_vit"), FAMILIES["timm_vit"].inputs()
    look = Look(lambda call: None, sites="vision.0.self")
    with sc.attach(model, look):
        run(model, inputs)
    assert F.scaled_dot_product_attention is theirs
    assert len(calls) == 3
    assert len(look.seen) == 1


def test_a_forward_of_a_detached_session_is_refused() -> None:
    model = shared("llama")
    with sc.attach(model) as session:
        assert torch.equal(session.forward(LLAMA).logits, run(model, LLAMA))
    with unchanged(model), pytest.raises(AttachError, match="detached"):
        session.forward(LLAMA, [scaled(2.0)])


def test_generations_inside_of_each_other_are_runs_of_their_own() -> None:
    """A method that generates in the middle of a generation."""
    model, inputs = shared("llava"), FAMILIES["llava"].inputs()
    bare = greedy(model, inputs)
    runs: list[tuple[int, str, str]] = []
    inner: list[Tensor] = []

    def observe(call: AttentionCall) -> None:
        runs.append((id(call.run), call.phase, call.site.name))
        if call.phase == "decode" and call.site.name == "text.2.self" and not inner:
            inner.append(torch.empty(0))
            inner[0] = greedy(model, inputs)

    with sc.attach(model, method(observe=observe)(sites="vision.0.self|text.2.self")):
        outer = greedy(model, inputs)
    assert torch.equal(outer, bare)
    assert torch.equal(inner[0], bare)
    assert len({r for r, _, _ in runs}) == 2
    for r in {r for r, _, _ in runs}:
        assert [p for i, p, s in runs if i == r and s == "text.2.self"] == ["prefill"] + ["decode"] * 4
        assert [p for i, p, s in runs if i == r and s == "vision.0.self"] == ["prefill"]


def test_a_bare_attention_module_is_a_model() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = attention(x, x, x, need_weights=False)[0]
        with unchanged(attention), sc.attach(attention, Look()):
            torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected)


def test_a_method_that_forgot_to_be_a_dataclass_is_told() -> None:
    class Forgot(Method):
        sites = "text.0.self"

        def observe(self, call: AttentionCall) -> None:
            pass

    with pytest.raises(OptionError, match="Forgot sets sites") as error:
        Forgot()
    assert "@dataclass" in error.value.remedy
