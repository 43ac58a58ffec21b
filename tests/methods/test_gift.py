"""GIFT against the maps of a model, put together by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run
from zoo.base import words

import saccade as sc
from saccade.steering.gift import GIFT, content_words, fused, salience

from .shared import Inputs, alone, followed, generated, numbers, two

EXAMPLE: dict[str, Any] = {}

SEEN, EDITED = 1, 2  # of four layers
ALPHA = 5.0


def eager(name: str = "llava") -> Any:
    return shared(name, torch.float32, "eager")


def maps(model: Any, inputs: Inputs, *methods: Any) -> tuple[Tensor, ...]:
    with torch.no_grad(), sc.attach(model, *methods):
        return model(**inputs, output_attentions=True).attentions


# ---- the paper, one sample, lists of numbers ----------------------------------------------------------


def top_half(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda h: -values[h])[: max(1, len(values) // 2)]


def salience_by_hand(w: Tensor, pictures: list[int], asked: list[int]) -> list[float]:
    """Of every visual token, from a layer's weights (heads, rows, keys)."""
    rises = [[[max(0.0, float(head[j, v] - head[j - 1, v])) for v in pictures] for j in asked] for head in w]
    heads = top_half([sum(map(sum, rows)) for rows in rises])
    mean = [sum(rises[h][j][v] for h in heads for j in range(len(asked))) / (len(heads) * len(asked))
            for v in range(len(pictures))]  # fmt: skip
    centre = sum(mean) / len(mean)
    spread = math.sqrt(sum((m - centre) ** 2 for m in mean) / (len(mean) - 1))
    mean = [min(max(m, centre - 3 * spread), centre + 3 * spread) for m in mean]
    return [(m - min(mean)) / (max(mean) - min(mean)) for m in mean]


def row_by_hand(
    w: Tensor, s: list[float], pictures: list[int], asked: list[int], beta: float = 1.0
) -> Tensor:
    """A row of every head (heads, keys)."""
    new = w.clone()
    looking = top_half([float(head[pictures].sum()) for head in w])
    reading = top_half([float(head[asked].sum()) for head in w])
    before = sum(float(w[h][pictures].sum()) for h in looking)
    for h in looking:
        for v, salient in zip(pictures, s, strict=True):
            new[h, v] *= math.exp(ALPHA * salient)
    rho = sum(float(new[h][pictures].sum()) for h in looking) / before
    for h in reading:
        new[h, asked] *= beta * rho
    return new / new.sum(-1, keepdim=True)


def places(model: Any, inputs: Inputs, sample: int) -> tuple[list[int], list[int]]:
    """Of the pictures, and of the words behind the last of them."""
    ids, real = inputs["input_ids"][sample], inputs["attention_mask"][sample].bool()
    pictures = (ids == model.config.image_token_id).nonzero()[:, 0].tolist()
    config = model.config
    marks = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    special = {config.text_config.bos_token_id, config.text_config.eos_token_id, *marks}
    asked = [j for j in range(pictures[-1] + 1, len(ids)) if real[j] and int(ids[j]) not in special]
    return pictures, asked


@pytest.mark.parametrize("beta", [1.0, 1.5])
@pytest.mark.parametrize(("name", "side"), [("llava", "left"), ("qwen2_5_vl", "right")])
def test_the_newest_row_is_the_papers(name: str, side: str, beta: float) -> None:
    """Two samples of one and two pictures, padded."""
    model, inputs = eager(name), two(family(name), side=side)
    before, after = maps(model, inputs), maps(model, inputs, GIFT(beta=beta))
    for sample in (0, 1):
        pictures, asked = places(model, inputs, sample)
        last = int(inputs["attention_mask"][sample].nonzero()[-1])
        s = salience_by_hand(before[SEEN][sample], pictures, asked)
        wanted = row_by_hand(before[EDITED][sample, :, last], s, pictures, asked, beta)
        assert (wanted - before[EDITED][sample, :, last]).abs().max() > 0.05
        assert_close(after[EDITED][sample, :, last], wanted, atol=1e-5, rtol=0)
    rows = torch.arange(last)
    assert_close(after[EDITED][1][:, rows], before[EDITED][1][:, rows], atol=0, rtol=0)


def test_while_writing_the_map_is_the_prompts_and_a_later_question_has_its_own() -> None:
    model, inputs = eager(), alone(two(family("llava")), 0)
    with sc.attach(model, GIFT()):
        first = generated(model, inputs, 3, output_attentions=True)
        question = followed(inputs, first, words(1, 6, seed=9))
        second = generated(model, question, 2, output_attentions=True, past_key_values=first.past_key_values)
    whole = {"input_ids": second.sequences, "pixel_values": inputs["pixel_values"]}
    native = maps(model, whole)  # the layers below the edited one are not edited
    pictures, asked = places(model, inputs, 0)
    start, again = inputs["input_ids"].shape[1], question["input_ids"].shape[1]
    for made, at, words_ in ((first, start, asked), (second, again, [*range(start + 3, again)])):
        s = salience_by_hand(native[SEEN][0], pictures, words_)
        for step, weights in enumerate(made.attentions):
            row = at - 1 + step
            wanted = row_by_hand(native[EDITED][0, :, row, : row + 1], s, pictures, words_)
            assert_close(weights[EDITED][0, :, -1], wanted, atol=1e-5, rtol=0)


# ---- the statements -----------------------------------------------------------------------------------


