"""Results as one file that needs no network: what every stack changed, and what it cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import isnan
from string import Template

from saccade.bench.results import CANNOT_TELL, LEAST, Figure, Results, lower
from saccade.evals.interval import Estimate
from saccade.report.chart import STYLE, Axis, Point, Scale, Span, number, scatter, strip

HEADLINE = ("accuracy", "accuracy+", "f1", "chair_i", "chair_s", "recall", "yes", "perception", "cognition")
COSTS = {
    "visual tokens": "visual tokens of a layer",
    "gflops": "GFLOPs of an answer",
    "peak mebibytes": "peak memory, MiB",
    "first token ms": "ms to the first token",
    "per token ms": "ms of a further token",
    "seconds": "seconds of an answer, in its batch",
    "tokens": "tokens of an answer",
    "speed-up": "times faster than bare",
    "bound": "times faster that FLOPs and bytes allow",
    "oracle speed-up": "times faster, the prompt being so short from the start",
    "flips": "answers that differ when asked alone, of how many",
}
TOLD = COSTS | {
    "chair_i": "chair_i, of what is named, not there",
    "chair_s": "chair_s, captions that name what is not there",
    "yes": "share of the answers that say yes",
}
PLOTTED = ("gflops", "first token ms", "per token ms", "peak mebibytes")
MARKS = {"better": "✓", "worse": "✗", "more": "↑", "less": "↓", CANNOT_TELL: "○"}
STRIP = 150  # pixels of a drawn change


@dataclass(frozen=True)
class Block:
    """What all stacks came to for one model and task; the first is the bare model."""

    model: str
    task: str
    stacks: dict[str, dict[str, Figure]]  # by stack, then by score

    @property
    def scores(self) -> list[str]:
        """The task's own, its main one first."""
        return [name for name in self._names if name not in COSTS]

    @property
    def costs(self) -> list[str]:
        return [name for name in COSTS if name in self._names]

    @property
    def main(self) -> str:
        return self.scores[0]

    @property
    def headline(self) -> list[str]:
        return [name for name in self.scores if name == self.main or name in HEADLINE]

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for one in self.stacks.values() for name in one))


def blocks(found: Results) -> list[Block]:
    """In the results' order. A stack of which several versions were run has the run's name behind its own."""
    made = []
    for (task, model), group in groupby(found, lambda one: (one.task, one.model)):
        figures = list(group)
        runs = Counter(stack for stack, _ in {(one.stack, one.run) for one in figures})
        stacks: dict[str, dict[str, Figure]] = {}
        for one in figures:
            name = f"{one.stack}, run {one.run[:6]}" if runs[one.stack] > 1 else one.stack
            stacks.setdefault(name, {})[one.score] = one
        made.append(Block(model, task, stacks))
    return made


def page(found: Results) -> str:
    made = blocks(found)
    parts = [_overview(made)] if len(made) > 1 else []
    body = "\n".join([*parts, *map(_section, made)])
    return PAGE.substitute(style=STYLE, strip=STRIP, least=LEAST, body=body)


def plots(block: Block) -> list[str]:
    """The main score against what it costs, and what is invented against what is named."""
    timed = "per token ms" in block.costs
    pairs = [(cost, block.main) for cost in PLOTTED if cost in block.costs]
    pairs += [] if timed else [("seconds", block.main)]
    if {"chair_i", "recall"} <= set(block.scores):
        pairs.insert(0, ("recall", "chair_i"))
    return [plot(block, *pair) for pair in pairs]


def plot(block: Block, x: str, y: str) -> str:
    points = [
        Point(name, span(figures[x].found), span(figures[y].found), figures[block.main].verdict)
        for name, figures in block.stacks.items()
        if {x, y, block.main} <= figures.keys()
    ]
    less = lower(x) or x in COSTS
    return scatter(points, Axis(TOLD.get(x, x), less), Axis(TOLD.get(y, y), lower(y)))


def span(e: Estimate) -> Span:
    return Span(e.value, e.low, e.high)


# ---- html ----------------------------------------------------------------------------------------------

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Saccade: results</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1b1d21; --dim: #5f656e; --edge: #dfe2e6; --head: #f5f6f8;
  --better: #00714f; --worse: #b34a00; --moved: #1f66a3 }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e8e9ec; --dim: #9ba1aa; --edge: #2e3238;
  --head: #1d2024; --better: #3ccb9b; --worse: #ff9650; --moved: #74b4ee } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 96rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .2rem; overflow-wrap: anywhere }
p { margin: .4rem 0; max-width: 46rem }
small, .dim { color: var(--dim); font-weight: 400 }
small { display: block; font-size: .8rem; line-height: 1.35 }
a { color: inherit }
.table { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--edge); border-radius: 8px }
table { border-collapse: collapse; min-width: 100% }
th, td { padding: .45rem .7rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--edge) }
tr:last-child > * { border-bottom: 0 }
thead th { background: var(--head); vertical-align: bottom; font-weight: 600 }
tbody th { position: sticky; left: 0; z-index: 1; background: var(--page); font-weight: 500; white-space: normal;
  overflow-wrap: anywhere; min-width: min(15rem, 36vw); border-right: 1px solid var(--edge) }
