"""Plots as SVG: they scale, need nothing, and read on light and on dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10, nan
from typing import NamedTuple

WIDTH, HEIGHT = 360, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 42  # margins
LETTER, LINE = 5.9, 12  # of the labels, about
LONGEST = 26  # letters of a label

# Told apart by the colour-blind too, and on white and near-black alike.
TONES = {
    "better": "#00946b",
    "worse": "#d55e00",
    "more": "#2f7fc1",
    "less": "#2f7fc1",
    "cannot tell": "#7d828a",
}
STYLE = """
.chart { display: block; width: 100%; height: auto; font: 11px/1 system-ui, sans-serif }
.chart text { fill: currentColor; paint-order: stroke; stroke: var(--page, #0000); stroke-width: 3px }
.chart .faint { opacity: .72 }
.chart .grid { stroke: currentColor; opacity: .13 }
.chart .rule { stroke: currentColor; opacity: .45 }
.chart .front { fill: none; stroke: currentColor; opacity: .5; stroke-dasharray: 3 3 }
.chart .ends { stroke: currentColor; stroke-width: 1.4; opacity: .4 }
.strip .ends { opacity: .8 }
.chart .line { fill: none; stroke: currentColor; stroke-width: 1.8 }
.chart .band { fill: currentColor; opacity: .13 }
.chart .dot { fill: currentColor }
.chart .ring { fill: none; stroke: currentColor; stroke-width: 1.8 }
"""
ALONE = (
    "svg { --page: #fff; color: #1b1d21; background: var(--page) } "
    "@media (prefers-color-scheme: dark) { svg { --page: #15171a; color: #e8e9ec } }"
)


class Span(NamedTuple):
    """A value and its interval, NaN where there is none."""

    value: float
    low: float = nan
    high: float = nan

    @property
    def shown(self) -> str:
        return number(self.value) + (f" ({number(self.low)} to {number(self.high)})" if self.wide else "")

    @property
    def wide(self) -> bool:
        return isfinite(self.low) and isfinite(self.high)

    @property
    def reach(self) -> list[float]:
        return [*filter(isfinite, self)]


@dataclass(frozen=True)
class Axis:
    title: str
    lower: bool = False  # is better

    def shown(self, arrows: str) -> str:
        """With an arrow to where it is better: for less, for more."""
        return f"{self.title} {arrows[not self.lower]}"


@dataclass(frozen=True)
class Point:
    name: str
    x: Span
    y: Span
    tone: str = ""  # one of TONES, or the ink


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Scale:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers."""
        rough = (self.high - self.low) / about
        unit = 10.0 ** floor(log10(rough))
        step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
        return [i * step for i in range(ceil(self.low / step), floor(self.high / step) + 1)]


def number(value: float, sign: str = "") -> str:
    """Three digits that count, and no more than that."""
    if not isfinite(value):
        return "-"
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size > 1 else 3
    return f"{value:{sign},.{decimals}f}".replace("-", "−")


def scatter(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """With intervals, and a dashed line behind which another is better in both; empty where there are no points."""
    points = [point for point in points if isfinite(point.x.value) and isfinite(point.y.value)]
    if not points:
        return ""
    across = Scale.over([v for point in points for v in point.x.reach], LEFT, WIDTH - RIGHT)
    up = Scale.over([v for point in points for v in point.y.reach], HEIGHT - BOTTOM, TOP)
    best = front(points, x, y)
    parts = [_frame(across, up, x, y), _staircase(best, across, up)]
    places = [(across(point.x.value), up(point.y.value)) for point in points]
    for point, (px, py) in zip(points, places):
        mark = f'<circle class="{"dot" if point.tone else "ring"}" cx="{px}" cy="{py}" r="4.5"/>'
        parts.append(_toned(_ends(point, across, up) + mark, point))
    parts += _labels(points, places, [point in best for point in points])
    return _chart("".join(parts), f"{y.title} against {x.title}")


def front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Those that no other betters in one and equals in the other, from the best x on."""

    def cost(value: float, axis: Axis) -> float:
        return value if axis.lower else -value

    found: list[Point] = []
    least = float("inf")
    for point in sorted(points, key=lambda p: (cost(p.x.value, x), cost(p.y.value, y))):
        if (reached := cost(point.y.value, y)) < least:
            least = reached
            found.append(point)
    return found


def strip(span: Span, scale: Scale, tone: str) -> str:
    """An interval beside zero, for a cell of a table; the scale's own pixels are its width."""
    middle, zero, at = LINE / 2, scale(0), scale(span.value)
    parts = [f'<line class="rule" x1="{zero}" x2="{zero}" y1="0" y2="{LINE}"/>']
    if span.wide:
        ends = f'x1="{scale(span.low)}" x2="{scale(span.high)}" y1="{middle}" y2="{middle}"'
        parts.append(f'<line class="ends" {ends}/>')
    parts.append(f'<circle class="dot" cx="{at}" cy="{middle}" r="3.5"/>')
    colour = TONES.get(tone, "currentColor")
    width = scale.start + scale.end
    return (
        f'<svg class="chart strip" viewBox="0 0 {width:g} {LINE}" role="img" '
        f'aria-label="{escape(span.shown)}"><g color="{colour}">{"".join(parts)}</g></svg>'
    )


def curve(
    values: Sequence[str], found: Sequence[Span], chosen: int, level: Span, x: str, y: str, *, ruled: str
) -> str:
    """A score over the values of a setting, with its intervals; the chosen one has a ring, and `ruled` is what the
    level line stands for."""
    across = Scale(-0.4, len(values) - 0.6, LEFT, WIDTH - RIGHT)
    up = Scale.over([v for span in (*found, level) for v in span.reach], HEIGHT - BOTTOM, TOP)
    at = [(across(i), up(span.value)) for i, span in enumerate(found)]
    parts = [_grid(up), _titles(x, y)]
    for i, name in enumerate(values):
        parts.append(_text(across(i), HEIGHT - BOTTOM + 15, _cut(name, 10), "middle", "faint"))
    right = WIDTH - RIGHT
    if level.wide:
        top, height = up(level.high), up(level.low) - up(level.high)
        parts.append(
            f'<rect class="band" x="{LEFT}" width="{right - LEFT}" y="{top}" height="{height:.1f}"/>'
        )
    parts.append(
        f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{up(level.value)}" y2="{up(level.value)}"/>'
    )
    parts.append(_text(right - 3, up(level.value) - 4, ruled, "end", "faint"))
    drawn = [f'<polyline class="line" points="{" ".join(f"{px},{py}" for px, py in at)}"/>']
    for name, span, (px, py) in zip(values, found, at):
        ends = _upright(px, span, up)
        drawn.append(f'<g>{ends}<circle class="dot" cx="{px}" cy="{py}" r="3.5"/>{_told(name, span)}</g>')
    drawn.append(f'<circle class="ring" cx="{at[chosen][0]}" cy="{at[chosen][1]}" r="8"/>')
    parts.append(f'<g color="{TONES["more"]}">{"".join(drawn)}</g>')
    return _chart("".join(parts), f"{y} over {x}")


def alone(chart: str) -> str:
    """A chart as a file of its own."""
    head, rest = chart.split(">", 1)
    size = f'xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{2 * HEIGHT}"'
    return f"{head} {size}><style>{ALONE}{STYLE.replace('width: 100%; height: auto; ', '')}</style>{rest}\n"


# ---- parts


def _chart(inside: str, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _frame(across: Scale, up: Scale, x: Axis, y: Axis) -> str:
    parts = [_grid(up)]
    ticks = across.ticks()
    for tick, name in zip(ticks, _names(ticks)):
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 15, name, "middle", "faint"))
    return "".join([*parts, _titles(x.shown("←→"), y.shown("↓↑"))])


def _grid(up: Scale) -> str:
    parts, ticks = [], up.ticks()
    for tick, name in zip(ticks, _names(ticks)):
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(_text(LEFT - 6, y + 4, name, "end", "faint"))
    return "".join(parts)


def _names(ticks: Sequence[float]) -> list[str]:
    """All with as many decimals as the step between them needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    decimals = max(0, -floor(log10(step or 1.0) + 1e-9))
    return [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]


def _titles(x: str, y: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'<g transform="translate(11 {middle}) rotate(-90)">{_text(0, 0, y, "middle")}</g>'
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, "middle") + turned


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def _cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _told(name: str, *spans: Span) -> str:
    return f"<title>{escape(name)}: {escape(', '.join(span.shown for span in spans))}</title>"


def _toned(inside: str, point: Point) -> str:
    colour = TONES.get(point.tone, "currentColor")
    return f'<g color="{colour}">{inside}{_told(point.name, point.x, point.y)}</g>'


def _ends(point: Point, across: Scale, up: Scale) -> str:
    y, level = up(point.y.value), point.x
    flat = f'<line class="ends" x1="{across(level.low)}" x2="{across(level.high)}" y1="{y}" y2="{y}"/>'
    return _upright(across(point.x.value), point.y, up) + (flat if level.wide else "")


def _upright(x: float, span: Span, up: Scale) -> str:
    if not span.wide:
        return ""
    return f'<line class="ends" x1="{x}" x2="{x}" y1="{up(span.low)}" y2="{up(span.high)}"/>'


def _staircase(best: Sequence[Point], across: Scale, up: Scale) -> str:
    first, *others = best
    steps = "".join(f"H{across(p.x.value)}V{up(p.y.value)}" for p in others)
    return f'<path class="front" d="M{across(first.x.value)} {up(first.y.value)}{steps}"/>'


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float]], first: Sequence[bool]
) -> list[str]:
    """Names where there is room for them; the others are told by the pointer."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    drawn = []
    for i in sorted(range(len(points)), key=lambda i: not first[i]):
        (x, y), name = places[i], _cut(points[i].name)
        width = LETTER * len(name)
        for left, base, anchor in (
            (x + 8, y + 4, "start"),
            (x - 8 - width, y + 4, "end"),
            (x - width / 2, y - 9, "middle"),
            (x - width / 2, y + 17, "middle"),
            (x + 5, y - 8, "start"),
            (x + 5, y + 15, "start"),
            (x - 5 - width, y - 8, "end"),
            (x - 5 - width, y + 15, "end"),
        ):
            box = (left, base - 9, left + width, base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                at = {"start": left, "end": left + width, "middle": left + width / 2}[anchor]
                drawn.append(_text(round(at, 1), round(base, 1), name, anchor))
                break
    return drawn


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
