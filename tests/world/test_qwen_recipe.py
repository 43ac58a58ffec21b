"""What `world/qwen` is trained on, against the plain model and its processor."""

import numpy as np
import pytest
import torch
from core.missing import Leave
from transformers import AutoModelForImageTextToText, AutoProcessor

from saccade.core.question import prepare_batch, written
from saccade.core.session import attach
from saccade.world.architectures import qwen_processor
from saccade.world.recipes.answering import IMAGE
from saccade.world.recipes.qwen import Qwen
from saccade.world.scenes import scene
from saccade.world.words import INDEX


def tiny(seed: int = 0) -> Qwen:
    torch.manual_seed(seed)
    recipe = Qwen(seed, steps=4, rows=4, alone=2)
    recipe.model.eval()
    return recipe


def alone(recipe, pictures, chat):
    """What the processor makes of one conversation."""
    messages = []
    for number, (question, answer, _) in enumerate(chat):
        content = [{"type": "image"}] * (len(pictures) if number == 0 else 0)
        messages += [
            {"role": "user", "content": [*content, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    processor = recipe.processor()
    text = processor.apply_chat_template(messages)
    images = [one.picture() for one in pictures]
    return processor(images=images, text=text, return_tensors="pt", add_special_tokens=False)


def due(ids):
    """The tokens after which one of an answer comes."""
    turn, end = [INDEX["assistant"], INDEX[":"]], INDEX["</s>"]
    starts = [i + 1 for i in range(len(ids) - 1) if ids[i : i + 2].tolist() == turn]
    return [at for start in starts for at in range(start, start + (ids[start:] == end).nonzero()[0].item())]


def test_the_recipe_makes_of_a_scene_what_the_processor_does():
    recipe, seen = tiny(), [scene(5), scene(6)]
    made = recipe.processor().image_processor([one.picture() for one in seen], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 24, 24]] * 2
    torch.testing.assert_close(recipe.pixels(seen).flatten(0, 1), made["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pictures", [1, 2])
def test_packed_questions_are_answered_as_if_alone(pictures):
    """Logits of every answer, against the model's own forward, windows and positions on what the processor makes."""
    recipe, seen = tiny(), [scene(5 + i) for i in range(2 * pictures)]
    groups = [seen[:pictures], seen[pictures:]]
    turns = [recipe.turns(group, np.random.default_rng(i), noise=0.0) for i, group in enumerate(groups)]
    turns[0].insert(0, [chat[0] for chat in turns[0][:3]])  # several turns in one
    batch = recipe.seen(seen) | recipe.asked(groups, turns, np.random.default_rng(0))
    with torch.no_grad():
        packed, labels, _, _ = recipe.read(recipe.look(batch["pixels"])[0], batch)
        at = 0
        for group, chat in ((group, chat) for group, own in zip(groups, turns) for chat in own):
            inputs = alone(recipe, group, chat)
            ids, logits = inputs["input_ids"][0], recipe.model(**inputs).logits[0]
            here = slice(at, at := at + len(due(ids)))
            assert torch.equal(labels[here], ids[1:][due(ids)])
            torch.testing.assert_close(packed[here], logits[due(ids)], atol=1e-4, rtol=1e-4)
    assert at == len(packed)


@pytest.mark.parametrize("renumbered", [False, True])
def test_missing_tokens_are_as_if_a_method_had_removed_them(renumbered):
    recipe, groups = tiny(), [[scene(5), scene(6)]]
    turns = [recipe.turns(groups[0], np.random.default_rng(0), noise=0.0)]
    batch = recipe.seen(groups[0]) | recipe.asked(groups, turns, np.random.default_rng(0), 0.06, renumbered)
    with torch.no_grad():
        packed, at = recipe.read(recipe.look(batch["pixels"])[0], batch)[0], 0
        for chat in turns[0]:
            inputs = alone(recipe, groups[0], chat)
            ids = inputs["input_ids"][0]
            there = ids != IMAGE
            there[(~there).nonzero().view(2, -1).gather(1, batch["kept"])] = True
            leave = Leave(keep={0: there[None]}, options={"positions": "renumber" if renumbered else "keep"})
            with attach(recipe.model, leave):
                logits = recipe.model(**inputs).logits[0]
            torch.testing.assert_close(
                packed[at : (at := at + len(due(ids)))], logits[due(ids)], atol=1e-4, rtol=1e-4
            )
    assert at == len(packed)


def test_the_processor_is_that_of_the_architecture():
    pytest.importorskip("torchvision", reason="Qwen2_5_VLProcessor asks for it")
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    own, text = qwen_processor(), "<s> user : <vision><image></vision> is there a cup ? assistant :"
    plain = Qwen2_5_VLProcessor(own.image_processor, own.tokenizer, Qwen2VLVideoProcessor())
    one, other = (
        each(images=scene(5).picture(), text=text, return_tensors="pt", add_special_tokens=False)
        for each in (own, plain)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_written_is_read_again_and_goes_on_where_a_batch_is_padded(tmp_path):
    recipe = tiny()
    recipe.export(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    same, inputs = tiny().model, alone(recipe, [scene(5)], [("is there a cup ?", "yes", "")])
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**inputs).logits, same(**inputs).logits, atol=1e-4, rtol=1e-4)
    asked = ["is there a cup ?", "what colour is the table ?"]
    images = [[scene(5 + i).picture()] for i in range(2)]
    alike = [
        prepare_batch(processor, [own], [written(processor, 1, text)]) for own, text in zip(images, asked)
    ]
    batch = prepare_batch(processor, images, [written(processor, 1, text) for text in asked])
    single = [model.generate(**one, max_new_tokens=4)[0, -4:] for one in alike]
    assert torch.equal(model.generate(**batch, max_new_tokens=4)[:, -4:], torch.stack(single))
