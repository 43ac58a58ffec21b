"""`saccade demo`: a trained model that ships with the package is asked, looked into, sped up and steered."""

from __future__ import annotations

import base64
import html
import io
import time
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from saccade import looking
from saccade.core.driver import split
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.session import attach
from saccade.evals.asking import answers
from saccade.evals.interval import Estimate
from saccade.evals.task import Task
from saccade.evals.world import BROKEN, Captions, Questions
from saccade.loading import quiet
from saccade.report.plain import safe
from saccade.stack import load
from saccade.world import embedded
from saccade.world.captions import ASKED
from saccade.world.scenes import scene

if TYPE_CHECKING:
    from torch import Tensor

    from saccade.core.call import AttentionCall
    from saccade.core.passes import Run
    from saccade.core.record import Recording

MODEL, SHOWN, QUESTION = "vlm", 9, "what colour is the car ?"
REDUCING, STEERING = "pyramiddrop", "damro"
STACKS = {
    "bare": "",
    "fewer visual tokens": REDUCING,
    "fewer inventions": STEERING,
    "both": f"{REDUCING}+{STEERING}",
}
TRY = (
    'saccade look photo.jpg --ask "What is on the table?" --model MODEL -o look.png',
    f"saccade ask photo.jpg \"What is on the table?\" --model MODEL --compare --with '{REDUCING}+{STEERING}'",
    "saccade methods hallucination",
)
OWN = "With a model of your own, a folder or a hub id:"


@dataclass
class Measured:
    title: str
    stack: str
    accuracy: Estimate
    chair: Estimate
    tokens: float  # visual, of a layer, on average
    seconds: float

    @property
    def cells(self) -> tuple[str, ...]:
        def interval(e: Estimate) -> str:
            return f"{e.value:.1%} ({e.low:.0%} to {e.high:.0%})"

        return (
            self.title,
            interval(self.accuracy),
            interval(self.chair),
            f"{self.tokens:.0f}",
            f"{self.seconds:.1f} s",
        )


HEAD = ("", "questions right", "named, but not there", "visual tokens", "time")


def demo(out: str = "demo.html", scenes: int = 200) -> None:
    """Ask about a drawn scene, see where the model looks, then measure methods on so many others."""
    path = Path(out)
    with quiet():
        model, processor = embedded.load(MODEL)
        picture = scene(SHOWN, "test").picture()
        asked = looking.look(model, processor, picture, QUESTION)
        told = looking.look(model, processor, picture, ASKED)
    size = sum(p.numel() for p in model.parameters())
    print(f"A drawn scene, and a {type(model).__name__} of {size:,} parameters, trained on such scenes.\n")
    print(asked.plain())
    print(f"\n{safe(ASKED)}\n» {told.answer()}\n")
    _write(path, page(asked, told, [], scenes))
    print(f"Where it looked for every word of that: {path}\n")
    print(f"The same on {scenes} other scenes, with {REDUCING} and {STEERING}:")
    rows = [measure(model, processor, title, stack, scenes) for title, stack in STACKS.items()]
    _write(path, page(asked, told, rows, scenes))
    print(_table(rows))
    print(f"\n{OWN}")
    for line in TRY:
        print(f"  {line}")


def measure(model: Any, processor: Any, title: str, stack: str, scenes: int, seed: int = 0) -> Measured:
    """One question and one caption of every scene, where what belongs together is as often apart."""
    _, methods = split(load(stack) if stack else ())
    rng = np.random.default_rng(seed)
    questions = sorted(Questions(BROKEN).samples(scenes, seed), key=lambda one: rng.random())
    one_each = {one.picture: one for one in questions}
    began, scores = time.perf_counter(), []
    jobs: tuple[tuple[Task, list[Any]], ...] = (
        (Questions(BROKEN), list(one_each.values())),
        (Captions(BROKEN), Captions(BROKEN).samples(scenes, seed)),
    )
    for task, samples in jobs:
        most, what = task.max_new_tokens, f"{title}: {task.name}"
        said = answers(model, processor, samples, methods, max_new_tokens=most, title=what)
        scores.append(task.score(zip(samples, said, strict=True)))
    seconds = time.perf_counter() - began
    seen = _Seen(sites="text.*.self")
    with quiet(), attach(model, [*methods, seen]) as session:
        model.generate(
            **looking.prepare(processor, [scene(SHOWN, "test").picture()], ASKED), max_new_tokens=1
        )
    tokens = session.results["_Seen"]
    return Measured(title, stack, scores[0]["accuracy"], scores[1]["chair_i"], tokens, seconds)


