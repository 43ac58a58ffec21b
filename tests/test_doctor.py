"""The doctor says what is true of a model, leaves it as it was, and says plainly what it cannot examine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import unchanged
from torch import Tensor, nn
from zoo import FAMILIES, run
from zoo.base import require

import saccade as sc
from saccade import cli
from saccade.core.errors import AttachError, InputError, SaccadeError
from saccade.core.seams.private import Name
from saccade.core.site import match
from saccade.examining import examination

ALL = {"inputs", "bias", "scores", "weights", "replace", "output", "observe", "hidden"}
CACHED = ALL | {"evict"}
BY_HAND = {"scores", "weights", "observe"}
FUSED = ALL | {"context", "skip"}

# Family: {attention sites: (seam, events, heads, key heads, width of a head)}, {layers of the cache}.
EXPECTED: dict[str, tuple[dict[str, tuple[str, set[str], int, int, int]], dict[str, str]]] = {
    "llama": ({"text.0:4.self": ("interface", CACHED, 4, 2, 16)}, {"DynamicLayer": "0:4"}),
    "gpt2": ({"text.0:4.self": ("interface", CACHED, 4, 4, 16)}, {"DynamicLayer": "0:4"}),
    "bloom": ({"text.0:3.self": ("softmax", BY_HAND, 4, 4, 0)}, {"DynamicLayer": "0:3"}),
    "llava": (
        {
            "vision.0:3.self": ("interface", ALL, 4, 4, 8),
            "text.0:4.self": ("interface", CACHED, 4, 2, 16),
        },
        {"DynamicLayer": "0:4"},
    ),
    "qwen2_5_vl": (
        {
            "vision.0:3.self": ("interface", ALL, 4, 4, 8),
            "text.0:4.self": ("interface", CACHED, 4, 2, 16),
        },
        {"DynamicLayer": "0:4"},
    ),
    "mllama": (
        {
            "vision.0:3.self": ("interface", ALL, 4, 4, 8),
            "text.*.self": ("interface", CACHED, 4, 2, 16),
            "text.*.cross": ("interface", CACHED, 4, 2, 16),
        },
        {"DynamicLayer": "0:4"},
    ),
    "t5": (
        {
            "encoder.0:3.self": ("interface", ALL, 4, 4, 8),
            "text.0:3.self": ("interface", CACHED, 4, 4, 8),
            "text.0:3.cross": ("interface", CACHED, 4, 4, 8),
        },
        {"DynamicLayer": "0:3"},
    ),
    "clip": (
        {"text.0:3.self": ("interface", ALL, 4, 4, 8), "vision.0:3.self": ("interface", ALL, 4, 4, 8)},
        {},
    ),
    "dinov2": ({"vision.0:3.self": ("interface", ALL, 4, 4, 8)}, {}),
    "timm_vit": ({"vision.0:3.self": ("sdpa", FUSED, 4, 4, 12)}, {}),
    "torch_mha": ({"text.0.self": ("sdpa", FUSED, 4, 4, 8)}, {}),
}
ROUNDED = {"torch_mha"}  # a fused path is off while it is observed


def examined(name: str, **options: Any) -> tuple[Any, sc.Diagnosis]:
    family = FAMILIES[name]
    model = family.build()
    run(model, family.inputs())  # the library installs hooks of its own in the first forward
    processor = family.processor() if family.processor else None
    with unchanged(model):
        return model, sc.doctor(model, processor, **options)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_it_says_is_true(name: str) -> None:
    model, d = examined(name)
    sites, layers = EXPECTED[name]
    with sc.attach(model) as session:
        everything = session.sites
    attention = {p.sites: p for p in d.places if p.seam != "module"}
    assert attention.keys() == sites.keys()
    for pattern, (seam, events, heads, key_heads, dim) in sites.items():
        place = attention[pattern]
        assert (place.seam, set(place.events)) == (seam, events)
        assert place.count == len(match(pattern, everything))
        (shape,) = (h for h in d.heads if h.sites == pattern)
        assert (shape.heads, shape.key_heads, shape.dim) == (heads, key_heads, dim)
        assert (shape.window, shape.softcap, shape.sinks, shape.reuses) == (None, None, False, "")
    assert sum(p.count for p in d.places) == len(everything)
    assert (d.cached.layers if d.cached else {}) == layers
    assert (
        d.trial is not None and d.trial.fired == len(everything) and d.trial.silent == d.trial.unreached == ()
    )
    assert d.trial.detached == 0 and (d.trial.observed == 0) == (name not in ROUNDED)
    assert d.healthy and d.model == type(model).__name__ and d.dtype == "float32"
    assert d.parameters == sum(p.numel() for p in model.parameters())


def test_a_unet() -> None:
    _, d = examined("unet")
    assert {p.sites: p.count for p in d.places} == {"unet.*.self": 4, "unet.*.cross": 4}
    assert {(h.sites.count("|"), h.heads, h.dim) for h in d.heads} == {(2, 8, 4), (0, 8, 8)}
    assert d.cached is d.pictures is d.chat_template is None
    assert d.trial is not None and d.trial.fired == 8 and d.healthy


@pytest.mark.parametrize(
    ("name", "read", "layer", "tokens", "boxed", "chat"),
    [
        ("llava", "placeholders", 1, 36, 36, True),  # features of the last layer but one
        ("qwen2_5_vl", "placeholders", 2, 24, 24, True),  # 12 x 8 patches, four in a token
        (
            "mllama",
            "cross-attention",
            2,
            148,
            96,
            True,
        ),  # four tiles of a class token and 36 patches, of which 96 show it
        ("clip", "nothing", None, None, None, False),
    ],
)
def test_pictures(name: str, read: str, layer: int, tokens: int, boxed: int, chat: bool) -> None:
    _, d = examined(name)
    assert d.pictures is not None
    assert (d.pictures.read, d.pictures.layer) == (read, layer)
    assert (d.pictures.tokens, d.pictures.boxed) == (tokens, boxed) and not d.pictures.problem
    assert d.chat_template is chat
    if name == "llava":
        assert d.pictures.placeholders == {"image": 3}
        assert d.pictures.features == {"image": "LlavaModel.get_image_features"}


def test_without_a_processor_pictures_are_made_up() -> None:
    model = FAMILIES["qwen2_5_vl"].build()
    d = sc.doctor(model)
    assert d.trial is not None and d.trial.silent == () and "pixel_values" in d.trial.inputs
    assert d.pictures is not None and d.pictures.tokens is None and "processor" in d.pictures.problem
    mllama = sc.doctor(FAMILIES["mllama"].build())
    assert mllama.trial is not None and {"vision.0:3.self", "text.*.cross"} <= set(mllama.trial.silent)
    assert "processor=" in mllama.trial.note and mllama.healthy


@pytest.mark.parametrize(
    "name", ["whisper", "bert", "deberta_v2", "vit", "swin", "sam_vision", "flux", "sd3", "blip"]
)
def test_made_up_inputs_reach_all_of_it(name: str) -> None:
    _, d = examined(name)
    assert d.trial is not None and d.trial.silent == () and d.trial.fired and d.healthy


def test_windows_sinks_and_caps() -> None:
    gemma, oss = (examined(name)[1] for name in ("gemma2", "gpt_oss"))
    assert {h.sites: (h.window, h.softcap) for h in gemma.heads} == {
        "text.0.self|text.2.self": (8, 2.0),
        "text.1.self|text.3.self": (None, 2.0),
    }
    assert all(h.sinks for h in oss.heads)
    assert gemma.cached is not None
    assert gemma.cached.layers == {"DynamicSlidingWindowLayer": "0 2", "DynamicLayer": "1 3"}


def test_layers_that_share_keys() -> None:
    _, d = examined("gemma3n")
    assert {h.sites: h.reuses for h in d.heads} == {
        "text.0.self": "",
        "text.1.self": "",
        "text.2.self": "text.0.self",
        "text.3.self": "text.1.self",
    }


def test_layers_that_do_not_attend() -> None:
    _, d = examined("jamba")
    assert d.cached is not None and d.cached.elsewhere == {"JambaMambaMixer": "0 2"}
    assert "LinearAttentionLayer" in d.cached.refusal
    assert [p.sites for p in d.places if "evict" in p.events] == []


# ---- methods ------------------------------------------------------------------------------------------


def test_every_entry_of_the_catalogue_is_judged() -> None:
    for name in ("llava", "bloom", "timm_vit"):
        model, d = examined(name)
        assert [f.slug for f in d.methods] == [card.slug for card in sc.methods()]
        for fit in d.methods:
            if fit.kind != "method":
                continue
            (method,) = sc.load(fit.slug)
            try:
                sc.attach(model, method).detach()
            except SaccadeError:
                assert not fit.fits and fit.missing and "\n" not in fit.missing
            else:
                assert fit.fits


def test_the_one_thing_that_is_missing() -> None:
    fits = {
        name: {f.slug: f for f in examined(name)[1].methods} for name in ("llama", "llava", "bloom", "jamba")
    }
    assert all(
        fits["llava"][slug].fits for slug in ("fastervlm", "var", "vhr", "vicrop", "attention_rollout")
    )
    for slug in ("fastervlm", "var", "vicrop"):
        assert fits["llama"][slug].missing == "it takes no pictures among its words"
        assert "LLaVA" in fits["llama"][slug].remedy
    assert "'bias' at text.0.self" in fits["bloom"]["zerotuning"].missing
    assert "denoising" in fits["llava"]["tgate"].missing
    assert "calibrate" in fits["llava"]["sparsemm"].missing and fits["llava"]["sparsemm"].fits


def test_a_method_that_takes_tokens_out_needs_a_cache_that_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "tracks", lambda methods: True)  # as if all did
    fit = next(f for f in examined("jamba")[1].methods if f.slug == "attention_rollout")
    assert fit.fits is False and "LinearAttentionLayer" in fit.missing


# ---- modules that nobody has seen ---------------------------------------------------------------------


class Attention(nn.Module):
    """Written by hand, in three dimensions, half of it never run."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        o = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        return self.out(o.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Attends under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax((self.q(x) @ x.mT)[:, None], dim=-1)[:, 0] @ x


