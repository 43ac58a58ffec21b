"""MasaCtrl by its identities, and against attention that is written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Look
from torch import Tensor
from zoo.base import generator
from zoo.pipelines import OTHER, PIPELINES, PROMPT, ready

import saccade as sc
from saccade.core.call import AttentionCall
from saccade.core.errors import InputError
from saccade.diffusion.masactrl import MasaCtrl

EXAMPLE: dict[str, Any] = {"start": 0.25, "source": "cat", "target": "horse", "first": 0.5}
LATENTS = torch.randn(1, 4, 16, 16, generator=generator(5)).repeat(2, 1, 1, 1)


def pair(*methods: Any, prompts: tuple[str, ...] = (PROMPT, OTHER), **options: Any) -> Tensor:
    latents = LATENTS[:1].repeat(len(prompts), 1, 1, 1)
    with sc.attach(ready("sd"), *methods):
        return PIPELINES["sd"].sample(
            ready("sd"), prompt=list(prompts), num_inference_steps=4, latents=latents, **options
        )


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_equal_prompts_stay_equal() -> None:
    rounding = apart(*pair(prompts=(PROMPT, PROMPT)))  # of one row of a batch against another
    assert apart(*pair(MasaCtrl(start=0.25, first=0.0), prompts=(PROMPT, PROMPT))) <= max(1e-4, 4 * rounding)


def test_after_the_last_step_and_behind_the_last_layer_nothing_is_changed() -> None:
    bare = pair()
    assert torch.equal(pair(MasaCtrl(start=1.0)), bare)
    assert torch.equal(pair(MasaCtrl(first=1.0)), bare)
    assert torch.equal(pair(MasaCtrl(start=1.0, source="cat", target="horse")), bare)


@pytest.mark.parametrize("words", [{}, {"source": "cat", "target": "horse"}])
def test_the_source_is_never_changed(words: dict[str, str]) -> None:
    bare, edited = pair(), pair(MasaCtrl(start=0.25, first=0.0, **words))
    assert torch.equal(edited[0], bare[0])
    assert apart(edited[1], bare[1]) > 0.01


def test_a_mask_of_everything_is_no_mask() -> None:
    everywhere = MasaCtrl(start=0.25, first=0.0, source="cat", target="horse", threshold=0.0)
    plain = pair(MasaCtrl(start=0.25, first=0.0))
    torch.testing.assert_close(pair(everywhere), plain, rtol=1e-4, atol=1e-4)
    masked = pair(MasaCtrl(start=0.25, first=0.0, source="cat", target="horse"))
    assert apart(masked, plain) > 0.01


def test_layers_are_counted_as_a_unet_runs_them() -> None:
    """The first half of seven layers, down, middle and the first up, stays as it is."""

    def tell(call: AttentionCall) -> bool:  # in the first step the latents are alike, and so are first keys
        return call.pass_.i > 0 and torch.equal(call.k[3], call.k[2])  # type: ignore[attr-defined]

    seen = Look(sites="unet.*.self", tell=tell)
    pair(MasaCtrl(start=0.0, first=0.5), seen)
    mutual = {site for site, _, told in seen.seen if told}
    order = list(dict.fromkeys(site for site, _, _ in seen.seen))
    assert mutual == set(order[round(0.5 * len(order)) :])
    assert all(site.startswith("unet.up") for site in mutual)


def test_both_halves_take_from_their_own_source() -> None:
    kept: dict[str, Tensor] = {}

    def tell(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        return call.k, call.v, call.q

    for name, method in (("bare", None), ("edited", MasaCtrl(start=0.0, first=0.0))):
        seen = Look(sites="unet.down.0.0.0.self", tell=tell)
        pair(*filter(None, [method, seen]))
        kept[name] = seen.seen[0][2]
    (k, v, q), (ek, ev, eq) = kept["bare"], kept["edited"]
    assert torch.equal(eq, q)
    for half in (slice(0, 2), slice(2, 4)):
        for edited, bare in ((ek, k), (ev, v)):
            assert torch.equal(edited[half][0], bare[half][0])
            assert torch.equal(edited[half][1], bare[half][0])


def test_object_and_background_are_read_apart() -> None:
    """Of the first masked call: the object sees the source's object alone, the others its background."""
    maps: list[Tensor] = []
    outs: list[tuple[Any, ...]] = []

    def cross(call: AttentionCall) -> None:
        if call.pass_.i == 0 and call.q.shape[2] == 16:  # type: ignore[attr-defined]
            source, target = (call.columns(f"word:{word}")[:, 0, 0] for word in ("cat", "horse"))
            w = call.weights().mean(1)
            maps.append(torch.stack([w[2][:, source[2]].sum(-1), w[3][:, target[3]].sum(-1)]))

    def own(call: AttentionCall) -> None:
        if call.pass_.i == 0 and call.site.name.startswith("unet.up"):  # type: ignore[attr-defined]
            outs.append((call.q, call.k, call.v, call.out, len(maps)))

    pair(
        MasaCtrl(start=0.0, first=0.4, source="cat", target="horse", threshold=0.4),
        Look(sites="unet.*.cross", tell=cross), Look(sites="unet.*.self", tell=own),
    )  # fmt: skip
    q, k, v, out, count = next(o for o in outs if o[-1])
    seen = torch.stack(maps[:count]).mean(0).view(2, 4, 4)
    low, high = seen.amin((1, 2), keepdim=True), seen.amax((1, 2), keepdim=True)
    side = int(q.shape[2] ** 0.5)
    mask = (
        ((seen - low) / (high - low) >= 0.4)
        .repeat_interleave(side // 4, 1)
        .repeat_interleave(side // 4, 2)
        .flatten(1)
    )
    assert 0 < int(mask[0].sum()) < mask.shape[1]
    for uncond_or_cond in (0, 2):
        target, source = uncond_or_cond + 1, uncond_or_cond
        scores = (q[target] @ k[source].transpose(-1, -2)) * q.shape[-1] ** -0.5
        for queries, keys in ((mask[1], mask[0]), (~mask[1], ~mask[0])):
            w = scores[:, queries].masked_fill(~keys, -torch.inf).softmax(-1)
            assert torch.allclose(w.sum(-1), torch.ones(())) and not w[..., ~keys].any()
            torch.testing.assert_close(out[target][:, queries], w @ v[source], rtol=1e-4, atol=1e-5)


def test_one_prompt_alone_is_refused() -> None:
    with pytest.raises(InputError, match="MasaCtrl takes the first prompt for the source"):
        pair(MasaCtrl(), prompts=(PROMPT,))
