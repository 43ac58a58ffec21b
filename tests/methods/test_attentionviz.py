"""Queries and keys that can be compared, against the models' own attention; and their page, in a browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import outputs_of, shared
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.question import prepare_batch, written
from saccade.probes.attentionviz import AttentionViz, Vectors, correlation, joined, moved, scaled

from .shared import two

EXAMPLE: dict[str, Any] = {}
CHROMIUM = shutil.which("chromium")
browsing = pytest.mark.skipif(CHROMIUM is None, reason="the page is clicked in Debian's chromium")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def seen(name: str, inputs: Any, tower: str = "text", **options: Any) -> Vectors:
    with sc.attach(shared(name), AttentionViz(**options)) as session:
        run(shared(name), inputs)
    return session.results["attentionviz"][tower]


def parts(found: Vectors, t: Tensor) -> list[Tensor]:
    """By input."""
    return [*t.split([len(one) for one in found.inputs], 2)]


def attended(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """By scaled dot products of (..., tokens, dim)."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    after = torch.ones(scores.shape[-2:]).triu(1).bool() & causal
    return scores.masked_fill(after, -torch.inf).softmax(-1)


# ---- what is comparable ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tower"), [("llama", "text"), ("gpt2", "text"), ("vit", "vision")])
def test_attention_of_moved_and_scaled_vectors_is_the_models_own(name: str, tower: str) -> None:
    inputs = two(family(name))
    with torch.no_grad():
        eager = shared(name, implementation="eager")(**inputs, output_attentions=True).attentions
    found = seen(name, inputs, tower)
    q, k, *_ = found.comparable
    real = inputs.get("attention_mask", torch.ones(2, 200)).bool()
    for sample, (own_q, own_k) in enumerate(zip(parts(found, q), parts(found, k), strict=True)):
        again = attended(own_q, own_k, tower == "text")
        for layer, expected in enumerate(eager):
            at = real[sample, : expected.shape[-1]]
            expected = expected[sample][:, at][..., at]
            assert_close(again[layer], expected.double(), atol=1e-5, rtol=0)
            assert_close(found.inputs[sample].weights[layer], expected, atol=1e-5, rtol=0)


def test_centres_coincide_and_dot_products_change_by_the_query_alone() -> None:
    q, k = noise(30, 8) + 3, 2 * noise(30, 8, seed=1) - 1
    for c in (0.25, 1.0, 3.0):
        q_new, k_new = moved(q, k, c)
        assert_close(q_new.mean(0), k_new.mean(0))
        change = q_new @ k_new.T - q @ k.T
        assert_close(change, change[:, :1].expand_as(change))
        assert_close(q_new / c, q)
    found = seen("llama", two(family("llama")))
    q, k, *_ = found.comparable
    assert_close(q.mean(2), k.mean(2))


@pytest.mark.parametrize(("name", "tower"), [("llama", "text"), ("gpt2", "text"), ("vit", "vision")])
def test_no_head_correlates_less_than_unscaled(name: str, tower: str) -> None:
    found = seen(name, two(family(name)), tower)
    _, _, scale, before, after = found.comparable
    assert (after.abs() >= before.abs()).all() and (after <= before).all() and (scale != 1).any()
    for site, head in ((0, 0), (len(found.sites) - 1, 1)):
        for c, told in ((float(scale[site, head]), after), (1.0, before)):
            q_new, k_new = moved(found.q[site, head].double(), found.k[site, head].double(), c)
            _, k_one = moved(found.q[site, head].double(), found.k[site, head].double(), 1.0)
            rows, start = [], 0
            for one in found.inputs:
                for i in range(start, start + len(one)):
                    for j in range(start, start + len(one)):
                        weight = float(one.weights[site, head, i - start, j - start])
                        dot = float(found.q[site, head, i].double() @ k_one[j])
                        rows.append((float((q_new[i] - k_new[j]).norm()), dot, weight))
                start += len(one)
            distance, dot, weight = np.array(rows).T
            covariance = np.cov(distance, dot, aweights=weight)
            expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
            assert float(told[site, head]) == pytest.approx(expected, abs=1e-6)


def test_a_scale_that_was_lost_is_found_again() -> None:
    """Of keys that are the queries themselves, made smaller: near is attended, where both are as large."""
    q = noise(40, 6)
    i, j = torch.cartesian_prod(torch.arange(40), torch.arange(40)).T
    for lost in (0.25, 1.0, 4.0):
        k = q / lost**2
        w = ((q @ k.T)[i, j]).softmax(0)
        c, before, after = scaled(q, k, i, j, torch.ones_like(w))
        assert c == pytest.approx(1 / lost, rel=0.1)
        assert after <= before


