"""More models that read pictures, or sound, and write text.

Placeholders have the ids of `vlm`; sound has the next one that is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers as T
from torch import Tensor

from .base import TEXT, TOWER, noise, pad, register, words
from .vlm import (
    END,
    EYE,
    FIRST,
    IMAGE,
    ONE,
    PATCHES,
    QWEN,
    QWEN_IDS,
    START,
    VIDEO,
    VIDEO_NEEDS,
    WIDE_EYE,
    llava_inputs,
    mrope,
    qwen,
    qwen_inputs,
    qwen_processor,
    qwen_video,
    square,
    written,
)
from .words import BOS, bare, chat, dialogue, tokenizer

AUDIO = FIRST + 4
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EAR = {
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "max_source_positions": 20,
}
"""An encoder of 40 steps of sound, halved twice."""
CODES = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}
"""A picture's codes, half as many a side as it has points."""

vlm = partial(register, slow=True, processor_needs=VIDEO_NEEDS)
PACKING = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
BOUNDS = {"shortest_edge": 48 * 48, "longest_edge": 128 * 128}
"""Of pictures that a processor packs; for clips as well."""


# --- Qwen's mixture of experts, and the thinker that also hears


@qwen(
    "qwen3_vl_moe",
    "vlm",
    "generates",
    "multi_image",
    "packed",
    "mrope",
    "deepstack",
    "moe",
    video=partial(qwen_video, stamped=True),
    processor=partial(qwen_processor, "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    slow=True,
)
def qwen3_vl_moe() -> Any:
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    rope = mrope(3, 3, 2, mrope_interleaved=True)
    return T.Qwen3VLMoeForConditionalGeneration, T.Qwen3VLMoeConfig(
        vision_config={**PATCHES, **tower, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, **MOE, "head_dim": 16, "rope_parameters": rope},
        **QWEN_IDS,
    )


def heard(batch: int, count: int, more: Sequence[int] = ()) -> dict[str, Tensor]:
    """A sample is words, then `more`, then a sound of `count` tokens, then words."""
    row = torch.tensor([*more, *[AUDIO] * count])
    first = torch.tensor([BOS])
    return pad(
        [torch.cat([first, words(1, 3, seed=b)[0], row, words(1, 5, seed=9 + b)[0]]) for b in range(batch)],
        "left",
    )


def omni_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    """Every sample has a picture and a sound."""
    seen = qwen_inputs([1] * len(images))
    ids = heard(len(images), 10, [START, *[IMAGE] * 16, END])
    mask = torch.ones(len(images), 40, dtype=torch.long)
    sound = {"input_features": noise(len(images), 8, 40), "feature_attention_mask": mask}
    return {
        **ids,
        **sound,
        "pixel_values": seen["pixel_values"][: 64 * len(images)],
        "image_grid_thw": torch.tensor([[1, 8, 8]] * len(images)),
    }


def omni_processor() -> Any:
    named = {
        **QWEN,
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    return T.Qwen2_5OmniProcessor(
        image_processor=T.Qwen2VLImageProcessor(size=BOUNDS, **PACKING),
        video_processor=T.Qwen2VLVideoProcessor(size=BOUNDS, **PACKING),
        feature_extractor=T.WhisperFeatureExtractor(feature_size=8),
        tokenizer=tokenizer(named),
        chat_template=chat("<|vision_bos|><|image_pad|><|vision_eos|>"),
    )


@vlm(
    "qwen2_5_omni",
    "vlm",
    "generates",
    "packed",
    "mrope",
    "windows",
    "audio",
    inputs=omni_inputs,
    processor=omni_processor,
    prompt=partial(dialogue, image="<|vision_bos|><|image_pad|><|vision_eos|>"),
)
def qwen2_5_omni() -> Any:
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    windows = {"window_size": 32, "fullatt_block_indexes": [1]}
    return T.Qwen2_5OmniThinkerForConditionalGeneration, T.Qwen2_5OmniThinkerConfig(
        vision_config={**PATCHES, **tower, **windows},
        audio_config={**EAR, "n_window": 10, "output_dim": 64},
        text_config={**TEXT, "rope_parameters": mrope(2, 3, 3)},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=AUDIO + 1,
        audio_end_token_id=AUDIO + 2,
    )


def sound_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    mask = torch.ones(len(images), 40, dtype=torch.long)
    return {
        **heard(len(images), 10),
        "input_features": noise(len(images), 8, 40),
        "feature_attention_mask": mask,
    }


@vlm("qwen2_audio", "audio", "generates", inputs=sound_inputs)
def qwen2_audio() -> Any:
    return T.Qwen2AudioForConditionalGeneration, T.Qwen2AudioConfig(
        audio_config=T.Qwen2AudioEncoderConfig(**EAR),
        text_config=T.Qwen2Config(**TEXT),
        audio_token_index=AUDIO,
    )


# --- GLM-4V: Qwen's packing, with positions of the pictures interpolated


GLM = "<|begin_of_image|><|image|><|end_of_image|>"


def glm4v_processor() -> Any:
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    return T.Glm4vProcessor(
        image_processor=T.Glm4vImageProcessor(size=BOUNDS, **PACKING),
        tokenizer=tokenizer({"image_token": "<|image|>", "video_token": "<|video|>"}, *marks),
        video_processor=T.Glm4vVideoProcessor(size=BOUNDS, **PACKING),
        chat_template=chat(GLM),
    )


@vlm(
    "glm4v",
    "vlm",
    "generates",
    "multi_image",
    "packed",
    "mrope",
    inputs=qwen_inputs,
    processor=glm4v_processor,
    prompt=partial(dialogue, image=GLM),
)
def glm4v() -> Any:
    tower = {"depth": 3, "hidden_size": 32, "num_heads": 4, "image_size": 64, "patch_size": 8}
    return T.Glm4vForConditionalGeneration, T.Glm4vConfig(
        vision_config={**tower, "intermediate_size": 64, "out_hidden_size": 64},
        text_config={**TEXT, "rope_parameters": mrope(2, 3, 3)},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=AUDIO,
        video_end_token_id=AUDIO + 1,
    )


# --- Gemma 4: patches with their places, four pooled into one; late layers share keys


def gemma4_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [FIRST + 1, *[IMAGE] * 16, FIRST + 2], side)
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(1)
    pictures = {
        "pixel_values": noise(sum(images), 64, 3 * 8 * 8),
        "image_position_ids": places.repeat(sum(images), 1, 1),
    }
    return {**ids, **pictures, "mm_token_type_ids": (ids["input_ids"] == IMAGE).long()}


def gemma4_processor() -> Any:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "video_token": "<|video|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    pooled = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    return T.Gemma4Processor(
        feature_extractor=T.Gemma4AudioFeatureExtractor(),
        image_processor=T.Gemma4ImageProcessor(**pooled),
        tokenizer=tokenizer(named),
        video_processor=T.Gemma4VideoProcessor(**pooled),
        chat_template=chat("<|image|>"),
    )


