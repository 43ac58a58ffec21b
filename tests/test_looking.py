"""Asking and looking, from a folder on the disk to the picture; and the demonstration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import shared, unchanged
from PIL import Image
from zoo import Family, family, select
from zoo.words import tokenizer

import saccade as sc
from saccade import cli, looking
from saccade.core.errors import InputError, SaccadeError

QUESTION = "Is the red cup on the box?"


def picture(width: int = 100, height: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA with a processor, as `save_pretrained` leaves them, in half precision."""
    path = tmp_path_factory.mktemp("models") / "llava"
    family("llava").build().half().save_pretrained(path)
    family("llava").processor().save_pretrained(path)
    return path


# ---- asking and looking -------------------------------------------------------------------------------


@pytest.mark.parametrize("f", select("vlm", "processor", "generates"))
def test_every_family_answers_and_is_looked_at(f: Family) -> None:
    model, processor = shared(f.name), f.processor()
    answer = looking.ask(model, processor, picture(), QUESTION, max_new_tokens=4)
    spoken = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [0]}  # not padding
    seen = looking.look(model, processor, picture(), QUESTION, **spoken)
    assert isinstance(answer, str) and answer.tokens <= 4 and answer.seconds > 0
    total = seen.map(sample=0).tensor.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=2e-3, rtol=0)
    assert total.shape[2] == 4 and seen.prompt == QUESTION
    assert seen.plain()


def test_the_answer_is_that_of_generate() -> None:
    f = family("llava")
    model, processor = shared("llava"), f.processor()
    images = [picture(), picture(60, 90, 1)]
    inputs = processor(images=images, text=f.prompt(2, QUESTION), return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    wanted = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    answer = looking.ask(model, processor, images, QUESTION, max_new_tokens=5)
    assert answer == wanted
    seen = looking.look(model, processor, images, QUESTION, max_new_tokens=5)
    assert torch.equal(seen.ids, made) and seen.answer().strip() == wanted
    assert [(p.width, p.height) for p in seen.pictures[0]] == [(100, 60), (60, 90)]
    for item, image in enumerate(images):
        heat = seen.map().on_picture(item)
        assert heat.shape == image.size[::-1]
        mask = seen.layouts[0].where(f"image:{item}")[0][: seen.map().tensor.shape[-1]]
        assert heat.sum() == pytest.approx(
            float(seen.map().mean("layer", "head", "row").tensor[mask].sum()), 1e-4
        )


def test_without_a_picture_it_is_text() -> None:
    seen = looking.look(shared("llava"), family("llava").processor(), None, QUESTION, max_new_tokens=3)
    assert all(layer["image"] == 0 for layer in seen.share().values())
    with pytest.raises(InputError, match="picture 0"):
        seen.overlay()
    assert "cup" in [w.text for w in seen.words]


def test_a_word_that_begins_the_text_has_one_begin_of_text() -> None:
    processor = family("llava").processor()
    bare = looking.prepare(processor, [picture()], QUESTION)["input_ids"][0]
    processor.chat_template = "<s>" + processor.chat_template
    assert torch.equal(looking.prepare(processor, [picture()], QUESTION)["input_ids"][0], bare)
    assert (bare == 1).sum() == 1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_prompt_without_a_place_for_the_picture_is_refused(name: str) -> None:
    processor = family(name).processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="no place for the picture"):
        looking.look(shared(name), processor, picture(), QUESTION)


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        (family("llava").processor, "LlamaForCausalLM takes no pictures"),
        (tokenizer, "makes nothing of pictures"),
    ],
)
def test_a_picture_that_nobody_looks_at_is_refused(processor: Any, why: str) -> None:
    with unchanged(shared("llama")), pytest.raises(InputError, match=why):
        sc.ask(shared("llama"), processor(), picture(), QUESTION)


