"""How like a language the tokens of pictures are: statistics of sequences of integers, for pictures and for text.

zipf          f(r) ~ (r + q)^-s          of n-grams by rank, by maximum likelihood; q = 0 unless shifted
innovation    types(n) ~ n^h             distinct tokens among the first n
huffman       H <= bits per token < H + 1
purity        sum_t max_segment count(t, segment) / tokens
grammar       perplexity of a compound PCFG, and how its trees branch
procrustes    min over rotations |A R - B|  of embeddings from co-occurrence, centred, of length 1
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.core.card import Card
from saccade.core.driver import Experiment
from saccade.core.errors import InputError
from saccade.core.system import option
from saccade.probes._parts.drawn import drawn

Sequences = Sequence[Sequence[int]]
Texts = tuple[tuple[int, ...], ...]

NEVER = -1e9


@dataclass(eq=False)
class VisualTokenLanguage(Experiment):
    """`run()` compares a corpus of pictures with one of text. Without any it takes drawn pictures, cut into patches
    that are told by their nearest of some codes, and sentences of a small grammar."""

    card = Card(
        slug="visual_token_language",
        name="Visual Token Language",
        kind="experiment",
        family="probes",
        form="probe",
        target="discrete image tokenizers (VQ) and token corpora",
        paper="Analyzing The Language of Visual Tokens (Chan et al., 2024)",
        summary="Zipf's and Heaps' laws, entropy, granularity, grammar and topology of discrete visual tokens",
        choices=(
            "Exponents of Zipf's law are those of maximum likelihood; R^2 is of the logarithms.",
            "The grammar reads pieces of at most `length` tokens, for its time grows with the third power, and is "
            "judged on a fifth of them, by the bound at the mean of its latent vector.",
            "Stability is the share of brackets that grammars of two seeds agree on.",
            "Embeddings of pictures and text are put side by side by how frequent their tokens are.",
            "Huffman's ratio is to a code of one length for every token.",
        ),
        tags=("Zipf", "Heaps", "entropy", "compression", "PCFG", "GloVe", "VQ", "discrete tokens"),
    )

    pictures: tuple[tuple[int, ...], ...] = option(
        (), "tokens of every picture, row by row; none: drawn ones"
    )
    texts: tuple[tuple[int, ...], ...] = option(
        (), "tokens of every text; none: sentences of a small grammar"
    )
    objects: tuple[tuple[int, ...], ...] = option((), "of the pictures' tokens the object that each lies on")
    parts: tuple[tuple[int, ...], ...] = option((), "and the part of it")
    length: int = option(12, "tokens of a piece that the grammar reads", low=3)
    steps: int = option(120, "in which a grammar is trained", low=1)
    width: int = option(16, "of the embeddings", low=1)

    def run(self) -> Compared:
        pictures, objects, parts = self.pictures, self.objects, self.parts
        if not pictures:
            pictures, objects, parts = looked_at()
        texts = self.texts or sentences(200)
        visual = self._statistics(pictures)
        for name, masks in (("objects", objects), ("parts", parts)):
            if masks:
                visual[f"purity, {name}"] = purity(pictures, masks)
        apart = procrustes(*alike(glove(pictures, self.width), glove(texts, self.width)))
        return Compared(visual, self._statistics(texts), apart)

    def _statistics(self, sequences: Sequences) -> dict[str, Statistic]:
        return {
            "zipf": zipf(sequences),
            "zipf, shifted": zipf(sequences, shifted=True),
            "zipf of pairs": zipf(sequences, 2),
            "innovation": innovation(sequences),
            "entropy": entropy(sequences),
            "huffman": huffman(sequences),
            "grammar": grammar(sequences, self.length, self.steps),
        }


@dataclass(frozen=True, eq=False)
class Statistic:
    value: float
    columns: Mapping[str, Tensor]  # to be plotted
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Compared:
    visual: Mapping[str, Statistic]
    textual: Mapping[str, Statistic]
    topology: Statistic  # how far the embeddings of both are apart

    def __repr__(self) -> str:
        lines = [f"{'':16}{'pictures':>12}{'text':>12}"]
        for name, mine in self.visual.items():
            theirs = self.textual.get(name)
            rows = {name: (mine.value, theirs and theirs.value)}
            rows |= {f"  {key}": (v, theirs and theirs.more[key]) for key, v in mine.more.items()}
            lines += [
                f"{key:16}" + "".join(f"{'' if value is None else f'{value:.3f}':>12}" for value in values)
                for key, values in rows.items()
            ]
        return "\n".join([*lines, f"{'topology':16}{self.topology.value:>12.3f}"])


# ---- counts ----------------------------------------------------------------------------------------------


def zipf(sequences: Sequences, n: int = 1, *, shifted: bool = False) -> Statistic:
    """The exponent of n-grams' frequencies by rank; `shifted` by Mandelbrot's q."""
    found = Counter(tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1))
    counts = torch.tensor(sorted(found.values(), reverse=True), dtype=torch.double)
    if len(counts) < 2:
        raise InputError(f"There are {len(counts)} kinds of {n}-grams.", "give sequences of several tokens")
    rank = torch.arange(1, len(counts) + 1, dtype=torch.double)
    shifts = torch.zeros(1, dtype=torch.double)
    if shifted:
        shifts = torch.cat([shifts, torch.logspace(-2, math.log10(len(counts)) + 1, 120, dtype=torch.double)])
    exponents, laws = _laws(counts, (rank + shifts[:, None]).log())
    best = int((laws @ counts).argmax())
    fitted = counts.sum().log() + laws[best]
    spread = (counts.log() - counts.log().mean()).square().sum()
    missed = (counts.log() - fitted).square().sum()
    more = {"R^2": float(1 - missed / spread.clamp_min(1e-12))}
    if shifted:
        more["shift"] = float(shifts[best])
    return Statistic(float(exponents[best]), {"rank": rank, "count": counts, "fitted": fitted.exp()}, more)


def _laws(counts: Tensor, log_rank: Tensor) -> tuple[Tensor, Tensor]:
    """By shift (shifts, ranks), the exponent at which the mean logarithm of the rank is what was seen, and the
    logarithms of all ranks' shares."""
    seen = log_rank @ counts / counts.sum()
    low, high = torch.full_like(seen, -1), torch.full_like(seen, 100)
    for _ in range(60):
        exponent = (low + high) / 2
        shares = (-exponent[:, None] * log_rank).log_softmax(-1)
        steeper = (shares.exp() * log_rank).sum(-1) > seen
        low, high = exponent.where(steeper, low), high.where(steeper, exponent)
    return exponent, shares