def test_alpha_of_zero_gives_identical_logits() -> None:
    model, inputs = shared("llava"), two(family("llava"))
    bare = run(model, inputs)
    with sc.attach(model, GIFT(alpha=0.0)):
        assert torch.equal(run(model, inputs), bare)


def trace(heads: int = 4, words_: int = 5, keys: int = 20) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.rand(1, heads, words_, keys, generator=noise, dtype=torch.float64) * 0.01


def test_salience_sits_on_a_planted_target_and_is_none_where_attention_never_rises() -> None:
    rise, visual = trace(), (torch.arange(20) < 12)[None]
    rise[..., 5] += 0.2
    rise[..., 8] = 0
    rise[..., 15] += 9  # no visual token
    s = salience(rise * visual, visual)[0]
    assert int(s.argmax()) == 5 and float(s[5]) == 1
    assert float(s[8]) == 0 and (s[12:] == 0).all() and (s >= 0).all()


def test_without_a_rise_nothing_is_salient() -> None:
    assert (salience(torch.zeros(1, 4, 0, 20), (torch.arange(20) < 12)[None]) == 0).all()


def rows(heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, gains, visual and question columns."""
    noise = torch.Generator().manual_seed(1)
    w = torch.rand(1, heads, 1, 20, generator=noise, dtype=torch.float64).exp().softmax(-1)
    gain = torch.rand(1, 1, 1, 20, generator=noise, dtype=torch.float64).mul(3).exp()
    columns = torch.arange(20)[None, None, None]
    return w, gain, (columns >= 3) & (columns < 12), columns >= 14


def test_rows_sum_to_one_and_other_heads_are_bit_identical() -> None:
    w, gain, visual, asked = rows(8)
    new = fused(w, gain, visual, asked, 1.0)
    assert_close(new.sum(-1), torch.ones_like(new.sum(-1)))
    chosen = {*top_half((w * visual).sum(-1)[0, :, 0].tolist()),
              *top_half((w * asked).sum(-1)[0, :, 0].tolist())}  # fmt: skip
    others = [h for h in range(8) if h not in chosen]
    assert others and torch.equal(new[:, others], w[:, others])
    assert ((new - w)[:, sorted(chosen)].abs().amax(-1) > 1e-3).all()


def test_in_a_head_chosen_for_both_the_ratio_changes_by_rho_over_its_own_gain() -> None:
    w, gain, visual, asked = rows(8)
    new = fused(w, gain, visual, asked, 1.0)
    seen, read = ((w * c).sum(-1)[0, :, 0].tolist() for c in (visual, asked))
    both = [h for h in top_half(seen) if h in top_half(read)]
    gained = (w * gain * visual).sum(-1)[0, :, 0].tolist()
    rho = sum(gained[h] for h in top_half(seen)) / sum(seen[h] for h in top_half(seen))
    now = ((new * asked).sum(-1) / (new * visual).sum(-1))[0, :, 0].tolist()
    assert both
    for h in both:
        assert now[h] == pytest.approx(read[h] / seen[h] * rho / (gained[h] / seen[h]))


def test_of_a_single_head_the_ratio_stays() -> None:
    w, gain, visual, asked = rows(1)
    new = fused(w, gain, visual, asked, 1.0)
    ratio = [float((x * asked).sum() / (x * visual).sum()) for x in (w, new)]
    assert ratio[0] == pytest.approx(ratio[1])
    assert (new - w).abs().max() > 1e-3


def test_the_papers_layers_of_32() -> None:
    sites = GIFT().sites
    assert numbers(sites["observe"]) == [11] and numbers(sites["weights"]) == [*range(12, 23)]


def test_a_prompt_of_words_is_untouched() -> None:
    model, ids = shared("llava"), words(1, 8)
    bare = run(model, {"input_ids": ids})
    with sc.attach(model, GIFT()):
        assert torch.equal(run(model, {"input_ids": ids}), bare)


# ---- content words, and the embedded model ------------------------------------------------------------


def told(text: str, **options: Any) -> str:
    _, processor = sc.world.load("vlm")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = [i for i, content in zip(ids, content_words(processor, **options)(ids), strict=True) if content]
    return processor.tokenizer.decode(kept)


def test_content_words_are_told_by_a_list_or_by_a_tagger() -> None:
    question = "what colour is the car ?"
    assert told(question) == "colour car"
    tags = {"what": "PRON", "colour": "NOUN", "is": "VERB", "the": "DET", "car": "NOUN", "?": "PUNCT"}
    assert told(question, tag=lambda texts: [tags[t] for t in texts]) == "colour is car"


def test_only_content_words_of_the_embedded_model_make_the_map() -> None:
    model, processor = sc.world.load("vlm")
    model.set_attn_implementation("eager")
    inputs = dict(
        sc.Question(processor, [sc.world.scene(9, "test").picture()], "what colour is the car ?").inputs(
            model
        )
    )
    pictures, asked = places(model, inputs, 0)
    ids = inputs["input_ids"][0]
    named = [j for j in asked if processor.tokenizer.decode(ids[j]).strip() in ("colour", "car", "assistant")]
    seen, edited = 3, 4
    before = maps(model, inputs)
    after = maps(
        model,
        inputs,
        GIFT(content=content_words(processor), sites={"observe": "text.3.self", "weights": "text.4.self"}),
    )
    s = salience_by_hand(before[seen][0], pictures, named)
    wanted = row_by_hand(before[edited][0, :, -1], s, pictures, asked)
    assert len(named) == 3 and (wanted - before[edited][0, :, -1]).abs().max() > 0.01
    assert_close(after[edited][0, :, -1], wanted, atol=1e-5, rtol=1e-4)