thead th:first-child { position: sticky; left: 0; z-index: 2; border-right: 1px solid var(--edge) }
td b { font-weight: 600 }
.note { white-space: normal; max-width: 14rem }
.verdict { display: block; font-size: .85rem; color: var(--dim); white-space: nowrap }
.better { color: var(--better) } .worse { color: var(--worse) } .more, .less { color: var(--moved) }
.drawn { min-width: ${strip}px; width: ${strip}px }
.drawn small { display: flex; justify-content: space-between }
.strip { margin-top: .3rem }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
summary { cursor: pointer; color: var(--dim); padding: .3rem 0 }
$style
</style>
<main>
<h1>Results</h1>
<p>Every stack answers what the bare model answers. Below a value stands its 95% interval, and below that how it
differs from the bare model's, on the questions that both have answered.</p>
<p><span class="better">✓ better</span> or <span class="worse">✗ worse</span>: the interval of the difference keeps
clear of zero, and at least $least pictures differ. <span class="more">↑ more</span> or <span class="less">↓
less</span>: likewise, of what is neither good nor bad. <span class="dim">○ cannot tell</span>: all else. Times and
memory are medians, from quartile to quartile, and told apart where those of the difference are nearer to each other
than to zero.</p>
$body
</main>
</html>
""")


def _overview(made: Sequence[Block]) -> str:
    """By model: the main score of every task."""
    parts = []
    for model, group in groupby(sorted(made, key=lambda one: one.model), lambda one: one.model):
        own = list(group)
        head = [
            _heading(f'<a href="#{_anchor(block)}">{escape(block.task)}</a>', block.main) for block in own
        ]
        names = dict.fromkeys(name for block in own for name in block.stacks)
        rows = [
            [_name(name), *(_cell(block.stacks.get(name, {}).get(block.main)) for block in own)]
            for name in names
        ]
        parts += [f"<h2>{escape(model)}, in short</h2>", _table([_heading("stack"), *head], rows)]
    return "".join(parts)


def _section(block: Block) -> str:
    others = [name for name in block.scores if name not in block.headline]
    drawn = "".join(f"<div>{one}</div>" for one in plots(block) if one)
    most = max(one.of for figures in block.stacks.values() for one in figures.values())
    return f"""<section>
<h2 id="{_anchor(block)}">{escape(block.task)} <span class="dim">{escape(block.model)}, {most:,} answers</span></h2>
{_main(block)}
<div class="plots">{drawn}</div>
{_all(block, others) if others else ""}
</section>"""


def _main(block: Block) -> str:
    scale = _scale([one[block.main] for one in block.stacks.values() if block.main in one])
    ends = f"<span>{number(scale.low, '+')}</span><span>0</span><span>{number(scale.high, '+')}</span>"
    first, *others = block.headline
    head = [
        _heading("stack"),
        _heading(first),
        f'<th scope="col" class="drawn">change<small>{ends}</small></th>',
        *map(_heading, (*others, *block.costs)),
    ]
    rows = []
    for name, figures in block.stacks.items():
        cells = [_cell(figures.get(score)) for score in (*others, *block.costs)]
        main = figures.get(first)
        rows.append([_name(name, _missing(figures)), _cell(main), _change(main, scale), *cells])
    return _table(head, rows)


def _all(block: Block, scores: Sequence[str]) -> str:
    rows = [[_name(name), *(_cell(one.get(score)) for score in scores)] for name, one in block.stacks.items()]
    table = _table([_heading("stack"), *map(_heading, scores)], rows)
    return f"<details><summary>{len(scores)} more scores</summary>{table}</details>"


def _scale(figures: Sequence[Figure]) -> Scale:
    """Of changes, the same to both sides of zero."""
    changes = [span(one.change) for one in figures if one.change]
    most = max((abs(end) for change in changes for end in change.reach), default=0) or 1.0
    return Scale(-most, most, 6, STRIP - 6)


def _change(figure: Figure | None, scale: Scale) -> str:
    drawn = strip(span(figure.change), scale, figure.verdict) if figure and figure.change else ""
    return f'<td class="drawn">{drawn}</td>'


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "<td></td>"
    found, parts = span(figure.found), []
    if found.wide:
        parts.append(f"<small>{number(found.low)} to {number(found.high)}</small>")
    told = " ".join(filter(None, (MARKS.get(figure.verdict), _moved(figure), figure.verdict)))
    if told:
        parts.append(f'<span class="verdict {figure.verdict.split(" ")[0]}">{escape(told)}</span>')
    if isnan(found.value) and figure.note:
        parts.append(f'<small class="note">{escape(figure.note)}</small>')
    value = figure.share or number(found.value)
    return f'<td title="{escape(figure.note)}"><b>{value}</b>{"".join(parts)}</td>'


def _moved(figure: Figure) -> str:
    """Scores by so many points, costs by so many percent."""
    if not figure.change or isnan(figure.change.value):
        return ""
    if figure.score not in COSTS:
        return number(figure.change.value, "+")
    bare = figure.found.value - figure.change.value
    return f"{round(100 * figure.change.value / bare):+d}%".replace("-", "−") if bare else ""


def _heading(name: str, below: str = "") -> str:
    if below:
        return f'<th scope="col">{name}<small>{escape(below)}</small></th>'
    return f'<th scope="col" title="{escape(TOLD.get(name, name))}">{escape(name)}</th>'


def _name(name: str, below: str = "") -> str:
    """Long ones are broken where methods and options begin."""
    broken = re.sub(r"([(+,]|, )", r"\1<wbr>", escape(name))
    return f'<th scope="row">{broken}<small>{below}</small></th>'


def _missing(figures: dict[str, Figure]) -> str:
    one = next(iter(figures.values()))
    return "" if one.samples == one.of else f"{one.samples:,} answers so far"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{"".join(head)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _anchor(block: Block) -> str:
    return escape(re.sub(r"\W+", "-", f"{block.model} {block.task}"))
