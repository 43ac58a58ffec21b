"""Prompt-to-Prompt by its identities, and the alignment of tokens by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look
from torch import Tensor
from zoo.pipelines import OTHER, PROMPT

from saccade.core.call import AttentionCall
from saccade.core.words import Word
from saccade.diffusion.prompt_to_prompt import PromptToPrompt, align

from .test_masactrl import apart, pair

EXAMPLE: dict[str, Any] = {"cross": 0.5, "own": 0.5, "blend": ("cat", "horse"), "threshold": 0.6}
LONGER = "a red cat and a blue dog on the mat"


def maps(
    method: Any, prompts: tuple[str, ...] = (PROMPT, OTHER), sites: str = "unet.*.cross"
) -> dict[Any, Tensor]:
    """Weights of the prompts' rows by site and step."""
    kept: dict[Any, Tensor] = {}

    def tell(call: AttentionCall) -> None:
        rows = call.pass_.rows["cond"]
        kept[call.site.name, call.pass_.i] = call.weights()[rows]  # type: ignore[attr-defined]

    pair(*filter(None, [method, Look(sites=sites, tell=tell)]), prompts=prompts)
    return kept


def test_equal_prompts_make_equal_pictures() -> None:
    rounding = apart(*pair(prompts=(PROMPT, PROMPT)))
    for options in ({}, {"cross": 1.0, "own": 1.0}, {"blend": ("cat",)}):
        assert apart(*pair(PromptToPrompt(**options), prompts=(PROMPT, PROMPT))) <= max(1e-4, 4 * rounding)


def test_without_a_steered_step_nothing_is_changed() -> None:
    assert torch.equal(pair(PromptToPrompt(cross=0.0, own=0.0)), pair())


def test_factors_of_one_are_none() -> None:
    assert torch.equal(pair(PromptToPrompt(factors={"horse": 1.0})), pair(PromptToPrompt()))


@pytest.mark.parametrize("options", [{}, {"cross": 1.0, "own": 1.0}, {"factors": {"horse": -1.0}}, EXAMPLE])
def test_the_source_is_never_changed(options: dict[str, Any]) -> None:
    bare, edited = pair(), pair(PromptToPrompt(**options))
    assert torch.equal(edited[0], bare[0])
    assert apart(edited[1], bare[1]) > 0.01


def test_a_swap_has_the_sources_maps_until_its_last_steered_step() -> None:
    for (site, step), (source, edit) in maps(PromptToPrompt(cross=0.5, own=0.0)).items():
        assert torch.equal(edit, source) == (step < 2), (site, step)


def test_words_that_keep_their_own_maps() -> None:
    bare = maps(None)
    refined = maps(PromptToPrompt(cross=1.0, own=0.0, swap=False))
    for site in {site for site, _ in bare}:
        (source, edit), own = refined[site, 0], bare[site, 0][1]
        others = [c for c in range(77) if c != 3]  # the cat's, and the horse's
        assert torch.equal(edit[..., others], source[..., others])
        if site == "unet.down.0.0.0.cross":  # which nothing has reached yet
            torch.testing.assert_close(edit[..., 3], own[..., 3])


def test_new_words_stand_beside_those_of_the_source() -> None:
    """What follows the new words is the end and the filling, as in the source."""
    for (site, _), (source, edit) in maps(PromptToPrompt(cross=1.0, own=0.0), (PROMPT, LONGER)).items():
        assert torch.equal(edit[..., :8], source[..., :8]), site
        assert torch.equal(edit[..., 11:], source[..., 8:74]), site


def test_a_factor_multiplies_its_words_column() -> None:
    plain, louder = (
        maps(PromptToPrompt(cross=1.0, own=0.0, factors=factors))["unet.down.0.0.0.cross", 0]
        for factors in ({}, {"horse": 2.0})
    )
    expected = plain.clone()
    expected[1, ..., 3] *= 2
    assert torch.equal(louder, expected)


def test_self_attention_is_the_sources_on_small_maps_only() -> None:
    for (site, step), (source, edit) in maps(PromptToPrompt(cross=0.0, own=0.5), sites="unet.*.self").items():
        small = site.startswith("unet.mid")
        if step == 0 and site == "unet.down.0.0.0.self":
            continue  # where the same latents have the same maps anyhow
        assert torch.equal(edit, source) == (small and step < 2), (site, step)


def test_nothing_differs_outside_of_the_blend() -> None:
    source, edit = pair(PromptToPrompt(cross=0.5, blend=("cat", "horse"), threshold=1.0))
    assert torch.equal(source, edit)
    source, edit = pair(PromptToPrompt(cross=0.5, blend=("cat", "horse"), threshold=0.99))
    differs = (source != edit).any(0)
    assert 0 < int(differs.sum()) < differs.numel()


def test_the_blend_is_where_the_words_are_attended_to() -> None:
    seen: list[Tensor] = []

    def tell(call: AttentionCall) -> None:
        if call.q.shape[2] == 16:
            w = call.weights()[call.pass_.rows["cond"]]
            seen.append(w[..., 3].mean(1).view(2, 4, 4))

    source, edit = pair(
        PromptToPrompt(cross=0.5, own=0.5, blend=("cat", "horse"), threshold=0.99),
        Look(sites="unet.*.cross", tell=tell),
    )
    total = torch.stack(seen).sum(0)[:, None]
    wide = torch.nn.functional.interpolate(
        torch.nn.functional.max_pool2d(total, 3, 1, 1), (16, 16), mode="bilinear"
    )
    mask = (wide / wide.amax((2, 3), keepdim=True) > 0.99).any(0)[0]
    assert torch.equal((source != edit).any(0), mask)


def said(*tokens: int) -> list[Word]:
    """Words w0, w1, .. of so many tokens each, behind a beginning."""
    starts = [1 + sum(tokens[:i]) for i in range(len(tokens))]
    return [Word(f"w{i}", tuple(range(s, s + n)), False) for i, (s, n) in enumerate(zip(starts, tokens))]


def test_tokens_of_a_swap_share_what_the_source_has() -> None:
    source, edit = said(1, 2, 1), said(1, 3, 1)
    edit[1] = edit[1]._replace(text="other")
    given, own = align(source, edit, 8, swap=True)
    assert given[2:4, 2:5].tolist() == [[pytest.approx(1 / 3)] * 3] * 2
    assert [given[0, 0], given[1, 1], given[4, 5], given[5, 6], given[6, 7]] == [1] * 5
    assert given[7].sum() == 0 and not own.any()


def test_words_that_are_not_exchanged_one_for_one_keep_their_own() -> None:
    source, edit = said(1, 1), said(1, 1, 1)
    edit[1:] = [word._replace(text=f"new{i}") for i, word in enumerate(edit[1:])]
    given, own = align(source, edit, 6, swap=True)
    assert own.tolist() == [0, 0, 1, 1, 0, 0]
    assert given[2].sum() == 0 and given[3, 4] == given[4, 5] == 1
