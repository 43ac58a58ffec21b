"""What was seen in one run, and the maps that it gives."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade.core.errors import InputError, nearest
from saccade.core.geometry import cells, on_picture
from saccade.core.layout import GENERATED, KINDS, PAD, Layout
from saccade.core.site import Site, layers, match
from saccade.core.words import Word, pieces, words

if TYPE_CHECKING:
    from PIL.Image import Image

SEGMENTS = ("first", "image", "question", "answer", "rest")
AXES = ("layer", "head", "row", "column")
FORMAT, VERSION = "saccade.recording", "1"
Words = str | int | Sequence[str | int] | None
THUMBNAIL = 1024  # pixels of the longer side of a picture that is kept


@dataclass
class Part:
    """What one call at one site left: one sample, or several, in one pass."""

    site: str
    space: int  # the layout of its columns
    first: int  # sample that its first row of the batch is, where the tower is called in parts
    moment: int
    rows: Tensor  # (batch, rows) logical positions, -1 for none
    columns: Tensor | None  # (batch, columns), or (batch, heads, columns) where heads hold different keys
    weights: Tensor  # (batch, heads, rows, columns)
    where: Tensor | None = None  # (batch, heads, rows, k) positions of the largest


@dataclass
class Recording:
    """What was seen in one run: `map` gives it by layer, head, row and column. Positions are logical ones.

    A sample is a row of what the caller got: of the batch, or of the sequences that `generate` returned. In a
    tower beside the main sequence it is a picture, tile or window, in the order of the calls.
    """

    parts: list[Part]
    sites: list[Site]
    layouts: list[Layout]  # of the main sequence, then of other spaces
    ids: Tensor | None  # (samples, tokens)
    answer_start: int  # first position of the answer of this run
    options: dict[str, Any]
    texts: list[list[str | None]] = field(default_factory=list)  # by sample: what every token wrote
    pictures: list[list[Picture]] = field(default_factory=list)  # by sample of the caller's batch
    prompt: str = ""

    # ---- telling it what the model does not know -----------------------------------------------------

    def with_words(self, tokenizer: Any) -> Recording:
        """Take the words of the ids from a tokenizer, or from a processor that has one."""
        if self.ids is None:
            raise InputError("There are no ids in this recording.", "call the model with input_ids")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        special = {*tokenizer.all_special_ids, -1}
        kind = self.layouts[0].kind
        written = (kind == KINDS.index("text")) | (kind == GENERATED)
        rows = zip(self.ids.tolist(), written.tolist(), strict=True)
        self.texts = [
            pieces(tokenizer, [i if w and i not in special else None for i, w in zip(*row, strict=True)])
            for row in rows
        ]
        return self

    def with_pictures(self, *samples: Sequence[Image]) -> Recording:
        """Keep the pictures of every sample of the batch, made smaller where they are large."""
        self.pictures = [[Picture.of(image) for image in images] for images in samples]
        return self

    # ---- words ---------------------------------------------------------------------------------------

    @property
    def words(self) -> list[Word]:
        """Of the first sample, what was asked and what was answered."""
        return self.words_of(0)

    def words_of(self, sample: int) -> list[Word]:
        if not self.texts:
            raise InputError(
                "Nobody has told the words of this recording.", "recording.with_words(tokenizer)"
            )
        return words(self.texts[sample], self.answer_start)

    def answer(self, sample: int = 0) -> str:
        """The text that was said."""
        return "".join(t or "" for t in self.texts[sample][self.answer_start :]).strip() if self.texts else ""

    def word(self, word: str | int, sample: int = 0) -> Word:
        """A word by its text, of the answer rather than of the question, or by its index in `words`."""
        known = self.words_of(sample)
        if isinstance(word, int):
            if not -len(known) <= word < len(known):
                raise InputError(f"There is no word {word} among {len(known)}.", "see recording.words")
            return known[word]
        wanted = word.casefold()
        for said in (True, False):
            for found in known:
                if found.said == said and found.text.casefold() == wanted:
                    return found
        texts = [w.text for w in known]
        raise InputError(
            f"The word {word!r} is neither in the answer nor in the question.",
            nearest(word, texts) or f"the words are {' '.join(texts)}",
        )

    # ---- maps ----------------------------------------------------------------------------------------

    def map(self, sites: str = "*", word: Words = None, sample: int = 0, *, reading: bool = False) -> Map:
        """Weights (layer, head, row, column) at the sites; those of a word are averaged over its rows.

        `word` is a word, of the answer rather than of the question, or an index into `words`, or several. For
        a word that the model said these are the rows that predicted its tokens, one earlier each: there it
        looked to say it. `reading=True` takes the rows of its own tokens, as for a word of the question.
        """
        wanted = None
        if word is not None:
            found = [self.word(w, sample) for w in ([word] if isinstance(word, str | int) else word)]
            wanted = torch.tensor([p - (w.said and not reading) for w in found for p in w.positions])
        chosen = match(sites, self.sites) if self.sites else []
        if not chosen:
            raise InputError(
                f"Nothing was recorded at {sites}: no pass had rows={self.options['rows']} and "
                f"columns={self.options['columns']}.",
                "record other rows or columns",
            )
        seen = [self._layer(site.name, sample) for site in chosen]
        rows = seen[0][1]
        if any(len(r) != len(rows) or not torch.equal(r, rows) or s != seen[0][3] for _, r, _, s in seen):
            raise InputError(
                f"{sites} names sites that saw other tokens.", "take one tower and kind: text.*.self"
            )
        if len({w.shape[0] for w, *_ in seen}) > 1:
            raise InputError(f"The sites of {sites} differ in their heads.", "take some of them")
        if wanted is not None:
            index = [(rows == p).nonzero()[:, 0] for p in wanted]
            if not all(map(len, index)):
                raise InputError(
                    f"Rows of {word!r} were not recorded (rows={self.options['rows']}).",
                    "record rows='all', or 'generated' for the words of the answer",
                )
            rows, at = wanted, torch.cat([i[:1] for i in index])
            seen = [(w[:, at], rows, columns, space) for w, _, columns, space in seen]
        columns = _union(c for _, _, c, _ in seen)
        tensor = torch.stack([_spread(w, c, columns) for w, _, c, _ in seen])
        if columns is None:
            names: tuple[Any, ...] = SEGMENTS if self.options["reduce"] == "segments" else ("entropy",)
        else:
            names = tuple(columns.tolist())
        values = (tuple(s.name for s in chosen), tuple(range(tensor.shape[1])), tuple(rows.tolist()), names)
        labels = dict(zip(AXES, values, strict=True))
        whole = Map(tensor, labels, self, sample, seen[0][3], chosen)
        return (
            whole if wanted is None else replace(whole, caption=" ".join(w.text for w in found)).mean("row")
        )

    def seen(self, word: Words = None, sample: int = 0) -> Map:
        """`map` of the text's sites, or of the only ones; of the answer's words, unless others are given."""
        if word is None and self.texts and self.options["rows"] in ("generated", "last", "all"):
            word = [i for i, w in enumerate(self.words_of(sample)) if w.said] or None
        first = min(self.sites, key=lambda s: s.tower != "text", default=None)
        sites = "*" if first is None or first.index is None else f"{first.tower}.*.{first.kind}"
        return self.map(sites, word, sample)

    def _layer(self, site: str, sample: int) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Weights (heads, rows, columns) in float32, rows, columns, and the space of one sample at a site."""
        found = []
        for part in self.parts:
            at = sample - part.first
            if part.site == site and 0 <= at < part.rows.shape[0]:
                rows = part.rows[at].cpu()
                real = rows >= 0
                if part.moment >= 0:
                    real &= self.layouts[0].kind[sample].cpu()[rows.clamp_min(0)] != PAD
                weights = part.weights[at].float().cpu()[:, real]
                columns = None if part.columns is None else part.columns[at].cpu()
                where = None if part.where is None else part.where[at].cpu()[:, real]
                if columns is not None and columns.ndim == 2 and where is None:
                    where = columns[:, None].expand_as(weights)
                if where is not None:
                    columns = _union([columns])
                    assert columns is not None
                    dense = weights.new_zeros(
                        *weights.shape[:2], int(columns.max()) + 1 if len(columns) else 1
                    )
                    weights = dense.scatter_add_(2, where.clamp_min(0), weights * (where >= 0))[..., columns]
                found.append((weights, rows[real], columns, part.space))
        if not found:
            raise InputError(f"There is no sample {sample} at {site}.", "count the samples from 0")
        columns = _union(c for _, _, c, _ in found)
        weights = torch.cat([_spread(w, c, columns) for w, _, c, _ in found], 1)
        return weights, torch.cat([r for _, r, _, _ in found]), columns, found[0][3]

    @property
    def nbytes(self) -> int:
        """Of the weights that are kept."""
        kept = [t for part in self.parts for t in (part.weights, part.where) if t is not None]
        return sum(t.numel() * t.element_size() for t in kept)

    def share(self, word: Words = None, sample: int = 0) -> dict[str, dict[str, float]]:
        """Of what `seen` gives, by layer: the share of attention on the first token, pictures, question,
        answer and the rest, as a mean over heads and rows."""
        if self.options["columns"] != "all" or self.options["reduce"] not in (None, "mean_heads", "segments"):
            raise InputError(
                "Shares need all columns, and this recording kept others.",
                "record columns='all' with reduce=None, 'mean_heads' or 'segments'",
            )
        seen = self.seen(word, sample)
        seen = seen.mean(*(axis for axis in ("head", "row") if axis in seen.axes))
        shares = seen.tensor
        if self.options["reduce"] != "segments":
            masks = segments(self.layouts[seen.space].where)[sample].to(shares.dtype).cpu()
            shares = shares @ masks[list(seen.labels["column"])]
        return {
            site: dict(zip(SEGMENTS, row, strict=True))
            for site, row in zip(seen.labels["layer"], shares.tolist(), strict=True)
        }

    # ---- pictures ------------------------------------------------------------------------------------

    def pictures_of(self, sample: int = 0) -> int:
        """How many pictures the sample has."""
        layout = self.layouts[0]
        if layout.shape[1] == 0 or not layout.named:
            return 0
        return int(torch.where(layout.where("image")[sample], layout.item[sample], -1).max()) + 1

    def overlay(
        self, word: Words = None, image: Image | None = None, item: int = 0, sample: int = 0
    ) -> Image:
        """The picture with `seen` over it, a mean over layers, heads and rows."""
        return self.seen(word, sample).overlay(image, item)

    def plain(self, word: Words = None, width: int = 80, *, colour: bool = False, sample: int = 0) -> str:
        """The same for a terminal, with the words and the shares of attention."""
        from saccade.report import plain

        return plain.recording(self, word, width, colour=colour, sample=sample)

    def _repr_html_(self) -> str:
        said = html.escape(self.answer() or f"{len(self.parts)} parts, {self.nbytes} bytes")
        text = f"<p>{html.escape(self.prompt)} <b>{said}</b></p>"
        try:
            picture = self.overlay()
        except InputError:
            return text
        picture.thumbnail((480, 480))
        data = io.BytesIO()
        picture.save(data, "PNG")
        source = base64.b64encode(data.getvalue()).decode()
        return f'{text}<img alt="attention" src="data:image/png;base64,{source}">'

    # ---- files ---------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file; everything but the numbers is JSON in its metadata."""
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}

        def keep(tensor: Tensor | None) -> str | None:
            if tensor is None:
                return None
            if id(tensor) not in names:
                names[id(tensor)] = f"t{len(names)}"
                tensors[names[id(tensor)]] = tensor.detach().cpu().clone().contiguous()
            return names[id(tensor)]

        def kept(thing: Any) -> dict[str, Any]:
            return {
                f.name: keep(v) if v is None or isinstance(v, Tensor) else v
                for f in fields(thing)
                for v in [getattr(thing, f.name)]
            }

        data = {
            "parts": [kept(part) for part in self.parts],
            "sites": [[s.name, s.tower, s.index, s.kind, s.depth] for s in self.sites],
            "layouts": [kept(layout) for layout in self.layouts],
            "ids": keep(self.ids),
            "answer_start": self.answer_start,
            "options": self.options,
            "texts": self.texts,
            "pictures": [[kept(picture) for picture in pictures] for pictures in self.pictures],
            "prompt": self.prompt,
        }
        try:
            save_file(tensors, path, {"format": FORMAT, "version": VERSION, "data": json.dumps(data)})
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path} cannot be written: {e}.", "give a path in a folder of yours") from e

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recording:
        """What `save` wrote."""
        remedy = "give a file that recording.save(path) wrote"
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path} cannot be read: {e}.", remedy) from e
        if about.get("format") != FORMAT:
            raise InputError(f"{path} is no recording of attention.", remedy)
        if about.get("version") != VERSION:
            raise InputError(
                f"{path} is a recording of version {about.get('version')}, and this library reads {VERSION}.",
                "record it again, or read it with the version of saccade that wrote it",
            )

        def made(kind: Any, values: dict[str, Any], *names: str) -> Any:
            return kind(**{k: tensors[v] if k in names and v is not None else v for k, v in values.items()})

        try:
            data = json.loads(about["data"])
            return Recording(
                parts=[made(Part, p, "rows", "columns", "weights", "where") for p in data["parts"]],
                sites=[
                    Site(name, "", nn.Identity(), tower, index, kind, "interface", depth)
                    for name, tower, index, kind, depth in data["sites"]
                ],
                layouts=[made(Layout, v, "kind", "item", "turn", "sample", "box") for v in data["layouts"]],
                ids=tensors[data["ids"]] if data["ids"] is not None else None,
                answer_start=data["answer_start"],
                options=data["options"],
                texts=data["texts"],
                pictures=[[made(Picture, p, "png") for p in pictures] for pictures in data["pictures"]],
                prompt=data["prompt"],
            )
        except (KeyError, TypeError, ValueError) as e:
            raise InputError(f"{path} is damaged: {e!r}.", remedy) from e


