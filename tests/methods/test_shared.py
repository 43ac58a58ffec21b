"""The checks that every method of the catalogue goes through by itself.

A method is tried on the models of its card's `target`, with the options `EXAMPLE` of its test module,
`test_<slug>.py`: those under which it acts on a tiny model. The module may also have
    MODELS     families of the zoo to be tried on instead
    DISCRETE   the options that count whole tokens: of these there is no small step
    BFLOAT16   options for that check, where by EXAMPLE the method would have to choose among near equals
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Look, assert_as_good_as, cast, rms, shared, unchanged
from PIL import Image
from torch import Tensor
from zoo import Family, family
from zoo.base import words

import saccade as sc
from saccade import catalog
from saccade.core.card import Card
from saccade.core.driver import Driver, Experiment
from saccade.core.errors import AttachError, InputError, OptionError, StackError
from saccade.core.method import EVENTS, Method
from saccade.core.system import System
from saccade.stack import Stack, load

from .shared import Inputs, alone, answer, followed, generated, replay, two

MODELS = {
    "vlm": ("llava", "qwen2_5_vl"),
    "llm": ("llama", "gpt2"),
    "any-transformer": ("llava", "gpt2", "vit"),
    "unet diffusion": (),  # see test_shared_pipelines.py
    "unet/dit diffusion": (),
    "dit diffusion": (),
    "clip": (),  # they do not write: see their own tests
    "cnn": (),
    "discrete image tokenizers (VQ) and token corpora": (),
    "one-layer attention": (),  # an experiment trains it
    "any model": (),  # an experiment trains one
}
"""By target. Different in positions, in grouping of keys, in how pictures come in."""
LACKING = {
    "image": ("llama", "mllama", "vit"),
    "first_token": ("vit", "timm_vit"),
    "sampling": ("unet", "llama"),
}
"""By need: models that cannot give it."""
ONE_TURN = {"blip2", "instructblip"}
"""Their `generate` asks for a picture every time."""
IN_ONE_PIECE = {"blip2", "instructblip", "paligemma"}
"""The library fails on pieces of their prompts, or hides the later ones from the first."""
NATIVE = {"inputs", "bias", "output", "observe", "hidden"}
"""Events that leave the scores to the model's own operator."""


# ---- the entries -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A method, driver or experiment with what its test module says of it."""

    card: Card
    cls: type[Any]
    tests: Any

    @cached_property
    def example(self) -> dict[str, Any]:
        return self.tests.EXAMPLE

    @property
    def models(self) -> tuple[str, ...]:
        return getattr(self.tests, "MODELS", None) or MODELS[self.card.target]

    @property
    def events(self) -> list[str]:
        """All that the class overrides."""
        everything = (*EVENTS, "begin", "end", "calibrate")
        return [name for name in everything if getattr(self.cls, name) is not getattr(Method, name)]

    def make(self, **options: Any) -> Any:
        return self.cls(**{**self.example, **options})


@dataclass(frozen=True)
class Trial:
    """A method on a model."""

    entry: Entry
    f: Family

    @property
    def model(self) -> Any:
        return shared(self.f.name)

    @property
    def exact_model(self) -> Any:
        return shared(self.f.name, torch.float64)

    @property
    def inputs(self) -> Inputs:
        return two(self.f)

    @property
    def exact_inputs(self) -> Inputs:
        return two(self.f, torch.float64)

    @property
    def question(self) -> sc.Question:
        assert self.f.processor
        noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
        options = {"max_new_tokens": 4, "min_new_tokens": 4}
        return sc.Question(
            self.f.processor(), [Image.fromarray(noise)], "Is the red cup on the box?", options
        )

    def asked(self, *systems: System) -> Tensor:
        """With these methods, and this driver, if there is one: the logits of the answer's last word."""
        methods = [m for m in systems if isinstance(m, Method)]
        driver = next((d for d in systems if isinstance(d, Driver)), None)
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _, __, out: seen.append(out[0, -1]))
        try:
            with sc.attach(self.model, *methods) as session:
                _ = session.run(driver, self.question) if driver else self.question.ask(session)
        finally:
            hook.remove()
        return seen[-1]

    def with_method(self, **options: Any) -> Tensor:
        with sc.attach(self.model, self.entry.make(**options)):
            return answer(self.model, self.inputs)

    def exactly(self, *methods: Method, tokens: int = 3) -> Tensor:
        """In float64."""
        with sc.attach(self.exact_model, *methods):
            return answer(self.exact_model, self.exact_inputs, tokens)

    @property
    def writes(self) -> bool:
        return hasattr(self.model, "generate") and self.model.can_generate()

    def told(self, answered: Tensor) -> Tensor:
        """What is told of an answer: the words' probabilities, or the output itself."""
        return answered.double().softmax(-1) if self.writes else answered.double()

    def rounding(self) -> float:
        """Twice the largest error of the bare model in float32: what two right computations may differ by."""
        plain = answer(self.model, self.inputs)
        return 2 * apart(plain, answer(self.exact_model, self.exact_inputs))


