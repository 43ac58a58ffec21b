"""MVP against captions and paths that are read by hand, and a model whose words are a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from saccade.core.errors import InputError, OptionError
from saccade.steering.mvp import MVP

from .lockstep import Reader, model_of, question, reader

ANSWERS = {
    "llava": ("r", "istant", "right"),
    "qwen2_5_vl": ("R", "whit", "right"),
    "world/vlm": ("Yes", "No"),
}
"""Words of one token that come to the mind of these models."""
EXAMPLE: dict[str, Any] = {
    "views": ("Describe this image in detail.",),
    "weights": (1.0,),
    "answers": ("r", "istant", "right"),
    "k": 1,
    "words": 4,
    "tokens": 2,
    "temperature": 0.0,
}
ASKED = "is there a cup ?"
VIEWS = ("describe the image .", "what is in the image ?")


def driver(name: str, **options: Any) -> MVP:
    given = {
        "views": VIEWS,
        "weights": (1.0, 0.5),
        "prompt": "{caption} {question}",
        "answers": ANSWERS[name],
    }
    return MVP(**{**given, "words": 4, "tokens": 5, "temperature": 0.0, **options})


def asked(name: str, driver: MVP, text: str = ASKED, scene: int = 0) -> Any:
    with sc.attach(model_of(name)) as session:
        return session.run(driver, question(name, text))


# ---- the scores, by hand ---------------------------------------------------------------------------------


def read_of(name: str, text: str) -> Reader:
    return reader(model_of(name), dict(question(name).inputs(model_of(name), text=text)))


def chances(read: Reader, written: list[int]) -> np.ndarray:
    logits = read(torch.tensor(written, dtype=torch.long))
    p = np.exp(logits - logits.max())
    return p / p.sum()


def scores(name: str, method: MVP) -> dict[str, float]:
    tokenizer = question(name).processor.tokenizer
    total = dict.fromkeys(method.answers, 0.0)

    def answer(token: int) -> str | None:
        said = tokenizer.decode([token]).strip(" .,!\n")
        return next((a for a in method.answers if a.lower() == said.lower()), None)

    for view, weight in zip(method.views, method.weights, strict=True):
        caption: list[int] = []
        while len(caption) < method.words:
            p = chances(read_of(name, view), caption)
            p[2] = 0  # the question's options say that it does not end so early
            caption.append(int(p.argmax()))
        text = f"{tokenizer.decode(caption, skip_special_tokens=True).strip()} {ASKED}"
        first = chances(read_of(name, text), [])
        for token in np.argsort(-first)[: method.k].tolist():
            if answer(token):
                total[answer(token)] += weight * first[token]  # type: ignore[index]
                continue
            path, sure = [token], 0.0
            while len(path) <= method.tokens and path[-1] != 2:
                p = chances(read_of(name, text), path)
                path.append(int(p.argmax()))
                if answer(path[-1]):
                    sure = float(np.sort(p)[-1] - np.sort(p)[-2])
                    total[answer(path[-1])] += weight * first[token] * sure  # type: ignore[index]
                    break
    return total


@pytest.mark.parametrize(("name", "k"), [("llava", 3), ("qwen2_5_vl", 2), ("world/vlm", 2)])
def test_the_scores_are_those_of_the_paths(name: str, k: int) -> None:
    method = driver(name, k=k)
    expected = scores(name, method)
    found = asked(name, method)
    assert found.found["scores"] == pytest.approx(expected, abs=1e-6)
    assert found == max(expected, key=expected.__getitem__) and max(expected.values()) > 0


def test_one_path_of_one_view_is_the_models_own_answer() -> None:
    """Of scenes with and without a cup, where it is asked behind the same caption."""
    method = driver("world/vlm", views=VIEWS[:1], weights=(1.0,), k=1, words=40, answers=("yes", "no"))
    model, said = model_of("world/vlm"), set()
    for scene in (0, 7, 8):
        ask = sc.Question(
            question("world/vlm").processor,
            [sc.world.scene(scene, "test").picture()],
            ASKED,
            {"max_new_tokens": 2},
        )
        with sc.attach(model) as session:
            answer = session.run(method, ask)
            own = ask.ask(session, text=f"{answer.found['captions'][0]} {ASKED}")
            assert answer == own.split()[0]
        said.add(str(answer))
    assert said == {"yes", "no"}


def test_a_view_that_is_asked_twice_counts_twice_and_decides_alike() -> None:
    once = asked("llava", driver("llava", views=VIEWS[:1], weights=(1.0,)))
    twice = asked("llava", driver("llava", views=VIEWS[:1] * 2, weights=(1.0, 1.0)))
    assert twice == once
    assert twice.found["scores"] == pytest.approx({a: 2 * s for a, s in once.found["scores"].items()})
    first = np.sort(chances(read_of("llava", f"{once.found['captions'][0]} {ASKED}"), []))
    assert 0 < sum(once.found["scores"].values()) <= first[-3:].sum()


# ---- a table in place of a model -------------------------------------------------------------------------


@contextmanager
def speaking(model: Any, table: Mapping[int | None, Mapping[int, float]]) -> Iterator[None]:
    """What follows each word, with which probability; None behind a prompt."""
    words: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        words.append(args[0] if args else kwargs["input"])

    def say(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        last = int(words[-1][0, -1])
        row = torch.full_like(out[0, -1], -30.0)
        for token, p in table.get(last, table[None]).items():
            row[token] = np.log(p)
        return row.expand_as(out)

    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(note, with_kwargs=True),
        model.lm_head.register_forward_hook(say),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_a_sure_path_outvotes_a_likelier_one_that_is_not() -> None:
    """`red` leads to yes with 0.51 against 0.49, `blue` to no with 0.99 against 0.01; no path of `box` answers."""
    tokenizer = question("llava").processor.tokenizer
    yes, no, red, blue, box = (tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in WORDS)
    table: dict[int | None, dict[int, float]] = {
        None: {red: 0.5, blue: 0.3, box: 0.2},
        red: {yes: 0.51, no: 0.49},
        blue: {no: 0.99, yes: 0.01},
        box: {box: 1.0},
    }
    model = model_of("llava")
    method = driver("llava", views=VIEWS[:1], weights=(1.0,), k=3, answers=("Yes", "No"))
    with speaking(model, table):
        answer = asked("llava", method)
        with sc.attach(model) as session:
            plain = question("llava", words=2).ask(session)
    assert plain == "red yes"
    assert answer == "No"
    assert answer.found["scores"] == pytest.approx({"Yes": 0.5 * 0.02, "No": 0.3 * 0.98}, abs=1e-6)


WORDS = ("yes", "no", "red", "blue", "box")


def test_what_comes_to_no_answer_is_refused() -> None:
    with pytest.raises(InputError, match="No path of MVP came to maybe or never"):
        asked("llava", driver("llava", answers=("maybe", "never")))


def test_every_view_has_a_weight() -> None:
    with pytest.raises(OptionError, match="2 views and 1 weights"):
        MVP(views=VIEWS, weights=(1.0,))