@vlm(
    "gemma4",
    "vlm",
    "generates",
    "multi_image",
    "sliding",
    "shared_keys",
    inputs=gemma4_inputs,
    processor=gemma4_processor,
    prompt=partial(dialogue, image="<|image|>"),
    needs=("transformers.models.gemma4",),
)
def gemma4() -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    share = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
    tower = {**TOWER, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 8}
    return T.Gemma4ForConditionalGeneration, T.Gemma4Config(
        vision_config={**tower, "pooling_kernel_size": 2, "position_embedding_size": 128},
        text_config={
            **TEXT,
            **share,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 32,
            "layer_types": layers,
        },
        audio_config=None,
        image_token_id=IMAGE,
        boi_token_id=FIRST + 1,
        eoi_token_id=FIRST + 2,
        video_token_id=FIRST + 3,
        audio_token_id=FIRST + 4,
        boa_token_id=FIRST + 5,
        eoa_token_index=FIRST + 6,
    )


# --- Llama 4: pixels shuffled four into one; some layers attend in chunks, without rotation in others


def llama4_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [FIRST + 1, *[IMAGE] * 16, FIRST + 2], side)
    return {**ids, "pixel_values": noise(sum(images), 3, 64, 64)}


def llama4_processor() -> Any:
    marks = ("<|image_start|>", "<|image_end|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
    return T.Llama4Processor(
        image_processor=T.Llama4ImageProcessor(size=square(64), max_patches=4),
        tokenizer=tokenizer(None, "<|patch|>", *marks),
        patch_size=8,
        chat_template=chat("<|image|>"),
    )


@vlm(
    "llama4",
    "vlm",
    "generates",
    "multi_image",
    "chunked",
    "moe",
    inputs=llama4_inputs,
    processor=llama4_processor,
    prompt=partial(dialogue, image="<|image|>"),
)
def llama4() -> Any:
    tower = {**WIDE_EYE, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    experts = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96}
    chunks = {"attention_chunk_size": 16, "no_rope_layers": [1, 0, 1, 0]}
    return T.Llama4ForConditionalGeneration, T.Llama4Config(
        vision_config={**tower, "intermediate_size": 128},
        text_config={**TEXT, **experts, **chunks, "head_dim": 16},
        image_token_index=IMAGE,
        boi_token_index=FIRST + 1,
        eoi_token_index=FIRST + 2,
    )


# --- Phi-4 multimodal: a crop and the whole, halved each way, a mark after each row and between the two


def phi4_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    """The lowest two of eight rows of the crop are blank."""
    ids = written([1] * len(images), lambda _: [IMAGE] * (3 * 5 + 1 + 4 * 5), side)
    there = torch.ones(len(images), 2, 8, 8)
    there[:, 1, 6:] = 0
    return {
        **ids,
        "image_pixel_values": noise(len(images), 2, 3, 64, 64),
        "image_sizes": torch.tensor([[64, 64]] * len(images)),
        "image_attention_mask": there,
    }


def phi4_processor() -> Any:
    class Counting(T.Phi4MultimodalImageProcessor):
        """The library counts 16 x 16 features and 16 marks of a whole, which are 4 x 4 and 4 here."""

        def preprocess(self, *args: Any, **kwargs: Any) -> Any:
            made = super().preprocess(*args, **kwargs)
            made["num_img_tokens"] = [int(count) - 16 * 17 + 4 * 5 for count in made["num_img_tokens"]]
            return made

    return T.Phi4MultimodalProcessor(
        image_processor=Counting(size=square(64), patch_size=8, dynamic_hd=4),
        audio_processor=T.Phi4MultimodalFeatureExtractor(),
        tokenizer=tokenizer({"image_token": "<|image|>", "audio_token": "<|audio|>"}),
        chat_template=chat("<|image|>"),
    )


@vlm(
    "phi4_multimodal",
    "vlm",
    "generates",
    "tiles",
    inputs=phi4_inputs,
    processor=phi4_processor,
    prompt=partial(dialogue, image="<|image|>"),
)
def phi4_multimodal() -> Any:
    eye = {**WIDE_EYE, "crop_size": 64, "image_token_id": IMAGE}
    ear = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_blocks": 2,
        "num_attention_heads": 4,
        "input_size": 16,
    }
    convolution = {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16}
    return T.Phi4MultimodalForCausalLM, T.Phi4MultimodalConfig(
        **TEXT, vision_config=eye, audio_config={**ear, **convolution, "audio_token_id": AUDIO}
    )


