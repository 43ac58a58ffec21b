"""Every statistic against a law that the tokens were drawn from, or a value counted by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from torch.testing import assert_close
from zoo.base import enliven, generator, noise

from saccade.core.errors import InputError
from saccade.probes.visual_token_language import (
    Grammar,
    VisualTokenLanguage,
    branching,
    divided,
    entropy,
    fit,
    glove,
    grammar,
    huffman,
    innovation,
    inside,
    looked_at,
    perplexity,
    procrustes,
    purity,
    sentences,
    zipf,
)

EXAMPLE: dict[str, Any] = {"steps": 2, "width": 4}


def drawn_from(shares: Tensor, count: int, seed: int = 0) -> list[list[int]]:
    return [shares.multinomial(count, replacement=True, generator=generator(seed)).tolist()]


# ---- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.8, 1.0, 1.4])
def test_tokens_of_zipfs_law_have_its_exponent(s: float) -> None:
    found = zipf(drawn_from(torch.arange(1.0, 301) ** -s, 100_000))
    assert abs(found.value - s) < 0.05
    assert found.more["R^2"] > 0.98
    assert found.columns["count"].sum() == 100_000 == round(float(found.columns["fitted"].sum()))


def test_tokens_that_are_all_as_frequent_are_flat() -> None:
    assert abs(zipf([list(range(50)) * 20]).value) < 1e-6
    assert abs(zipf(drawn_from(torch.ones(50), 100_000)).value) < 0.05


def test_mandelbrots_shift_is_found() -> None:
    found = zipf(drawn_from((torch.arange(1.0, 301) + 8) ** -1.5, 200_000), shifted=True)
    assert abs(found.value - 1.5) < 0.1 and 6 < found.more["shift"] < 10.5
    assert found.more["R^2"] > zipf(drawn_from((torch.arange(1.0, 301) + 8) ** -1.5, 200_000)).more["R^2"]


def test_pairs_are_neighbours_of_one_sequence() -> None:
    assert zipf([[1, 2, 1, 2], [2, 2]], n=2).columns["count"].tolist() == [2, 1, 1]


def test_the_innovation_curve_is_that_of_independent_tokens() -> None:
    """sum_t 1 - (1 - p_t)^n, within what the mean of a hundred sources scatters by."""
    shares = torch.arange(1, 41, dtype=torch.double) ** -1.0
    shares = shares / shares.sum()
    sources = torch.tensor(drawn_from(shares, 6000)).view(100, 60)
    curves = torch.stack([innovation([source.tolist()]).columns["types"] for source in sources])
    n = torch.arange(1, 61, dtype=torch.double)
    expected = (1 - (1 - shares) ** n[:, None]).sum(1)
    allowed = 4 * curves.std(0) / 10 + 1e-9
    assert ((curves.mean(0) - expected).abs() <= allowed).all()
    assert innovation([[5, 5, 7], [5, 8]]).columns["types"].tolist() == [1, 1, 2, 2, 3]


def test_heaps_exponent_is_one_where_all_is_new_and_nothing_where_nothing_is() -> None:
    assert innovation([list(range(500))]).value == pytest.approx(1)
    assert innovation([[3] * 500]).value == pytest.approx(0)


@pytest.mark.parametrize("seed", range(5))
def test_huffmans_bits_lie_within_one_of_the_entropy(seed: int) -> None:
    shares = torch.rand(13, generator=generator(seed)) ** 4
    tokens = drawn_from(shares, 500, seed)
    counts = [tokens[0].count(t) for t in set(tokens[0])]
    h = -sum(c / 500 * math.log2(c / 500) for c in counts)
    assert entropy(tokens).value == pytest.approx(h)
    found = huffman(tokens)
    assert h <= found.value + 1e-12 and found.value < h + 1
    assert (2 ** -found.columns["bits"]).sum() == 1  # a code, and none of it is wasted
    assert found.more["ratio"] == pytest.approx(math.ceil(math.log2(len(counts))) / found.value)


def test_huffmans_code_is_the_one_made_by_hand() -> None:
    """a 4, b 2, c 1, d 1: 1, 2, 3 and 3 bits."""
    found = huffman([[0, 0, 0, 0, 1, 1], [2, 3]])
    assert found.columns["bits"].tolist() == [1, 2, 3, 3]
    assert found.value == 14 / 8 and found.more["ratio"] == 2 / (14 / 8)
    assert huffman([[7, 7]]).value == 0


def test_purity_is_counted_by_hand() -> None:
    """Token 1: three on segment 0 and one on 5. Token 2: one on each."""
    found = purity([[1, 1, 2], [1, 1, 2]], [[0, 0, 5], [0, 5, 0]])
    assert found.value == 4 / 6
    assert found.columns["purity"].tolist() == [0.75, 0.5]


# ---- topology --------------------------------------------------------------------------------------------


def test_embeddings_and_their_rotation_are_nowhere_apart_and_shuffled_rows_are() -> None:
    a = noise(30, 6).double()
    turn = torch.linalg.qr(noise(6, 6, seed=3).double()).Q
    assert procrustes(a, 3 * a @ turn + 7).value < 1e-7
    near = procrustes(a, a @ turn + 0.1 * noise(30, 6, seed=4)).value
    far = procrustes(a, (a @ turn)[torch.randperm(30, generator=generator(0))]).value
    assert 0.01 < near < 0.3 < far <= 2**0.5


def test_the_rotation_is_the_best_there_is() -> None:
    a, b = (noise(20, 3, seed=s).double() for s in (1, 2))
    found = procrustes(a, b).value
    a, b = ((t - t.mean(0)) / (t - t.mean(0)).norm() for t in (a, b))
    turns = (torch.linalg.qr(noise(3, 3, seed=s).double()).Q for s in range(300))
    others = [float((a @ turn - b).norm()) for turn in turns]
    assert found <= min(others) < found + 0.1


def test_embeddings_put_tokens_near_that_are_seen_with_the_same() -> None:
    """Kinds 0 to 3 are mostly seen among themselves, and so are 4 to 7."""
    picks = torch.randint(0, 4, (400, 6), generator=generator(0))
    picks[200:] += 4
    strangers = torch.rand(picks.shape, generator=generator(1)) < 0.1
    picks = torch.where(strangers, 7 - picks, picks)
    made = glove(picks.tolist(), width=4, window=5)
    made = made - made.mean(0)
    counts = picks.flatten().bincount()
    side = counts.argsort(descending=True, stable=True) >= 4
    alike = torch.cosine_similarity(made[:, None], made[None], -1)
    same = side[:, None] == side
    assert alike[same].mean() > alike[~same].mean() + 0.3


# ---- grammar ---------------------------------------------------------------------------------------------


def scores(length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of two nonterminals and three preterminals, for two sequences."""
    made = (
        torch.randn(*size, generator=generator(seed), dtype=torch.double)
        for size in ((2, 2), (2, 2, 25), (2, length, 3))
    )
    roots, rules, terms = made
    return roots.log_softmax(-1), rules.log_softmax(-1).unflatten(-1, (5, 5)), terms


