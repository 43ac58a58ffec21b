"""Tiny made-up inputs of a model, from its processor, its configuration, or its first layer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from saccade.core.probe import featurizer, patch_of
from saccade.core.question import prepare
from saccade.core.seams.plain import PlainHost

Inputs = Mapping[str, Any] | tuple[Any, ...]

KNOWN_LAYERS = (nn.Embedding, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
TEXT_WIDTHS = ("cross_attention_dim", "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim")
WORDS = 12  # of a made-up text
SIDE = 64  # of a picture where nobody names a size
QUESTION = "What is in the picture?"


def picture(size: tuple[int, int]) -> Image.Image:
    """Coloured noise: a plain picture would leave some features equal."""
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=_seeded())
    return Image.fromarray(noise.numpy())


def made_up(host: PlainHost, processor: Any, size: tuple[int, int]) -> Iterator[Callable[[], Inputs]]:
    """Makers of inputs that the model may take, those that reach most of it first. They raise, or make none,
    where they do not fit."""
    model: Any = host.model
    if host.samples:
        yield partial(_sampling, model)
    elif type(model).__module__.startswith("diffusers"):
        for shape in ((1, 0, 16, 16), (1, 0, 2, 16, 16), (1, 2, 0, 16, 16)):  # pictures, clips
            yield partial(_denoiser, model, shape)
    elif not hasattr(host, "text_config"):
        yield partial(of_first_layer, model)
    else:
        if processor is not None:
            yield partial(_complete, _processed, host, processor, size)
        for make in (_placed, _paired, _sound, _written, _seen, _filmed):
            yield partial(_complete, make, host)


def _complete(make: Callable[..., dict[str, Any]], host: PlainHost, *options: Any) -> dict[str, Any]:
    """With words for the decoder, where there is one beside the encoder; where the model is."""
    inputs = make(host, *options)
    if inputs and getattr(host, "encoder_decoder", False) and "decoder_input_ids" in host.parameters:
        inputs = {**inputs, "decoder_input_ids": _ids(host)[:, :4]}
    return {name: to_model(host.model, value) for name, value in inputs.items()}


def to_model(model: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_model(model, part) for name, part in value.items()}
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not isinstance(value, Tensor) or parameter is None:
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


# ---- models of transformers ------------------------------------------------------------------------------


def _processed(host: PlainHost, processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """What the processor makes of a picture and a question, of as much of them as it takes."""
    sees = hasattr(processor, "image_processor") or "pixel_values" in processor.model_input_names
    if not (hasattr(processor, "tokenizer") or hasattr(processor, "get_vocab")):
        made = processor(images=picture(size), return_tensors="pt") if sees else {}
    else:
        made = _asked(host, processor, [picture(size)] if sees else [])
    return {name: value for name, value in dict(made).items() if name in host.parameters and name != "labels"}


def _asked(host: PlainHost, processor: Any, pictures: list[Image.Image]) -> Any:
    """A question about pictures, behind the mark of one where the processor does not put it there itself."""
    placeholder = host.vocabulary.placeholders.get("image") if pictures else None
    with contextlib.suppress(ValueError, TypeError, IndexError):
        made = prepare(processor, pictures, QUESTION)
        if placeholder is None or bool((made["input_ids"] == placeholder).any()):
            return made
    return prepare(processor, pictures, f"{getattr(processor, 'image_token', '')}{QUESTION}")


def _placed(host: PlainHost) -> dict[str, Any]:
    """Words around as many placeholders as the features of random pixels fill."""
    mark = host.vocabulary.placeholders.get("image")
    if mark is None:
        return {}
    features, needed = featurizer(host, "image")
    pixels = _packed(host.model) if "image_grid_thw" in host.parameters else _pixels(host)
    if "qformer_input_ids" in needed:
        pixels["qformer_input_ids"] = _ids(host)
    if "image_sizes" in needed:
        pixels = _tiled(host, pixels["pixel_values"])
    pixels = {name: to_model(host.model, value) for name, value in pixels.items()}
    with torch.no_grad():
        count = len(features(pixels))
    words = _ids(host)
    ids = torch.cat([words[:, :4], torch.full((1, count), mark), words[:, 4:]], 1)
    if "mm_token_type_ids" in host.parameters:
        pixels["mm_token_type_ids"] = (ids == mark).long()
    return {"input_ids": ids, **pixels}


def _packed(model: Any) -> dict[str, Tensor]:
    """One picture as rows of patches."""
    config = model.config.vision_config
    merge = getattr(config, "spatial_merge_size", 1)
    channels = getattr(config, "in_channels", getattr(config, "in_chans", 3))
    height, width = patch_of(model)
    numbers = channels * getattr(config, "temporal_patch_size", 1) * height * width
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    return {"pixel_values": _noise(int(grid.prod()), numbers), "image_grid_thw": grid}


def _tiled(host: PlainHost, view: Tensor) -> dict[str, Tensor]:
    """A base view and the tiles of the first shape that the model cuts."""
    config: Any = host.model.config
    height, width = config.image_grid_pinpoints[0]
    tiles = (height // view.shape[-2]) * (width // view.shape[-1])
    return {
        "pixel_values": view.repeat(1 + tiles, 1, 1, 1)[None],
        "image_sizes": torch.tensor([[height, width]]),
    }


def _paired(host: PlainHost) -> dict[str, Any]:
    """Words and pixels for two towers, or for text that reads pictures by cross-attention."""
    if not {"input_ids", "pixel_values"} <= set(host.parameters) or "image" in host.vocabulary.placeholders:
        return {}
    return {"input_ids": _ids(host), **_pixels(host)}


def _sound(host: PlainHost) -> dict[str, Any]:
    config: Any = host.model.config
    if host.model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 50)  # a convolution of stride 2 is in front
        return {"input_features": _noise(1, config.num_mel_bins, frames)}
    if host.model.main_input_name == "input_values":
        bins, length = getattr(config, "num_mel_bins", 0), getattr(config, "max_length", 0)
        return {"input_values": _noise(1, length, bins) if bins and length else _noise(1, 4000)}
    return {}


def _written(host: PlainHost) -> dict[str, Any]:
    return {"input_ids": _ids(host)} if "input_ids" in host.parameters else {}


def _seen(host: PlainHost) -> dict[str, Any]:
    return _pixels(host) if "pixel_values" in host.parameters else {}


def _filmed(host: PlainHost) -> dict[str, Any]:
    frames: Any = getattr(host.model.config, "num_frames", 0)
    still = _pixels(host)["pixel_values"]
    return {"pixel_values": still[:, None].repeat(1, frames, 1, 1, 1)} if frames else {}


def _ids(host: PlainHost) -> Tensor:
    """Words without a meaning of their own; the last one ends the text, where some read its meaning."""
    config: Any = host.text_config  # type: ignore[attr-defined]
    taken = set(host.vocabulary.special) | set(host.vocabulary.placeholders.values())
    words = [i for i in range(min(config.vocab_size, 1000)) if i not in taken]
    ids = words[len(words) // 4 :][: WORDS - 1]
    end = getattr(config, "eos_token_id", None)
    return torch.tensor([[*ids, end if isinstance(end, int) and end < config.vocab_size else ids[0]]])


def _pixels(host: PlainHost) -> dict[str, Tensor]:
    config: Any = host.model.config
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or _side(host.model)
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": _noise(1, getattr(config, "num_channels", 3), height, width)}


# ---- others ----------------------------------------------------------------------------------------------


def _sampling(pipe: Any) -> dict[str, Any]:
    """Two steps to small latents."""
    side = 16 * getattr(pipe, "vae_scale_factor", 8)
    given = {
        "prompt": "a cat",
        "num_inference_steps": 2,
        "output_type": "latent",
        "height": side,
        "width": side,
    }
    names = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in given.items() if name in names}


def _denoiser(model: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Latents, a step and text states, by the names that denoisers share; 0 in the shape is the channels."""
    config = model.config
    channels = config.get("in_channels", 4)
    width = next((config[name] for name in TEXT_WIDTHS if config.get(name)), 1)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    names = inspect.signature(model.forward).parameters
    latents = (
        _noise(1, len(grid), channels) if "img_ids" in names else _noise(*(n or channels for n in shape))
    )
    known: dict[str, Any] = {
        "sample": latents,
        "hidden_states": latents,
        "timestep": torch.ones(1, dtype=torch.long),
        "encoder_hidden_states": _noise(1, 7, width),
        "pooled_projections": _noise(1, config.get("pooled_projection_dim") or 1),
        "img_ids": grid,
        "txt_ids": torch.zeros(7, 3),
    }
    if config.get("guidance_embeds"):
        known["guidance"] = torch.ones(1)
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        known["added_cond_kwargs"] = {"text_embeds": _noise(1, pooled), "time_ids": torch.ones(1, 6)}
    return {name: to_model(model, value) for name, value in known.items() if name in names}


def of_first_layer(model: nn.Module) -> tuple[Tensor, ...]:
    """What a module's first layer takes, for every argument that it needs."""
    first = next((m for m in model.modules() if isinstance(m, KNOWN_LAYERS)), model)
    weight = next((p for p in first.parameters(recurse=False) if p.ndim > 1), torch.empty(1, 1))
    if isinstance(first, nn.Embedding):
        made = torch.randint(0, first.num_embeddings, (1, WORDS), generator=_seeded())
    elif weight.ndim == 4:
        made = _noise(1, weight.shape[1], *_side(model))
    else:
        made = _noise(1, WORDS, weight.shape[-1])
    needed = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return (to_model(model, made),) * max(1, len(needed))


def _side(model: Any) -> tuple[int, int]:
    """Of the pictures that a model was made for, where it says so."""
    owner = next((m for m in model.modules() if hasattr(m, "img_size")), None)
    size = getattr(owner, "img_size", None) or getattr(model, "default_cfg", {}).get("input_size") or SIDE
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_seeded())


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