# --- Molmo 2: features of two layers, four patches pooled into one by attention


def molmo2_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [FIRST + 1, *[IMAGE] * 9, FIRST + 2], side)
    patches = torch.arange(36).view(3, 2, 3, 2).transpose(1, 2).reshape(9, 4)
    count = sum(images)
    return {
        **ids,
        "pixel_values": noise(count, 36, 3 * 8 * 8),
        "image_token_pooling": torch.cat([patches + 36 * i for i in range(count)]),
        "image_grids": torch.tensor([[3, 3, 0, 0]] * count),
        "image_num_crops": torch.ones(count, dtype=torch.long),
        "mm_token_type_ids": (ids["input_ids"] == IMAGE).long(),
    }


def molmo2_processor() -> Any:
    places = ("<im_start>", "<im_end>", "<low_res_im_start>", "<frame_start>", "<frame_end>")
    more = ("<im_col>", "<im_low>", "<|image|>", "<|video|>")
    return T.Molmo2Processor(
        image_processor=T.Molmo2ImageProcessor(
            size=square(48), patch_size=8, max_crops=4, overlap_margins=[1, 1], pooling_size=[2, 2]
        ),
        video_processor=T.Molmo2VideoProcessor(size=square(48), patch_size=8),
        tokenizer=tokenizer(None, "<im_patch>", *places, *more, bos=False),
        chat_template=chat("<|image|>"),
    )