class Block(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.mix = kind()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class Model(nn.Module):
    def __init__(self, *kinds: type[nn.Module], skipped: int = -1) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds)
        self.skipped = skipped

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            x = x if number == self.skipped else block(x)
        return x


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


def test_attention_written_by_hand() -> None:
    model = Model(Attention, Attention, Plain).train()  # with dropout
    with unchanged(model):
        d = sc.doctor(model)
    assert model.training and all(m.training for m in model.modules())
    assert [(p.sites, p.seam, set(p.events)) for p in d.places if p.seam != "module"] == [
        ("text.0:2.self", "softmax", BY_HAND)
    ]
    assert [(h.heads, h.dim) for h in d.heads] == [(2, 0)]
    assert d.trial is not None and d.trial.inputs == {"argument 0": "1 x 12"}
    assert d.trial.observed == d.trial.detached == 0 and d.healthy and d.trial.unreached == ()
    assert next(f for f in d.methods if f.slug == "attention_rollout").fits


def test_a_site_that_never_fires_and_attention_that_is_no_site() -> None:
    d = sc.doctor(Model(Attention, Attention, Mixer, Mixer, skipped=1))
    assert d.trial is not None
    assert "text.1.self" in d.trial.silent and "text.0.self" not in d.trial.silent
    assert d.trial.unreached == ("blocks.*.mix (Mixer, 2 of them)",)


