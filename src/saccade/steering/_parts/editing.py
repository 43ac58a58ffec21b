"""Several descriptions of one thing: what they agree on, where they contradict, and one description of all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from saccade.core.errors import InputError
from saccade.steering._parts.masks import Box

_END = re.compile(r"\s*[.,;]\s*(?:and\s+)?(?:there (?:is|are)\s+)?", re.IGNORECASE)


@dataclass
class Groups:
    same: list[str] = field(default_factory=list)  # said in all
    contradictory: list[list[str]] = field(default_factory=list)  # of each at most one is true
    unique: list[str] = field(default_factory=list)


class Editor(Protocol):
    """With an LLM: `Written(lambda prompt: pipe(prompt)[0]["generated_text"])`, where
    `pipe = transformers.pipeline("text-generation", "meta-llama/Llama-3.1-8B-Instruct", return_full_text=False)`."""

    def group(self, captions: Sequence[str]) -> Groups: ...

    def rewrite(self, captions: Sequence[str], kept: Sequence[str]) -> str:
        """One caption of several, and of the statements in them that hold."""
        ...

    def fuse(self, whole: str, parts: Sequence[tuple[str, Box]]) -> str:
        """A picture's caption with what is said of its parts, whose boxes go from 0 to 1."""
        ...


# ---- by rule ---------------------------------------------------------------------------------------------


class Plain:
    """Statements end at stops and commas. Two contradict that differ by one word, which is not the last."""

    def group(self, captions: Sequence[str]) -> Groups:
        said = [statements(caption) for caption in captions]
        every = list(dict.fromkeys(one for own in said for one in own))
        groups = Groups(same=[one for one in every if all(one in own for own in said)])
        for one in every:
            if one in groups.same:
                continue
            rivals = next(
                (g for g in groups.contradictory if all(contradict(one, other) for other in g)), None
            )
            rivals.append(one) if rivals else groups.contradictory.append([one])
        groups.unique = [one for one, *others in groups.contradictory if not others]
        groups.contradictory = [group for group in groups.contradictory if len(group) > 1]
        return groups

    def rewrite(self, captions: Sequence[str], kept: Sequence[str]) -> str:
        return _text(kept)

    def fuse(self, whole: str, parts: Sequence[tuple[str, Box]]) -> str:
        told = [one for caption, _ in parts for one in statements(caption)]
        held = [one for one in statements(whole) if not any(contradict(one, other) for other in told)]
        return _text(list(dict.fromkeys([*held, *told])))


def statements(caption: str) -> list[str]:
    parts = _END.split(re.sub(r"^\s*there (?:is|are)\s+", "", caption.lower()))
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def contradict(a: str, b: str) -> bool:
    one, other = a.split(), b.split()
    differing = [i for i, (x, y) in enumerate(zip(one, other)) if x != y]
    return len(one) == len(other) and len(differing) == 1 and differing[0] < len(one) - 1


def _text(kept: Sequence[str]) -> str:
    return "".join(f"{one}. " for one in kept).strip()


# ---- by a language model ---------------------------------------------------------------------------------

GROUP = (
    "Here are {count} descriptions of the same part of a picture.\n{captions}\nSort what they state. Write one line "
    "for each, and nothing else:\nSAME: a statement that all of them make\nCONTRADICTORY: statements that cannot all "
    "be true, in their own words, with | between them\nUNIQUE: a statement that only some of them make"
)
REWRITE = (
    "Here are {count} descriptions of the same part of a picture.\n{captions}\nThese statements hold:\n{kept}\nWrite "
    "one description from these statements, with nothing that is not in them. Answer with the description."
)
FUSE = (
    "Here is a description of a picture: {whole}\nHere are more reliable ones of its parts, each with its box, left, "
    "top, right and bottom from 0 to 1.\n{parts}\nCorrect and complete the first by the others, and mention nothing "
    "twice. Answer with the description."
)


@dataclass(frozen=True)
class Written:
    """By a language model: from a prompt to what it says."""

    say: Callable[[str], str]

    def group(self, captions: Sequence[str]) -> Groups:
        said = self.say(GROUP.format(count=len(captions), captions=_lines(captions)))
        groups = Groups()
        for kind, text in re.findall(r"^\W*(SAME|CONTRADICTORY|UNIQUE)\W*:\s*(.+?)\s*$", said, re.MULTILINE):
            rivals = [part.strip() for part in text.split("|") if part.strip()]
            if kind == "CONTRADICTORY":
                groups.contradictory.append(rivals)
            else:
                (groups.same if kind == "SAME" else groups.unique).append(text)
        if groups == Groups():
            raise InputError(
                f"The language model sorted no statements: {said[:80]!r}.",
                "use one that follows instructions, or editor=plain",
            )
        return groups

    def rewrite(self, captions: Sequence[str], kept: Sequence[str]) -> str:
        prompt = REWRITE.format(count=len(captions), captions=_lines(captions), kept=_lines(kept))
        return self.say(prompt).strip()

    def fuse(self, whole: str, parts: Sequence[tuple[str, Box]]) -> str:
        told = [f"({', '.join(f'{edge:.2f}' for edge in box)}) {caption}" for caption, box in parts]
        return self.say(FUSE.format(whole=whole, parts=_lines(told))).strip()


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
