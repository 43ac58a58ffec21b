"""The language model's training: its steps, its stages, and that a killed run ends where an undisturbed one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saccade.world import embedded, evaluate
from saccade.world import train as training
from saccade.world.architectures import lm_tokenizer
from saccade.world.recipes.lm import ALL, LOOKUP, Lm, Stage
from saccade.world.text import END, INDEX, WORDS

SUM = "Mary and Tom had 12 + 7 = 19 ."
STAGES = (Stage((16,), 64, LOOKUP), Stage((48,), 288, ALL))


def tiny(seed: int = 0) -> Lm:
    torch.manual_seed(seed)
    return Lm(seed, steps=4, stages=STAGES)


def all_right(self: Lm, batch: training.Batch) -> list[np.ndarray]:
    return [np.ones(int((due == 1).sum()), bool) for due in batch["due"]]


def test_a_step_depends_on_seed_number_and_stage() -> None:
    one, other, later = tiny(), tiny(), tiny()
    later.helpers.stage = 1
    assert all(torch.equal(one.batch(3)[name], other.batch(3)[name]) for name in ("ids", "due"))
    assert not torch.equal(one.batch(3)["ids"], one.batch(4)["ids"])
    assert not torch.equal(one.batch(3)["ids"], tiny(1).batch(3)["ids"])
    assert one.batch(3)["ids"].shape == (4, 17) and later.batch(3)["ids"].shape == (6, 49)


def test_what_is_due_follows_from_the_text() -> None:
    recipe = tiny()
    ids, due = (recipe.batch(0)[name] for name in ("ids", "due"))
    assert (ids[:, 0] == INDEX["<s>"]).all() and ((ids == INDEX["<pad>"]) == (due == -1)).all()
    lists = 0
    for row, told in zip(ids.tolist(), due.tolist()):
        words = [WORDS[i] for i in row]
        assert 1 in told
        for at in (i for i, one in enumerate(told) if one == 1):
            before = max(i for i in range(at - 1) if words[i] == words[at - 1])
            assert words[before + 1] == words[at]
        lists += END in words
    assert lists


def test_a_stage_ends_when_it_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny()
    assert recipe.validate()["stage"] == 0 == recipe.helpers.stage
    monkeypatch.setattr(Lm, "right", all_right)
    assert recipe.validate()["stage"] == 0 and recipe.helpers.stage == 1
    assert recipe.validate().keys() > {*ALL, "first"} and recipe.helpers.stage == 1  # the last one


def test_a_killed_run_ends_where_an_undisturbed_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Lm, "right", all_right)
    whole, parts = tiny(), tiny()
    training.train(whole, tmp_path / "whole", every=2, workers=1)

    class Killed(Exception):
        pass

    def killed(self: Lm, step: int, batch: training.Batch, loss=Lm.loss):
        if step == 3:
            raise Killed
        return loss(self, step, batch)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(Lm, "loss", killed)
        training.train(parts, tmp_path / "parts", every=2)
    parts = tiny(1)  # whatever it began with
    parts.seed = 0
    training.train(parts, tmp_path / "parts", every=2)
    assert parts.helpers.stage == 1
    ended = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in ended)

    folder = tmp_path / "parts" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    monkeypatch.setattr(embedded, "MODELS", tmp_path / "parts")
    own, reader = embedded.load("model")
    inputs = reader(SUM, return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert torch.equal(own(**inputs).logits, model(**tokenizer(SUM, return_tensors="pt")).logits)
    saved = zip(own.parameters(), parts.model.parameters(), strict=True)
    assert all(torch.equal(one, other.float()) for one, other in saved)
    assert evaluate.main([str(folder), "--scenes", "2", "--batch", "8"]) == 0
    assert "recall of 32" in capsys.readouterr().out


def test_numbers_are_read_by_digits_and_a_text_has_a_beginning() -> None:
    tokenizer = lm_tokenizer()
    ids = tokenizer(SUM)["input_ids"]
    said = "<s> Mary and Tom had 1 2 + 7 = 1 9 ."
    assert tokenizer.convert_ids_to_tokens(ids) == said.split() and tokenizer.decode(ids) == said
    assert tokenizer.convert_tokens_to_ids(list(WORDS)) == list(range(len(WORDS)))
    assert all(tokenizer(word)["input_ids"] == [INDEX["<s>"], INDEX[word]] for word in WORDS)
