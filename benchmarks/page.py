"""How long a key press of the page of `saccade look` takes until the new map is drawn, and how large the page is.

    python -m benchmarks.page [--layers 24] [--heads 16] [--side 24] [--words 40] [--out big.html]

Of a recording of random weights, in headless Chromium. The time runs from the event to the frame that shows it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

from saccade.core.layout import KINDS, Layout
from saccade.core.record import Part, Recording
from saccade.core.site import Site

CHROMIUM = "/usr/bin/chromium"
ASKED = ["what", "stands", "beside", "the", "red", "boat", "at", "the", "left", "edge", "?"]
KEYS = ("ArrowRight", "ArrowLeft", "ArrowUp", "Shift+ArrowUp")
PRESS = """async key => {
  const [, shift, name] = key.match(/(Shift\\+)?(.*)/)
  const painted = () => new Promise(done => requestAnimationFrame(() => {
    const channel = new MessageChannel()
    channel.port1.onmessage = done
    channel.port2.postMessage(0)
  }))
  await painted()
  const start = performance.now()
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, shiftKey: !!shift, bubbles: true}))
  await painted()
  return performance.now() - start
}"""


def recording(layers: int, heads: int, side: int, words: int, seed: int = 0) -> Recording:
    """One picture of side * side tokens, a question and an answer of so many words; some tokens are sinks."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((672, 672))
    answer = [("yellow", "boat", "with", "a", "sign")[i % 5] for i in range(words)]
    kinds = ["special", *["image"] * side**2, *["text"] * len(ASKED), *["generated"] * words]
    tokens, start = len(kinds), 1 + side**2 + len(ASKED)
    box = torch.full((1, tokens, 4), torch.nan)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    corner = torch.stack([x, y, x + 1, y + 1], -1).reshape(-1, 4) * (672 / side)
    box[0, 1 : 1 + side**2] = corner
    kind = torch.tensor([[KINDS.index(k) for k in kinds]])
    layout = Layout(
        kind,
        torch.where(kind == KINDS.index("image"), 0, -1),
        torch.zeros_like(kind),
        torch.zeros(1).long(),
        box,
    )
    rows, columns = torch.arange(1 + side**2, tokens - 1), torch.arange(tokens - 1)
    hidden = columns > rows[:, None]
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(len(rows), 2, generator=generator) * 672
    middle = (corner[:, :2] + corner[:, 2:]) / 2
    near = -((middle - centres[:, None]) / 90).square().sum(-1)  # every row looks at a place of its own
    parts, sites = [], []
    for layer in range(layers):
        scores = torch.randn(heads, len(rows), tokens - 1, generator=generator)
        scores[:, :, 1 : 1 + side**2] += 4 * near.exp() * torch.rand(heads, 1, 1, generator=generator)
        if layer > 1:
            scores[:, :, [0, 1 + side, side**2 - 1]] += 5
        w = scores.masked_fill(hidden, -torch.inf).softmax(-1)[None].half()
        parts.append(Part(f"text.{layer}.self", 0, 0, 0, rows[None], columns[None], w))
        sites.append(
            Site(f"text.{layer}.self", "", nn.Identity(), "text", layer, "self", "interface", layers)
        )
    options = {"rows": "after_image", "columns": "all", "reduce": None}
    texts: list[str | None] = [*[None] * (1 + side**2), *(f" {word}" for word in (*ASKED, *answer))]
    seen = Recording(parts, sites, [layout], None, start, options, [texts], prompt=" ".join(ASKED))
    return seen.with_pictures([picture])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("layers", 24), ("heads", 16), ("side", 24), ("words", 40), ("presses", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="keep the page there")
    args = parser.parse_args()
    seen = recording(args.layers, args.heads, args.side, args.words)
    start = time.perf_counter()
    made = seen.page()
    print(f"page of {len(made) / 1e6:.1f} MB, made in {time.perf_counter() - start:.1f} s")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = args.out or Path(folder) / "page.html"
        path.write_text(made, "utf-8")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        tab.goto(path.resolve().as_uri())
        print(f"opened in {time.perf_counter() - start:.2f} s")
        for key in KEYS:
            times = sorted(tab.evaluate(PRESS, key) for _ in range(args.presses))
            print(f"{key:14} median {statistics.median(times):5.1f} ms, slowest {times[-1]:5.1f} ms")
        browser.close()


if __name__ == "__main__":
    main()
