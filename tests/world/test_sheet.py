"""The page of scenes, and the command that draws it."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from saccade import cli
from saccade.core.errors import InputError
from saccade.world import sheet as module
from saccade.world.scenes import scene
from saccade.world.sheet import ENLARGED, GAP, MARGIN, SIDE, TYPE, sheet


def card(page: Image.Image, column: int) -> np.ndarray:
    """The picture of a card of the first row."""
    x = MARGIN + column * (SIDE + GAP)
    return np.asarray(page)[MARGIN : MARGIN + SIDE, x : x + SIDE]


def test_a_page_shows_the_scenes_with_thin_boxes():
    page = sheet(3, "broken", start=40)
    for column in range(3):
        shown, one = card(page, column), scene(40 + column, "broken")
        boxed = np.zeros((SIDE, SIDE), bool)
        for x0, y0, x1, y1 in (np.multiply(thing.box, ENLARGED) for thing in one.things):
            frame = np.zeros((SIDE + 2, SIDE + 2), bool)
            frame[y0 : y1 + 2, x0 : x1 + 2] = True
            frame[y0 + 1 : y1 + 1, x0 + 1 : x1 + 1] = False
            boxed |= frame[1:-1, 1:-1]
        assert boxed.any()
        large = one.image.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
        assert (shown[~boxed] == large[~boxed]).all()
        assert (shown[boxed] == 255).all()


def test_the_text_of_a_card_stays_under_its_picture():
    font = ImageFont.load_default(TYPE)
    for number in range(40):
        texts = module._text(scene(number), number, font)
        assert max(font.getlength(line) for line, _ in texts) <= SIDE


def test_text_is_set_as_one_reads_it():
    assert module._typeset("this is a park . there is a red dog , and a cup .") == (
        "This is a park. There is a red dog, and a cup."
    )
    assert module._typeset("L A H") == "L A H"


def test_rows_hold_four():
    one, four, five = (sheet(count) for count in (1, 4, 5))
    assert four.width == one.width + 3 * (SIDE + GAP) == five.width
    assert five.height > four.height + SIDE


def test_the_command_writes_a_picture(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    asked = ["world", "sheet", "-o", str(path), "--seed", "9", "--count", "2", "--split", "calibration"]
    assert cli.main(asked) == 0 and capsys.readouterr().err == ""
    with Image.open(path) as page:
        assert (np.asarray(page) == np.asarray(sheet(2, "calibration", 9))).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "-1"], "The first seed -1 is out of range"),
        (["--seed", str(2**32)], "is out of range"),
        (["--count", "0"], "The count 0 is out of range"),
        (["--count", "401"], "401 scenes do not go on a page"),
        (["--split", "exam"], "There is no split 'exam'"),
    ],
)
def test_the_command_refuses(options, said, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    assert cli.main(["world", "sheet", "-o", str(path), *options]) == 2
    assert said in capsys.readouterr().err and not path.exists()


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert cli.main(["world", "sheet", "-o", str(tmp_path / "sheet.gif")]) == 2
    assert ".png, .jpg, .jpeg or .webp" in capsys.readouterr().err
    assert cli.main(["world", "sheet", "-o", str(tmp_path / "no" / "sheet.png"), "--count", "1"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_page_has_an_end():
    with pytest.raises(InputError, match="do not go on a page"):
        sheet(401)