@dataclass(eq=False, kw_only=True)
class _Seen(Method):
    """How many visual tokens a layer reads, on average."""

    phases: tuple[str, ...] = ("prefill",)

    def begin(self, run: Run) -> None:
        run.state["seen"] = []

    def observe(self, call: AttentionCall) -> None:
        counts: list[Tensor] = call.run.state["seen"]
        counts.append(call.columns("image").float().sum(-1).mean())

    def end(self, run: Run) -> float:
        return float(np.mean([float(count) for count in run.state["seen"]]))


def _table(rows: list[Measured]) -> str:
    cells = [HEAD, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


# ---- the page ------------------------------------------------------------------------------------------

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Saccade: what a model looks at</title>
<style>
:root { color-scheme: light dark; font: 17px/1.5 system-ui, sans-serif }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
img { width: 24rem; max-width: 100%; border-radius: 6px; display: block; margin: .6rem 0 }
button { font: inherit; padding: .1rem .45rem; margin: .1rem 0; border: 1px solid #8886; border-radius: 6px;
  background: none; color: inherit; cursor: pointer }
button[aria-pressed=true] { background: #c2410c; border-color: #c2410c; color: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid #8884 }
pre { overflow-x: auto; padding: .6rem; border: 1px solid #8884; border-radius: 6px }
.asked { opacity: .7 }
</style>
<h1>What a model looks at</h1>
<p>Choose a word of its answer, with the mouse or the arrow keys: the heat shows where it looked to say it, a mean
over all layers and heads.</p>
$looks
<h2>On $scenes other scenes</h2>
<table><tr>$head</tr>$rows</table>
<p>With 95% intervals. What usually stands together is as often apart in these scenes, so that a model that guesses
names what is not there.</p>
<h2>Try it on your model</h2>
<pre>$own</pre>
<script>
for (const look of document.querySelectorAll("section")) {
  const words = [...look.querySelectorAll("button")], image = look.querySelector("img")
  const choose = at => words.forEach((word, i) => {
    word.setAttribute("aria-pressed", i == at)
    if (i == at) { image.src = word.dataset.look; image.alt = "where it looked to say " + word.textContent }
  })
  words.forEach((word, i) => {
    word.onclick = word.onmouseenter = () => choose(i)
    word.onkeydown = key => {
      const next = i + ({ArrowRight: 1, ArrowLeft: -1})[key.key]
      if (words[next]) { words[next].focus(); choose(next) }
    }
  })
  choose(0)
}
</script>
</html>
""")


def page(asked: Recording, told: Recording, rows: list[Measured], scenes: int) -> str:
    """One file that needs no network."""

    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

    return PAGE.substitute(
        looks=_look(asked) + _look(told),
        scenes=scenes,
        head=line("th", HEAD),
        rows="".join(f"<tr>{line('td', row.cells)}</tr>" for row in rows),
        own=html.escape("\n".join(TRY)),
    )


def _look(seen: Recording) -> str:
    """A recording whose every word shows its map."""
    words = [i for i, word in enumerate(seen.words) if word.said]
    buttons = (
        f'<button data-look="{_picture(seen, i)}">{html.escape(seen.words[i].text)}</button>' for i in words
    )
    asked = html.escape(seen.prompt)
    return f'<section><p class="asked">{asked}</p><img alt=""><div>{" ".join(buttons)}</div></section>'


def _picture(seen: Recording, word: int) -> str:
    data = io.BytesIO()
    seen.map("text.*.self", word=word).mean("layer", "head").overlay().save(data, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as e:
        raise InputError(f"{path} cannot be written: {e}.", "run the demo in a folder of yours") from e
