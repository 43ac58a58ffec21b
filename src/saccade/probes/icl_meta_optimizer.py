"""Does reading demonstrations change a model as learning from them does?

    W_V [X'; X] (W_K [X'; X])^T q = (W_ZSL + dW_ICL) q          unnormalised attention to demonstrations X' and query X
    W_ZSL = W_V X (W_K X)^T,   dW_ICL = sum_i W_V x'_i (W_K x'_i)^T        outer products, as of gradient descent

    SimAOU  = cos(h_ICL - h_ZSL, h_FT - h_ZSL)       h: attention's output at the last token, of length 1 before
    SimAM   = cos(s_ICL, s_FT), beside cos(s_ICL, s_ZSL)      s: its scores over the query's own tokens, by head
    Rec2FTP = |wrong alone, right after learning and after reading| / |wrong alone, right after learning|

    MoAttn(q_t) = attention(q_t) + sum_{i<t} eta^(t-i) v_i             momentum, as a descent may have it

Learning (FT) is one pass of descent over the demonstrations, in order, on what makes keys and values alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from saccade.core.call import AttentionCall
from saccade.core.card import Card
from saccade.core.driver import Experiment
from saccade.core.errors import InputError, OptionError
from saccade.core.method import Method, Sites
from saccade.core.passes import HiddenCall
from saccade.core.session import Session, attach
from saccade.core.site import match
from saccade.core.system import option
from saccade.probes._parts.table import Table, layers

MEASURES = ("SimAOU", "random", "SimAM", "SimAM alone", "tau")
WIDTH = 64  # of the small learner
START = 0  # the token that every prompt of the small learner begins with


@dataclass(eq=False)
class ICLMetaOptimizer(Experiment):
    """`run()` trains a small model to look up what it has read, and compares; `compare` does so in any language
    model."""

    card = Card(
        slug="icl_meta_optimizer",
        name="ICL-as-GD (MoAttn)",
        kind="experiment",
        family="probes",
        form="theory",
        target="llm",
        trains="full",
        paper="Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers "
        "(Dai et al., 2023)",
        summary="Reading demonstrations changes attention's outputs in the direction of fine-tuning on them",
        code="microsoft/LMOps",
        choices=(
            "The query's own tokens are those of its prompt alone, what every prompt begins with among them.",
            "The small model reads lists of words with answers; what it is asked for is one of the demonstrations.",
            "Learning sees a demonstration at a time, behind that beginning, and the loss of its answer alone.",
            "tau is Kendall's, of reading's scores and of queries of the demonstrations' tokens times the last "
            "token's, as they are while learning and after it; both are means over heads.",
            "Momentum attention is not in the release; it is built as written.",
        ),
        tags=("in-context learning", "fine-tuning", "gradient descent", "momentum", "linear attention"),
    )

    tasks: int = option(24, "lists of demonstrations that are read, and learned", low=1)
    keys: int = option(24, "words that are asked for", low=2)
    answers: int = option(8, "words that answer", low=2)
    shots: int = option(4, "demonstrations, for no more than there are keys", low=1)
    rate: float = option(0.3, "of descent while learning from demonstrations", low=0)
    steps: int = option(200, "of the small model's own training", low=1)
    seed: int = option(0, "of the model and of all that is drawn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots > self.keys:
            raise OptionError(
                f"ICLMetaOptimizer has {self.keys} keys for {self.shots} demonstrations.", "give more keys"
            )

    def run(self) -> Compared:
        random = torch.Generator().manual_seed(self.seed)
        last = 1 + self.keys + self.answers
        answers = range(last - self.answers, last)
        found = []
        with attach(self.learner(random)) as session:
            for _ in tqdm(range(self.tasks), desc="tasks", unit="task", mininterval=1):
                shots = self.drawn(random)
                found.append(compare(session, shots, shots, (START,), answers, self.rate, random))
        return joined(found)

    def drawn(self, random: torch.Generator) -> list[Example]:
        """Different keys, each with an answer."""
        keys = torch.randperm(self.keys, generator=random)[: self.shots]
        answers = torch.randint(self.answers, (self.shots,), generator=random)
        return [Example((key,), answer) for key, answer in self.ids(keys, answers).tolist()]

    def ids(self, keys: Tensor, answers: Tensor) -> Tensor:
        """Of keys, each with its answer: (..., 2)."""
        return torch.stack([1 + keys, 1 + self.keys + answers], -1)

    def learner(self, random: torch.Generator) -> Any:
        """A model that was trained to say, for a key that comes again, the answer that followed it. Its first layer
        is told to know the token before, with which looking up is learned at once."""
        from transformers import LlamaConfig, LlamaForCausalLM

        words = 1 + self.keys + self.answers
        config = LlamaConfig(
            vocab_size=words, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256, bos_token_id=START, eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model, before = LlamaForCausalLM(config), nn.Linear(WIDTH, words)
            nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
        optimizer = torch.optim.AdamW([*model.parameters(), *before.parameters()], 5e-3, weight_decay=0.0)
        with tqdm(range(self.steps), desc="learner", unit="step", mininterval=1) as progress:
            for _ in progress:
                ids, known = self.sequences(48, random)
                out = model(ids, use_cache=False, output_hidden_states=True)
                loss = F.cross_entropy(out.logits[:, :-1][known[:, 1:]], ids[:, 1:][known[:, 1:]])
                told = before(F.rms_norm(out.hidden_states[1][:, 1:], (WIDTH,)))
                optimizer.zero_grad()
                (loss + F.cross_entropy(told.flatten(0, 1), ids[:, :-1].flatten())).backward()
                optimizer.step()
                progress.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        return model.eval()

    def sequences(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids of keys that come again, each with its answer, and where the answer is known: (count, tokens)."""
        own = torch.rand(count, self.keys, generator=random).argsort(1)[:, : self.shots]
        answers = torch.randint(self.answers, (count, self.shots), generator=random)
        asked = torch.randint(self.shots, (count, 10), generator=random)
        ids = self.ids(own.gather(1, asked), answers.gather(1, asked))
        known = torch.zeros_like(ids, dtype=torch.bool)
        known[..., 1] = (asked[:, :, None] == asked[:, None]).tril(-1).any(-1)
        return F.pad(ids.flatten(1), (1, 0), value=START), F.pad(known.flatten(1), (1, 0))


