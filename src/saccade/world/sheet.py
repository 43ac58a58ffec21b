"""A page of scenes with what is true of them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from saccade.core.errors import InputError
from saccade.world.captions import caption
from saccade.world.kinds import SIZE
from saccade.world.questions import WEIGHTS, Question, ask, questions
from saccade.world.scenes import Scene, scenes

ENLARGED = 3
SIDE = SIZE * ENLARGED
COLUMNS = 4
MOST = 400  # scenes of a page
MARGIN, GAP, TYPE, LINE = 36, 28, 15, 21  # pixels
PAPER, INK, FAINT, ACCENT, FRAME = (
    (250, 248, 243),
    (42, 40, 46),
    (138, 134, 130),
    (172, 62, 44),
    (255, 255, 255),
)


def sheet(count: int = 12, split: str = "test", start: int = 0) -> Image.Image:
    """Each scene with its boxes, its caption, and a question with its answer."""
    if count > MOST:
        raise InputError(f"{count} scenes do not go on a page.", f"show {MOST} at most")
    shown = list(scenes(count, split, start))
    font = ImageFont.load_default(TYPE)
    texts = [_text(scene, number, font) for number, scene in enumerate(shown)]
    rows = [range(first, min(first + COLUMNS, count)) for first in range(0, count, COLUMNS)]
    heights = [SIDE + LINE * (1 + max(len(texts[number]) for number in row)) + GAP for row in rows]
    across = min(count, COLUMNS)
    page = Image.new(
        "RGB", (2 * MARGIN + across * (SIDE + GAP) - GAP, 2 * MARGIN + sum(heights) - GAP), PAPER
    )
    y = MARGIN
    for row, height in zip(rows, heights):
        for column, number in enumerate(row):
            x = MARGIN + column * (SIDE + GAP)
            page.paste(_boxed(shown[number]), (x, y))
            _write(page, x, y + SIDE + LINE // 2, texts[number], font)
        y += height
    return page


Line = tuple[str, tuple[int, int, int]]


def _text(scene: Scene, number: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[Line]:
    question = _question(scene, number)
    parts = (
        (f"{scene.split} {scene.seed}", FAINT),
        (caption(scene), INK),
        (question.text, FAINT),
        (question.answer, ACCENT),
    )
    return [(line, ink) for part, ink in parts for line in _wrapped(_typeset(part), font)]


def _question(scene: Scene, number: int) -> Question:
    """Of every kind in turn, as far as the scenes admit them."""
    rng = np.random.default_rng(scene.seed)
    return ask(scene, rng, list(WEIGHTS)[number % len(WEIGHTS)]) or questions(scene, rng, 1)[0]


def _boxed(scene: Scene) -> Image.Image:
    picture = scene.picture().resize((SIDE, SIDE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        x0, y0, x1, y1 = (ENLARGED * side for side in thing.box)
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=FRAME)
    return picture


def _typeset(words: str) -> str:
    for mark in ".,?":
        words = words.replace(f" {mark}", mark)
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in words.split(". "))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _write(
    page: Image.Image, x: int, y: int, lines: list[Line], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    draw = ImageDraw.Draw(page)
    for line, ink in lines:
        draw.text((x, y), line, ink, font)
        y += LINE
