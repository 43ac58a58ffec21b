"""A page to look around in: what the model looked at for every word, by layer and by head, and with methods."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import replace
from difflib import SequenceMatcher
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.core.reduce import segments
from saccade.report.overlay import colours, veil

if TYPE_CHECKING:
    from saccade.core.faithfulness import Faithfulness
    from saccade.core.map import Map
    from saccade.core.record import Recording, Words

SHARES = ("image", "question", "answer", "sinks", "rest")
WHOLE = "the whole answer"


def page(seen: Recording, beside: Recording | None = None, word: Words = None, sample: int = 0) -> str:
    """One file that needs no network; two recordings of one question stand side by side."""
    found = [_Run(run, sample) for run in (seen, beside) if run is not None]
    if len({run.shape for run in found}) > 1:
        raise InputError(
            "These recordings cannot be compared: their layers, heads or pictures differ.",
            "record the same question about the same pictures with the same model",
        )
    parts, merged = files("saccade.report"), seen.options["reduce"] == "mean_heads"
    data = {
        "colours": _colours(),
        "shares": SHARES,
        "layers": [site.index if site.index is not None else site.name for site in found[0].map.sites],
        "heads": [0] if merged else seen.options.get("heads") or [*range(found[0].map.tensor.shape[2])],
        "merged": merged,
        "pictures": [_picture(found[0].map, item) for item in range(seen.pictures_of(sample))],
        "runs": [run.data() for run in found],
        "partners": _partners(*found) if len(found) > 1 else [],
        "start": found[0].start(word),
    }
    return Template(parts.joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(seen.prompt or "attention"),
        style=parts.joinpath("page.css").read_text("utf-8"),
        script=parts.joinpath("page.js").read_text("utf-8"),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


class _Run:
    """Of one recording, all that can be chosen: the whole answer, and every word whose rows were recorded."""

    def __init__(self, seen: Recording, sample: int) -> None:
        if seen.options["columns"] != "all" or seen.options["reduce"] not in (None, "mean_heads"):
            raise InputError(
                "The page shows shares and places, and this recording kept others.",
                "record columns='all' with reduce=None or 'mean_heads'",
            )
        if not seen.pictures_of(sample):
            raise InputError("There is no picture in this recording.", "ask about a picture")
        self.seen, self.sample = seen, sample
        whole = seen.map(seen.main_sites(), sample=sample)
        at = {row: i for i, row in enumerate(whole.labels["row"])}
        rows = {i: [p - w.said for p in w.positions] for i, w in enumerate(seen.words_of(sample))}
        self.rows = {i: [at[p] for p in needed] for i, needed in rows.items() if at.keys() >= set(needed)}
        self.words = {i: word for i, word in enumerate(seen.words_of(sample)) if i in self.rows}
        said = [row for i, word in self.words.items() if word.said for row in self.rows[i]]
        if not said:
            raise InputError(
                "No row that says a word of the answer was recorded.", "record rows='after_image'"
            )
        chosen = [whole.tensor[:, :, index].mean(2) for index in (said, *self.rows.values())]
        labels = {"word": (WHOLE, *self.words), **{a: whole.labels[a] for a in ("layer", "head", "column")}}
        gone = whole.gone
        if gone is not None:
            gone = torch.stack([gone[:, :, index].all(2) for index in (said, *self.rows.values())])
        self.map = replace(whole, tensor=torch.stack(chosen), labels=labels, gone=gone)
        grids = [self.map.grids(item) for item in range(seen.pictures_of(sample))]
        self.grids = [grid.shape[-2:] for grid in grids]
        self.places = [grid.flatten(-2).float() for grid in grids]  # (words, layers, heads, cells) each

    @property
    def shape(self) -> tuple[Any, ...]:
        return (*self.map.tensor.shape[1:3], tuple(self.grids), tuple(s.name for s in self.map.sites))

    def start(self, word: Words) -> int:
        """The word that the page opens with, the sharpest where none is named."""
        if isinstance(word, str | int):
            index = self.seen.words_of(self.sample).index(self.seen.word(word, self.sample))
            if index not in self.words:
                raise InputError(f"Rows of {word!r} were not recorded.", "record rows='after_image' or 'all'")
            return 1 + [*self.words].index(index)
        sharpest = self.seen.sharpest(self.sample)
        return 0 if sharpest is None else 1 + [*self.words].index(sharpest)

    def data(self) -> dict[str, Any]:
        seen, columns = self.seen, list(self.map.labels["column"])
        try:
            sinks: dict[str, tuple[int, ...]] | None = seen.sinks(self.sample)
        except InputError:  # the page says that they are not known
            sinks = None
        drawing = sorted({position for positions in (sinks or {}).values() for position in positions})
        layout = seen.layouts[self.map.space]
        kinds = segments(layout.where)[self.sample].cpu()[columns]  # (columns, SEGMENTS)
        first, image, question, answer, rest = kinds.unbind(-1)
        shares = []
        for layer, site in enumerate(self.map.sites):
            sink = torch.tensor([column in (sinks or {}).get(site.name, ()) for column in columns])
            masks = [image & ~sink, question & ~sink, answer & ~sink, sink, (first | rest) & ~sink]
            shares.append(self.map.tensor[:, layer] @ torch.stack(masks, -1).float())
        targets = [*(word.positions for word in self.words.values()), *((position,) for position in drawing)]
        own = self.map.space == 0  # else the columns are those of another sequence
        onto = torch.tensor([[own and column in target for target in targets] for column in columns]).float()
        return {
            "stack": seen.stack,
            "words": [{"text": WHOLE, "said": True}]
            + [{"text": word.text, "said": word.said} for word in self.words.values()],
            "maps": [_packed(place) for place in self.places],
            "gone": [self._gone(item) for item in range(len(self.places))],
            "faithfulness": [told for one in seen.faithfulness if (told := self._measured(one))["words"]],
            "shares": _bytes(torch.stack(shares, 1), np.float32),  # (words, layers, heads, SHARES)
            "onto": _packed(self.map.tensor @ onto),
            "sinks": sinks and {
                "tokens": [self._sink(position) for position in drawing],
                "layers": [[drawing.index(p) for p in sinks[site.name]] for site in self.map.sites],
            },
        }  # fmt: skip

    def _gone(self, item: int) -> dict[str, Any] | None:
        """Bits of the places whose tokens were removed, by word, layer and head, or for all heads alike."""
        gone = self.map.absents(item).expand(*self.map.tensor.shape[:3], *self.grids[item]).flatten(-2)
        if not gone.any():
            return None
        alike = bool((gone == gone[:, :, :1]).all())
        bits = np.packbits((gone[:, :, :1] if alike else gone).numpy())
        return {"alike": alike, "bits": _bytes(torch.from_numpy(bits), np.uint8)}

    def _measured(self, one: Faithfulness) -> dict[str, Any]:
        """With the choices whose map it is: a word, the whole answer, or both."""
        whole = [0] if one.words == self.seen.indices(None, self.sample) else []
        own = [1 + at for at, i in enumerate(self.words) if one.words == [i]]
        return {
            "words": whole + own if one.sample == self.sample else [],
            "removed": one.removed,
            "curves": {order: np.round(runs, 4).tolist() for order, runs in one.curves.items()},
            "areas": {order: round(one.deletion(order), 4) for order in one.curves},
            "beaten": one.beaten,
        }

    def _sink(self, position: int) -> dict[str, Any]:
        """What a token writes, or where it lies on which picture, as shares of its sides."""
        layout = self.seen.layouts[self.map.space]
        text = (self.seen.texts[self.sample][position] or "").strip()
        words = [i for i, word in enumerate(self.words.values(), 1) if position in word.positions]
        first = bool(layout.where("first")[self.sample, position])
        name = "the first token" if first else f"“{text}”" if text else f"token {position}"
        found: dict[str, Any] = {"text": name, "picture": None, "words": words}
        box, item = layout.boxes[self.sample, position], int(layout.item[self.sample, position])
        if item >= 0 and bool(box.isfinite().all()):
            width, height = self.map.size(item)
            sides = (box.cpu() / torch.tensor([width, height, width, height])).clamp(0, 1)
            found |= {"text": f"a place on picture {item + 1}", "picture": item}
            found["box"] = [round(side, 5) for side in sides.tolist()]
        return found


def _picture(seen: Map, item: int) -> dict[str, Any]:
    picture, data = seen.picture(item), io.BytesIO()
    picture.save(data, "WEBP", quality=88)
    (width, height), grid = seen.size(item), seen.cells(item)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"source": source, "width": width, "height": height, "rows": grid[0], "columns": grid[1]}


def _colours() -> list[list[int]]:
    """Of 256 strengths red, green, blue and how much they cover."""
    strength = np.linspace(0, 1, 256)
    table = np.concatenate([colours(strength), 255 * veil(strength)[:, None]], -1)
    found: list[list[int]] = table.round().astype(int).tolist()
    return found


def _partners(one: _Run, other: _Run) -> list[list[int | None]]:
    """For every word of each run the same word of the other: the common parts of question and answer."""
    texts = [[(w.text.casefold(), w.said) for w in run.words.values()] for run in (one, other)]
    pairs = {0: 0}
    for a, b, length in SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_matching_blocks():
        pairs |= {a + i + 1: b + i + 1 for i in range(length)}
    back = {b: a for a, b in pairs.items()}
    return [[known.get(i) for i in range(len(run.words) + 1)] for run, known in ((one, pairs), (other, back))]


def _packed(t: Tensor) -> dict[str, str]:
    """(..., n) in squares of 255 steps of the largest of every n, which are finer where little is."""
    top = t.amax(-1)
    steps = (t / top.clamp_min(1e-30)[..., None]).clamp_min(0).sqrt() * 255
    return {"steps": _bytes(steps.round(), np.uint8), "tops": _bytes(top, np.float32)}


def _bytes(t: Tensor, kind: Any) -> str:
    return base64.b64encode(t.numpy().astype(kind).tobytes()).decode()
