"""Loading a model by name: embedded, in a folder, or on the hub. Weights are read from safetensors only."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import cached_file, logging

from saccade.core.errors import InputError, OptionError

DTYPES = ("float32", "bfloat16", "float16")

# Types of configurations that only the authors' code reads, and where transformers' form of such a model is.
CONVERTED = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf",
}

# What a configuration is loaded as that does not name its class, the first that knows it.
CLASSES = (
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    ("AutoModel", "MODEL_MAPPING"),
)

PIPELINE = "model_index.json"  # what stands in a pipeline's folder instead of a configuration


def load_model(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    *,
    any_kind: bool = False,
) -> tuple[Any, Any]:
    """A vision-language model and its processor: an embedded one (`world/vlm`), a folder, or a name on the
    hub. Where `any_kind` is welcome it may be any model or pipeline, and the processor None.

    `dtype` is the model's own unless given, but float32 in place of float16 on a CPU; `device` is a GPU where
    there is one.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"No dtype is called {dtype!r}.", f"use {', '.join(DTYPES)}")
    place = _device(device)
    if name.startswith("world/"):
        model, processor = importlib.import_module("saccade.world").load(name.removeprefix("world/"))
    else:
        model, processor = _pretrained(name, dtype, trust_remote_code, any_kind)
    wanted = getattr(torch, dtype) if dtype else model.dtype
    if dtype is None and place.type == "cpu" and wanted == torch.float16:
        wanted = torch.float32
    model = model.to(place) if model.dtype == wanted else model.to(place, wanted)
    return model.eval() if isinstance(model, torch.nn.Module) else model, processor


def check_name(name: str, any_kind: bool = False) -> None:
    """Refuse, before anything is loaded, a name under which there is nothing, as far as it can be told."""
    if name.startswith("world/"):
        importlib.import_module("saccade.world.embedded").folder(name.removeprefix("world/"))
        return
    folder = Path(name).expanduser()
    local = folder.is_dir()
    held = {file for file in ("config.json", PIPELINE) if (folder / file).is_file()}
    if local and not (held if any_kind else "config.json" in held):
        raise InputError(f"{name} holds no model: there is no config.json.", "give a folder that has one")
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(f"There is no folder {name}.", "give a folder, or a hub id such as OWNER/MODEL")


def _pretrained(name: str, dtype: str | None, trust_remote_code: bool, any_kind: bool) -> tuple[Any, Any]:
    check_name(name, any_kind)
    folder = Path(name).expanduser()
    local = folder.is_dir()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    source = str(folder) if local else name
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # fail beside a wrong torchvision

        with quiet() if local else contextlib.nullcontext():
            if any_kind:
                return _any_kind(source, dtype, options)
            processor = AutoProcessor.from_pretrained(source, **options)
            return AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=True, **options
            ), processor
    except Exception as e:  # files and libraries raise whatever befalls them
        raise failure(name, local, e, any_kind) from e


def _any_kind(source: str, dtype: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The class that the configuration names, or one that transformers knows for it."""
    import transformers as hf

    if _is_pipeline(source, options["local_files_only"]):
        pipelines = importlib.import_module("diffusers").DiffusionPipeline
        given = {"torch_dtype": getattr(torch, dtype)} if dtype else {}
        pipe = pipelines.from_pretrained(source, use_safetensors=True, **given, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe, None
    config = hf.AutoConfig.from_pretrained(source, **options)
    remote = getattr(config, "auto_map", {}) if options["trust_remote_code"] else {}
    kind = getattr(hf, (config.architectures or [""])[0], None)
    if kind is None or remote:
        known = (name for name, mapping in CLASSES if name in remote or type(config) in getattr(hf, mapping))
        kind = getattr(hf, next(known, "AutoModel"))
    model = kind.from_pretrained(source, dtype=dtype or "auto", use_safetensors=True, **options)
    try:
        return model, hf.AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError):
        return model, None


def _is_pipeline(source: str, local: bool) -> bool:
    try:
        return bool(cached_file(source, PIPELINE, local_files_only=local))
    except OSError:
        return False


def failure(name: str, local: bool, error: Exception, any_kind: bool = False) -> InputError:
    """Why a model could not be loaded, as far as it can be told."""
    said = repr(error) if isinstance(error, KeyError) else str(error).strip()
    what = f"{name} cannot be loaded: {said.splitlines()[0] if said else repr(error)}"
    if mismatch := torchvision_problem():
        return InputError(
            f"{name} cannot be loaded: torchvision does not fit this torch ({mismatch}).", TORCHVISION_REMEDY
        )
    if other := CONVERTED.get(_type_of(name, local)):
        return InputError(what, f"load transformers' own form of such a model, as in {other}")
    if "trust_remote_code" in said:
        return InputError(what, "read the model's own code, and allow it with --trust-remote-code")
    if isinstance(error, SafetensorError):
        return InputError(what, "its weights are damaged or not all there: fetch them again")
    if "safetensors" in said:
        return InputError(
            what,
            "only safetensors are read, for a pickle can run code: save_pretrained() in Python writes them",
        )
    if isinstance(error, OSError) and not local:
        return InputError(
            what,
            f"check the name and the network; or fetch it before (hf download {name}) and set HF_HUB_OFFLINE=1",
        )
    if any_kind:
        return InputError(what, "give a model that transformers or diffusers knows, with safetensors")
    return InputError(
        what, "give a vision-language model that transformers knows, with safetensors and processor"
    )


def _type_of(name: str, local: bool) -> str:
    """What the configuration calls its model; empty where it cannot be read."""
    from transformers import PreTrainedConfig

    try:
        return str(PreTrainedConfig.get_config_dict(name, local_files_only=local)[0].get("model_type", ""))
    except (OSError, ValueError):
        return ""


TORCHVISION_REMEDY = (
    "pip uninstall torchvision, for most models do without it, or install the build for this torch"
)


def torchvision_problem() -> str:
    """What is wrong with it; empty where it imports or is not there at all."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return ""
    except (ImportError, RuntimeError) as e:
        return str(e).strip().splitlines()[0]
    return ""


def _device(name: str | None) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"The device {name!r} is not here: {str(e).splitlines()[0]}", "use cpu") from e
    return device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars for what is read from a disk, nor advice to install what is not needed."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
