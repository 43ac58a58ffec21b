"""Training: what a step is made of, and that a killed run ends where an undisturbed one does."""

import numpy as np
import pytest
import torch

from saccade.world import embedded
from saccade.world import train as training
from saccade.world.architectures import vlm_processor
from saccade.world.recipes.labels import NONE, TOKENS
from saccade.world.recipes.vlm import Vlm
from saccade.world.scenes import scene


def tiny(seed: int = 0) -> Vlm:
    torch.manual_seed(seed)
    return Vlm(seed, steps=4, rows=4, alone=2)


def test_a_step_depends_on_nothing_but_seed_and_number():
    one, other = tiny().batch(3), tiny().batch(3)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(tiny(1).batch(3)["ids"][0, :200], one["ids"][0, :200])


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(Vlm, "validate", lambda self: {})
    whole, parts = tiny(), tiny()
    training.train(whole, tmp_path / "whole", every=2)

    class Killed(Exception):
        pass

    def killed(self, step, batch, loss=Vlm.loss):
        if step == 3:
            raise Killed
        return loss(self, step, batch)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(Vlm, "loss", killed)
        training.train(parts, tmp_path / "parts", every=2)
    parts = tiny(1)  # whatever it began with
    parts.seed = 0
    training.train(parts, tmp_path / "parts", every=2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    )
    monkeypatch.setattr(embedded, "MODELS", tmp_path / "parts")
    model, processor = embedded.load("model")  # transformers' own folder, with a card that knows its checksum
    assert torch.equal(model.lm_head.weight, parts.model.lm_head.weight.float())
    inputs = processor(
        images=scene(5).picture(),
        text="<s> user : <image> is there a cup ? assistant :",
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("renumbered", [False, True])
def test_packed_questions_are_answered_as_if_alone(renumbered):
    """Logits of every answer in a row of many, against the plain model on that one conversation, which sees the
    same tokens of the picture at the same positions."""
    recipe, seen = tiny(), scene(5)
    recipe.model.eval()
    turns = [recipe.turns([seen], np.random.default_rng(i), noise=0.0) for i in range(2)]
    batch = recipe.seen([seen, seen]) | recipe.asked(
        [[seen], [seen]], turns, np.random.default_rng(0), 0.25, renumbered
    )
    with torch.no_grad():
        features, _ = recipe.look(batch["pixels"])
        packed, labels, _, _ = recipe.read(features, batch)
        processor, at = vlm_processor(), 0
        for kept, chat in ((kept, chat) for kept, own in zip(batch["kept"], turns) for chat in own):
            messages = []
            for number, (question, answer, _) in enumerate(chat):
                content = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": question}]
                messages += [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
            text = processor.apply_chat_template(messages)
            inputs = processor(
                images=seen.picture(), text=text, return_tensors="pt", add_special_tokens=False
            )
            ids = inputs["input_ids"][0]
            there = ids != processor.image_token_id
            there[torch.arange(len(ids))[~there][kept]] = True
            ids, places = ids[there], torch.arange(len(ids))[there]
            embeddings = recipe.model.get_input_embeddings()(ids)
            pictures = recipe.model.get_image_features(inputs["pixel_values"]).pooler_output
            embeddings[ids == processor.image_token_id] = pictures[0][kept]
            logits = recipe.model(
                inputs_embeds=embeddings[None],
                attention_mask=torch.ones(1, len(ids)),
                position_ids=(torch.arange(len(ids)) if renumbered else places)[None],
            ).logits[0]
            due = []
            for start in (
                i for i in range(len(ids) - 1) if processor.decode(ids[i : i + 2]) == "assistant :"
            ):
                stop = next(i for i in range(start, len(ids)) if processor.decode(ids[i]) == "</s>")
                due += range(start + 1, stop)
            assert torch.equal(labels[at : at + len(due)], ids[1:][due])
            torch.testing.assert_close(packed[at : at + len(due)], logits[due], atol=1e-4, rtol=1e-4)
            at += len(due)
    assert at == len(packed)


def test_missing_tokens_leave_their_places_or_close_up():
    recipe, seen = tiny(), scene(5)
    turns = [recipe.turns([seen], np.random.default_rng(0), noise=0.0)]
    rng = np.random.default_rng
    kept = recipe.asked([[seen]], turns, rng(2), 0.25, renumbered=False)
    closed = recipe.asked([[seen]], turns, rng(2), 0.25, renumbered=True)
    count = round(0.25 * TOKENS)
    places = kept["kept"][0]
    assert len(places) == count and places[-1] < TOKENS - 1
    assert torch.equal(places, places.sort().values)
    assert torch.equal(kept["positions"][0, 3 : 3 + count], 3 + places)
    assert torch.equal(closed["positions"][0, : 3 + count + 1], torch.arange(3 + count + 1))
    assert kept["positions"][0, 3 + count] == 3 + TOKENS  # the question stands where it always does


def test_labels_are_the_answers_alone():
    recipe, seen = tiny(), scene(5)
    turns = [recipe.turns([seen], np.random.default_rng(0), noise=0.0)]
    batch = recipe.asked([[seen]], turns, np.random.default_rng(0))
    told = batch["labels"][0][batch["labels"][0] != NONE].tolist()
    processor = vlm_processor()
    said = [word for chat in turns[0] for _, answer, _ in chat for word in [*answer.split(), "</s>"]]
    assert processor.tokenizer.convert_ids_to_tokens(told) == said


def test_an_unknown_recipe_names_those_that_there_are(capsys):
    assert training.main(["vml", "--threads", "1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("saccade: No recipe is called 'vml'") and "vlm" in told