def test_attention_modules_that_are_the_list_itself() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Attention(), Attention())
    d = sc.doctor(model)
    assert [p.sites for p in d.places if p.seam != "module"] == ["text.0:2.self"] and d.healthy


def test_a_module_without_attention_that_can_be_reached() -> None:
    with unchanged(model := Model(Plain, Plain)):
        d = sc.doctor(model)
    assert "no attention that can be reached" in d.problem and d.remedy and not d.healthy
    assert d.places == d.methods == () and d.trial is not None and d.trial.unreached == ()
    assert "Nothing can be attached" in d.plain()
    mixing = sc.doctor(Model(Plain, Mixer))
    assert mixing.trial is not None and mixing.trial.unreached == ("blocks.*.mix (Mixer)",)
    assert "blocks.1.mix (Mixer)" not in mixing.plain() and "blocks.*.mix (Mixer)" in mixing.plain()


def test_a_model_that_is_never_the_same_is_not_healthy() -> None:
    class Counting(Model):
        calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(ids) + self.calls

    d = sc.doctor(Counting(Attention))
    assert d.trial is not None and d.trial.detached and not d.healthy
    assert "! changes the output" in d.plain()


def test_chance_is_the_same_in_every_pass() -> None:
    class Noisy(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + torch.randn(16)

    model = Noisy(Attention).eval()
    state = torch.random.get_rng_state()
    assert sc.doctor(model).trial.detached == 0  # type: ignore[union-attr]
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- what it is given ---------------------------------------------------------------------------------


def test_inputs_of_the_users_own() -> None:
    model = Model(Attention)
    for inputs in (
        {"ids": torch.tensor([[1, 2, 3]])},
        (torch.tensor([[1, 2, 3]]),),
        torch.tensor([[1, 2, 3]]),
    ):
        trial = sc.doctor(model, inputs=inputs).trial
        assert trial is not None and "1 x 3" in trial.inputs.values() and trial.fired
    with pytest.raises(InputError, match="do not go through Model: TypeError"):
        sc.doctor(model, inputs={"words": torch.tensor([[1]])})


def test_inputs_that_nobody_can_make_up() -> None:
    class Picky(Model):
        def forward(self, ids: Tensor) -> Tensor:
            raise KeyError("something else")

    d = sc.doctor(Picky(Attention))
    assert d.trial is not None and "pass inputs=" in d.trial.note and d.places and d.methods and d.healthy


@pytest.mark.parametrize("given", ["llama", None, {}, torch.zeros(1), Attention])
def test_what_is_no_module_is_one_clear_error(given: Any) -> None:
    with pytest.raises(SaccadeError, match="no torch module") as raised:
        sc.doctor(given)
    assert "pass the model itself" in raised.value.remedy


def test_the_bare_model_is_examined() -> None:
    model = FAMILIES["llama"].build()
    with sc.attach(model), pytest.raises(AttachError, match="attached"):
        sc.doctor(model)


def test_without_a_pass_nothing_runs() -> None:
    model: Any = FAMILIES["llava"].build()

    def never(*_: Any) -> None:
        raise AssertionError

    for module in model.modules():
        module.register_forward_pre_hook(never)
    d = sc.doctor(model, FAMILIES["llava"].processor(), run=False)  # type: ignore[misc]
    assert d.trial is None and d.heads == () and d.pictures is not None and d.pictures.problem == "not tried"
    assert len(d.places) == 12 and d.cached is not None and d.healthy
    assert next(f for f in d.methods if f.slug == "var").fits


# ---- versions -----------------------------------------------------------------------------------------


def test_the_ranges_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = dict(
        re.match(r"([\w-]+)>=([\d.]+)", line).groups()  # type: ignore[union-attr]
        for line in (*project["dependencies"], *extras["diffusers"], *extras["timm"])
        if ">=" in line
    )
    assert {library: lowest for library, (lowest, _) in examination.RANGES.items()} == {
        library: wanted[library] for library in examination.RANGES
    }


@pytest.mark.parametrize(
    ("version", "said"),
    [("5.18.3", "older"), ("5.19.0", ""), ("5.23.9", ""), ("5.24.0.dev0", "newer"), ("", None)],
)
def test_versions_outside_of_the_range(
    version: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        examination, "_version", lambda library: version if library == "transformers" else "99.0"
    )
    found = {v.library: v for v in sc.doctor(Model(Attention), run=False).versions}
    if said is None:
        assert "transformers" not in found
    else:
        assert said in found["transformers"].problem and bool(found["transformers"].problem) == bool(said)
        assert found["transformers"].known == "5.19 to 5.23" and not found["torch"].problem


def test_private_names_that_moved_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Name("transformers.cache_utils:Cache.no_such_thing")
    other = Name("transformers.cache_utils:Cache.crop", ("self", "somewhere_else"))
    monkeypatch.setitem(examination.PRIVATE, "transformers", (gone, other))
    found = {v.library: v.problem for v in sc.doctor(Model(Attention), run=False).versions}
    assert "Cache.no_such_thing is gone" in found["transformers"]
    assert "Cache.crop takes" in found["transformers"]


# ---- printing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "bloom", "gemma2", "t5", "unet"])
def test_it_reads_well(name: str) -> None:
    _, d = examined(name)
    text = repr(d)
    assert max(map(len, text.splitlines())) <= 80 and "\n\n\n" not in text
    for place in d.places:
        assert place.sites in text.replace("| ", "|").replace("|\n  ", "|")
    for fit in d.methods:
        assert fit.slug in text
    assert json.loads(d.json())["places"][0]["sites"] == d.places[0].sites
    html = d._repr_html_()
    assert all(f"<code>{place.sites}</code>" in html for place in d.places) and html.count("<table>") == 1
    assert len(html) < 10_000


# ---- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as `save_pretrained` leaves them, some with a processor."""
    path = tmp_path_factory.mktemp("models")
    for name in ("llama", "t5", "clip", "dinov2", "bert", "llava"):
        family = FAMILIES[name]
        family.build().save_pretrained(path / name)
        if family.processor:
            family.processor().save_pretrained(path / name)
    return path


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["doctor", *argv, "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama", "LlamaForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("clip", "CLIPModel"),
        ("dinov2", "Dinov2Model"),
        ("bert", "BertModel"),
        ("llava", "LlavaForConditionalGeneration"),
    ],
)
def test_a_folder_is_loaded_as_what_it_is(name: str, model: str, folders: Path, capsys: Any) -> None:
    code, out, _ = told(capsys, str(folders / name), "--json")
    said = json.loads(out)
    assert (code, said["model"], said["healthy"]) == (0, model, True)
    assert said["trial"]["silent"] == [] and said["methods"]
    if name in ("llava", "clip"):
        assert said["chat_template"] is (name == "llava")