def parses(
    rules: Tensor, terms: Tensor, symbol: int, start: int, end: int
) -> list[tuple[float, frozenset[Any]]]:
    """Every tree below a symbol with its score and brackets, written out."""
    if end - start == 1:
        return [(float(terms[start, symbol - 2]), frozenset())] if symbol >= 2 else []
    if symbol >= 2:
        return []
    found = []
    for middle, b, c in itertools.product(range(start + 1, end), range(5), range(5)):
        lefts, rights = parses(rules, terms, b, start, middle), parses(rules, terms, c, middle, end)
        for (x, left), (y, right) in itertools.product(lefts, rights):
            found.append((float(rules[symbol, b, c]) + x + y, left | right | {(start, end)}))
    return found


def test_the_inside_score_is_the_sum_over_all_trees_and_marks_are_the_brackets_of_the_best() -> None:
    roots, rules, terms = scores(4)
    marks = [torch.zeros(2, 4 - w + 1, 1, dtype=torch.double, requires_grad=True) for w in (2, 3)]
    best = inside(roots, rules, terms, marks)
    used = torch.autograd.grad(best.sum(), marks)
    for row in range(2):
        trees = [
            (float(roots[row, a]) + score, brackets)
            for a in range(2)
            for score, brackets in parses(rules[row], terms[row], a, 0, 4)
        ]
        every = torch.tensor([score for score, _ in trees], dtype=torch.double)
        assert_close(inside(roots, rules, terms)[row], every.logsumexp(0))
        assert_close(best[row].detach(), every.max())
        brackets = {
            (i, i + w)
            for w, mark in zip((2, 3), used, strict=True)
            for i in mark[row, :, 0].nonzero()[:, 0].tolist()
        }
        assert brackets | {(0, 4)} == trees[int(every.argmax())][1]


def test_a_grammars_probabilities_sum_to_one_over_all_sequences_of_a_length_and_less() -> None:
    """Sums over lengths 2 and 3 of two words stay below 1, and rise; the bound is below the log-probability."""
    torch.manual_seed(0)
    model, totals = Grammar(2, 2, 2, 8), []
    z = torch.zeros(1, 2)
    with torch.no_grad():
        for length in (2, 3):
            words = torch.tensor(list(itertools.product(range(2), repeat=length)))
            totals.append(float(inside(*model(words, z.expand(len(words), -1))).exp().sum()))
        assert model.bound(words).shape == (8,)
        rules = model(words[:1], z)[1][0].exp()  # that S ends at once: its rule goes to two preterminals
        begins = model(words[:1], z)[0][0].exp()
    assert totals[0] == pytest.approx(float(begins @ rules[:, 2:, 2:].sum((1, 2))), rel=1e-5)
    assert 0 < sum(totals) < 1


