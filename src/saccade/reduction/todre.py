"""Send a diverse few of the visual tokens, and let them leave where they and the words have ceased to meet.

    behind the projector   p_1 = the patch with the most of the class token's attention in the tower's last layer
                           p_i = argmin_j  sum over i' < i of cos(x_j, x_p_i')           i <= k = round(keep * N)
    in the text tower, at a layer 7/8 up, means over heads, M(rows, columns) a sum of attention
        M(words, visual) / M(words, all) < tau   and   M(visual, words) / M(visual, all) < tau
                           all visual tokens leave, from the next layer on

With diversity "center" the next is the one farthest from its nearest: argmin_j max over i' of the cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.features import Item
from saccade.core.importance import class_token, note, noted, tower_attention
from saccade.core.method import Method, Sites, option
from saccade.core.tokens import Tokens, TokensCall


@dataclass(eq=False)
class ToDRE(Method):
    card = Card(
        slug="todre",
        name="ToDRE",
        kind="method",
        family="reduction",
        form="method",
        target="vlm",
        paper="ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language "
        "Models (Li et al., 2025)",
        summary="Keep a diverse few visual tokens, and drop all where words and picture no longer meet",
        needs=("image",),
        neutral={"keep": 1.0, "tau": 0.0},
        choices=(
            "Cumulative similarity as in the paper's second version; the first version's k-center is "
            "diversity='center'.",
            "In towers without a class token the first patch is drawn, as in the paper, from the seed.",
            "The paper's tau is not known to us; the default is a guess.",
            "Words are all tokens of the prompt that are not visual. Positions stay where all leave.",
            "With tiles the first patch is one of the first view, and separators stay.",
        ),
        headline="90% of visual tokens removed after the encoder, 2.6x total inference speed-up, 95.1% of "
        "performance kept",
        tags=("token pruning", "diversity", "k-center", "task awareness", "training-free"),
    )

    keep: float = option(0.1, "share of the visual tokens that stays; 1 keeps all", low=0, high=1)
    diversity: str = option("sum", "cumulative or nearest similarity", choices=("sum", "center"))
    tau: float = option(
        0.1, "below which attention between words and picture has ceased; 0 never", low=0, high=1
    )
    seed: int = option(0, "of the first patch, in towers without a class token")
    sites: Sites = option(
        {"observe": "vision.-1.self|text.87%.self", "tokens": "text.*.layer"},
        "where the first patch is found and where attention is checked; the layers above the latter",
    )
    phases: tuple[str, ...] = option(("prefill", "extend"), "passes in which tokens leave")

    def observe(self, call: AttentionCall) -> None:
        if call.site.tower == "text":
            self._check(call)
            return
        call.run.state["class"] = class_token(call) is not None
        note(call, tower_attention(call))

    def features(self, item: Item) -> Tokens | None:
        if self.keep == 1:
            return None
        attention, tile = noted(item)
        patches = (tile >= 0).nonzero()[:, 0]
        first = int((tile[patches] == tile[patches[0]]).sum())
        if item.run.state["class"]:
            pivot = int(attention[patches][:first].argmax())
        else:
            pivot = int(torch.randint(len(patches), (1,), generator=torch.Generator().manual_seed(self.seed)))
        count = max(1, round(self.keep * len(patches)))
        chosen = diverse(item.x[patches], pivot, count, self.diversity)
        keep = tile < 0
        keep[patches[chosen]] = True
        return Tokens(keep, positions="renumber")

    def _check(self, call: AttentionCall) -> None:
        visual = call.queries("visual")
        if self.tau == 0 or not bool(visual.any()):
            return
        call.pass_.check_complete()
        both = [share < self.tau for share in meeting(call)]
        before = call.run.state.get("done", torch.zeros_like(both[0]))
        call.run.state["done"] = before | (both[0] & both[1])

    def tokens(self, call: TokensCall) -> Tokens | None:
        if call.layer == 0:
            call.run.state.pop("done", None)  # of an earlier pass
        done: Tensor | None = call.run.state.get("done")
        if done is None or not bool(done.any()):
            return None
        leave = call.tokens("visual") & done[:, None]
        return Tokens(~leave) if bool(leave.any()) else None


def diverse(x: Tensor, first: int, count: int, diversity: str) -> Tensor:
    """Tokens (count,) one after another, each the least alike to those before it."""
    x = F.normalize(x.detach() if x.dtype == torch.float64 else x.detach().float(), dim=-1)
    chosen = [first]
    alike = x @ x[first]
    while len(chosen) < count:
        chosen.append(int(alike.index_fill(0, torch.tensor(chosen, device=x.device), torch.inf).argmin()))
        new = x @ x[chosen[-1]]
        alike = alike + new if diversity == "sum" else alike.maximum(new)
    return torch.tensor(chosen, device=x.device)


def meeting(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The shares of the words' attention that visual tokens get, and of the visual tokens' that words get: (batch,)."""
    visual, everything = (call.columns(name)[:, 0] for name in ("visual", "all"))  # (batch, 1, keys)
    seen, real = (call.queries(name)[..., None] for name in ("visual", "all"))  # (batch, queries, 1)
    words, asking = everything & ~visual, real & ~seen
    mass = torch.zeros(4, call.q.shape[0], dtype=torch.float64, device=call.q.device)
    for rows in call.chunks():
        w = call.weights(rows, keep=False).mean(1).double()
        pairs = ((asking, visual), (asking, everything), (seen, words), (seen, everything))
        mass += torch.stack([(w * of[:, rows] * to).sum((1, 2)) for of, to in pairs])
    return mass[0] / mass[1], mass[2] / mass[3]