@dataclass
class Picture:
    """A picture as it was given to the model, or smaller."""

    width: int  # of the original
    height: int
    png: Tensor  # (bytes,), uint8

    @staticmethod
    def of(image: Image) -> Picture:
        small, data = image.convert("RGB"), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(data, "PNG")
        return Picture(*image.size, torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8))

    def image(self) -> Image:
        from PIL import Image

        return Image.open(io.BytesIO(self.png.numpy().tobytes())).convert("RGB")


class Token(NamedTuple):
    """A column and its weight."""

    position: int
    weight: float
    kind: str
    text: str


@dataclass
class Map:
    """Weights with named axes, of which `mean`, `max`, `heads` and `layers` leave fewer."""

    tensor: Tensor
    labels: dict[str, tuple[Any, ...]]  # by axis, in order
    recording: Recording
    sample: int
    space: int  # the layout of the columns
    sites: list[Site]
    caption: str = ""

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.labels)

    def mean(self, *axes: str) -> Map:
        return self._over(axes, lambda t, at: t.mean(at))

    def max(self, *axes: str) -> Map:
        return self._over(axes, lambda t, at: t.amax(at))

    def heads(self, *heads: int) -> Map:
        count = self.tensor.shape[self._axis("head")]
        wrong = [h for h in heads if not -count <= h < count]
        if wrong:
            raise InputError(f"There is no head {wrong[0]} here.", f"use heads from 0 to {count - 1}")
        return self._choose("head", [h % count for h in heads])

    def layers(self, span: str | int) -> Map:
        """`8:24`, `-2`, `25%:75%` or `3`, as in patterns of sites."""
        self._axis("layer")
        chosen = [i for i, site in enumerate(self.sites) if site.index in layers(span, site.depth)]
        if not chosen:
            known = ", ".join(site.name for site in self.sites)
            raise InputError(f"No layer {span} was recorded.", f"there are {known}")
        return replace(self._choose("layer", chosen), sites=[self.sites[i] for i in chosen])

    def on_picture(self, item: int = 0, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Weights on one picture in its own geometry: (height, width), or a coarser `shape` of the same area.

        A token's weight is spread evenly over the part of its box that lies in the picture; where tiles and
        base views overlap they add up. So the array's sum is the share of attention on this picture, save
        tokens that show no place of it, such as the ends of rows. Axes that are left are averaged.
        """
        weights, boxes = self._boxed(item)
        width, height = self._size(item, boxes)
        return on_picture(weights, boxes, (width, height), shape or (height, width)).float().numpy()

    def grid(self, item: int = 0) -> np.ndarray:
        """`on_picture` as coarse as the tokens are."""
        _, boxes = self._boxed(item)
        return self.on_picture(item, cells(boxes, self._size(item, boxes)))

    def overlay(self, image: Image | None = None, item: int = 0) -> Image:
        """The picture with this map over it."""
        from saccade.report import overlay

        return overlay.overlay(image or self.picture(item), self.grid(item), self.caption)

    def picture(self, item: int = 0) -> Image:
        """The picture as it was kept, or a grey one."""
        from PIL import Image

        if kept := self._kept(item):
            return kept.image()
        return Image.new("RGB", self._size(item, self._boxed(item)[1]), (96, 96, 96))

    def top(self, k: int = 10) -> list[Token]:
        """The columns with the largest weights, a mean over the other axes."""
        weights = self._columns()
        texts = self.recording.texts[self.sample] if self.recording.texts and self.space == 0 else []
        kinds = self.recording.layouts[self.space].kind
        found = []
        for i in weights.topk(min(k, len(weights))).indices.tolist():
            position = self.labels["column"][i]
            if isinstance(position, str):
                found.append(Token(-1, float(weights[i]), position, ""))
                continue
            kind = KINDS[int(kinds[self._row(), position])]
            text = (texts[position] if position < len(texts) else None) or ""
            found.append(Token(position, float(weights[i]), kind, text))
        return found

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis} {len(labels)}" for axis, labels in self.labels.items())
        return f"<Map of {sizes or 'one number'}>"

    # ---- inside --------------------------------------------------------------------------------------

    def _axis(self, name: str) -> int:
        if name not in self.labels:
            raise InputError(f"This map has no axis {name!r}.", f"it has {', '.join(self.labels) or 'none'}")
        return list(self.labels).index(name)

    def _over(self, axes: Iterable[str], reduction: Any) -> Map:
        smaller = self
        for axis in axes:
            at = smaller._axis(axis)
            if smaller.tensor.shape[at] == 0:
                raise InputError(f"This map is empty along {axis!r}.", "record rows and columns that exist")
            labels = {name: value for name, value in smaller.labels.items() if name != axis}
            smaller = replace(smaller, tensor=reduction(smaller.tensor, at), labels=labels)
        return smaller

    def _choose(self, axis: str, index: list[int]) -> Map:
        at = self._axis(axis)
        labels = {**self.labels, axis: tuple(self.labels[axis][i] for i in index)}
        return replace(self, tensor=self.tensor.index_select(at, torch.tensor(index)), labels=labels)

    def _columns(self) -> Tensor:
        self._axis("column")
        return self.mean(*(axis for axis in self.labels if axis != "column")).tensor

    def _row(self) -> int:
        """Of the layout: in other spaces than the main one beams and pictures may be more than rows."""
        return self.sample % self.recording.layouts[self.space].shape[0]

    def _boxed(self, item: int) -> tuple[Tensor, Tensor]:
        """Weights (tokens,) and boxes (tokens, 4) of a picture's tokens that show a place of it."""
        weights, positions = self._columns().double(), self.labels["column"]
        if positions and isinstance(positions[0], str):
            raise InputError("Sums have no place in a picture.", "record reduce=None, mean_heads or topk(k)")
        layout, row = self.recording.layouts[self.space], self._row()
        at = torch.tensor(positions, dtype=torch.long)
        on = (layout.where("image")[row] & (layout.item[row] == item)).cpu()[at]
        if not on.any():
            raise InputError(
                f"Nothing was recorded of a picture {item}.", "count the sample's pictures from 0"
            )
        boxes = layout.boxes[row].cpu()[at][on].double()
        known = boxes.isfinite().all(-1)
        if not known.any():
            raise InputError(
                "The tokens of this picture have no boxes.",
                "session.locate(processor, images), before the model runs",
            )
        return weights[on][known], boxes[known]

    def _kept(self, item: int) -> Picture | None:
        pictures, layout = self.recording.pictures, self.recording.layouts[self.space]
        sample = int(layout.sample[self._row()])
        return pictures[sample][item] if sample < len(pictures) and item < len(pictures[sample]) else None

    def _size(self, item: int, boxes: Tensor) -> tuple[int, int]:
        """Width and height in the units of the boxes."""
        if kept := self._kept(item):
            return kept.width, kept.height
        return max(1, round(float(boxes[:, 2].max()))), max(1, round(float(boxes[:, 3].max())))


def _union(columns: Iterable[Tensor | None]) -> Tensor | None:
    """All positions, sorted; None where there are none, but sums."""
    known = [c for c in columns if c is not None]
    if not known:
        return None
    everything = torch.cat(known).unique()
    return everything[everything >= 0]


def _spread(w: Tensor, columns: Tensor | None, onto: Tensor | None) -> Tensor:
    """Weights (..., columns) at other, sorted columns; zero where there were none."""
    if columns is None or onto is None or torch.equal(columns, onto):
        return w
    real = columns >= 0
    out = w.new_zeros(*w.shape[:-1], len(onto))
    out[..., torch.searchsorted(onto, columns[real])] = w[..., real]
    return out


def segments(where: Callable[[str], Tensor]) -> Tensor:
    """Every token in one of SEGMENTS, on a new last axis, from masks by name. Padding is in none."""
    left, found = where("all"), []
    for name in ("first", "visual", "question", "generated"):
        found.append(where(name) & left)
        left = left & ~found[-1]
    return torch.stack([*found, left], -1)