class Example(NamedTuple):
    """A question, in tokens, and the token that answers it."""

    question: tuple[int, ...]
    answer: int


@dataclass(frozen=True, eq=False, repr=False)
class Compared:
    """Means over queries, by layer; and who was right: a row for each query, alone, after learning, after reading."""

    table: Table  # (layer, measure)
    right: Tensor  # (queries, 3), bool

    @property
    def rec2ftp(self) -> float | None:
        return rec2ftp(*self.right.unbind(1))

    def __repr__(self) -> str:
        alone, learned, read = self.right.double().mean(0).tolist()
        share = "undefined, for learning put nothing right" if self.rec2ftp is None else f"{self.rec2ftp:.2f}"
        return f"right: alone {alone:.2f}, learned {learned:.2f}, read {read:.2f}; Rec2FTP {share}\n{self.table!r}"


def compare(
    session: Session,
    shots: Sequence[Example],
    queries: Sequence[Example],
    start: Sequence[int] = (),
    answers: Sequence[int] = (),
    rate: float = 0.01,
    random: torch.Generator | None = None,
) -> Compared:
    """What queries find without demonstrations, behind them, and after learning from them. The model says the
    likeliest of `answers`, or of all tokens."""
    if not shots or not queries:
        raise InputError("There is nothing to compare.", "give demonstrations and queries")
    random = random or torch.Generator().manual_seed(0)
    shown = [token for shot in shots for token in (*shot.question, shot.answer)]
    alone = [taken(session, [*start, *query.question], answers) for query in queries]
    read = [taken(session, [*start, *shown, *query.question], answers) for query in queries]
    with learned(session, shots, start, rate) as trained:
        after = [taken(session, [*start, *query.question], answers) for query in queries]
    found, right = [], []
    for query, zsl, icl, ft in zip(queries, alone, read, after, strict=True):
        own = [*range(len(start)), *range(-len(query.question), 0)]
        noise = torch.rand(zsl.outputs.shape, generator=random, dtype=torch.double)
        among = icl.scores[:, :, len(start) : len(start) + len(shown)].mean(1)  # (layers, shown)
        similar = torch.einsum("lhsd,lhd->ls", trained, ft.query) / ft.query.shape[1]
        values = (
            sim_aou(icl.outputs, ft.outputs, zsl.outputs),
            cosine(unit(icl.outputs) - unit(zsl.outputs), noise),
            sim_am(icl.scores[..., own], ft.scores),
            sim_am(icl.scores[..., own], zsl.scores),
            tau(among, similar),
        )
        found.append(torch.stack(values, -1))
        right.append([one.said == query.answer for one in (zsl, ft, icl)])
    table = Table(torch.stack(found).mean(0), {"layer": layers(len(found[0])), "": MEASURES})
    return Compared(table, torch.tensor(right))


def joined(found: Sequence[Compared]) -> Compared:
    """Of several tasks, each counted by its queries."""
    counts = torch.tensor([len(one.right) for one in found]).double()
    values = torch.stack([one.table.values for one in found])
    mean = (values * (counts / counts.sum())[:, None, None]).sum(0)
    return Compared(Table(mean, found[0].table.axes), torch.cat([one.right for one in found]))


# ---- what is compared --------------------------------------------------------------------------------------


