"""ReFocus: editing to the pixel, programs that are read, and a model whose replies are a script."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import shared
from PIL import Image

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.core.question import Answer, Question
from saccade.steering._parts.programs import ActionError, execute, program
from saccade.steering.refocus import TOOLS, ReFocus, answered

from .lockstep import model_of, question

EXAMPLE: dict[str, Any] = {"replies": 2, "words": 4}
MODELS = ("llava", "qwen2_5_vl")
COLUMNS = {"Year": (0.0, 0.1, 0.3, 0.9), "Name": (0.3, 0.1, 0.6, 0.9), "Gain": (0.6, 0.1, 1.0, 0.9)}
INSET = {"Year": (2, 12, 29, 89), "Name": (32, 12, 59, 89), "Gain": (62, 12, 99, 89)}
"""Of a picture of 100 x 100, from 0 + 2 to 30 - 2 and so on; the last ones are outside."""


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def within(*names: str) -> np.ndarray:
    found = np.zeros((100, 100), bool)
    for name in names:
        x0, y0, x1, y1 = INSET[name]
        found[y0:y1, x0:x1] = True
    return found


def edited(how: str, *names: str, kind: str = "columns") -> np.ndarray:
    return np.asarray(TOOLS[f"focus_on_{kind}_with_{how}"](picture(), list(names), COLUMNS), float)


PIXELS = np.asarray(picture(), float)

# ---- editing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["columns", "x_values", "y_values"])
@pytest.mark.parametrize("names", [("Year",), ("Name", "Gain"), ("Year", "Nobody")])
def test_mask_paints_exactly_the_others_white(kind: str, names: tuple[str, ...]) -> None:
    others = within(*set(COLUMNS) - set(names))
    found = edited("mask", *names, kind=kind)
    assert (found[others] == 255).all() and np.array_equal(found[~others], PIXELS[~others])


def test_the_first_row_is_the_header_and_stays() -> None:
    found = edited("mask", "Gain", kind="rows")
    assert (found[within("Name")] == 255).all() and np.array_equal(
        found[~within("Name")], PIXELS[~within("Name")]
    )
    assert np.array_equal(edited("mask", "Year", kind="rows"), PIXELS)


def test_highlight_tints_the_named() -> None:
    named = within("Year", "Gain")
    found = edited("highlight", "Year", "Gain", "Nobody")
    assert np.abs(found - (205 / 255 * PIXELS + 50 / 255 * np.array([255, 0, 0])))[named].max() <= 1
    assert np.array_equal(found[~named], PIXELS[~named])


def test_draw_outlines_the_named_by_five_pixels() -> None:
    border = within("Name")
    x0, y0, x1, y1 = INSET["Name"]
    border[y0 + 5 : y1 - 5, x0 + 5 : x1 - 5] = False
    found = edited("draw", "Name", "Nobody")
    assert (found[border] == (255, 0, 0)).all() and np.array_equal(found[~border], PIXELS[~border])


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("names", "boxes"), [([], COLUMNS), (["Year"], {}), (["Nobody"], COLUMNS)])
def test_where_there_is_nothing_to_do_the_picture_stays(tool: str, names: Any, boxes: Any) -> None:
    assert TOOLS[tool](picture(), names, boxes).tobytes() == picture().tobytes()


def test_there_is_a_tool_for_every_kind_and_way() -> None:
    kinds, ways = ("columns", "rows", "x_values", "y_values"), ("mask", "draw", "highlight")
    assert set(TOOLS) == {f"focus_on_{kind}_with_{way}" for kind in kinds for way in ways}


def test_a_box_that_the_inset_leaves_nothing_of_is_not_painted() -> None:
    thin = {"a": (0.5, 0.5, 0.53, 0.9), "b": (0.0, 0.0, 0.4, 0.4)}
    for how in ("highlight", "draw"):
        assert TOOLS[f"focus_on_columns_with_{how}"](picture(), ["a"], thin).tobytes() == picture().tobytes()


# ---- programs --------------------------------------------------------------------------------------------


def names() -> dict[str, Any]:
    return {"image_1": picture(), "columns_bbox": COLUMNS}


def test_a_program_calls_tools_and_keeps_what_it_assigns() -> None:
    known = names()
    code = (
        'chosen = ["Year", "Gain"]\na = focus_on_columns_with_mask(image_1, chosen, columns_bbox)\ndisplay(a)'
    )
    assert np.array_equal(np.asarray(execute(code, known, TOOLS)), edited("mask", "Year", "Gain"))
    again = execute('focus_on_columns_with_draw(a, ("Year",), columns_bbox)', known, TOOLS)
    assert (np.asarray(again)[12, 2:27] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "open('x')",
        "__import__('os').system('true')",
        "image_1.save('x.png')",
        "display(image_1.size)",
        "[n for n in columns_bbox]",
        "(lambda: image_1)()",
        "eval('image_1')",
        "print(image_1)",
        "focus_on_columns_with_mask(image_1, ['Year'])",
        "focus_on_columns_with_mask(image_1, 'Year', columns_bbox)",
        "focus_on_columns_with_mask = image_1",
        "a, b = image_1, image_1",
        "while True: pass",
        "columns_bbox['x'] = 1",
        "display(other)",
        "x = 1",
        "display(",
        "",
    ],
)
def test_programs_that_do_anything_else_are_refused(code: str) -> None:
    with pytest.raises(ActionError):
        execute(code, names(), TOOLS)


def test_replies_are_read() -> None:
    assert program("THOUGHT: look\nACTION:\n```python\ndisplay(image_1)\n```") == "display(image_1)\n"
    with pytest.raises(ActionError, match="no ACTION"):
        program("THOUGHT: hm")
    assert answered("ANSWER: It is 3. FINAL ANSWER: 3.5. TERMINATE") == "3.5"
    assert answered("ANSWER: 3") == "" == answered("TERMINATE")


# ---- the loop --------------------------------------------------------------------------------------------

CALL = "display(focus_on_columns_with_mask(image_1, ['Year'], columns_bbox))"
EDIT = f"THOUGHT 0: the year\nACTION 0:\n```python\n{CALL}\n```"


class Scripted(Question):
    def ask(self, session: Any, images: Any = None, text: str | None = None) -> Answer:
        seen.append((list(images), str(text)))
        return Answer(self.options["script"][len(seen) - 1])


seen: list[tuple[list[Image.Image], str]] = []


def scripted(*replies: str, **options: Any) -> Answer:
    seen.clear()
    asked = Scripted(None, [picture()], "How much in 2005?", {"script": replies})
    with sc.attach(shared("llava")) as session:
        return session.run(ReFocus(boxes={"columns": COLUMNS}, **options), asked)


def test_a_scripted_model_ends_in_the_expected_turns() -> None:
    wrong = "ACTION 0:\n```python\nimport os\n```"
    answer = scripted(wrong, EDIT, "THOUGHT 2: seen\nANSWER: it is 12 FINAL ANSWER: 12. TERMINATE")
    assert answer == "12" and answer.found["finished"] and len(seen) == 3
    first, second, third = seen
    for part in ("How much in 2005?", "Year, Name, Gain", "focus_on_columns_with_mask(image, names, boxes)"):
        assert part in first[1]
    assert "focus_on_rows" not in first[1]
    assert "ERROR" in second[1] and "import os" in second[1] and second[1].startswith(first[1])
    assert "ERROR" not in third[1].removeprefix(second[1]) and EDIT in third[1]
    assert [len(images) for images, _ in seen] == [1, 1, 2]
    assert np.array_equal(np.asarray(third[0][1], float), edited("mask", "Year"))
    assert answer.pictures["edit 0"].tobytes() == third[0][1].tobytes()
    assert third[0][0].tobytes() == picture().tobytes()


def test_it_stops_after_the_last_reply() -> None:
    answer = scripted(*[EDIT] * 9)
    assert len(seen) == 6 and answer == EDIT and not answer.found["finished"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "world/vlm"])
def test_models_answer_as_they_can(name: str) -> None:
    asked = question(name, "what colour is the cup ?")
    with sc.attach(model_of(name)) as session:
        assert session.run(ReFocus(replies=0), asked) == asked.ask(session)
        answer = session.run(ReFocus(replies=2, words=4), asked)
    assert not answer.found["finished"] and answer.tokens <= 4
    assert any("ERROR" in turn for turn in answer.found["talk"])


def test_a_reader_gives_the_boxes() -> None:
    def read(image: Image.Image) -> Any:
        assert image.tobytes() == picture().tobytes()
        return {"rows": {"Total": (0, 0, 1, 0.5)}}

    seen.clear()
    asked = Scripted(None, [picture()], "How much?", {"script": ["ANSWER: 3 TERMINATE"]})
    with sc.attach(shared("llava")) as session:
        assert session.run(ReFocus(reader=read), asked) == "3"
    assert "rows_bbox: Total" in seen[0][1] and "columns" not in seen[0][1]


def test_what_cannot_be_done_is_told() -> None:
    with sc.attach(shared("llava")) as session, pytest.raises(InputError, match="the question has 2"):
        session.run(ReFocus(), sc.Question(None, [picture()] * 2, "How much?"))
    with pytest.raises(OptionError, match="no tools for bars"):
        ReFocus(boxes={"bars": {}})
