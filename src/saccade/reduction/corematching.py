"""Let neurons say which visual tokens matter, and tokens which neurons do.

    a(x) = act(gate x) * up x;    Gamma(x) = the largest rho of the positive a(x)
    C        the beta * D neurons that are in Gamma of the most tokens of the prompt, layer by layer
    score    of a visual token  |Gamma(x) & C|;  those strictly above the elbow stay for the layers behind
    elbow    of the sorted scores the one that is farthest from the line between the first and the last
    written words have the neurons C alone

`score="released"` counts instead how many a(x) > 0 a visual token shares with the prompt's fifth last token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.card import Card
from saccade.core.errors import InputError
from saccade.core.method import Method, Sites, option
from saccade.core.passes import HiddenCall
from saccade.core.tokens import Tokens, TokensCall
from saccade.reduction._parts.choice import highest

FROM_END = 5  # the token that the released code compares with


@dataclass(eq=False)
class CoreMatching(Method):
    card = Card(
        slug="corematching",
        name="CoreMatching",
        kind="method",
        family="reduction",
        form="method",
        target="vlm / llm with gated MLP",
        paper="CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for "
        "Comprehensive Acceleration of Vision-Language Models (Wang et al., 2025)",
        summary="Drop visual tokens whose neurons are not the prompt's, and neurons that are not",
        neutral={"rho": 1.0, "beta": 1.0, "score": "none"},
        code="wangqinsi1/2025-ICML-CoreMatching",
        choices=(
            "Tokens leave, as in the paper; the released code sets their keys and values to 0 in layers 5 to 18, each "
            "by its own scores, where they still take weight, and cuts no neurons.",
            "They leave before layer 10 of 32, which scales with the depth, by the neurons of the layer below.",
            "The elbow is the farthest on either side of the line, as in the released code: where no score is above "
            "its own, all tokens of the picture leave.",
            "Every picture has its own elbow. A later turn's words choose the neurons anew.",
            "Neurons outside of C are set to 0, which equals leaving their rows and columns out, and takes as long.",
        ),
        headline="5x FLOPs reduction and 10x overall speedup on Titan Xp",
        tags=("token pruning", "neuron pruning", "activation sparsity", "elbow", "training-free"),
    )

    rho: float = option(0.4, "share of a token's positive neurons that are its core", low=0, high=1)
    beta: float = option(0.4, "share of all neurons that are the prompt's core", low=0, high=1)
    score: str = option(
        "core", "what visual tokens are judged by; none keeps all", choices=("core", "released", "none")
    )
    sites: Sites = option(
        {"hidden": "text.*.neurons", "tokens": "text.31%.layer"},
        "neurons that are cut, and the layer before which tokens leave",
    )

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        if call.phase == "decode":
            core = call.state.get(call.site.name)
            return h if core is None else h.masked_fill(~core[:, None], 0)
        call.pass_.check_complete("counts the neurons of a whole prompt")
        real = call.rows("all", h)
        gamma = token_core(h, self.rho)
        core = sentence_core(gamma & real, self.beta)
        call.state[call.site.name] = core
        leaving = [site.layer for site in call.run.places(self, "tokens")]
        if self.score != "none" and call.site.layer + 1 in leaving:
            other = core[:, None] if self.score == "core" else fifth_last(h > 0, real[..., 0])
            call.run.state["scores"] = ((gamma if self.score == "core" else h > 0) & other).sum(-1)
        return h

    def tokens(self, call: TokensCall) -> Tokens | None:
        pictures = call.items("visual")
        if self.score == "none" or not any(bool(picture.any()) for picture in pictures):
            return None
        if call.layer == 0:
            raise InputError(
                "CoreMatching judges tokens by the neurons of the layer below, and there is none below the first.",
                "let tokens leave before a later layer, as in sites={tokens: text.10.layer, ...}",
            )
        scores = call.run.state.pop("scores")
        keep = ~call.tokens("visual")
        for picture in pictures:
            for row, mine in enumerate(picture):
                if bool(mine.any()):
                    found = scores[row, mine].double()
                    ordered = found.sort(descending=True).values
                    keep[row, mine] = found > ordered[elbow(ordered)]
        return Tokens(keep)


def token_core(a: Tensor, rho: float) -> Tensor:
    """Gamma of every token (..., neurons), bool."""
    positive = a > 0
    count = torch.ceil(rho * positive.sum(-1, keepdim=True).double())
    return highest(a, positive, count)


def sentence_core(gamma: Tensor, beta: float) -> Tensor:
    """C from Gamma (batch, tokens, neurons): (batch, neurons), bool."""
    counts = gamma.sum(1).float()
    count = torch.tensor(round(beta * counts.shape[1]), device=counts.device)
    return highest(counts, torch.ones_like(counts, dtype=torch.bool), count)


def fifth_last(active: Tensor, real: Tensor) -> Tensor:
    """Of the neurons (batch, tokens, neurons) those of the fifth last of the real tokens: (batch, 1, neurons)."""
    behind = real.flip(1).cumsum(1).flip(1)  # real tokens from here on
    at = (real & (behind <= FROM_END)).int().argmax(1)
    return active[torch.arange(len(at), device=at.device), at][:, None]


def elbow(ordered: Tensor) -> int:
    """Of scores in descending order the farthest from the line between the first and the last."""
    line = torch.linspace(0, 1, len(ordered), dtype=ordered.dtype, device=ordered.device)
    return int((ordered - ordered[0] - (ordered[-1] - ordered[0]) * line).abs().argmax())