def dual(w_k: Tensor, w_v: Tensor, shown: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """W_ZSL and dW_ICL (out, width), of matrices (out, width), demonstrations (tokens, width) and own tokens."""
    update = sum(torch.outer(w_v @ x, w_k @ x) for x in shown)
    return (w_v @ own.T) @ (w_k @ own.T).T, torch.as_tensor(update)


def sim_aou(icl: Tensor, ft: Tensor, zsl: Tensor) -> Tensor:
    """Of outputs (layers, width): (layers,)."""
    return cosine(unit(icl) - unit(zsl), unit(ft) - unit(zsl))


def sim_am(a: Tensor, b: Tensor) -> Tensor:
    """Of scores (layers, heads, own tokens): (layers,)."""
    return cosine(a, b).mean(1)


def rec2ftp(alone: Tensor, learned: Tensor, read: Tensor) -> float | None:
    """Of who was right, (queries,) each; None where learning put nothing right."""
    fixed = ~alone & learned
    return int((fixed & read).sum()) / int(fixed.sum()) if bool(fixed.any()) else None


def tau(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's rank correlation along the last axis, of numbers without ties."""
    pairs = torch.tril_indices(a.shape[-1], a.shape[-1], -1, device=a.device)
    orders = [torch.sign(t[..., pairs[0]] - t[..., pairs[1]]) for t in (a, b)]
    return (orders[0] * orders[1]).mean(-1)


def unit(t: Tensor) -> Tensor:
    return F.normalize(t, dim=-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1, eps=1e-20)


# ---- in a model --------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    outputs: Tensor  # (layers, width) of attention at the last token
    scores: Tensor  # (layers, heads, tokens) of that row
    query: Tensor  # (layers, heads, dim) of the last token
    said: int


@dataclass(eq=False)
class Take(Method):
    sites: Sites = "text.*.self"
    gave: dict[str, Tensor] = field(default_factory=dict)  # by site: (width,)
    scored: dict[str, Tensor] = field(default_factory=dict)  # (heads, tokens)
    asked: dict[str, Tensor] = field(default_factory=dict)  # (heads, tokens, dim)

    def hidden(self, call: HiddenCall, h: Tensor) -> Tensor:
        self.gave[call.site.name] = call.last(h)[0].detach().double().cpu()
        return h

    def observe(self, call: AttentionCall) -> None:
        self.scored[call.site.name] = call.scores("last")[0, :, 0].detach().double().cpu()
        self.asked[call.site.name] = call.q[0].detach().double().cpu()


def taken(session: Session, ids: Sequence[int], answers: Sequence[int]) -> Taken:
    take = Take()
    logits = session.forward(inputs(session, ids), [take]).logits[0, -1]
    among = torch.tensor(answers or range(len(logits)))
    said = int(among[logits.cpu()[among].argmax()])
    gave, scored, asked = (torch.stack([*kept.values()]) for kept in (take.gave, take.scored, take.asked))
    return Taken(gave, scored, asked[:, :, -1], said)


@contextlib.contextmanager
def learned(
    session: Session, shots: Sequence[Example], start: Sequence[int], rate: float
) -> Iterator[Tensor]:
    """The session's model with keys and values of a pass of descent, which is undone in the end; gives the queries
    that the demonstrations' tokens had on the way: (layers, heads, tokens of all, dim)."""
    sites = match("text.*.self", session.sites)
    masks = {p: mask for site in sites for p, mask in session.parameters(site.name, "kv").items()}
    before = {p: (p.detach().clone(), p.requires_grad) for p in masks}
    asked = []
    try:
        for p in masks:
            p.requires_grad_()
        for shot in shots:
            take, ids = Take(), [*start, *shot.question, shot.answer]
            logits = session.forward(inputs(session, ids), [take], grad=True).logits[0, -2]
            loss = F.cross_entropy(logits[None].float(), torch.tensor([shot.answer], device=logits.device))
            asked.append(torch.stack([*take.asked.values()])[:, :, len(start) :])
            with torch.no_grad():
                for p, slope in zip(masks, torch.autograd.grad(loss, [*masks]), strict=True):
                    p.sub_(rate * slope * masks[p])
        yield torch.cat(asked, 2)
    finally:
        with torch.no_grad():
            for p, (weight, wanted) in before.items():
                p.copy_(weight)
                p.requires_grad_(wanted)


def inputs(session: Session, ids: Sequence[int]) -> dict[str, Tensor]:
    model: Any = session.model
    return {"input_ids": torch.tensor([ids], device=model.device)}


# ---- momentum ----------------------------------------------------------------------------------------------


def momentum(v: Tensor, eta: float | Tensor) -> Tensor:
    """sum_{i<t} eta^(t-i) v_i for every token, of values (..., tokens, dim), one token after the other. Learnable
    where `eta` is a parameter."""
    kept, found = torch.zeros_like(v[..., 0, :]), []
    for value in v.unbind(-2):
        found.append(kept)
        kept = eta * (kept + value)
    return torch.stack(found, -2)


def momentum_attention(q: Tensor, k: Tensor, v: Tensor, eta: float | Tensor) -> Tensor:
    """Causal, of as many queries as keys (..., tokens, dim)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) + momentum(v, eta)
