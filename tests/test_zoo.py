"""The zoo's models build, repeat themselves, and take what their processors give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import cast
from PIL import Image
from zoo import Family, run, select

SIZES = [(100, 60), (60, 100), (80, 80)]
SHORT, LONG = "What is it?", "Is the red cup to the left of the box?"


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def asked(f: Family, side: str = "left", seed: int = 0) -> dict[str, Any]:
    """Two samples through the processor, with one picture and, where the family allows, with two."""
    assert f.processor and f.prompt
    first, second, third = (picture(size, seed + i) for i, size in enumerate(SIZES))
    several = "multi_image" in f.tags
    images = [[first], [second, third]] if several else [first, second]
    text = [f.prompt(1, SHORT), f.prompt(1 + several, LONG)]
    made = f.processor()(images=images, text=text, padding=True, padding_side=side, return_tensors="pt")
    return dict(cast(dict(made), torch.float32))  # Llama 4's gives bfloat16


@pytest.mark.parametrize("f", select())
def test_two_builds_give_the_same_finite_output(f: Family) -> None:
    first, second = (run(f.build(), f.inputs()) for _ in range(2))
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert torch.equal(first, second)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("f", select("multi_image"))
def test_samples_hold_different_numbers_of_pictures(f: Family, side: str) -> None:
    model, inputs = f.build(), f.inputs(images=(1, 2), side=side)
    assert run(model, inputs).isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("f", select("processor"))
def test_a_model_takes_what_its_processor_gives_and_sees_it(f: Family, side: str) -> None:
    model, inputs = f.build(), asked(f, side)
    seen, other = run(model, inputs), run(model, asked(f, side, seed=7))
    assert seen.isfinite().all()
    assert ((seen - other).abs().amax(dim=tuple(range(1, seen.ndim))) > 0.01).all()


@pytest.mark.parametrize("f", select("vlm", "processor"))
def test_a_chat_template_writes_the_prompt(f: Family) -> None:
    assert f.processor and f.prompt
    processor = f.processor()
    if not getattr(processor, "chat_template", None):
        pytest.skip(f"{f.name} has no chat")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": SHORT}]
    turn = [{"role": "user", "content": content}]
    written = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert written == f.prompt(2, SHORT)


@pytest.mark.parametrize("f", select("video"))
def test_a_clip_goes_through(f: Family) -> None:
    assert f.video
    assert run(f.build(), f.video(8)).isfinite().all()


@pytest.mark.parametrize("f", select("video", "processor"))
def test_a_processor_takes_a_clip(f: Family) -> None:
    assert f.processor and f.prompt
    clip = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    inputs = f.processor()(videos=[clip], text=[f.prompt(0, SHORT, videos=1)], return_tensors="pt")
    assert run(f.build(), dict(inputs)).isfinite().all()


@pytest.mark.parametrize("f", select("generates"))
def test_it_generates(f: Family) -> None:
    model: Any = f.build()
    inputs: Any = f.inputs()
    model.generation_config.eos_token_id = None
    made = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert len(made.logits) == 3
    assert all(logits.isfinite().all() for logits in made.logits)


@pytest.mark.parametrize("f", select("generates"))
def test_eager_attention_agrees(f: Family) -> None:
    inputs = f.inputs()
    torch.testing.assert_close(
        run(f.build(attn_implementation="eager"), inputs), run(f.build(), inputs), atol=1e-4, rtol=1e-4
    )