def test_what_does_not_vary_does_not_correlate() -> None:
    assert correlation(torch.ones(5), torch.arange(5.0), torch.ones(5)) == 0


# ---- where they lie --------------------------------------------------------------------------------------


def test_places_are_those_of_a_singular_value_decomposition_and_always_the_same() -> None:
    found = seen("gpt2", two(family("gpt2")))
    for dimensions in (2, 3):
        q, k = found.embedded(dimensions)
        again = seen("gpt2", two(family("gpt2"))).embedded(dimensions)
        assert torch.equal(q, again[0]) and torch.equal(k, again[1])
        for site, head in ((0, 0), (3, 2)):
            both = torch.cat([found.comparable.q[site, head], found.comparable.k[site, head]]).numpy()
            u, s, vh = np.linalg.svd(both - both.mean(0), full_matrices=False)
            expected = (u * s)[:, :dimensions] * np.sign(
                [row[np.abs(row).argmax()] for row in vh[:dimensions]]
            )
            assert_close(torch.cat([q, k], 2)[site, head], torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_queries_and_keys_are_those_of_the_modules() -> None:
    """Of GPT-2, which does not turn them; without the padding."""
    inputs = two(family("gpt2"))
    made = [
        out
        for path, out in outputs_of(shared("gpt2"), lambda: run(shared("gpt2"), inputs))
        if "c_attn" in path
    ]
    found = seen("gpt2", inputs, heads=(3, 1), sites="text.2:4.self")
    real = inputs["attention_mask"].bool()
    q, k, _ = (
        torch.stack(made[2:])[:, real].unflatten(-1, (3, 4, -1)).unbind(2)
    )  # (layers, tokens, heads, dim)
    assert_close(found.q, q[:, :, [3, 1]].transpose(1, 2))
    assert_close(found.k, k[:, :, [3, 1]].transpose(1, 2))
    assert found.heads == ((3, 1), (3, 1)) and found.sites == ("text.2.self", "text.3.self")
    assert [one.ids for one in found.inputs] == [
        tuple(row[own].tolist()) for row, own in zip(inputs["input_ids"], real, strict=True)
    ]


def test_runs_are_joined_as_if_they_were_one() -> None:
    inputs = two(family("gpt2"))
    both = joined([seen("gpt2", {name: t[row : row + 1] for name, t in inputs.items()}) for row in range(2)])
    together = seen("gpt2", inputs)
    assert [len(one) for one in both.inputs] == [len(one) for one in together.inputs]
    assert both.q.shape == together.q.shape and repr(both).splitlines()[0] == repr(together).splitlines()[0]


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(InputError, match="not of the same heads"):
        inputs = two(family("gpt2"))
        joined([seen("gpt2", inputs), seen("gpt2", inputs, sites="text.0.self")])
    with pytest.raises(InputError, match="ids"):
        seen("vit", two(family("vit")), "vision").with_words(None)
    with pytest.raises(InputError, match="narrow with sites="):
        seen("mllama", two(family("mllama")), sites="text.*.self|text.*.cross")


# ---- the page --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked() -> dict[str, Vectors]:
    """Two pictures and questions, seen by the model that ships with the package."""
    model, processor = sc.world.load("vlm")
    pictures = [[sc.world.scene(number, "test").picture()] for number in (9, 10)]
    texts = [written(processor, 1, text) for text in ("what colour is the car ?", "describe the image .")]
    with sc.attach(model, AttentionViz(sites="text.1:3.self|vision.0:2.self")) as session:
        session.locate(processor, pictures)
        model.generate(**prepare_batch(processor, pictures, texts), max_new_tokens=1)
        found = session.results["attentionviz"]
    return {
        "text": found["text"].with_words(processor).with_pictures(*pictures),
        "vision": found["vision"].with_pictures(*pictures),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Opens a page; in the end nothing may have gone wrong in it, or been fetched."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
    tab.on("request", lambda one: wrong.append(one.url) if one.url[:5] not in ("file:", "data:") else None)

    def show(text: str) -> Any:
        path = tmp_path / "page.html"
        path.write_text(text, "utf-8")
        tab.goto(path.as_uri())
        return tab

    yield show
    tab.close()
    assert wrong == []


def weights_shown(tab: Any) -> np.ndarray:
    """In parts of the largest."""
    script = "[...document.querySelectorAll('#tokens button')].map(b => +b.style.getPropertyValue('--shade'))"
    return np.array(tab.evaluate(script))


def chosen(tab: Any, group: str) -> str:
    return tab.locator(f"{group} [aria-checked=true]").get_attribute("aria-label")


def same(tab: Any, found: Tensor) -> None:
    """To a step of the 255 that the page has of a root."""
    np.testing.assert_allclose(weights_shown(tab), (found / found.max()).numpy(), atol=4 / 255)


@browsing
def test_heads_tokens_and_their_attention_are_chosen_by_keys(show: Any, looked: dict[str, Vectors]) -> None:
    found = looked["text"]
    tab = show(found.page())
    assert tab.locator("#heads button").count() == 8 and chosen(tab, "#heads") == "text.1.self, head 0"
    same(tab, found.inputs[0].weights[0, 0, 0])
    tab.locator("#heads [aria-checked=true]").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    assert (
        chosen(tab, "#heads") == "text.2.self, head 2"
        and "text.2.self, head 2" in tab.locator("h2").nth(1).inner_text()
    )
    tab.locator("#tokens [aria-checked=true]").focus()
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
    same(tab, found.inputs[0].weights[1, 2, 5])
    tab.locator("#side input").nth(1).check()
    same(tab, found.inputs[0].weights[1, 2, :, 5])
    tab.locator("#input").select_option("1")
    same(tab, found.inputs[1].weights[1, 2, :, 0])
    assert "describe" in tab.locator("#input option").nth(1).inner_text()
    assert "describe" in tab.locator("#tokens").inner_text()


@browsing
def test_a_point_that_is_clicked_is_the_one_that_is_drawn_there(
    show: Any, looked: dict[str, Vectors]
) -> None:
    found = looked["text"]
    tab = show(found.page())
    q, k = (t[0, 0] for t in found.embedded())
    far = int(k.norm(dim=-1).argmax())
    x, y = (k[far] / torch.cat([q, k]).abs().max()).tolist()
    box = tab.locator("#cloud").bounding_box()
    radius = 2 if len(k) > 400 else 3.5
    half = min(box["width"], box["height"]) / 2 - 3 * radius
    tab.locator("#cloud").click(
        position={"x": box["width"] / 2 + half * x, "y": box["height"] / 2 - half * y}
    )
    first = len(found.inputs[0])
    at = (0, far) if far < first else (1, far - first)
    assert tab.locator("#side input").nth(1).is_checked()
    same(tab, found.inputs[at[0]].weights[0, 0, :, at[1]])


@browsing
def test_colours_themes_and_pictures(show: Any, looked: dict[str, Vectors]) -> None:
    tab = show(looked["vision"].page("Patches"))
    drawn = set()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        for colour in ("type", "position", "norm", "kind", "input"):
            tab.locator("#colour").select_option(colour)
            assert tab.locator("#legend li").count() >= 1
            drawn.add((scheme, colour, tab.evaluate("document.getElementById('cloud').toDataURL()")))
    assert len({picture for *_, picture in drawn}) >= 6
    assert tab.locator("#picture img").count() == 1
    tab.locator("#tokens button").nth(3).click()
    own = tab.locator("#picture .own").bounding_box()
    whole = tab.locator("#picture img").bounding_box()
    left, top, *_ = looked["vision"].inputs[0].boxes[3].tolist()
    size = looked["vision"].inputs[0].picture.width
    assert own["x"] - whole["x"] == pytest.approx(left / size * whole["width"], abs=2)
    assert own["y"] - whole["y"] == pytest.approx(top / size * whole["width"], abs=2)


@browsing
def test_what_a_user_wrote_is_text(show: Any, looked: dict[str, Vectors]) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    found = looked["text"]
    inputs = [replace(one, texts=(evil, *one.texts[1:])) for one in found.inputs]
    text = replace(found, inputs=inputs).page(evil)
    assert evil not in text and text.count("</script>") == 2
    tab = show(text)
    assert evil in tab.title()
    assert "onerror" in tab.locator("#tokens").inner_text() and tab.locator("#tokens img").count() == 0


def test_it_holds_in_a_trained_model(looked: dict[str, Vectors]) -> None:
    for tower, found in looked.items():
        q, k, _, before, after = found.comparable
        assert (after.abs() >= before.abs()).all() and (after < before).any()
        assert_close(q.mean(2), k.mean(2))
        for one, own_q, own_k in zip(found.inputs, parts(found, q), parts(found, k), strict=True):
            again = attended(own_q, own_k, tower == "text")
            assert_close(again, one.weights.double(), atol=1e-5, rtol=0)


def test_the_page_is_one_file_of_some_size(
    looked: dict[str, Vectors], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = looked["vision"].page()
    assert len(text) < 2_000_000
    assert "default-src 'none'" in text and not re.search(r"https?://|@import|url\(", text)
    monkeypatch.setattr("saccade.report.vectors.MOST", 1000)
    with pytest.raises(InputError, match="attention weights"):
        looked["vision"].page()
