"""Edit a picture by editing its prompt: the edit attends as the source does.

    cross-attention, first `cross` of the steps    w_edit[:, j] <- sum_i A[i, j] * w_source[:, i]
                                                   its own column for a new word; times the word's factor
    self-attention, first `own` of the steps       w_edit <- w_source     up to a quarter of the latents' side
    blend, after every step                        x_edit <- x_source + mask * (x_edit - x_source)

A aligns the tokens of the two prompts: words that both say, and, one for one, words that were exchanged. The
mask is where the blend words of either prompt are attended to. The prompts are one batch, the source first,
and begin from the same latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.method import Method, Sites, option
from saccade.core.passes import Denoising
from saccade.core.words import Word
from saccade.diffusion._parts.editing import attention_to, sampling, saying, side


@dataclass(eq=False)
class PromptToPrompt(Method):
    card = Card(
        slug="prompt_to_prompt",
        name="Prompt-to-Prompt",
        kind="method",
        family="diffusion",
        form="method",
        target="unet diffusion",
        paper="Prompt-to-Prompt Image Editing with Cross Attention Control (Hertz et al., 2022)",
        summary="Edit a picture by its prompt: the edit keeps the source's attention maps",
        needs=("sampling",),
        neutral={"cross": 0.0, "own": 0.0},
        code="google/prompt-to-prompt",
        choices=(
            "Words exchanged one for one are a swap, others a refinement; the paper's user says which.",
            "Self-attention takes the source's queries and keys, which gives its maps on the fused kernel.",
            "The paper's 16x16 of 64x64 latents scales: a quarter of their side.",
        ),
        tags=("editing", "cross-attention", "word swap", "reweighting", "local blend"),
    )

    cross: float = option(0.8, "share of the steps with the source's cross-attention", low=0, high=1)
    own: float = option(0.4, "share of the steps with the source's self-attention", low=0, high=1)
    swap: bool = option(
        True, "words exchanged one for one take the source's maps; if not, they keep their own"
    )
    factors: Mapping[str, float] = option(
        {}, "by word of the edit: what its column is multiplied with, -2 to 2"
    )
    blend: tuple[str, ...] = option(
        (), "words of the prompts where the edit may differ; everywhere without them"
    )
    threshold: float = option(0.3, "of the blend map's maximum, above which the edit shows", low=0, high=1)
    sites: Sites = option(
        {"inputs": "unet.*.self", "replace": "unet.*.cross", "observe": "unet.*.cross"},
        "self- and cross-attention",
    )
    batch: str = option("cond", "rows of the batch that are edited: those of the prompts")

    def inputs(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = sampling(call)
        if p.i >= self.own * p.total or side(p, q.shape[2]) > 0.25:
            return q, k, v
        return q[:1].expand_as(q), k[:1].expand_as(k), v

    def replace(self, call: AttentionCall) -> Tensor | None:
        """The source's output is the native operator's own, and so is all after the last steered step."""
        p = sampling(call)
        if p.i >= self.cross * p.total:
            return None
        source, *edits = w = call.weights()
        rows = [source]
        for row, (given, own) in enumerate(self._alignments(call, p, w), 1):
            rows.append((source @ given + edits[row - 1] * own) * self._factors(call, row, w))
        edited = torch.stack(rows)
        call.edit(slice(0, call.q.shape[2]), edited)
        return torch.cat([call.next()[:1], call.apply(edited)[1:]])

    def observe(self, call: AttentionCall) -> None:
        seen = attention_to(call, saying(call, *self.blend)) if self.blend else None
        if seen is not None:
            call.run.state["seen"] = call.run.state.get("seen", 0) + seen

    def step(self, latents: Tensor, p: Denoising) -> Tensor:
        seen = p.run.state.get("seen")
        if seen is None:
            return latents
        seen = F.interpolate(F.max_pool2d(seen[:, None], 3, 1, 1), latents.shape[-2:], mode="bilinear")
        mask = seen > self.threshold * seen.amax((2, 3), keepdim=True)
        return torch.where(mask | mask[:1], latents, latents[:1])

    def _alignments(self, call: AttentionCall, p: Denoising, w: Tensor) -> list[tuple[Tensor, Tensor]]:
        state = call.run.state
        if "alignments" not in state:
            source, *edits = p.words
            made = [align(source, edit, w.shape[-1], self.swap) for edit in edits]
            state["alignments"] = [(given.to(w), own.to(w)) for given, own in made]
        return state["alignments"]

    def _factors(self, call: AttentionCall, row: int, w: Tensor) -> Tensor:
        factors = w.new_ones(w.shape[-1])
        for word, factor in self.factors.items():
            factors[saying(call, word)[row]] = factor
        return factors


def align(source: Sequence[Word], edit: Sequence[Word], columns: int, swap: bool) -> tuple[Tensor, Tensor]:
    """What each token of the source (rows) gives to each of the edit (columns), and which keep their own.

    Tokens that are no word, a beginning, an end, filling, are aligned in their order.
    """
    given = torch.zeros(columns, columns)
    texts = [[word.text.lower() for word in prompt] for prompt in (source, edit)]
    for what, a, b, c, d in SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_opcodes():
        if what == "equal" or (what == "replace" and swap and b - a == d - c):
            for old, new in zip(source[a:b], edit[c:d]):
                rows, into = torch.tensor(old.positions), torch.tensor(new.positions)
                same = len(rows) == len(into)  # else every token spreads over all of the other word's
                given[rows[:, None], into] = torch.eye(len(into)) if same else torch.tensor(1 / len(into))
    rest = [
        sorted(set(range(columns)) - {p for word in prompt for p in word.positions})
        for prompt in (source, edit)
    ]
    for row, column in zip(*rest):
        given[row, column] = 1
    return given, (given.sum(0) == 0).float()
