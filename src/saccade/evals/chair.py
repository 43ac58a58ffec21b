"""CHAIR: how much of what a caption names is not in the picture (Rohrbach et al., 2018).

    chair_i   of the objects that captions name, each as often as it is named
    chair_s   of the captions
    recall    of the objects in the pictures, those that their captions name

A caption that says "there is no cup" names a cup: the official rule reads no negation, and nor does this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from saccade.evals.interval import bootstrap, share
from saccade.evals.task import Row, Sample, Scores, by_picture

# Marks are kept, so that no name reaches over a comma.
_PIECE = re.compile(r"\w+(?:-\w+)*|[^\w\s]")
_IRREGULAR = {"people": "person", "children": "child", "mice": "mouse", "geese": "goose", "oxen": "ox"}
_ENDINGS = (("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


@dataclass(frozen=True)
class Chair:
    """`synonyms` gives for every word, or two words, the object that it names, for its own name too, and "" where
    two words name none of them ("train track"). `unless` has words that name nothing in a caption that has another
    ("seat" and "toilet")."""

    synonyms: Mapping[str, str]
    unless: Mapping[str, str] = field(default_factory=dict)

    def named(self, caption: str) -> list[str]:
        """The objects, in order and as often as they are named."""
        words = self._words(caption)
        return [
            self.synonyms[word]
            for word in words
            if self.synonyms.get(word) and self.unless.get(word) not in words
        ]

    def score(self, rows: Iterable[Row]) -> Scores:
        """The truth of a sample is the objects of its picture. `words` is a caption's length, without marks."""

        def tally(sample: Sample, text: str) -> list[float]:
            named, there = self.named(text), set(sample.truth)
            invented = [name for name in named if name not in there]
            length = sum(word[0].isalnum() for word in _PIECE.findall(text))
            return [len(invented), len(named), bool(invented), 1, len(there & set(named)), len(there), length]

        invented, named, wrong, captions, met, there, length = by_picture(rows, tally)
        return {
            "chair_i": share(invented, named),
            "chair_s": share(wrong, captions),
            "recall": share(met, there),
            "words": bootstrap([length, captions], lambda t: t[..., 0] / t[..., 1]),
        }

    def _words(self, caption: str) -> list[str]:
        """In the form that `synonyms` knows; two that make one name are the object that they name."""
        pieces = _PIECE.findall(caption.lower())
        words, at = [], 0
        while at < len(pieces):
            word, *after = pieces[at : at + 2]
            pairs = (f"{a} {b}" for a in _forms(word) for b in _forms(*after)) if after else ()
            pair = next(filter(self.synonyms.__contains__, pairs), None)
            words.append(word if pair is None else self.synonyms[pair])
            at += 1 if pair is None else 2
        return [next(filter(self.synonyms.__contains__, _forms(word)), word) for word in words]


def _forms(word: str) -> Iterator[str]:
    """The word and what it may be the plural of. The vocabulary is closed: no dictionary need choose among them."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    for plural, singular in _ENDINGS:
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