def test_a_grammars_own_corpus_is_less_perplexing_than_its_tokens_shuffled() -> None:
    corpus = sentences(100)
    flat = torch.tensor([token for s in corpus for token in s])
    flat = flat[torch.randperm(len(flat), generator=generator(0))].tolist()
    shuffled = [[flat.pop() for _ in s] for s in corpus]
    found = []
    for sequences in (corpus, shuffled):
        train, held, words = divided(sequences, 12)
        found.append(perplexity(fit(train, words, 50), held))
    assert found[0] < 0.8 * found[1]


def test_the_perplexity_of_a_grammar_that_knows_nothing_is_the_number_of_words() -> None:
    """All words alike, one nonterminal that divides into two words for certain."""
    model = Grammar(7, 1, 1, 8)
    with torch.no_grad():
        for layer in (model.divides, model.says[-1], model.told):
            layer.weight.zero_()
            layer.bias.zero_()
        model.divides.bias[3] = 100.0
    pairs = torch.randint(0, 7, (20, 2), generator=generator(0))
    assert perplexity(model, [pairs]) == pytest.approx(7, rel=1e-5)


def test_branching_is_counted_by_hand() -> None:
    """((a b) c) d e branches to the left with two of three brackets."""
    assert branching({(0, 2), (0, 3), (3, 5)}, 5) == (1 / 3, 2 / 3)
    assert branching({(1, 4), (2, 4)}, 4) == (1, 0)


def test_pieces_are_neither_lost_nor_read_twice() -> None:
    corpus = [list(range(10 * i, 10 * i + 7 + i % 2)) for i in range(10)]
    train, held, words = divided(corpus, 4)
    seen = sorted(int(t) for batch in (*train, *held) for t in batch.flatten())
    kept = [
        t for s in corpus for at in range(0, len(s), 4) if len(s[at : at + 4]) > 2 for t in s[at : at + 4]
    ]
    every = sorted({t for s in corpus for t in s})
    assert [every[i] for i in seen] == sorted(kept) and words == len(every)
    assert sum(len(batch) for batch in held) == 4
    with pytest.raises(InputError, match="2 pieces"):
        divided([[1, 2, 3], [1, 2, 3]], 4)


def test_what_a_grammar_is_told_by() -> None:
    found = grammar(sentences(40), steps=5)
    assert 1 < found.value < 40
    assert all(0 <= found.more[name] <= 1 for name in ("right", "left", "stability"))
    assert len(found.columns["length"]) == 8


# ---- corpora ---------------------------------------------------------------------------------------------


def test_drawn_pictures_tokens_tell_the_thing_better_than_shuffled_ones() -> None:
    tokens, objects, parts = looked_at(60)
    assert {len(s) for s in (*tokens, *objects, *parts)} == {64}
    found = purity(tokens, objects).value
    order = torch.randperm(60, generator=generator(0)).tolist()
    assert found > purity([tokens[i][::-1] for i in order], objects).value + 0.05
    assert purity(tokens, parts).value < found


@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_it_reads_what_tokenizers_of_transformers_give(name: str) -> None:
    shape: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
    if name == "chameleon":
        config = T.ChameleonVQVAEConfig(
            **shape, embed_dim=8, num_embeddings=32, latent_channels=8, resolution=32, attn_resolutions=[]
        )
        model: Any = enliven(T.ChameleonVQVAE(config)).eval()
        with torch.no_grad():
            ids = model.encode(noise(6, 3, 32, 32)).image_tokens
    else:
        config = T.Emu3VQVAEConfig(
            **shape,
            codebook_size=32,
            embed_dim=8,
            latent_channels=8,
            hidden_size=64,
            attn_resolutions=[],
            temporal_downsample_factor=1,
        )
        model = enliven(T.Emu3VQVAE(config)).eval()
        with torch.no_grad():
            ids = model.encode(noise(6, 3, 32, 32), torch.tensor([[32, 32]] * 6)).image_tokens
            ids = torch.stack(list(ids))
    pictures = tuple(map(tuple, ids.reshape(6, -1).tolist()))
    found = VisualTokenLanguage(pictures=pictures, texts=sentences(20), steps=1, length=6).run()
    assert (
        found.visual["entropy"].value == pytest.approx(entropy(pictures).value)
        and found.visual["entropy"].value > 0
    )
    assert "purity, objects" not in found.visual


def test_pictures_and_text_are_told_side_by_side() -> None:
    found = VisualTokenLanguage(**EXAMPLE).run()
    assert found.visual.keys() - found.textual.keys() == {"purity, objects", "purity, parts"}
    assert f"{found.visual['huffman'].value:.3f}" in repr(found) and "topology" in repr(found)
    assert 0 < found.topology.value < 2**0.5