@vlm(
    "molmo2",
    "vlm",
    "generates",
    "multi_image",
    "bidirectional",
    inputs=molmo2_inputs,
    processor=molmo2_processor,
    prompt=partial(dialogue, image="<|image|>"),
    needs=("transformers.models.molmo2",),
)
def molmo2() -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return T.Molmo2ForConditionalGeneration, T.Molmo2Config(
        vision_config={**TOWER, **heads, "image_size": [48, 48], "patch_size": 8},
        adapter_config={
            **heads,
            "hidden_size": 32,
            "intermediate_size": 64,
            "text_hidden_size": 64,
            "vision_feature_layer": [2, 1],
        },
        text_config={**TEXT, "head_dim": 16, "additional_vocab_size": 8},
        image_patch_id=IMAGE,
        image_start_token_id=FIRST + 1,
        image_end_token_id=FIRST + 2,
        low_res_image_start_token_id=FIRST + 3,
        frame_start_token_id=FIRST + 4,
        frame_end_token_id=FIRST + 5,
    )


# --- Janus and Chameleon: models that could also draw; the second reads pictures as codes


def janus_processor() -> Any:
    named = {
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return T.JanusProcessor(
        image_processor=T.JanusImageProcessor(size=square(48), min_size=8),
        tokenizer=tokenizer(named),
        chat_template=chat("<image_placeholder>"),
        num_image_tokens=36,
    )


@vlm(
    "janus",
    "vlm",
    "generates",
    "multi_image",
    inputs=llava_inputs,
    processor=janus_processor,
    prompt=partial(dialogue, image="<image_placeholder>"),
)
def janus() -> Any:
    return T.JanusForConditionalGeneration, T.JanusConfig(
        vision_config={**EYE, "mlp_ratio": 2, "projection_dim": 64, "num_image_tokens": 36},
        vq_config={**CODES, "projection_dim": 64, "image_token_embed_dim": 64},
        text_config=T.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )


def chameleon_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [FIRST + 1, *[IMAGE] * 16, FIRST + 2], side)
    return {**ids, "pixel_values": noise(sum(images), 3, 8, 8)}


def chameleon_processor() -> Any:
    named = {
        "image_token": "<image>",
        "boi_token": "<racm3:break>",
        "eoi_token": "<eoss>",
        "sep_token": "<reserved08706>",
    }
    processor = T.ChameleonProcessor(
        image_processor=T.ChameleonImageProcessor(size={"shortest_edge": 16}, crop_size=square(16)),
        tokenizer=tokenizer(named),
        image_seq_length=64,
    )
    processor.chat_template = chat("<image>")
    return processor


@vlm(
    "chameleon",
    "vlm",
    "generates",
    "multi_image",
    "codes",
    "convolutions",
    inputs=chameleon_inputs,
    processor=chameleon_processor,
    prompt=partial(dialogue, image="<image>"),
)
def chameleon() -> Any:
    codes = {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 400 + i for i in range(16)}
    return T.ChameleonForConditionalGeneration, T.ChameleonConfig(
        **TEXT,
        vq_config={**CODES, "resolution": 8, "attn_resolutions": [4]},
        vocabulary_map={"<image>": IMAGE, **codes},
    )


# --- Florence-2: a tower that attends over windows and over channels, then an encoder and a decoder


def florence2_inputs(batch: int = 2) -> dict[str, Any]:
    ids = torch.cat([torch.full((batch, 17), IMAGE), words(batch, 6)], 1)
    return {
        "input_ids": ids,
        "pixel_values": noise(batch, 3, 32, 32),
        "decoder_input_ids": words(batch, 6, seed=3),
    }


def florence2_processor() -> Any:
    eye = T.CLIPImageProcessor(size=square(32), do_center_crop=False)
    eye.image_seq_length = 17
    return T.Florence2Processor(
        image_processor=eye, tokenizer=tokenizer({"image_token": "<image>"}, bos=False)
    )


@vlm(
    "florence2",
    "encdec",
    "generates",
    "windows",
    "convolutions",
    inputs=florence2_inputs,
    processor=florence2_processor,
    prompt=bare,
)
def florence2() -> Any:
    reader = {
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    special = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    stages = {
        "depths": [1, 1],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
    }
    patches = {
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
    }
    return T.Florence2ForConditionalGeneration, T.Florence2Config(
        vision_config={**stages, **patches, "projection_dim": 32, "max_position_embeddings": 8},
        text_config=T.BartConfig(vocab_size=512, **reader, **widths, **special),
        image_token_id=IMAGE,
    )
