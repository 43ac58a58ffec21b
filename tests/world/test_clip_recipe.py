"""What `world/clip` is trained on, against the plain model and its processor."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from saccade.world.captions import caption, photo_of
from saccade.world.recipes.clip import Clip, contrast
from saccade.world.scenes import closeup, scene


def tiny() -> Clip:
    torch.manual_seed(0)
    return Clip(0, steps=4, rows=8)


def test_what_is_written_says_of_a_batch_what_the_recipe_does(tmp_path):
    """Pictures, words, the token at which a text ends, and sharpness."""
    recipe, seen = tiny(), [scene(i) for i in range(3)]
    thing = seen[0].things[0]
    texts = [caption(seen[1]), "a cup", photo_of(thing.kind, thing.colour)]
    recipe.export(tmp_path)
    model, processor = (
        AutoModel.from_pretrained(tmp_path, dtype=torch.float32),
        AutoProcessor.from_pretrained(tmp_path),
    )
    images = [seen[1].picture(), seen[2].picture(), closeup(seen[0], thing)]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    recipe.model.float().eval()
    batch = recipe.inputs([np.asarray(image.resize((96, 96), 3)) for image in images], texts, "scenes")
    with torch.no_grad():
        pictures = recipe.model.visual_projection(recipe.model.vision_model(batch["scenes"]).pooler_output)
        alike = recipe.alike(recipe.texts(batch, "scenes"), pictures)
        torch.testing.assert_close(alike, model.eval()(**inputs).logits_per_text, atol=1e-4, rtol=1e-4)
        short = model(**processor(text=texts[1:2], images=images, padding=True, return_tensors="pt"))
    torch.testing.assert_close(alike[1:2], short.logits_per_text, atol=1e-4, rtol=1e-4)  # whatever pads it


def test_a_name_fits_all_closeups_of_what_it_says():
    recipe = tiny()
    batch, seen = recipe.batch(3), [scene(3 * 8 + i) for i in range(8)]
    near = recipe.near(seen, np.random.default_rng([0, 3]))[:4]
    names = recipe.processor.tokenizer.batch_decode(batch["closeups ids"], skip_special_tokens=True)
    for name, row in zip(names, batch["fits"], strict=True):
        words = name.split()
        expected = [thing.kind == words[-1] and words[-2] in ("a", "an", thing.colour) for _, thing in near]
        assert row.tolist() == expected
    assert batch["fits"].diagonal().all()


def test_the_contrast_is_least_where_all_that_fits_is_equally_alike():
    fits = torch.tensor([[True, False, True], [False, True, False]])
    own = torch.where(fits, 50.0, 0.0)
    entropy = (
        np.log(2) / 2 + 0
    ) / 2  # of a text with two pictures, halved with one that has one; pictures have one
    assert contrast(own, fits).item() == pytest.approx(entropy, abs=1e-4)
    assert contrast(-own, fits) > 10
    lopsided = own + torch.tensor([1.0, 0, 0])
    assert contrast(lopsided, fits) > contrast(own, fits) + 0.01


def test_a_step_has_a_gradient_everywhere():
    recipe = tiny()
    loss, _ = recipe.loss(0, recipe.batch(0))
    loss.backward()
    still = [name for name, p in recipe.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