def test_a_stack_is_at_work_and_is_told() -> None:
    model, processor = shared("llava"), family("llava").processor()
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    bare = looking.look(model, processor, picture(), QUESTION, dtype="float32", **options)
    stack = sc.load("zerotuning(gamma=50.0)")
    answers = [
        looking.ask(model, processor, picture(), QUESTION, s, **options) for s in (str(stack), stack, *stack)
    ]
    assert len(set(answers)) == 1 and "ZeroTuning" in answers[0].session_summary
    seen = looking.look(model, processor, picture(), QUESTION, stack, dtype="float32", **options)
    first = [r.map().tensor[:, :, 0, 0].mean() for r in (bare, seen)]
    assert first[1] > 2 * first[0]
    assert (bare.stack, seen.stack) == ("", str(stack))


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(InputError, match="A str is no picture"):
        looking.ask(shared("llava"), family("llava").processor(), ["cup.png"], QUESTION)


# ---- loading ------------------------------------------------------------------------------------------


def test_a_folder_is_loaded(folder: Path) -> None:
    model, processor = looking.load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32 and not model.training  # no float16 on a CPU
    assert type(processor).__name__ == "LlavaProcessor"
    assert looking.load_model(str(folder), "float16", "cpu")[0].dtype == torch.float16
    assert looking.load_model(str(folder), "bfloat16", "cpu")[0].dtype == torch.bfloat16
    answer = looking.ask(model, processor, picture(), QUESTION, max_new_tokens=3)
    assert answer == looking.ask(
        shared("llava", torch.float16).float(),
        family("llava").processor(),
        picture(),
        QUESTION,
        max_new_tokens=3,
    )


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "bare" / "pytorch_model.bin")
    family("llama").build().save_pretrained(tmp_path / "text")
    for name, said in (
        (str(tmp_path / "none"), "no folder"),
        ("./none", "no folder"),
        ("llava", "no folder"),
        (str(tmp_path / "empty"), r"no config\.json"),
        (str(tmp_path / "bare"), "safetensors"),
        (str(tmp_path / "text"), "vision-language"),
    ):
        with pytest.raises(SaccadeError, match=said):
            looking.load_model(name, device="cpu")
    with pytest.raises(SaccadeError, match="float32, bfloat16"):
        looking.load_model(str(folder), "int3")
    with pytest.raises(SaccadeError, match="use cpu"):
        looking.load_model(str(folder), device="cuda:99")
    with pytest.raises(SaccadeError, match="No embedded model"):
        looking.load_model("world/nothing")


def test_a_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as refusal:
        looking.load_model("nobody/nothing", device="cpu")
    assert "hf download nobody/nothing" in refusal.value.remedy


def test_a_torchvision_of_another_torch_is_recognised(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    problem = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(problem)
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = f"""
from saccade import demonstration, looking
from saccade.core.errors import InputError
for call in (lambda: looking.load_model({str(folder)!r}, device="cpu"), demonstration.demo):
    try:
        call()
    except InputError as e:
        print(e.remedy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout.count("pip uninstall torchvision") == 2, done.stderr


# ---- the command line ---------------------------------------------------------------------------------


def test_the_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("cup.png")
    model = ("--model", str(folder), "--device", "cpu")
    assert cli.main(["ask", "cup.png", QUESTION, *model, "--with", "zerotuning", "--compare"]) == 0
    assert "with zerotuning" in capsys.readouterr().out
    assert (
        cli.main(["look", "cup.png", "--ask", QUESTION, *model, "--plain", "--word", "cup", "-o", "o.png"])
        == 2
    )
    assert "Rows of 'cup' were not recorded" in capsys.readouterr().err
    assert cli.main(["look", "cup.png", "--ask", QUESTION, *model, "--plain", "-o", "seen.png"]) == 0
    assert QUESTION in (out := capsys.readouterr().out) and "┌" in out and "image" in out
    assert Image.open("seen.png").size[0] == 512
    assert cli.main(["look", "cup.png", "--ask", QUESTION, *model, "-o", "seen.safetensors"]) == 0
    assert sc.Recording.load("seen.safetensors").overlay().size[0] == 512
    assert cli.main(["look", "cup.png", "--ask", QUESTION, *model, "-o", "no/folder.png"]) == 2
    assert "cannot be written" in capsys.readouterr().err