def test_a_configuration_that_names_no_class(folders: Path, tmp_path: Path, capsys: Any) -> None:
    for name, model in (
        ("llama", "LlamaForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("clip", "CLIPModel"),
    ):
        shutil.copytree(folders / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["architectures"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert json.loads(told(capsys, str(tmp_path / name), "--json", "--no-pass")[1])["model"] == model


def test_the_command_prints_and_obeys(folders: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = told(capsys, str(folders / "llama"))
    assert code == 0 and "text.0:4.self" in out and "exact to the bit" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = told(capsys, str(folders / "llama"), "--no-pass", "--dtype", "bfloat16")
    assert code == 0 and "exact" not in out and "bfloat16 on cpu" in out


def test_a_pipeline_in_a_folder(tmp_path: Path, capsys: Any) -> None:
    require("sd", ("diffusers",))
    from zoo.pipelines import PIPELINES

    PIPELINES["sd"].build().save_pretrained(tmp_path / "sd")
    code, out, _ = told(capsys, str(tmp_path / "sd"), "--json")
    said = json.loads(out)
    assert code == 0 and said["model"] == "StableDiffusionPipeline"
    assert said["trial"]["silent"] == [] and said["trial"]["fired"] > 0
    assert any("CLIPAttention" in name for name in said["trial"]["unreached"])
    assert {m["slug"] for m in said["methods"] if m["fits"]} >= {"prompt_to_prompt", "tgate"}
    (var,) = (m for m in said["methods"] if m["slug"] == "var")
    assert var["missing"] == "it takes no pictures among its words"
    (tmp_path / "sd" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    code, out, err = told(capsys, str(tmp_path / "sd"))
    assert (code, out) == (2, "") and "NoSuchPipeline" in err and len(err.strip().splitlines()) == 2


def test_a_model_of_timm_in_a_folder(tmp_path: Path, capsys: Any) -> None:
    require("timm", ("timm",))
    from transformers import TimmWrapperConfig, TimmWrapperModel

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes)
    TimmWrapperModel(config).save_pretrained(tmp_path)
    code, out, _ = told(capsys, str(tmp_path), "--json")
    said = json.loads(out)
    assert code == 0 and {place["tower"] for place in said["places"]} == {"vision"}
    assert said["trial"]["inputs"] == {"pixel_values": "1 x 3 x 32 x 32"} and said["trial"]["silent"] == []


LLAMA = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "there is no config.json"),
        ({"config.json": "{"}, "cannot be loaded"),
        ({"config.json": '{"model_type": "no_such_type"}'}, "no_such_type"),
        ({"config.json": '{"model_type": "llava_llama"}'}, "llava-hf/llava-1.5-7b-hf"),
        (
            {"config.json": '{"model_type": "internvl_chat", "auto_map": {"AutoConfig": "mine.Mine"}}'},
            "OpenGVLab/InternVL3-8B-hf",
        ),
        ({"config.json": LLAMA}, "model.safetensors"),
        ({"config.json": LLAMA, "pytorch_model.bin": ""}, "a pickle can run code"),
        ({"config.json": LLAMA, "model.safetensors": "version https://git-lfs"}, "fetch them again"),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}', "mine.py": ""},
            "--trust-remote-code",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded(
    files: dict[str, str], said: str, tmp_path: Path, capsys: Any
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, out, err = told(capsys, str(tmp_path))
    assert (code, out) == (2, "") and said in err and len(err.strip().splitlines()) == 2


def test_remote_code_runs_where_it_is_trusted(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = told(capsys, str(tmp_path))
    assert code == 2 and "--trust-remote-code" in err
    code, out, _ = told(capsys, str(tmp_path), "--trust-remote-code", "--json")
    assert code == 0 and json.loads(out)["model"] == "MineForCausalLM"


def test_a_hub_without_a_network(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = told(capsys, "nobody/nothing")
    assert code == 2 and "hf download nobody/nothing" in err


def test_a_torchvision_of_another_torch_is_named(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    problem = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(problem)
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = f"""
import torch
import saccade as sc
from saccade import cli
print(sc.doctor(torch.nn.MultiheadAttention(8, 2), run=False))
raise SystemExit(cli.main(["doctor", {str(folders / "llava")!r}, "--device", "cpu"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    told = " ".join(done.stdout.split())
    assert "torchvision 0.1 ! does not fit this torch" in told and "pip uninstall torchvision" in told, (
        done.stderr
    )
    assert done.returncode == 2 and "pip uninstall torchvision" in done.stderr, done.stderr