def innovation(sequences: Sequences) -> Statistic:
    """Heaps' exponent, of distinct tokens against tokens seen."""
    seen: set[int] = set()
    types = []
    for token in (token for s in sequences for token in s):
        seen.add(token)
        types.append(len(seen))
    tokens = torch.arange(1, len(types) + 1, dtype=torch.double)
    curve = torch.tensor(types, dtype=torch.double)
    at = torch.logspace(0, math.log10(len(types)), 50).round().long().unique() - 1
    x, y = tokens[at].log(), curve[at].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return Statistic(slope, {"tokens": tokens, "types": curve})


def entropy(sequences: Sequences) -> Statistic:
    """Bits per token, each by itself."""
    tokens, counts = _counted(sequences)
    shares = counts / counts.sum()
    return Statistic(float(-(shares * shares.log2()).sum()), {"token": tokens, "count": counts})


def huffman(sequences: Sequences) -> Statistic:
    """Bits per token under Huffman's code, and how much shorter that is than one length for all."""
    tokens, counts = _counted(sequences)
    lengths = torch.zeros(len(counts), dtype=torch.double)
    heap = [(count, i, [i]) for i, count in enumerate(counts.tolist())]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, mine), (b, _, theirs) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[mine + theirs] += 1
        heapq.heappush(heap, (a + b, i, mine + theirs))
    bits = float(counts @ lengths / counts.sum())
    ratio = math.ceil(math.log2(len(counts))) / bits if bits else 1.0
    return Statistic(bits, {"token": tokens, "count": counts, "bits": lengths}, {"ratio": ratio})


def purity(sequences: Sequences, masks: Sequences) -> Statistic:
    """The share of tokens that lie on the segment on which their kind lies most often."""
    pairs = Counter(pair for s, m in zip(sequences, masks, strict=True) for pair in zip(s, m, strict=True))
    tokens, segments = (sorted({pair[at] for pair in pairs}) for at in (0, 1))
    table = torch.tensor([[pairs[t, segment] for segment in segments] for t in tokens], dtype=torch.double)
    kinds = torch.tensor(tokens)
    best = table.max(1).values
    return Statistic(
        float(best.sum() / table.sum()),
        {"token": kinds, "count": table.sum(1), "purity": best / table.sum(1)},
    )


