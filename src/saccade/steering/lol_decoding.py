"""Contrast a model with an amateur that was made to hallucinate, in the last layer and in a lower one.

    c_N, c_j   log p(word) - log p'(word), of the amateur p', by the last layer and by layer j
    r          log p(word | instruction, prompt) - log p(word | prompt)
    logits     log p + strength * (c_N + omega * c_j + mu * r - log p)      where p >= alpha * max p

The amateur reads the same prompt on a cache of its own; the prompt behind an instruction to be truthful is
followed beside the caller's, where an instruction is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.branch import Branch
from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, option
from saccade.core.passes import HiddenCall, Pass, Run
from saccade.core.session import attach
from saccade.core.site import match
from saccade.loading import load_model
from saccade.steering._parts.contrast import plausible
from saccade.steering._parts.prompts import of_samples

GIVEN: tuple[str, ...] = ("input_ids", "attention_mask")  # to an amateur


@dataclass(eq=False)
class LOL(Method):
    card = Card(
        slug="lol_decoding",
        name="LOL",
        kind="method",
        family="steering",
        form="method",
        target="llm",
        paper="Lower Layer Matters: Alleviating Hallucination via Multi-Layer Fusion Contrastive Decoding with "
        "Truthfulness Refocused (Chen et al., 2024)",
        summary="Contrast a model with a hallucinating amateur, in the last layer and a lower one",
        neutral={"strength": 0.0, "alpha": 0.0},
        sure="abstract",
        choices=(
            "How the parts are summed, the layer, omega and mu are reconstructed from the abstract.",
            "Both models read their lower layer through their own final norm and head.",
            "The instruction is token ids, as tokenizer(text).input_ids makes them, behind the prompt's "
            "first special token; without one there is no refocusing.",
            "strength is ours, 1 being the paper's: the contrast itself has no neutral setting.",
        ),
        headline="average +4.5 points on all TruthfulQA metrics over the best baseline",
        tags=("hallucination", "contrastive decoding", "amateur model", "early exit", "truthfulness"),
    )

    amateur: Any = option(None, "the model with induced hallucination: a module, a folder or a hub name")
    alpha: float = option(0.1, "least probability of a word, as a share of the likeliest", low=0, high=1)
    layer: str = option("50%", "the lower layer of both models")
    omega: float = option(0.3, "weight of the lower layer's contrast", low=0)
    mu: float = option(0.5, "weight of what the instruction adds", low=0)
    instruction: tuple[int, ...] = option((), "ids of words that ask for the truth; none for no refocusing")
    strength: float = option(1.0, "share of the contrast in the logits; 0 changes nothing", low=0, high=1)

    def sites_of(self, event: str) -> tuple[str, ...]:
        return (f"text.{self.layer}.layer",) if event == "hidden" else ()

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        call.run.state["lower"] = h[:, -1]
        return h

    def branches(self, run: Run) -> Iterable[Branch]:
        words: dict[str, Tensor] = {n: run.inputs[n] for n in GIVEN if n in run.inputs}
        found = [Branch(words, model=Amateur(self._amateur(run.runtime.model), self.layer))]
        if self.instruction:
            found.append(Branch(instructed(run, words, self.instruction)))
        return found

    def _amateur(self, model: Any) -> nn.Module:
        if self.amateur is None:
            raise InputError(
                "LOL contrasts with an amateur: there is none.", "give it: lol_decoding(amateur=...)"
            )
        if self.amateur is model:
            raise InputError("LOL's amateur is the model itself.", "give another, or a copy of it")
        if isinstance(self.amateur, nn.Module):
            return self.amateur
        return loaded(self.amateur, model.dtype, str(model.device))

    def prediction(self, base: Tensor, branches: list[Tensor], p: Pass) -> Tensor:
        amateur, *truthful = branches
        if amateur.shape[-1] != 2 * base.shape[-1]:
            raise InputError(
                f"The amateur has {amateur.shape[-1] // 2} words, the model {base.shape[-1]}.",
                "give one with the same vocabulary",
            )
        lower = p.run.unembed(p.run.state["lower"]).log_softmax(-1)
        fabled, fabled_lower = (half.log_softmax(-1) for half in amateur.chunk(2, -1))
        added = self.omega * (lower - fabled_lower) - fabled
        if truthful:
            added = added + self.mu * (truthful[0] - base)
        return plausible(base + self.strength * added, base, self.alpha)


class Amateur(nn.Module):
    """A model whose logits are those of its last layer and, behind them, those of a lower one."""

    def __init__(self, model: Any, layer: str) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        with attach(model) as session:
            (site,) = match(f"text.{layer}.layer", session.sites)
            self.place = site.layer + 1  # among the hidden states: embeddings first
            self.unembed = session.unembed
            self.unembed(torch.zeros_like(model.get_output_embeddings().weight[0]))  # found while attached

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **cache: Any) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **cache}
        if self.takes_positions and attention_mask is not None:
            places = (attention_mask.cumsum(1) - 1).clamp_min(0)
            given["position_ids"] = places[:, -input_ids.shape[1] :]
        out = self.model(**given, output_hidden_states=True)
        states = out.hidden_states
        last = self.place == len(states) - 1  # which is behind the final norm already
        lower = out.logits if last else self.unembed(states[self.place])
        return SimpleNamespace(logits=torch.cat([out.logits, lower], -1), past_key_values=out.past_key_values)


@cache
def loaded(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    model: nn.Module = load_model(name, device=device, any_kind=True)[0]
    return model.to(dtype)


def instructed(run: Run, words: dict[str, Tensor], instruction: tuple[int, ...]) -> dict[str, Tensor]:
    """The prompt (samples, tokens) with more ids in front of it, but behind the special token that begins it."""
    layout, _ = of_samples(run)
    begun = layout.where("first") & layout.where("special")
    first = layout.where("all").long().argmax(1, keepdim=True) + begun.any(1, keepdim=True).long()
    ids, more = words["input_ids"], len(instruction)
    place = torch.arange(ids.shape[1] + more, device=ids.device).expand(ids.shape[0], -1)
    old = torch.where(place < first, place, place - more)
    mine = (place >= first) & (place < first + more)

    def spread(values: Tensor, new: Tensor) -> Tensor:
        there = new.to(values)[(place - first).clamp(0, more - 1)]
        return torch.where(mine, there, values.gather(1, old.clamp_min(0)))

    given = torch.tensor(instruction, device=ids.device)
    news = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    return {name: spread(value, news[name]) for name, value in words.items()}
