"""Drivers and experiments: what may be attached, what a stack may hold, and what a question can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import Look, shared, unchanged
from PIL import Image
from zoo import family

import saccade as sc
from saccade import cli
from saccade.core.card import Card
from saccade.core.driver import split
from saccade.core.errors import AttachError, InputError, OptionError, StackError
from saccade.core.system import option


def card(slug: str, kind: Any, *needs: str) -> Card:
    return Card(
        slug=slug,
        name=slug,
        kind=kind,
        family="steering",
        form="method",
        target="vlm",
        paper="none",
        summary="a toy",
        needs=needs,
    )


@dataclass(eq=False)
class Twice(sc.Driver):
    """Asks, and asks again with the answer."""

    card = card("twice", "driver")

    times: int = option(2, "how often it asks", low=1)
    fails: bool = option(False, "in the middle of its work")

    def run(self, session: sc.Session, question: sc.Question) -> sc.Answer:
        session.locate(question.processor, question.images)
        answer = question.ask(session)
        for _ in range(self.times - 1):
            if self.fails:
                raise ZeroDivisionError
            answer = question.ask(session, text=f"{question.text} {answer}")
        answer.found["times"] = self.times
        return answer


@dataclass(eq=False)
class Search(sc.Driver):
    card = card("search", "driver", "image")

    detector: Any = option(None, "finds things: a picture to boxes", helper=True)

    def run(self, session: sc.Session, question: sc.Question) -> sc.Answer:
        boxes = self.detector(question.images[0])
        return question.ask(session, [question.images[0].crop(box) for box in boxes])


@dataclass(eq=False)
class Finding(sc.Experiment):
    card = card("finding", "experiment")

    def run(self) -> dict[str, int]:
        return {"found": 1}


TEXT = "Is the red cup on the box?"


def picture() -> Image.Image:
    return Image.effect_noise((90, 60), 80).convert("RGB")


def question(text: str = TEXT, *images: Image.Image, **options: Any) -> sc.Question:
    return sc.Question(
        family("llava").processor(), images, text, {"max_new_tokens": 5, "min_new_tokens": 5, **options}
    )


# ---- running --------------------------------------------------------------------------------------------


def test_a_driver_answers_by_several_passes() -> None:
    model, image = shared("llava"), picture()
    with sc.attach(model) as session:
        first = question(TEXT, image).ask(session)
        expected = question(f"{TEXT} {first}", image).ask(session)
        answer = session.run(Twice(), question(TEXT, image))
    assert answer == expected and answer.found == {"times": 2}
    assert answer.seconds > expected.seconds  # of all that it did


def test_methods_of_the_session_act_in_all_its_passes() -> None:
    model, look = shared("llava"), Look(sites="text.0.self")
    with sc.attach(model, look) as session:
        session.run(Twice(times=3), question(TEXT, picture()))
    assert look.phases_seen.count("prefill") == 3


@pytest.mark.parametrize("driver", [Twice(), Twice(fails=True)])
def test_pictures_that_it_located_are_forgotten(driver: Twice) -> None:
    model, image, mine = shared("llava"), picture(), picture().resize((60, 90))
    with sc.attach(model) as session:
        session.locate(family("llava").processor(), [mine])
        before = session._runtime.located
        try:
            session.run(driver, question(TEXT, image))
        except ZeroDivisionError:
            assert driver.fails
        assert session._runtime.located is before is not None


def test_a_failing_driver_leaves_the_model_as_it_was() -> None:
    model = shared("llava")
    sc.ask(model, family("llava").processor(), None, TEXT, max_new_tokens=1)
    with unchanged(model), pytest.raises(ZeroDivisionError):
        sc.ask(model, family("llava").processor(), picture(), TEXT, [Twice(fails=True), sc.VAR()])


def test_without_its_helper_a_driver_does_not_begin() -> None:
    model = shared("llava")
    with sc.attach(model) as session:
        with pytest.raises(InputError, match="Search has no detector") as refusal:
            session.run(Search(), question(TEXT, picture()))
        assert refusal.value.remedy == "detector: finds things: a picture to boxes"
        image = picture()
        answer = session.run(Search(detector=lambda _: [(0, 0, 50, 50)]), question(TEXT, image))
        assert answer == question(TEXT, image.crop((0, 0, 50, 50))).ask(session)


def test_without_a_picture_it_does_not_begin() -> None:
    with sc.attach(shared("llava")) as session, pytest.raises(InputError, match="Search looks at a picture"):
        session.run(Search(detector=len), question())
    with sc.attach(shared("llama")) as session, pytest.raises(AttachError, match="Search cannot serve"):
        session.run(Search(detector=len), question(TEXT, picture()))


def test_options_are_those_of_methods() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        Twice(times=0)

    class Forgotten(Twice):
        times = 3

    with pytest.raises(OptionError, match="no dataclass"):
        Forgotten()


# ---- where it may stand ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "way"), [(Twice(), "stack='twice'"), (Finding(), r"sc.Finding\(\).run\(\)")]
)
def test_only_methods_are_attached(thing: Any, way: str) -> None:
    model = shared("llava")
    with unchanged(model), pytest.raises(AttachError, match=f"{type(thing).__name__} is an? (?s:.*){way}"):
        sc.attach(model, sc.VAR(), thing)

    class Nameless(sc.Driver):
        """Of a notebook, without a card."""

    with pytest.raises(AttachError, match="stack=driver"):
        sc.attach(model, Nameless())
    with pytest.raises(AttachError, match="is no method"):
        sc.attach(model, "var")  # type: ignore[arg-type]


def test_a_stack_is_split_into_its_driver_and_its_methods() -> None:
    driver, first, second = Twice(), sc.VAR(), sc.VHR()
    assert split([first, driver, second]) == (driver, [first, second])
    assert split([first]) == (None, [first])
    assert split([]) == (None, [])
    with pytest.raises(StackError, match="Twice and Search both drive"):
        split([driver, first, Search()])
    with pytest.raises(StackError, match="Finding is an experiment"):
        split([first, Finding()])
    with pytest.raises(AttachError, match="is not attached"):
        split([Finding()])


def test_asking_takes_drivers_in_every_form() -> None:
    model, processor, image = shared("llava"), family("llava").processor(), picture()
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    answers = [
        sc.ask(model, processor, image, TEXT, stack, **options)
        for stack in (
            "vicrop(window=40)",
            sc.load("vicrop(window=40)"),
            sc.ViCrop(window=40),
            [sc.ViCrop(window=40)],
        )
    ]
    assert len(set(answers)) == 1 and "crop" in answers[0].pictures
    with pytest.raises(InputError, match="ViCrop is a driver"):
        sc.look(model, processor, image, TEXT, "vicrop")


def test_a_stack_in_writing_has_one_driver() -> None:
    assert [type(part).__name__ for part in sc.load("var+vicrop(window=40)+vhr")] == ["VAR", "ViCrop", "VHR"]
    assert str(sc.load("var+vicrop(map=grad)")) == "var+vicrop(map=grad)"
    with pytest.raises(StackError) as refusal:
        sc.load("vicrop+var+vicrop(map=grad)")
    line, carets = refusal.value.problem.splitlines()[1:3]
    assert line[carets.index("^") : carets.rindex("^") + 1] == "vicrop" and carets.index("^") > line.index(
        "var"
    )


def test_the_command_line_shows_how_a_driver_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "vicrop"]) == 0
    shown = capsys.readouterr().out
    assert "driver, steering" in shown and "sc.ask(model, processor, image, question, stack='vicrop" in shown
    assert "sc.attach" not in shown and "Options of every method" not in shown


# ---- questions ------------------------------------------------------------------------------------------


def test_a_question_makes_inputs_of_any_pictures_and_words() -> None:
    model, image = shared("llava"), picture()
    asked = question(TEXT, image)
    processor: Any = asked.processor
    for images, text in (((image,), TEXT), ((image, image), TEXT), ((), "Why?"), ((image,), "Why?")):
        prompt = f"user: {'<image>' * len(images)}{text}\nassistant:"
        given = {"images": list(images)} if images else {}
        expected = processor(text=prompt, return_tensors="pt", **given)
        made = asked.inputs(model, images, text)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
    assert torch.equal(asked.inputs(model)["input_ids"], asked.inputs(model, [image], TEXT)["input_ids"])
    half = asked.inputs(shared("llava", torch.bfloat16))
    assert half["pixel_values"].dtype == torch.bfloat16 and half["input_ids"].dtype == torch.long


def test_pictures_of_one_prompt_go_to_a_processor_that_wants_a_list_of_them() -> None:
    model, image = shared("paligemma"), picture()
    asked = sc.Question(family("paligemma").processor(), [image], "What is it?")
    one, two = (asked.inputs(model, [image] * count) for count in (1, 2))
    assert two["pixel_values"].shape[0] == 2
    assert two["input_ids"].shape[1] == one["input_ids"].shape[1] + 36
