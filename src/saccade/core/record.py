"""What was seen in one run, and the maps that it gives."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.core import archive
from saccade.core.errors import InputError, nearest
from saccade.core.faithfulness import Faithfulness
from saccade.core.layout import GENERATED, KINDS, PAD, Layout
from saccade.core.map import AXES, Map
from saccade.core.picture import Picture
from saccade.core.reduce import SEGMENTS, segments
from saccade.core.sinks import readers, sinks
from saccade.core.site import Site, match
from saccade.core.words import Word, pieces, words

if TYPE_CHECKING:
    from PIL.Image import Image

KIND, VERSION = "recording", "3"
Words = str | int | Sequence[str | int] | None
LONG = 3  # letters that most words of grammar have at most


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
    stack: str = ""  # the methods that were at work
    faithfulness: list[Faithfulness] = field(default_factory=list)  # of the maps for which it was measured

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

    def indices(self, words: Words = None, sample: int = 0) -> list[int]:
        """Of words in `words`; of those of the answer, where none is named."""
        known = self.words_of(sample)
        if words is None:
            return [i for i, word in enumerate(known) if word.said]
        named = [words] if isinstance(words, str | int) else words
        return [known.index(self.word(one, sample)) for one in named]

    def sharpest(self, sample: int = 0) -> int | None:
        """The word of the answer that was looked for most sharply, a long one where there is one."""
        whole = self.map(self.main_sites(), sample=sample).mean("layer", "head")
        grids = [whole.grids(item) for item in range(self.pictures_of(sample))]  # (rows, y, x) each
        at = {row: i for i, row in enumerate(whole.labels["row"])}
        peaks = {}
        for index, word in enumerate(self.words_of(sample)):
            rows = [position - 1 for position in word.positions]
            if word.said and word.text.isalnum() and at.keys() >= set(rows):
                own = [grid[[at[row] for row in rows]].mean(0) for grid in grids]
                peaks[index] = (len(word.text) > LONG, max(float(grid.max()) for grid in own))
        return max(peaks, key=peaks.__getitem__, default=None)

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
        gone = tensor.isnan()
        if columns is None:
            names: tuple[Any, ...] = SEGMENTS if self.options["reduce"] == "segments" else ("entropy",)
        else:
            names = tuple(columns.tolist())
        values = (tuple(s.name for s in chosen), tuple(range(tensor.shape[1])), tuple(rows.tolist()), names)
        labels = dict(zip(AXES, values, strict=True))
        whole = Map(tensor.nan_to_num(0), labels, self, sample, seen[0][3], chosen)
        whole.gone = gone if gone.any() else None
        return (
            whole if wanted is None else replace(whole, caption=" ".join(w.text for w in found)).mean("row")
        )

    def seen(self, word: Words = None, sample: int = 0) -> Map:
        """`map` of the text's sites, or of the only ones; of the answer's words, unless others are given."""
        if (
            word is None
            and self.texts
            and self.options["rows"] in ("generated", "last", "all", "after_image")
        ):
            word = [i for i, w in enumerate(self.words_of(sample)) if w.said] or None
        return self.map(self.main_sites(), word, sample)

    def main_sites(self) -> str:
        """A pattern for those of the text, or for the only ones."""
        first = min(self.sites, key=lambda s: s.tower != "text", default=None)
        return "*" if first is None or first.index is None else f"{first.tower}.*.{first.kind}"

    def _layer(self, site: str, sample: int) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Weights (heads, rows, columns) in float32, NaN for keys that were not there, rows, columns, and the space
        of one sample at a site."""
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
                ragged = columns is not None and columns.ndim == 2 and where is None
                if ragged:
                    assert columns is not None
                    where = columns[:, None].expand_as(weights)
                if where is not None:
                    columns = _union([columns])
                    assert columns is not None
                    dense = weights.new_zeros(
                        *weights.shape[:2], int(columns.max()) + 1 if len(columns) else 1
                    )
                    held = (where >= 0).float()
                    there = torch.zeros_like(dense).scatter_add_(2, where.clamp_min(0), held)[..., columns]
                    weights = dense.scatter_add_(2, where.clamp_min(0), weights * held)[..., columns]
                    weights = weights.masked_fill((there == 0) & ragged, torch.nan)
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

    def sinks(self, sample: int = 0) -> dict[str, tuple[int, ...]]:
        """By layer of the text, the tokens that draw attention whatever is asked: see `core/sinks.py`."""
        layout = self.layouts[0]
        reading = readers(layout.where("question"))[sample].cpu()
        able = (~layout.where("question") | layout.where("first"))[sample].cpu()
        found = {}
        for site in match(self.main_sites(), self.sites):
            weights, rows, columns, space = self._layer(site.name, sample)
            whole = self.options["columns"] == "all" and space == 0
            here = reading[rows]
            if columns is None or not whole or here.sum() < reading.sum():
                raise InputError(
                    "Sinks are seen from the question, whose rows and all columns were not recorded.",
                    "record rows='after_image' or 'all', columns='all', and no sums",
                )
            weights = weights[:, here].nan_to_num(0)
            found[site.name] = tuple(columns[sinks(weights, able[columns])].tolist())
        return found

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
        """The picture with `seen` over it, a mean over layers, heads and rows, and how faithful it was found."""
        found, measured = self.seen(word, sample), self.measured(word, sample)
        if measured:
            found.caption += f" · faithfulness {measured.gain:+.2f}"
        return found.overlay(image, item)

    def measured(self, word: Words = None, sample: int = 0) -> Faithfulness | None:
        """How faithful the map of a word was found, or of the answer; None where nobody measured it."""
        if not self.faithfulness:
            return None
        wanted = (self.indices(word, sample), sample)
        return next((one for one in self.faithfulness if (one.words, one.sample) == wanted), None)

    def plain(self, word: Words = None, width: int = 80, *, colour: bool = False, sample: int = 0) -> str:
        """The same for a terminal, with the words and the shares of attention."""
        from saccade.report import plain

        return plain.recording(self, word, width, colour=colour, sample=sample)

    def page(self, beside: Recording | None = None, word: Words = None, sample: int = 0) -> str:
        """A page to look around in, HTML that needs nothing else; with another recording of the same pictures
        and question beside it, both and their difference. It opens at `word`."""
        from saccade.report import page

        return page.page(self, beside, word, sample)

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

    def save(self, path: archive.Path) -> None:
        """One safetensors file; everything but the numbers is JSON in its metadata."""
        sites = [[s.name, s.tower, s.index, s.kind, s.depth] for s in self.sites]
        layouts = [replace(layout, words=None) for layout in self.layouts]
        archive.write(path, KIND, VERSION, vars(self) | {"sites": sites, "layouts": layouts})

    @staticmethod
    def load(path: archive.Path) -> Recording:
        """What `save` wrote."""
        return archive.read(path, KIND, VERSION, _built)