def module_of(slug: str) -> Any:
    name = f"{__package__}.test_{slug}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def attachable() -> list[Card]:
    return [card for card in catalog.cards() if card.family not in ("networks", "layers")]


def entries() -> Iterator[Entry]:
    """Those that can be tried; of the others `test_everything_says_how_it_is_tried` complains."""
    for card in attachable():
        tests = module_of(card.slug)
        if hasattr(tests, "EXAMPLE") and card.kind in ON_MODELS:
            yield Entry(card, catalog.load_class(card.slug), tests)


@cache
def upcast(name: str) -> Any:
    """The weights of the bfloat16 model, in float64."""
    return copy.deepcopy(shared(name, torch.bfloat16)).double()


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; words that both rule out, with -inf, do not differ."""
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0, a - b).abs().max())


# ---- on every model of the target ------------------------------------------------------------------------


def acts(t: Trial) -> None:
    """A method changes the answer; a probe changes nothing, to the bit, and has a result."""
    bare = answer(t.model, t.inputs)
    with sc.attach(t.model, t.entry.make()) as session:
        with_it = answer(t.model, t.inputs)
    if t.entry.card.form == "probe":
        assert torch.equal(with_it, bare)
        assert session.results[t.entry.card.slug]
    else:
        assert apart(t.told(with_it), t.told(bare)) > 10 * t.rounding()


def leaves_nothing_behind(t: Trial) -> None:
    before = answer(t.model, t.inputs)
    with unchanged(t.model):
        t.with_method()
    assert torch.equal(answer(t.model, t.inputs), before)


def leaves_nothing_behind_when_an_event_fails(t: Trial) -> None:
    before = answer(t.model, t.inputs)
    for event in t.entry.events:
        if event == "calibrate":
            continue
        with pytest.MonkeyPatch.context() as patch, unchanged(t.model), pytest.raises(ZeroDivisionError):
            patch.setattr(t.entry.cls, event, lambda *_: 1 / 0)
            t.with_method()
        assert torch.equal(answer(t.model, t.inputs), before), event


def neutral_changes_nothing(t: Trial) -> None:
    """To the bit where the model's own operator answers, within rounding where the weights were made."""
    if not t.entry.card.neutral:
        return
    bare, neutral = answer(t.model, t.inputs), t.with_method(**t.entry.card.neutral)
    if NATIVE.issuperset(t.entry.cls.events()):
        assert torch.equal(neutral, bare)
    else:
        assert_as_good_as(neutral, bare, answer(t.exact_model, t.exact_inputs))


def a_small_step_from_neutral_changes_a_little(t: Trial) -> None:
    """Above what float64 rounds off, and far below what the example does."""
    neutral = t.entry.card.neutral
    at_neutral, at_example = (t.told(t.exactly(t.entry.make(**options))) for options in (neutral, {}))
    for name, value in neutral.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name in getattr(t.entry.tests, "DISCRETE", ()):
            continue
        try:
            stepped = t.entry.make(**{**neutral, name: value + 1e-4})
        except OptionError:  # neutral is the upper limit
            stepped = t.entry.make(**{**neutral, name: value - 1e-4})
        change = apart(t.told(t.exactly(stepped)), at_neutral)
        assert 1e-10 < change < 0.01 * apart(at_example, at_neutral), name


def a_batch_equals_its_samples(t: Trial) -> None:
    """In float64, where two samples of different lengths are padded on the left."""
    with sc.attach(t.exact_model, t.entry.make()):
        together = answer(t.exact_model, t.exact_inputs)
        for sample, row in enumerate(together):
            assert apart(answer(t.exact_model, alone(t.exact_inputs, sample))[0], row) < t.rounding()


