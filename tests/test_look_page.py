"""The page of a recording, in a browser: what it shows is what was recorded, and it needs nothing else."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saccade as sc
from saccade.core.errors import InputError
from saccade.core.faithfulness import REVERSE, Faithfulness
from saccade.core.record import Recording

CHROMIUM = shutil.which("chromium")
browsing = pytest.mark.skipif(CHROMIUM is None, reason="the page is clicked in Debian's chromium")
ASKED = "describe the image ."
Open = Callable[[str], Any]


def look(*images: int, stack: str | None = None, asked: str = ASKED, tokens: int = 64) -> Recording:
    model, processor = sc.world.load("vlm")
    pictures = [sc.world.scene(image, "test").picture() for image in images]
    return sc.look(model, processor, pictures, asked, stack, rows="after_image", max_new_tokens=tokens)


@pytest.fixture(scope="module")
def seen() -> Recording:
    return look(9)


@pytest.fixture(scope="module")
def beside() -> Recording:
    """Of an answer that is cut off."""
    return look(9, stack="fastervlm(keep=0.5)+vhr", tokens=6)


@pytest.fixture(scope="module")
def sinking(seen: Recording) -> Recording:
    """Attention is even, but half of it is on the 41st place of the picture, in all layers but the first."""
    changed = copy.deepcopy(seen)
    for part in changed.parts:
        even = (part.weights > 0).float()
        part.weights = even / even.sum(-1, keepdim=True)
        if part.site != "text.0.self":
            part.weights *= 0.5
            part.weights[..., sink_of(seen)] += 0.5
    return changed


def sink_of(seen: Recording) -> int:
    return int(seen.layouts[0].where("image")[0].nonzero()[40])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
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


# ---- what the test knows of a recording, and reads from the page --------------------------------------


def grid(seen: Recording, word: int, layer: int | None = None, head: int | None = None, item: int = 0) -> Any:
    found = seen.map("text.*.self", word=word)
    found = found if layer is None else found.layers(layer)
    return (found if head is None else found.heads(head)).grid(item)


def shown(tab: Any, stage: int = 0) -> np.ndarray:
    """The numbers that a stage was drawn from."""
    return np.array(tab.evaluate(f"stages[{stage}].heat && [...stages[{stage}].heat]"))


def alike(tab: Any, wanted: np.ndarray, stage: int = 0, times: float = 1.0) -> None:
    """To a step of the 255 that the page has."""
    np.testing.assert_allclose(shown(tab, stage), wanted.flatten(), atol=times / 255 * np.abs(wanted).max())


def pixels(tab: Any, stage: int = 0) -> np.ndarray:
    """How much of the picture the heat covers: (height, width)."""
    height, width, data = tab.evaluate(
        f"""() => {{ const {{canvas}} = stages[{stage}]
        const {{data}} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
        return [canvas.height, canvas.width, [...data.filter((_, i) => i % 4 === 3)]] }}"""
    )
    return np.array(data).reshape(height, width)


def words(seen: Recording) -> list[int]:
    """Those that the page shows, in its order."""
    first = int(seen.layouts[0].where("image")[0].nonzero().max())
    return [i for i, word in enumerate(seen.words) if word.positions[0] > first]


def said(seen: Recording, at: int) -> int:
    """A word of the answer, among those of letters that it has but once."""
    texts = [word.text for word in seen.words]
    return [i for i, w in enumerate(seen.words) if w.said and w.text.isalpha() and texts.count(w.text) == 1][
        at
    ]


def sunk(seen: Recording) -> np.ndarray:
    """Places of the picture that are sinks in some layer."""
    sinks, first = seen.sinks(), sink_of(seen) - 40
    return np.array([any(first + i in found for found in sinks.values()) for i in range(144)]).reshape(12, 12)


def chosen(tab: Any) -> str:
    return tab.locator("[role=radio][aria-checked=true]").inner_text()


def chip(tab: Any, text: str, line: int = -1) -> Any:
    return tab.locator(".line").nth(line).get_by_role("radio", name=text, exact=True).first


# ---- one recording ------------------------------------------------------------------------------------


@browsing
def test_a_word_shows_its_map(show: Open, seen: Recording) -> None:
    word = said(seen, 2)
    tab = show(seen.page(word=word))
    before, own, after = (seen.words[word + by].text for by in (-1, 0, 1))
    assert chosen(tab) == own and f"To say “{own}”" in tab.locator("#told").inner_text()
    alike(tab, grid(seen, word))
    drawn = pixels(tab)
    tab.keyboard.press("ArrowRight")
    assert chosen(tab) == after and f"“{after}”" in tab.locator("#told").inner_text()
    alike(tab, grid(seen, word + 1))
    assert (pixels(tab) != drawn).mean() > 0.1
    for _ in range(2):
        tab.keyboard.press("ArrowLeft")
    assert chosen(tab) == before
    asked = next(i for i in words(seen) if seen.words[i].text == "image")
    chip(tab, "image", 0).click()  # of the question: where it looked when it read it
    assert "Reading “image”" in tab.locator("#told").inner_text()
    alike(tab, grid(seen, asked))
    chip(tab, "the whole answer").click()
    np.testing.assert_allclose(shown(tab), seen.seen().grid().flatten(), atol=seen.seen().grid().max() / 255)


@browsing
def test_the_heat_is_where_the_numbers_are(show: Open, seen: Recording) -> None:
    tab = show(seen.page(word=said(seen, 1)))
    wanted = grid(seen, said(seen, 1))
    top = wanted[~sunk(seen)].max()
    centres = pixels(tab)[15::30, 15::30]  # a cell has 30 of them
    np.testing.assert_allclose(centres, 255 * 0.7 * np.minimum(wanted / top, 1) ** 0.85, atol=9)
    hottest = np.array(np.argwhere(wanted == top)[0])
    box = tab.locator(".stage").bounding_box()
    row, column = hottest + 0.5
    tab.mouse.move(box["x"] + column / 12 * box["width"], box["y"] + row / 12 * box["height"])
    told = tab.locator(".here").inner_text()
    assert float(told.removeprefix("here ").removesuffix("%")) == pytest.approx(100 * top, abs=0.06)
    assert told.removeprefix("here ") in tab.locator("figcaption .high").inner_text()
    tab.get_by_role("button", name="Heat").click()
    assert not tab.locator(".stage canvas").is_visible()


@browsing
def test_the_pointer_shows_a_word_for_as_long_as_it_is_there(show: Open, seen: Recording) -> None:
    own, other = (seen.words[said(seen, at)].text for at in (0, -1))
    tab = show(seen.page(word=own))
    before = shown(tab)
    chip(tab, other).hover()
    assert chosen(tab) == own and f"“{other}”" in tab.locator("#told").inner_text()
    assert not np.allclose(shown(tab), before)
    tab.mouse.move(1, 1)
    np.testing.assert_array_equal(shown(tab), before)


@browsing
def test_layers_and_heads_are_chosen(show: Open, seen: Recording) -> None:
    word = said(seen, 1)
    tab = show(seen.page(word=word))
    tab.keyboard.press("ArrowUp")
    alike(tab, grid(seen, word, layer=0))
    tab.keyboard.press("Shift+ArrowDown")  # from the mean of all to the last
    alike(tab, grid(seen, word, layer=0, head=3))
    assert tab.locator("#told").inner_text().endswith("(layer 0, head 3).")
    tab.get_by_label("Layer", exact=True).fill("5")
    alike(tab, grid(seen, word, layer=5, head=3))
    assert tab.locator("#layer-told").inner_text() == "5"
    tab.get_by_label("Layer", exact=True).fill("-1")
    tab.get_by_label("Head", exact=True).fill("1")
    alike(tab, grid(seen, word, head=1))
    tab.get_by_role("button", name="Layer 2: ").click()
    alike(tab, grid(seen, word, layer=2, head=1))
    assert tab.get_by_label("Layer", exact=True).input_value() == "2"


@browsing
def test_all_heads_stand_in_order(show: Open, seen: Recording) -> None:
    word = said(seen, 1)
    tab = show(seen.page(word=word))
    found = seen.map("text.*.self", word=word)
    image = seen.layouts[0].where("image")[0][list(found.labels["column"])]
    columns = torch.tensor(found.labels["column"])
    sinks = torch.stack([torch.isin(columns, torch.tensor(at)) for at in seen.sinks().values()])
    shares = (found.tensor * (image & ~sinks)[:, None]).sum(-1)
    tab.wait_for_function("document.querySelector('#tiles b').textContent")
    labels = tab.locator("#tiles button").evaluate_all(
        "all => all.map(one => one.getAttribute('aria-label'))"
    )
    told = [tuple(map(int, re.findall(r"\d+", label))) for label in labels]
    assert len(told) == 32 and len({(layer, head) for layer, head, _ in told}) == 32
    assert all(abs(share - 100 * float(shares[layer, head])) < 0.51 for layer, head, share in told)
    ordered = [float(shares[layer, head]) for layer, head, _ in told]
    assert ordered == sorted(ordered, reverse=True)
    layer, head, _ = told[4]
    tab.locator("#tiles button").nth(4).click()
    alike(tab, grid(seen, word, layer, head))
    pressed = tab.locator("#tiles [aria-pressed=true]")
    pressed.wait_for()
    assert pressed.count() == 1 and pressed.get_attribute("aria-label") == labels[4]


@browsing
def test_the_shares_of_every_layer(show: Open, sinking: Recording) -> None:
    word = said(sinking, 1)
    tab = show(sinking.page(word=word))
    w = sinking.map("text.*.self", word=word).mean("head").tensor
    layout, columns = sinking.layouts[0], range(w.shape[-1])
    sink = sink_of(sinking)
    for layer, row in enumerate(w):
        wanted = dict.fromkeys(("image", "question", "answer", "sinks", "rest"), 0.0)
        for column in columns:
            kinds = {"image": "image", "question": "question", "generated": "answer"}
            name = next((told for kind, told in kinds.items() if layout.where(kind)[0, column]), "rest")
            wanted["sinks" if layer and column == sink else name] += float(row[column])
        label = tab.get_by_role("button", name=f"Layer {layer}: ").get_attribute("aria-label")
        told = {name: int(share) for name, share in re.findall(r"(\w+) (\d+)%", label)}
        assert told == {name: pytest.approx(100 * share, abs=0.51) for name, share in wanted.items()}
    bar = tab.locator("#shares button").nth(3).locator(".bar span")
    widths = bar.evaluate_all("all => all.map(one => parseFloat(one.style.width))")
    assert sum(widths) == pytest.approx(100, abs=0.2)


@browsing
def test_sinks_are_marked_and_do_not_outshine_the_rest(show: Open, sinking: Recording) -> None:
    word = said(sinking, 1)
    tab = show(sinking.page(word=word))
    assert tab.locator(".mark").count() == 1
    box, stage = (tab.locator(name).bounding_box() for name in (".mark", ".stage"))
    row, column = divmod(40, 12)
    assert box["x"] - stage["x"] == pytest.approx(column / 12 * stage["width"], abs=1)
    assert box["y"] - stage["y"] == pytest.approx(row / 12 * stage["height"], abs=1)
    given = sinking.map("text.*.self", word=word).mean("layer", "head").tensor[sink_of(sinking)]
    told = re.search(r"a place on picture 1 \((.*)%\)", tab.locator("#sinks").inner_text())
    assert told and float(told[1]) == pytest.approx(100 * float(given), rel=0.01)
    assert (np.delete(pixels(tab), 0, 0) > 100).mean() > 0.01  # other places are seen too
    tab.get_by_role("button", name="Layer 0: ").click()
    assert tab.locator(".mark").count() == 0
    assert tab.locator("#sinks").inner_text() == "No token is a sink in layer 0."


@browsing
def test_one_stop_for_the_tab_key_in_every_group(show: Open, seen: Recording) -> None:
    tab = show(seen.page())
    tab.wait_for_function("document.querySelector('#tiles b').textContent")
    for group in ("#words", "#shares", "#tiles"):
        assert tab.locator(f"{group} [tabindex='0']").count() == 1
    tab.locator("#tiles button").first.focus()
    word = chosen(tab)
    tab.keyboard.press("ArrowRight")  # among heads, not among words
    assert tab.evaluate("tiles.findIndex(tile => tile.button === document.activeElement)") == 1
    assert chosen(tab) == word
    label = tab.locator("#tiles button").nth(1).get_attribute("aria-label")
    tab.keyboard.press("Enter")
    assert label.partition(":")[0].lower() in tab.locator("#told").inner_text()


@browsing
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_everywhere(
    show: Open, seen: Recording, beside: Recording, width: int, scheme: str
) -> None:
    tab = show("<p>")
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    show(seen.page(beside))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

    def light(colour: str) -> float:
        r, g, b = (int(n) / 255 for n in re.findall(r"\d+", colour)[:3])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    def style(of: str, name: str) -> float:
        return light(tab.locator(of).first.evaluate("(one, name) => getComputedStyle(one)[name]", name))

    def contrast(of: str, ground: str) -> float:
        low, high = sorted((style(of, "color"), style(ground, "backgroundColor")))
        return (high + 0.05) / (low + 0.05)

    assert (style("body", "backgroundColor") < 0.1) == (scheme == "dark")
    for text in (
        "#told",
        "#told strong",
        "#sinks",
        "figcaption",
        "#faith p",
        "#legend",
        ".line.asked",
        "#tiles button",
    ):
        assert contrast(text, "body") > 4.5, text
    assert contrast("[aria-checked=true]", "[aria-checked=true]") > 4.5


# ---- several pictures, two runs ------------------------------------------------------------------------


@browsing
def test_several_pictures_stand_in_a_strip(show: Open) -> None:
    seen = look(9, 12, asked="what colour is the car ?")
    word = words(seen)[-1]
    tab = show(seen.page(word=word))
    alike(tab, grid(seen, word, item=0))
    strip, image = tab.locator("#strip button"), tab.locator(".stage img")
    first = image.get_attribute("src")
    for item in range(2):
        share = grid(seen, word, item=item).sum()
        assert float(strip.nth(item).inner_text().removesuffix("%")) == pytest.approx(100 * share, abs=1)
    strip.nth(1).click()
    alike(tab, grid(seen, word, item=1))
    assert image.get_attribute("src") != first and strip.nth(1).get_attribute("aria-pressed") == "true"


@browsing
def test_two_runs_stand_side_by_side(show: Open, seen: Recording, beside: Recording) -> None:
    word = next(
        w.text
        for w in beside.words
        if w.said and w.text in [other.text for other in seen.words if other.said]
    )
    tab = show(seen.page(beside, word))
    assert tab.locator("figcaption strong").all_inner_texts() == [
        "without methods",
        "fastervlm(keep=0.5)+vhr",
        "Difference",
    ]
    one, other = (
        grid(run, next(i for i in words(run) if run.words[i].said and run.words[i].text == word))
        for run in (seen, beside)
    )
    alike(tab, one)
    alike(tab, other, 1)
    np.testing.assert_allclose(
        shown(tab, 2), (other - one).flatten(), atol=2 / 255 * max(one.max(), other.max())
    )
    rose = pixels(tab, 2)
    at = np.array(np.unravel_index(rose.argmax(), rose.shape)) / rose.shape * one.shape
    most = np.array(np.unravel_index(np.abs(other - one).argmax(), one.shape))
    assert np.abs(at - most - 0.5).max() < 1
    only = seen.words[said(seen, -1)].text
    assert only not in [w.text for w in beside.words]
    chip(tab, only, 1).click()
    assert f"does not say “{only}”" in tab.locator("figcaption").nth(1).inner_text()
    assert shown(tab, 1).ndim == shown(tab, 2).ndim == 0 and pixels(tab, 1).max() == 0
    chip(tab, "describe", 0).click()  # of the question, which both have read
    assert shown(tab, 2).shape == (144,)


# ---- what was removed, and how faithful a map is -------------------------------------------------------


@browsing
def test_places_whose_tokens_were_removed_are_hatched(show: Open, seen: Recording, beside: Recording) -> None:
    word = beside.words[said(beside, 0)].text
    tab = show(seen.page(beside, word))
    layout = beside.layouts[0]
    kept = {int(p) for part in beside.parts if part.columns is not None for p in part.columns.flatten()}
    gone = np.array([int(p) not in kept for p in layout.where("image")[0].nonzero()[:, 0]]).reshape(12, 12)
    assert gone.sum() == 72
    struck = pixels(tab, 1)[15::30, 15::30] >= 216
    np.testing.assert_array_equal(struck, gone)
    captions = tab.locator("figcaption")
    assert "hatched: 72 of 144 places were removed" in captions.nth(1).inner_text()
    assert "removed" not in captions.nth(0).inner_text() + captions.nth(2).inner_text()
    row, column = np.argwhere(gone)[0] + 0.5
    box = tab.locator(".stage").nth(1).bounding_box()
    tab.mouse.move(box["x"] + column / 12 * box["width"], box["y"] + row / 12 * box["height"])
    assert captions.nth(1).locator(".here").inner_text() == "here removed"


@browsing
def test_places_that_some_layers_have(show: Open) -> None:
    """Hatched are those that none of the chosen layers has."""
    seen = look(9, stack="pyramiddrop", tokens=4)
    word = said(seen, 0)
    tab = show(seen.page(word=word))
    layers, columns = (
        seen.map("text.*.self", word=word),
        seen.layouts[0].where("image")[0].nonzero()[:, 0].tolist(),
    )
    for layer in (0, 7):
        held = {
            int(p) for part in seen.parts if part.site == f"text.{layer}.self" for p in part.columns.flatten()
        }
        tab.get_by_role("button", name=f"Layer {layer}: ").click()
        struck = (pixels(tab)[15::30, 15::30] >= 216).ravel()
        np.testing.assert_array_equal(struck, [column not in held for column in columns])
        np.testing.assert_array_equal(struck, layers.layers(layer).absent().ravel())
    assert struck.any()


@browsing
def test_how_faithful_a_map_is_stands_beside_it(show: Open, seen: Recording, beside: Recording) -> None:
    one, other = copy.deepcopy(seen), copy.deepcopy(beside)
    index, removed = said(one, 1), [0.0, 0.5, 1.0]
    curves = {
        "map": [[0.9, 0.3, 0.1]],
        "reversed": [[0.9, 0.8, 0.1]],
        "random": [[0.9, 0.5, 0.1], [0.9, 0.1, 0.1]],
    }
    one.faithfulness = [
        Faithfulness([index], "", 0, removed, curves),
        Faithfulness(one.indices(), "", 0, removed, curves | {"map": [[0.9, 0.7, 0.1]]}),
    ]
    text = one.words[index].text
    tab = show(one.page(other, index))
    told = tab.locator("#faith p")
    # The areas: 0.25 * (0.9 + 2 p + 0.1).
    averages = "40% brightest first, 40% random order, 65% faintest first"
    said_of = told.nth(0).inner_text()
    assert said_of.startswith(f"without methods +0.00 The probability of “{text}” is 90%. ")
    assert f"While places are removed, its mean is {averages}; it ends at 10%." in said_of
    assert "beats 1 of 2 random orders" in said_of
    assert "Not measured for this word." in told.nth(1).inner_text()
    lines = [tab.locator(f"#faith .{name}[points]") for name in curves]
    wanted = " ".join(f"{30 + 290 * x:.1f},{104 - 96 * p:.1f}" for x, p in zip(removed, curves["map"][0]))
    assert lines[0].first.get_attribute("points") == wanted and lines[2].count() == 3  # two runs, and the key
    chip(tab, "the whole answer", 1).click()
    assert "−0.20" in told.nth(0).inner_text() and "90% a token" in told.nth(0).inner_text()
    chip(tab, "describe", 0).click()
    assert (
        told.nth(0).inner_text()
        == f"without methods Not measured for this word; +0.00 for “{text}”, −0.20 for the whole answer."
    )
    assert not tab.locator("#faith svg").first.is_visible()


def test_the_map_of_a_one_word_answer_is_the_words_map() -> None:
    seen = look(9, asked="what colour is the car ?")
    seen.faithfulness = [
        Faithfulness(seen.indices(), "", 0, [0.0, 1.0], {key: [[1.0, 0.0]] for key in REVERSE})
    ]
    chip = 1 + words(seen).index(seen.words.index(seen.word("yellow")))
    assert f'"faithfulness":[{{"words":[0,{chip}],' in seen.page()


# ---- what is written into it ---------------------------------------------------------------------------


@browsing
def test_what_a_user_or_a_model_wrote_is_text(show: Open, seen: Recording) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    changed = copy.deepcopy(seen)
    changed.prompt = changed.stack = evil
    changed.texts[0][changed.words[said(seen, 1)].positions[0]] = f" <b>{evil}"
    text = changed.page()
    assert evil not in text and text.count("</script>") == 2
    tab = show(text)
    assert evil in tab.title()
    assert "onerror" in tab.locator("#words").inner_text() and tab.locator("#words img").count() == 0


def test_it_is_one_file_and_small(seen: Recording, beside: Recording) -> None:
    page = seen.page(beside)
    assert len(page) < 5_000_000
    assert "default-src 'none'" in page and not re.search(r"https?://|@import|url\(", page)


def test_it_opens_at_the_word_that_is_asked_for(seen: Recording) -> None:
    known = words(seen)
    for word in (seen.words[said(seen, 1)].text, known[2]):
        start = int(re.search(r'"start":(\d+)', seen.page(word=word))[1])  # type: ignore[index]
        assert seen.words[known[start - 1]] == seen.word(word)


def test_what_has_no_page_is_said(seen: Recording) -> None:
    model, processor = sc.world.load("vlm")
    picture = sc.world.scene(9, "test").picture()

    def looked(image: Any = picture, **options: Any) -> Recording:
        return sc.look(model, processor, image, ASKED, max_new_tokens=4, **options)

    for wrong, told in (
        (lambda: looked(reduce="segments").page(), "kept others"),
        (lambda: looked(columns="image").page(), "kept others"),
        (lambda: looked(None).page(), "no picture"),
        (lambda: looked(rows=slice(0, 5)).page(), "word of the answer"),
        (lambda: seen.page(look(12, 13)), "cannot be compared"),
        (lambda: looked().page(word="describe"), "not recorded"),
        (lambda: seen.page(word="giraffe"), "neither in the answer"),
    ):
        with pytest.raises(InputError, match=told):
            wrong()
    assert '"sinks":null' in looked().page()  # their rows were not recorded


def test_a_mean_over_heads_has_a_page(seen: Recording) -> None:
    model, processor = sc.world.load("vlm")
    picture = sc.world.scene(9, "test").picture()
    merged = sc.look(model, processor, picture, ASKED, rows="after_image", reduce="mean_heads")
    assert merged.sinks() == seen.sinks() and '"merged":true' in merged.page()