def _counted(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The kinds of tokens and how often each is there."""
    tokens, counts = torch.cat([torch.tensor(s) for s in sequences]).unique(return_counts=True)
    return tokens, counts.double()


# ---- topology --------------------------------------------------------------------------------------------


def glove(sequences: Sequences, width: int = 16, window: int = 10, steps: int = 300, seed: int = 0) -> Tensor:
    """Embeddings of tokens, the most frequent first: (tokens, width).

    w_i . c_j + b_i + b_j ~ log X_ij, errors weighted with min(1, X_ij / 100)^0.75.
    """
    tokens, counts = _counted(sequences)
    order = {
        int(token): place for place, token in enumerate(tokens[counts.argsort(descending=True, stable=True)])
    }
    together = torch.zeros(len(tokens), len(tokens))
    for s in sequences:
        places = torch.tensor([order[token] for token in s])
        for far in range(1, min(window, len(s) - 1) + 1):
            near = places[:-far], places[far:]
            together.index_put_(near, torch.tensor(1 / far), accumulate=True)
    together = together + together.T
    rows, columns = together.nonzero().T
    seen = together[rows, columns]
    weight, wanted = (seen / 100).clamp_max(1) ** 0.75, seen.log()
    noise = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        words, contexts = (
            ((torch.rand(len(tokens), width + 1, generator=noise) - 0.5) / width).requires_grad_()
            for _ in range(2)
        )
        optimizer = torch.optim.Adagrad([words, contexts], 0.05)
        for _ in range(steps):
            w, c = words[rows], contexts[columns]
            error = (w[:, :-1] * c[:, :-1]).sum(-1) + w[:, -1] + c[:, -1] - wanted
            optimizer.zero_grad()
            (weight * error.square()).sum().backward()
            optimizer.step()
    return (words + contexts)[:, :-1].detach().double()


def alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As many rows of both."""
    rows = min(len(a), len(b))
    return a[:rows], b[:rows]


def procrustes(a: Tensor, b: Tensor) -> Statistic:
    """How far embeddings (rows, width) are apart once one is turned as near to the other as it goes: 0 to sqrt(2)."""
    a, b = (t - t.mean(0) for t in (a, b))
    a, b = a / a.norm(), b / b.norm()
    u, _, v = torch.linalg.svd(a.mT @ b)
    left = (a @ u @ v - b).norm(dim=-1)
    return Statistic(float(left.norm()), {"row": torch.arange(len(a)), "distance": left})


# ---- grammar ---------------------------------------------------------------------------------------------


class Grammar(nn.Module):
    """A compound PCFG: the probabilities of its rules depend on a latent vector of every sequence.

    S -> A,  A -> B C,  T -> word        A among the nonterminals; B, C among these and the preterminals T
    """

    def __init__(self, words: int, nonterminals: int = 6, preterminals: int = 10, width: int = 32) -> None:
        super().__init__()
        latent = width // 4
        self.start = nn.Parameter(torch.randn(1, width))
        self.nonterminals = nn.Parameter(torch.randn(nonterminals, width))
        self.preterminals = nn.Parameter(torch.randn(preterminals, width))
        self.symbols = nonterminals + preterminals
        self.begins = _layers(width + latent, width, nonterminals)
        self.divides = nn.Linear(width + latent, self.symbols**2)
        self.says = _layers(width + latent, width, words)
        self.embedding = nn.Embedding(words, width)
        self.reader = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.told = nn.Linear(2 * width, 2 * latent)

    def latent(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance: (sequences, latent)."""
        mean, variance = self.told(self.reader(self.embedding(words))[0].amax(1)).chunk(2, -1)
        return mean, variance

    def forward(self, words: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of roots (sequences, nonterminals), of rules (sequences, nonterminals, symbols,
        symbols), and of the words (sequences, length, preterminals)."""

        def given(states: Tensor) -> Tensor:
            by_sequence = states.expand(len(z), -1, -1)
            return torch.cat([by_sequence, z[:, None].expand(-1, len(states), -1)], -1)

        roots = self.begins(given(self.start))[:, 0].log_softmax(-1)
        rules = self.divides(given(self.nonterminals)).log_softmax(-1)
        says = self.says(given(self.preterminals)).log_softmax(-1).mT  # (sequences, words, preterminals)
        terms = says.take_along_dim(words[:, :, None], 1)
        return roots, rules.unflatten(-1, (self.symbols, self.symbols)), terms

    def bound(self, words: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Of the log-probabilities of sequences (sequences, length), from below; at the mean without noise."""
        mean, variance = self.latent(words)
        z = mean
        if noise is not None:
            z = mean + (variance / 2).exp() * torch.randn(mean.shape, generator=noise)
        divergence = (variance.exp() + mean.square() - 1 - variance).sum(-1) / 2
        return inside(*self(words, z)) - divergence

    def trees(self, words: Tensor) -> list[set[tuple[int, int]]]:
        """The brackets [start, end) of the best tree of every sequence, without words and the whole."""
        length = words.shape[1]
        with torch.inference_mode(False), torch.enable_grad():
            marks = [torch.zeros(len(words), length - w + 1, 1, requires_grad=True) for w in range(2, length)]
            roots, rules, terms = self(words, self.latent(words)[0])
            score = inside(roots, rules, terms, marks)
            used = torch.autograd.grad(score.sum(), marks) if marks else ()
        found: list[set[tuple[int, int]]] = [set() for _ in words]
        for w, mark in enumerate(used, 2):
            for row, start in mark[..., 0].nonzero().tolist():
                found[row].add((start, start + w))
        return found


def inside(roots: Tensor, rules: Tensor, terms: Tensor, marks: Sequence[Tensor] | None = None) -> Tensor:
    """Log-probability of every sequence, summed over trees; with `marks`, that of the best tree, in which a mark
    (sequences, starts, 1) of a width from 2 on has a slope where the tree has a bracket."""

    def total(t: Tensor, axis: int) -> Tensor:
        return t.logsumexp(axis) if marks is None else t.max(axis).values

    (_, length, preterminals), nonterminals = terms.shape, roots.shape[1]
    chart = {1: F.pad(terms, (nonterminals, 0), value=NEVER)}  # by width: (sequences, starts, symbols)
    for width in range(2, length + 1):
        starts = length - width + 1
        left = torch.stack([chart[w][:, :starts] for w in range(1, width)], 2)
        right = torch.stack([chart[width - w][:, w : w + starts] for w in range(1, width)], 2)
        pairs = total(left[..., :, None] + right[..., None, :], 2).flatten(
            2
        )  # (sequences, starts, symbols^2)
        made = total(pairs[:, :, None] + rules.flatten(2)[:, None], 3)
        if marks is not None and width < length:
            made = made + marks[width - 2]
        chart[width] = F.pad(made, (0, preterminals), value=NEVER)
    return total(chart[length][:, 0, :nonterminals] + roots, 1)


def fit(pieces: Sequence[Tensor], words: int, steps: int = 120, seed: int = 0) -> Grammar:
    """A grammar trained on batches (sequences, length)."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        model = Grammar(words)
        noise = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        sizes = torch.tensor([float(batch.numel()) for batch in pieces])
        for _ in range(steps):
            batch = pieces[int(sizes.multinomial(1, generator=noise))]
            batch = batch[torch.randperm(len(batch), generator=noise)[:32]]
            optimizer.zero_grad()
            (-model.bound(batch, noise).sum() / batch.numel()).backward()
            optimizer.step()
    return model


def perplexity(model: Grammar, pieces: Sequence[Tensor]) -> float:
    with torch.no_grad():
        total = sum(float(model.bound(batch).sum()) for batch in pieces)
    return math.exp(-total / sum(batch.numel() for batch in pieces))


def grammar(sequences: Sequences, length: int = 12, steps: int = 120) -> Statistic:
    """Perplexity on what was held out, how much its trees are those that branch to the right or left alone, and
    how far two seeds agree on them."""
    train, held, words = divided(sequences, length)
    models = [fit(train, words, steps, seed) for seed in range(2)]
    trees = [[tree for batch in held for tree in model.trees(batch)] for model in models]
    sizes = [batch.shape[1] for batch in held for _ in batch]
    lengths = torch.tensor([float(n) for n in sizes])
    to_right, to_left = zip(
        *(branching(tree, n) for tree, n in zip(trees[0], sizes, strict=True)), strict=True
    )
    agreed = [len(a & b) / max(1, n - 2) for a, b, n in zip(*trees, sizes, strict=True)]
    columns = {"length": lengths, "right": torch.tensor(to_right), "left": torch.tensor(to_left)}
    means = {name: float(columns[name].mean()) for name in ("right", "left")}
    return Statistic(perplexity(models[0], held), columns, {**means, "stability": sum(agreed) / len(agreed)})


def branching(tree: set[tuple[int, int]], length: int) -> tuple[float, float]:
    """Shares of the brackets of the tree that branches to the right alone, and to the left alone, which it has."""
    inner = max(1, length - 2)
    right = sum((start, length) in tree for start in range(1, length - 1))
    left = sum((0, end) in tree for end in range(2, length))
    return right / inner, left / inner


def divided(sequences: Sequences, length: int) -> tuple[list[Tensor], list[Tensor], int]:
    """Batches of pieces of one length each, those to train on and a fifth that is held out, and how many words."""
    order = {token: i for i, token in enumerate(sorted({token for s in sequences for token in s}))}
    pieces = [s[at : at + length] for s in sequences for at in range(0, len(s), length)]
    pieces = [piece for piece in pieces if len(piece) > 2]
    if len(pieces) < 5:
        raise InputError(
            f"There are {len(pieces)} pieces of three tokens and more.", "give a grammar more to read"
        )

    def batches(some: Iterable[Sequence[int]]) -> list[Tensor]:
        by_length: dict[int, list[list[int]]] = {}
        for piece in some:
            by_length.setdefault(len(piece), []).append([order[token] for token in piece])
        return [torch.tensor(rows) for rows in by_length.values()]

    held = set(range(0, len(pieces), 5))
    return (
        batches(piece for i, piece in enumerate(pieces) if i not in held),
        batches(pieces[i] for i in held),
        len(order),
    )


def _layers(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


# ---- corpora ---------------------------------------------------------------------------------------------


def looked_at(count: int = 120, patch: int = 4, codes: int = 24) -> tuple[Texts, Texts, Texts]:
    """Drawn pictures as the numbers of codes, the thing that each patch lies on, and its upper or lower half."""
    seen = drawn(count, seed=3)
    patches = F.unfold(seen.pixels, patch, stride=patch).mT  # (pictures, patches, values)
    flat = patches.flatten(0, 1)
    noise = torch.Generator().manual_seed(0)
    book = flat[torch.randperm(len(flat), generator=noise)[:codes]]
    for _ in range(10):
        nearest = torch.cdist(flat, book).argmin(-1)
        book = torch.stack(
            [flat[nearest == i].mean(0) if (nearest == i).any() else book[i] for i in range(codes)]
        )
    nearest = torch.cdist(flat, book).argmin(-1).view(count, -1)
    thing = F.avg_pool2d(seen.mask.float()[:, None], patch)[:, 0] > 0.5  # (pictures, rows, columns)
    rows = torch.arange(thing.shape[1])[:, None]
    middle = (thing * rows).sum((1, 2)) / thing.sum((1, 2)).clamp_min(1)
    objects = thing.long() * (1 + seen.kind[:, None, None])
    parts = torch.where(thing, 2 * objects + (rows > middle[:, None, None]), 0)
    tokens, things, halves = (tuple(map(tuple, t.flatten(1).tolist())) for t in (nearest, objects, parts))
    return tokens, things, halves


def sentences(count: int, seed: int = 0) -> Texts:
    """S -> NP VP,  NP -> article noun | article adjective noun,  VP -> verb NP, words of each by Zipf's law."""
    noise = torch.Generator().manual_seed(seed)
    kinds = {"article": range(2), "noun": range(2, 14), "verb": range(14, 20), "adjective": range(20, 26)}

    def said(*names: str) -> list[int]:
        shares = [1 / torch.arange(1.0, len(kinds[name]) + 1) for name in names]
        picks = [int(share.multinomial(1, generator=noise)) for share in shares]
        return [kinds[name][pick] for name, pick in zip(names, picks, strict=True)]

    def thing() -> list[int]:
        plain = bool(torch.rand(1, generator=noise) < 0.6)
        return said("article", "noun") if plain else said("article", "adjective", "noun")

    return tuple((*thing(), *said("verb"), *thing()) for _ in range(count))