def beams_score_as_replayed_one_by_one(t: Trial) -> None:
    """The log-probability of each sample's best beam is that of writing its tokens alone."""
    if not t.writes:
        return
    model, inputs = t.exact_model, t.exact_inputs
    start = inputs["input_ids"].shape[1]
    with sc.attach(model, t.entry.make()):
        made = generated(model, inputs, 4, num_beams=2, length_penalty=0.0, output_scores=True)
        for sample, (sequence, score) in enumerate(zip(made.sequences, made.sequences_scores, strict=True)):
            written = sequence[start:]
            logits = replay(model, alone(inputs, sample), written)
            expected = logits.log_softmax(-1).gather(1, written[:, None]).sum()
            assert apart(score, expected) < len(written) * t.rounding()


def samples_are_drawn_from_what_a_replay_gives(t: Trial) -> None:
    """Two sequences drawn for each sample."""
    if not t.writes:
        return
    model, inputs = t.exact_model, t.exact_inputs
    start = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    with sc.attach(model, t.entry.make()):
        drawn = generated(model, inputs, do_sample=True, top_k=0, num_return_sequences=2)
        logits = torch.stack(drawn.logits, 1)
        assert len({tuple(sequence.tolist()) for sequence in drawn.sequences}) == 4
        for row, sequence in enumerate(drawn.sequences):
            again = replay(model, alone(inputs, row // 2), sequence[start:])
            assert apart(again, logits[row]) < t.rounding()


def a_second_turn_on_the_same_cache(t: Trial) -> None:
    """It acts there as well, and a batch still equals its samples."""
    if not t.writes or t.f.name in ONE_TURN:
        return
    model, inputs = t.exact_model, t.exact_inputs
    question = words(2, 4, seed=9)

    def second_turn(inputs: Inputs, question: Tensor) -> Tensor:
        first = generated(model, inputs)
        return answer(model, followed(inputs, first, question), past_key_values=first.past_key_values)

    bare = second_turn(inputs, question)
    with sc.attach(model, t.entry.make()):
        together = second_turn(inputs, question)
        for sample, row in enumerate(together):
            single = second_turn(alone(inputs, sample), question[sample : sample + 1])
            assert apart(single[0], row) < t.rounding()
    if t.entry.card.form == "probe":
        assert torch.equal(together, bare)
    else:
        assert apart(t.told(together), t.told(bare)) > 10 * t.rounding()


def a_prompt_in_pieces_is_answered_as_the_whole(t: Trial) -> None:
    """Or it is refused, where the prompt's end decides."""
    if not t.writes or t.f.name in IN_ONE_PIECE:
        return
    with sc.attach(t.exact_model, t.entry.make()):
        whole = answer(t.exact_model, t.exact_inputs)
        try:
            pieces = answer(t.exact_model, t.exact_inputs, prefill_chunk_size=11)
        except InputError as e:
            assert "prefill_chunk_size" in e.remedy
        else:
            assert apart(pieces, whole) < t.rounding()


def bfloat16_is_as_good_as_the_model_in_bfloat16(t: Trial) -> None:
    """The error against float64 with the same weights is at most twice the bare model's."""
    low, high = shared(t.f.name, torch.bfloat16), upcast(t.f.name)
    inputs = two(t.f, torch.bfloat16)

    options = getattr(t.entry.tests, "BFLOAT16", {})

    def last(model: Any, dtype: torch.dtype, *methods: Method) -> Tensor:
        with sc.attach(model, *methods):
            return answer(model, cast(inputs, dtype), tokens=1).double()

    def error_with(*methods: Method) -> float:
        difference = last(low, torch.bfloat16, *methods) - last(high, torch.float64, *methods)
        return rms(difference[difference.isfinite()])  # not of words that are ruled out

    bare_error, error = error_with(), error_with(t.entry.make(**options))
    assert error <= 2 * bare_error, f"{error:.2e}, the bare model {bare_error:.2e}"


# ---- once for each method --------------------------------------------------------------------------------


def every_option_has_a_doc(entry: Entry) -> None:
    for field in dataclasses.fields(entry.cls):
        assert field.metadata.get("doc"), f"declare {field.name} with option(..., 'what it is')"


def notation_comes_back(entry: Entry) -> None:
    slug = entry.card.slug
    assert str(load(slug)) == slug
    assert load(slug) == Stack([entry.cls()])
    example = Stack([entry.make()])
    assert load(str(example)) == example


def neutral_names_options(entry: Entry) -> None:
    assert set(entry.card.neutral) <= {field.name for field in dataclasses.fields(entry.cls)}
    assert entry.card.neutral or entry.card.form == "probe", "say at which options nothing changes"


def a_model_without_what_it_needs_is_refused(entry: Entry) -> None:
    for need in entry.card.needs:
        for name in LACKING[need]:
            model = shared(name)
            with unchanged(model), pytest.raises(AttachError) as refusal:
                sc.attach(model, entry.make())
            assert entry.cls.__name__ in refusal.value.problem
            assert type(model).__name__ in refusal.value.problem
            assert refusal.value.remedy


def every_event_is_held_by_a_test(entry: Entry) -> None:
    """With any event of the class replaced by the identity, a test of the method's own goes red."""
    tests = own_tests(entry)[::-1]  # the first are identities as a rule, and notice little
    for event in entry.events:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(entry.cls, event, getattr(Method, event))
            noticing = next((test for test in tests if goes_red(test)), None)
        assert noticing, f"no test notices {event!r} missing"
        tests.sort(key=lambda test: test is not noticing)  # it may notice the next as well


# ---- drivers and experiments -----------------------------------------------------------------------------


def a_driver_acts(t: Trial) -> None:
    """A driver changes the answer; a probe changes nothing, to the bit, and finds something."""
    if t.entry.card.form == "probe":
        assert torch.equal(t.asked(t.entry.make()), t.asked())
        with sc.attach(t.model) as session:
            assert session.run(t.entry.make(), t.question).found
    else:
        assert apart(t.asked(t.entry.make()), t.asked()) > 0.1


def a_driver_leaves_nothing_behind(t: Trial) -> None:
    before = t.asked()
    with unchanged(t.model):
        t.asked(t.entry.make())
    assert torch.equal(t.asked(), before)


def a_driver_leaves_nothing_behind_when_a_pass_fails(t: Trial) -> None:
    """Each of its passes in turn."""
    before, count, last = t.asked(), 0, -1

    def fail_at_last(*_: Any) -> None:
        nonlocal count
        count += 1
        if count - 1 == last:
            raise ZeroDivisionError

    hook = t.model.get_input_embeddings().register_forward_hook(fail_at_last)
    try:
        t.asked(t.entry.make())
        for last in range(count):  # noqa: B007
            count = 0
            with unchanged(t.model), pytest.raises(ZeroDivisionError):
                t.asked(t.entry.make())
    finally:
        hook.remove()
    assert last > 0
    assert torch.equal(t.asked(), before)


def a_neutral_driver_changes_nothing(t: Trial) -> None:
    assert torch.equal(t.asked(t.entry.make(**t.entry.card.neutral)), t.asked())


def methods_act_in_a_drivers_answers(t: Trial) -> None:
    """Where it is neutral, the answer is that of the methods alone."""
    look, stack = Look(), sc.load("zerotuning(gamma=100.0)")
    neutral = t.entry.make(**t.entry.card.neutral)
    assert torch.equal(t.asked(*stack), t.asked(*stack, neutral))
    assert apart(t.asked(*stack), t.asked()) > 0.1
    t.asked(look, t.entry.make())
    assert look.seen


def attaching_it_is_refused_and_says_how_to_run_it(entry: Entry) -> None:
    model = shared("llava")
    with unchanged(model), pytest.raises(AttachError, match=entry.cls.__name__) as refusal:
        sc.attach(model, entry.make())
    assert {"driver": "stack=", "experiment": "().run()"}[entry.card.kind] in refusal.value.remedy


def a_question_that_it_cannot_serve_is_refused(entry: Entry) -> None:
    """One without a picture, and one for a model without what it needs."""
    picture = Image.new("RGB", (64, 64))
    for need in entry.card.needs:
        for name in LACKING[need]:
            with sc.attach(shared(name)) as session, pytest.raises(AttachError) as refusal:
                session.run(entry.make(), sc.Question(None, [picture], "Why?"))
            assert type(shared(name)).__name__ in refusal.value.problem
    if "image" in entry.card.needs:
        with sc.attach(shared("llava")) as session, pytest.raises(InputError, match="picture"):
            session.run(entry.make(), sc.Question(None, [], "Why?"))


def without_its_helper_it_is_refused(entry: Entry) -> None:
    question = sc.Question(None, [Image.new("RGB", (64, 64))], "Why?")
    for field in dataclasses.fields(entry.cls):
        if field.metadata["helper"]:
            with sc.attach(shared("llava")) as session, pytest.raises(InputError, match=field.name):
                session.run(entry.make(**{field.name: None}), question)


def it_is_alone_of_its_kind_in_a_stack(entry: Entry) -> None:
    with pytest.raises(StackError, match=entry.cls.__name__):
        load(f"{entry.card.slug}+var+{entry.card.slug}")


def it_shows_something(entry: Entry) -> None:
    assert issubclass(entry.cls, Experiment) and entry.make().run()


def own_tests(entry: Entry) -> list[Callable[[], None]]:
    """Those that can be called as they are: without fixtures and parameters."""
    tests = (value for name, value in vars(entry.tests).items() if name.startswith("test_"))
    return [test for test in tests if not test.__code__.co_argcount]


def goes_red(test: Callable[[], None]) -> bool:
    try:
        test()
    except (Exception, pytest.fail.Exception):
        return True
    return False


# ---- the matrix ------------------------------------------------------------------------------------------

ON_MODELS: dict[str, tuple[Callable[[Trial], None], ...]] = {
    "method": (
        acts,
        leaves_nothing_behind,
        leaves_nothing_behind_when_an_event_fails,
        neutral_changes_nothing,
        a_small_step_from_neutral_changes_a_little,
        a_batch_equals_its_samples,
        beams_score_as_replayed_one_by_one,
        samples_are_drawn_from_what_a_replay_gives,
        a_second_turn_on_the_same_cache,
        a_prompt_in_pieces_is_answered_as_the_whole,
        bfloat16_is_as_good_as_the_model_in_bfloat16,
    ),
    "driver": (
        a_driver_acts,
        a_driver_leaves_nothing_behind,
        a_driver_leaves_nothing_behind_when_a_pass_fails,
        a_neutral_driver_changes_nothing,
        methods_act_in_a_drivers_answers,
    ),
    "experiment": (),
}
ONCE: dict[str, tuple[Callable[[Entry], None], ...]] = {
    "method": (
        every_option_has_a_doc,
        notation_comes_back,
        neutral_names_options,
        a_model_without_what_it_needs_is_refused,
        every_event_is_held_by_a_test,
    ),
    "driver": (
        every_option_has_a_doc,
        notation_comes_back,
        neutral_names_options,
        attaching_it_is_refused_and_says_how_to_run_it,
        a_question_that_it_cannot_serve_is_refused,
        without_its_helper_it_is_refused,
        it_is_alone_of_its_kind_in_a_stack,
    ),
    "experiment": (
        every_option_has_a_doc,
        notation_comes_back,
        attaching_it_is_refused_and_says_how_to_run_it,
        it_is_alone_of_its_kind_in_a_stack,
        it_shows_something,
    ),
}


def name_of(value: Any) -> str:
    if isinstance(value, Trial):
        return f"{value.entry.card.slug}-{value.f.name}"
    return value.card.slug if isinstance(value, Entry) else value.__name__


TRIALS = [Trial(entry, family(name)) for entry in entries() for name in entry.models]


@pytest.mark.parametrize(
    ("trial", "check"), [(t, check) for t in TRIALS for check in ON_MODELS[t.entry.card.kind]], ids=name_of
)
def test_on_models_of_its_target(trial: Trial, check: Callable[[Trial], None]) -> None:
    check(trial)


@pytest.mark.parametrize(
    ("entry", "check"), [(e, check) for e in entries() for check in ONCE[e.card.kind]], ids=name_of
)
def test_once(entry: Entry, check: Callable[[Entry], None]) -> None:
    check(entry)


@pytest.mark.parametrize("card", attachable(), ids=lambda card: card.slug)
def test_everything_says_how_it_is_tried(card: Card) -> None:
    tests = module_of(card.slug)
    assert card.kind in ON_MODELS, (
        f"there are no checks yet for the kind {card.kind!r}: add them to the matrix"
    )
    assert tests is not None, f"there is no tests/methods/test_{card.slug}.py: write it"
    assert hasattr(tests, "EXAMPLE"), f"test_{card.slug}.py: EXAMPLE = {{options that act on a tiny model}}"