def _built(data: dict[str, Any]) -> Recording:
    data["parts"] = [Part(**part) for part in data["parts"]]
    data["sites"] = [
        Site(name, "", nn.Identity(), tower, index, kind, "interface", depth)
        for name, tower, index, kind, depth in data["sites"]
    ]
    data["layouts"] = [Layout(**layout) for layout in data["layouts"]]
    data["pictures"] = [[Picture(**one) for one in pictures] for pictures in data["pictures"]]
    data["faithfulness"] = [Faithfulness(**one) for one in data["faithfulness"]]
    return Recording(**data)


def _union(columns: Iterable[Tensor | None]) -> Tensor | None:
    """All positions, sorted; None where there are none, but sums."""
    known = [c for c in columns if c is not None]
    if not known:
        return None
    everything = torch.cat(known).unique()
    return everything[everything >= 0]


def _spread(w: Tensor, columns: Tensor | None, onto: Tensor | None) -> Tensor:
    """Weights (..., columns) at other, sorted columns; NaN where there were none."""
    if columns is None or onto is None or torch.equal(columns, onto):
        return w
    real = columns >= 0
    out = w.new_full((*w.shape[:-1], len(onto)), torch.nan)
    out[..., torch.searchsorted(onto, columns[real])] = w[..., real]
    return out
