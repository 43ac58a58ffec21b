"""Task-KV against heads compared one by one, with the weights that the model returns and values seen on their way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import readers
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.reduction.task_kv import TaskKV, chosen, full_heads, meaning

from .embedded import asked, said, trained
from .shared import Inputs, alone, followed, generated, two

EXAMPLE: dict[str, Any] = {
    "keep": 0.8, "beta": 0.5, "least": 1, "sinks": 2, "recent": 4, "window": 5, "top": 6,
}  # fmt: skip
MODELS = ("llama", "gpt2")
DISCRETE = ("beta", "least")
DOUBLE = torch.float64


def sample(name: str) -> Inputs:
    single = alone(two(family(name), DOUBLE), 0)
    return {name: value for name, value in single.items() if name != "attention_mask"}


# ---- the paper, head by head -----------------------------------------------------------------------------


def values(name: str, inputs: Inputs) -> list[Tensor]:
    """(heads, tokens, dim) of every layer, as the linear maps give them."""
    model, seen = shared(name, DOUBLE, "eager"), []
    parts = [m.c_attn if name == "gpt2" else m.v_proj for _, m in sorted(readers(model).items())]
    hooks = [part.register_forward_hook(lambda _, __, out: seen.append(out[0])) for part in parts]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    if name == "gpt2":
        seen = [out[:, 2 * out.shape[1] // 3 :] for out in seen]
    return [out.unflatten(-1, (-1, 16)).transpose(0, 1) for out in seen]


def by_hand(name: str, inputs: Inputs, options: dict[str, Any]) -> list[list[list[int]]]:
    """Entries that every key head of every layer keeps."""
    with torch.no_grad():
        attentions = shared(name, DOUBLE, "eager")(**inputs, output_attentions=True).attentions
    kept = []
    for r, (w, v) in enumerate(zip(attentions, values(name, inputs), strict=True)):
        n, length, window = len(v), w.shape[-1], options["window"]
        group = w.shape[1] // n
        rows = w[0, :, length - window :].sum(1) / window
        c = [sum(rows[h * group + g] for g in range(group)) / group for h in range(n)]
        vectors = []
        for h in range(n):
            best = sorted(range(length), key=lambda j: -float(c[h][j]))[: options["top"]]
            vectors.append(sum(c[h][j] * v[h, j] for j in best))
        centre = sum(vectors) / n
        far = [float(((u - centre) ** 2).sum()) for u in vectors]
        f = round(n * options["beta"] - (n * options["beta"] - options["least"]) * r / (len(attentions) - 1))
        order = sorted(range(n), key=lambda h: round(far[h] / max(far), 9))  # two are equally far
        full = {order[0], *order[::-1][: f - 1]}
        sinks, recent = options["sinks"], options["recent"]
        k = round((options["keep"] * n * length - length * f) / (n - f)) - sinks - recent
        layer = []
        for h in range(n):
            middle = range(sinks, length - recent)
            pooled = {j: sum(float(c[h][i]) for i in middle if abs(i - j) <= 3) / 7 for j in middle}
            best = sorted(middle, key=lambda j: -pooled[j])[:k]
            some = [*range(sinks), *sorted(best), *range(length - recent, length)]
            layer.append(list(range(length)) if h in full else some)
        kept.append(layer)
    return kept


def entries(cache: Any) -> list[list[list[int]]]:
    found = []
    for layer in cache.layers:
        pos, heads = layer.positions()[0], layer.keys.shape[1]
        rows = [pos] * heads if pos.ndim == 1 else pos
        found.append([[p for p in row.tolist() if p >= 0] for row in rows])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_every_head_keeps(name: str) -> None:
    inputs, length = sample(name), 24
    with sc.attach(shared(name, DOUBLE), TaskKV(**EXAMPLE)):
        got = entries(generated(shared(name, DOUBLE), inputs, 1).past_key_values)
    assert got == by_hand(name, inputs, EXAMPLE)
    for layer in got:
        n, counts = len(layer), {len(head) for head in layer}
        assert abs(sum(map(len, layer)) - 0.8 * n * length) <= n
        assert all(len(set(head)) == len(head) for head in layer)
        assert len(counts - {length}) == 1


def test_the_next_words_see_what_is_kept() -> None:
    """Against whole forwards in which what every head has lost is masked."""
    from dense import oracle

    model, inputs = shared("llama", DOUBLE), sample("llama")
    kept = by_hand("llama", inputs, EXAMPLE)
    with sc.attach(model, TaskKV(**EXAMPLE)):
        got = generated(model, inputs, 4)
    prompt, whole = inputs["input_ids"].shape[1], oracle("llama")
    modules = readers(whole)
    for layer, heads in enumerate(kept):
        gone = torch.ones(1, 2, prompt + 3, prompt + 3, dtype=torch.bool)
        for head, places in enumerate(heads):
            gone[0, head, :, [*places, *range(prompt, prompt + 3)]] = False
        gone[:, :, :prompt] = False
        modules[layer].gone = gone
    try:
        made = run(whole, {"input_ids": got.sequences[:, :-1]})[0, prompt - 1 :]
    finally:
        for module in modules.values():
            del module.gone
    assert_close(torch.cat(got.logits), made.float(), atol=1e-5, rtol=0)


def test_full_heads_fall_linearly_from_a_share_to_a_count() -> None:
    assert [full_heads(r, 32, 32, 0.25, 4) for r in (0, 31)] == [8, 4]
    assert [full_heads(r, 5, 40, 0.3, 4) for r in range(5)] == [12, 10, 8, 6, 4]
    assert [full_heads(r, 3, 4, 1.0, 1000000) for r in range(3)] == [4, 4, 4]
    assert full_heads(0, 1, 8, 0.5, 1) == 4
    assert full_heads(0, 4, 8, 0.0, 1) == 1


def test_meaning_of_all_tokens_is_the_mean_row_times_values() -> None:
    rng = torch.Generator().manual_seed(0)
    c, v = torch.rand(2, 3, 10, generator=rng), torch.randn(2, 3, 10, 4, generator=rng)
    everything = torch.ones(2, 3, 10, dtype=torch.bool)
    assert_close(meaning(c, v, everything, 10), torch.einsum("bhj,bhjd->bhd", c, v))
    two_best = c.topk(2).indices
    made = torch.stack(
        [
            torch.stack([sum(c[b, h, j] * v[b, h, j] for j in two_best[b, h]) for h in range(3)])
            for b in range(2)
        ]
    )
    assert_close(meaning(c, v, everything, 2), made)
    assert not meaning(c, v, ~everything, 2).any()


def test_the_far_head_and_the_nearest_are_full() -> None:
    rng = torch.Generator().manual_seed(1)
    vectors = torch.randn(1, 8, 4, generator=rng)
    vectors[0, 5] += 50
    far = (vectors[0] - vectors[0].mean(0)).norm(dim=1)
    assert int(far.argmax()) == 5
    nearest = int(far.argmin())
    assert chosen(vectors, 1)[0].nonzero()[:, 0].tolist() == [nearest]
    assert set(chosen(vectors, 2)[0].nonzero()[:, 0].tolist()) == {5, nearest}
    for count in range(1, 9):
        assert int(chosen(vectors, count).sum()) == count and chosen(vectors, count)[0, nearest]
        assert torch.equal(chosen(vectors * 7.5, count), chosen(vectors, count))


def test_all_heads_full_is_the_full_cache() -> None:
    model, inputs = shared("llama"), {"input_ids": sample("llama")["input_ids"]}
    bare = generated(model, inputs).logits
    for options, same in (({"beta": 1.0, "least": 9}, True), ({"beta": 1.0, "least": 1}, False)):
        with sc.attach(model, TaskKV(**{**EXAMPLE, **options})):
            got = generated(model, inputs).logits
        assert all(torch.equal(a, b) for a, b in zip(got, bare)) == same


def test_a_later_turn_ends_with_its_own_share() -> None:
    model, inputs = shared("llama", DOUBLE), sample("llama")
    with sc.attach(model, TaskKV(**EXAMPLE)):
        first = generated(model, inputs, 5)
        more = followed(inputs, first, torch.full((1, 9), 150))
        second = generated(model, more, 1, past_key_values=first.past_key_values)
    length = more["input_ids"].shape[1]
    for layer in entries(second.past_key_values):
        assert sum(map(len, layer)) <= 0.8 * 2 * length + 1
        for head in layer:
            assert head[:2] == [0, 1] and head[-4:] == list(range(length - 4, length))


def test_on_the_trained_model() -> None:
    (model, _), inputs = trained(), asked()
    options = {**EXAMPLE, "keep": 0.7, "sinks": 4, "recent": 8}
    with sc.attach(model, TaskKV(**options)):
        cache = generated(model, inputs, 1).past_key_values
    lengths = inputs["attention_mask"].sum(1)
    for layer in cache.layers:
        held, heads = (layer.positions() >= 0).sum((1, 2)), layer.keys.shape[1]
        assert_close(held.double(), 0.7 * heads * lengths.double(), atol=float(heads), rtol=0)
    assert said(TaskKV(beta=1.0, least=99)) == said()


def test_a_budget_below_what_must_stay_is_refused() -> None:
    model, inputs = shared("llama"), {"input_ids": sample("llama")["input_ids"]}
    with (
        sc.attach(model, TaskKV(**{**EXAMPLE, "keep": 0.5})),
        pytest.raises(InputError, match="of 48 entries"),
    ):
        generated(model, inputs)
    with sc.attach(model, TaskKV(**{**EXAMPLE, "keep": 0.5, "recent": 30})):
        assert entries(generated(model, inputs, 1).past_key_values)[0] == [list(range(24))] * 2
