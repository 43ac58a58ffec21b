"""Models that read pictures and write text.

Special tokens have the ids that `words.tokenizer` gives them: `FIRST` for the first that a family names.
Wherever the family keeps the sizes of pictures, those made by hand differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers as T
from torch import Tensor

from .base import TEXT, TOWER, noise, pad, register, words
from .words import BOS, FIRST, bare, chat, dialogue, tokenizer

IMAGE = FIRST
VIDEO = FIRST + 1
TILE = {**TOWER, "image_size": 32, "patch_size": 8}
"""Tiles of 4 x 4 patches, for families that cut a picture up."""
EYE = {**TOWER, "image_size": 48, "patch_size": 8}
"""One view of 6 x 6 patches."""
WIDE_EYE = {**TOWER, "image_size": 64, "patch_size": 8}
"""8 x 8 patches, for families that merge four into one feature."""
PINPOINTS = [[32, 64], [64, 32], [64, 64]]

VIDEO_NEEDS = ("torchvision",)
"""Video processors exist with torchvision only, and the processors that own one with them."""
ONE = (1, 1)
PICTURE = {"image_token": "<image>"}
BOTH = {**PICTURE, "video_token": "<video>"}


def square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def written(images: Sequence[int], item: Callable[[int], list[int]], side: str) -> dict[str, Tensor]:
    """Ids and mask of a batch with `images[b]` pictures in sample b; picture i reads as `item(i)`."""
    samples, index = [], 0
    for b, count in enumerate(images):
        parts = [torch.tensor([BOS]), words(1, 3, seed=b)[0]]
        for i in range(index, index + count):
            parts += [torch.tensor(item(i)), words(1, 3, seed=10 + i)[0]]
        samples.append(torch.cat([*parts, words(1, 5, seed=20 + b)[0]]))
        index += count
    return pad(samples, side)


def grid(images: Sequence[int], first: Sequence[int], second: Sequence[int]) -> Tensor:
    """One row for every picture; each third has another shape, so that two samples of one need no padding."""
    return torch.tensor([second if i % 3 == 2 else first for i in range(sum(images))])


# --- LLaVA: one square view, every patch a token


def llava_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [IMAGE] * 36, side)
    return {**ids, "pixel_values": noise(sum(images), 3, 48, 48)}


def llava_processor() -> Any:
    return T.LlavaProcessor(
        image_processor=T.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=square(48)),
        tokenizer=tokenizer(PICTURE),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )


@register(
    "llava",
    "vlm",
    "generates",
    "multi_image",
    inputs=llava_inputs,
    processor=llava_processor,
    prompt=partial(dialogue, image="<image>"),
)
def llava() -> Any:
    return T.LlavaForConditionalGeneration, T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**EYE),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=36,
        vision_feature_layer=-2,
    )


# --- LLaVA-NeXT and OneVision: a base view, then the best-fitting tiles, unpadded, a newline after each row


TILED = {(40, 60): 16 + 6 * (8 + 1), (64, 30): 16 + 8 * (4 + 1)}
"""Height and width of a picture, and the tokens of its base view, rows and newlines."""


def tiled_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    sizes = grid(images, *TILED)
    ids = written(images, lambda i: [IMAGE] * TILED[tuple(sizes[i].tolist())], side)
    return {**ids, "pixel_values": noise(len(sizes), 5, 3, 32, 32), "image_sizes": sizes}


def onevision_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    """Beside another picture of its sample a picture keeps only its base view, with one newline."""
    sizes = grid(images, *TILED)
    alone = [count == 1 for count in images for _ in range(count)]
    counts = [TILED[tuple(s)] if one else 17 for s, one in zip(sizes.tolist(), alone, strict=True)]
    ids = written(images, lambda i: [IMAGE] * counts[i], side)
    pixels = noise(len(sizes), 5, 3, 32, 32)
    return {**ids, "pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor(images)}


def onevision_video(frames: int) -> dict[str, Any]:
    ids = written([1], lambda _: [VIDEO] * (frames * 4 + 1), "left")
    return {**ids, "pixel_values_videos": noise(1, frames, 3, 32, 32)}


def llava_next_processor() -> Any:
    return T.LlavaNextProcessor(
        image_processor=T.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=square(32), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer(PICTURE),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>"),
    )


def onevision_processor() -> Any:
    return T.LlavaOnevisionProcessor(
        image_processor=T.LlavaOnevisionImageProcessor(size=square(32), image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer(BOTH),
        video_processor=T.LlavaOnevisionVideoProcessor(size=square(32)),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat("<image>", "<video>"),
    )


@register(
    "llava_next",
    "vlm",
    "generates",
    "multi_image",
    "tiles",
    inputs=tiled_inputs,
    processor=llava_next_processor,
    prompt=partial(dialogue, image="<image>"),
)
def llava_next() -> Any:
    return T.LlavaNextForConditionalGeneration, T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**TILE),
        text_config=T.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )


@register(
    "llava_onevision",
    "vlm",
    "generates",
    "multi_image",
    "tiles",
    inputs=onevision_inputs,
    video=onevision_video,
    processor=onevision_processor,
    processor_needs=VIDEO_NEEDS,
    prompt=partial(dialogue, image="<image>", video="<video>"),
)
def llava_onevision() -> Any:
    return T.LlavaOnevisionForConditionalGeneration, T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**TILE, vision_use_head=False),
        text_config=T.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )


# --- Video-LLaVA: CLIP on pictures, another CLIP on eight frames, all tokens kept


def video_llava_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [IMAGE] * 16, side)
    return {**ids, "pixel_values_images": noise(sum(images), 3, 32, 32)}


def video_llava_video(frames: int) -> dict[str, Any]:
    ids = written([1], lambda _: [VIDEO] * (frames * 17), "left")
    return {**ids, "pixel_values_videos": noise(1, frames, 3, 32, 32)}


def video_llava_processor() -> Any:
    size = {"size": {"shortest_edge": 32}, "crop_size": square(32)}
    return T.VideoLlavaProcessor(
        image_processor=T.VideoLlavaImageProcessor(**size),
        video_processor=T.VideoLlavaVideoProcessor(**size),
        tokenizer=tokenizer(BOTH),
        patch_size=8,
        chat_template=chat("<image>", "<video>"),
    )


@register(
    "video_llava",
    "vlm",
    "generates",
    "multi_image",
    inputs=video_llava_inputs,
    video=video_llava_video,
    processor=video_llava_processor,
    processor_needs=VIDEO_NEEDS,
    prompt=partial(dialogue, image="<image>", video="<video>"),
)
def video_llava() -> Any:
    return T.VideoLlavaForConditionalGeneration, T.VideoLlavaConfig(
        vision_config=T.CLIPVisionConfig(**TILE),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=8 * 17,
    )


# --- Qwen: pictures of any size packed into rows of patches, four merged into a token


QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
START, END = FIRST + 2, FIRST + 3
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
PATCHES = {"num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}


def qwen_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    grids = grid(images, (1, 8, 8), (1, 4, 8))
    ids = written(images, lambda i: [START, *[IMAGE] * (int(grids[i].prod()) // 4), END], side)
    kinds = (ids["input_ids"] == IMAGE).long()
    pixels = noise(int(grids.prod(1).sum()), 3 * 2 * 8 * 8)
    return {**ids, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def qwen_video(frames: int, stamped: bool = False) -> dict[str, Any]:
    """Two frames make one step of 4 x 4 tokens; `stamped` gives each step its time and its own markers."""
    steps = frames // 2
    if stamped:
        clip = [START, *[150, START, *[VIDEO] * 16, END] * steps, END]
    else:
        clip = [START, *[VIDEO] * (16 * steps), END]
    ids = written([1], lambda _: clip, "left")
    return {
        **ids,
        "pixel_values_videos": noise(steps * 64, 3 * 2 * 8 * 8),
        "video_grid_thw": torch.tensor([[steps, 8, 8]]),
        "mm_token_type_ids": 2 * (ids["input_ids"] == VIDEO).long(),
    }


def qwen_processor(kind: str, clips: str) -> Any:
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    bounds = {"shortest_edge": 48 * 48, "longest_edge": 128 * 128}
    image, video = (f"<|vision_start|>{token}<|vision_end|>" for token in QWEN.values())
    return getattr(T, kind)(
        image_processor=T.Qwen2VLImageProcessor(size=bounds, **sizes),
        tokenizer=tokenizer(
            {**QWEN, "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
        ),
        video_processor=getattr(T, clips)(size={**bounds, "longest_edge": 8 * 64 * 64}, **sizes),
        chat_template=chat(image, video),
    )


qwen = partial(
    register,
    inputs=qwen_inputs,
    prompt=partial(
        dialogue,
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
    ),
    processor_needs=VIDEO_NEEDS,
)


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


@qwen(
    "qwen2_vl",
    "vlm",
    "generates",
    "multi_image",
    "packed",
    "mrope",
    video=qwen_video,
    processor=partial(qwen_processor, "Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
)
def qwen2_vl() -> Any:
    return T.Qwen2VLForConditionalGeneration, T.Qwen2VLConfig(
        vision_config={**PATCHES, "depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        text_config={**TEXT, "rope_parameters": mrope(2, 3, 3)},
        **QWEN_IDS,
    )


@qwen(
    "qwen2_5_vl",
    "vlm",
    "generates",
    "multi_image",
    "packed",
    "mrope",
    "windows",
    video=qwen_video,
    processor=partial(qwen_processor, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
)
def qwen2_5_vl() -> Any:
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    windows = {"window_size": 32, "fullatt_block_indexes": [1]}
    return T.Qwen2_5_VLForConditionalGeneration, T.Qwen2_5_VLConfig(
        vision_config={**PATCHES, **tower, **windows},
        text_config={**TEXT, "rope_parameters": mrope(2, 3, 3)},
        **QWEN_IDS,
    )


@qwen(
    "qwen3_vl",
    "vlm",
    "generates",
    "multi_image",
    "packed",
    "mrope",
    "deepstack",
    video=partial(qwen_video, stamped=True),
    processor=partial(qwen_processor, "Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
)
def qwen3_vl() -> Any:
    tower = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    return T.Qwen3VLForConditionalGeneration, T.Qwen3VLConfig(
        vision_config={**PATCHES, **tower, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, "head_dim": 16, "rope_parameters": mrope(3, 3, 2, mrope_interleaved=True)},
        **QWEN_IDS,
    )


# --- InternVL: square tiles and a thumbnail last, pixels shuffled four into one


INTERN = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}


def internvl_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    tiles = grid(images, [3], [1]).flatten().tolist()
    ids = written(images, lambda i: [FIRST + 1, *[IMAGE] * (16 * tiles[i]), FIRST + 2], side)
    return {**ids, "pixel_values": noise(sum(tiles), 3, 64, 64)}


def internvl_processor() -> Any:
    return T.InternVLProcessor(
        image_processor=T.GotOcr2ImageProcessor(
            size=square(64), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer(INTERN),
        video_processor=T.InternVLVideoProcessor(size=square(64)),
        image_seq_length=16,
        chat_template=chat("<IMG_CONTEXT>", "<video>"),
    )


@register(
    "internvl",
    "vlm",
    "generates",
    "multi_image",
    "tiles",
    inputs=internvl_inputs,
    processor=internvl_processor,
    processor_needs=VIDEO_NEEDS,
    prompt=partial(dialogue, image="<IMG_CONTEXT>", video="<video>"),
)
def internvl() -> Any:
    return T.InternVLForConditionalGeneration, T.InternVLConfig(
        vision_config={**TOWER, "image_size": [64, 64], "patch_size": [8, 8]},
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    )


# --- Gemma 3 and PaliGemma: one square view; the picture's tokens see each other both ways


def gemma3_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [FIRST + 1, *[IMAGE] * 16, FIRST + 2], side)
    kinds = (ids["input_ids"] == IMAGE).long()
    return {**ids, "pixel_values": noise(sum(images), 3, 64, 64), "token_type_ids": kinds}


def gemma3_processor() -> Any:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return T.Gemma3Processor(
        image_processor=T.Gemma3ImageProcessor(size=square(64)),
        tokenizer=tokenizer(named),
        image_seq_length=16,
        chat_template=chat("<start_of_image>"),
    )


@register(
    "gemma3",
    "vlm",
    "generates",
    "multi_image",
    "sliding",
    "bidirectional",
    inputs=gemma3_inputs,
    processor=gemma3_processor,
    prompt=partial(dialogue, image="<start_of_image>"),
)
def gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    return T.Gemma3ForConditionalGeneration, T.Gemma3Config(
        vision_config=T.SiglipVisionConfig(**WIDE_EYE, vision_use_head=False),
        text_config=T.Gemma3TextConfig(
            **TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=32, layer_types=layers
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=FIRST + 1,
        eoi_token_index=FIRST + 2,
    )


def paligemma_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    """Token type 0 throughout: all of it is the prefix, which sees itself both ways."""
    inputs = llava_inputs(images, side)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def paligemma_processor() -> Any:
    eye = T.SiglipImageProcessor(size=square(48))
    eye.image_seq_length = 36
    return T.PaliGemmaProcessor(image_processor=eye, tokenizer=tokenizer(PICTURE, bos=False))


def paligemma_prompt(n_images: int, question: str) -> str:
    return "<image>" * n_images + question


@register(
    "paligemma",
    "vlm",
    "generates",
    "multi_image",
    "bidirectional",
    inputs=paligemma_inputs,
    processor=paligemma_processor,
    prompt=paligemma_prompt,
)
def paligemma() -> Any:
    reader = {**TEXT, "vocab_size": 512 + 1152}  # the processor adds words for places and segments
    return T.PaliGemmaForConditionalGeneration, T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(**EYE, projection_dim=64, vision_use_head=False),
        text_config=T.GemmaConfig(**reader, head_dim=16),
        projection_dim=64,
        image_token_index=IMAGE,
    )


# --- Idefics 3 and SmolVLM: tiles in reading order, then the whole, between written markers


PLACES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
AROUND, GLOBAL = FIRST + 1, FIRST + 2


def idefics3_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    """A sample with fewer pictures than another is filled up with black ones."""
    ids = written(images, lambda _: [AROUND, GLOBAL, *[IMAGE] * 16, AROUND], side)
    pixels = noise(len(images), max(images), 3, 64, 64)
    for b, count in enumerate(images):
        pixels[b, count:] = 0
    return {**ids, "pixel_values": pixels}


def idefics3_tokenizer() -> Any:
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    return tokenizer(named, *PLACES)


def idefics3_processor() -> Any:
    return T.Idefics3Processor(
        image_processor=T.Idefics3ImageProcessor(
            size={"longest_edge": 128}, max_image_size={"longest_edge": 64}
        ),
        tokenizer=idefics3_tokenizer(),
        image_seq_len=16,
        chat_template=chat("<image>"),
    )


def smolvlm_processor() -> Any:
    return T.SmolVLMProcessor(
        image_processor=T.SmolVLMImageProcessor(
            size={"longest_edge": 128}, max_image_size={"longest_edge": 64}
        ),
        tokenizer=idefics3_tokenizer(),
        video_processor=T.SmolVLMVideoProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}
        ),
        image_seq_len=16,
        chat_template=chat("<image>", "<video>"),
    )


def _idefics3(config: Any) -> Any:
    return config(
        vision_config=WIDE_EYE,
        text_config=T.LlamaConfig(**TEXT),
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
    )


@register(
    "idefics3",
    "vlm",
    "generates",
    "multi_image",
    "tiles",
    inputs=idefics3_inputs,
    processor=idefics3_processor,
    prompt=partial(dialogue, image="<image>"),
)
def idefics3() -> Any:
    return T.Idefics3ForConditionalGeneration, _idefics3(T.Idefics3Config)


@register(
    "smolvlm",
    "vlm",
    "generates",
    "multi_image",
    "tiles",
    inputs=idefics3_inputs,
    processor=smolvlm_processor,
    processor_needs=(*VIDEO_NEEDS, "num2words"),
    prompt=partial(dialogue, image="<image>", video="<video>"),
)
def smolvlm() -> Any:
    return T.SmolVLMForConditionalGeneration, _idefics3(T.SmolVLMConfig)


# --- Mllama: tiles seen through cross-attention; one token stands for a picture


def mllama_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    """Every picture has two tiles of four; a token sees the last picture before it."""
    ids = written(images, lambda _: [IMAGE], side)
    most = max(images)
    there = torch.arange(most) < torch.tensor(images)[:, None]
    latest = (ids["input_ids"] == IMAGE).cumsum(1) - 1
    seen = (latest[..., None] == torch.arange(most)) & there[:, None]
    tiles = torch.tensor([1, 1, 0, 0])
    return {
        **ids,
        "pixel_values": noise(len(images), most, 4, 3, 48, 48)
        * (there[..., None] * tiles)[..., None, None, None],
        "aspect_ratio_ids": there.long() * 2,
        "aspect_ratio_mask": there[..., None] * tiles,
        "cross_attention_mask": seen[..., None] * tiles,
    }


def mllama_processor() -> Any:
    return T.MllamaProcessor(
        image_processor=T.MllamaImageProcessor(size=square(48), max_image_tiles=4),
        tokenizer=tokenizer({"image_token": "<|image|>"}, "<|python_tag|>", bos=False),
        chat_template=chat("<|image|>"),
    )


@register(
    "mllama",
    "vlm",
    "generates",
    "multi_image",
    "tiles",
    "cross",
    inputs=mllama_inputs,
    processor=mllama_processor,
    prompt=partial(dialogue, image="<|image|>"),
)
def mllama() -> Any:
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
    }
    depth = {"num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return T.MllamaForConditionalGeneration, T.MllamaConfig(
        vision_config={**tower, **depth, "vision_output_dim": 64, "supported_aspect_ratios": ratios},
        text_config={**TEXT, "cross_attention_layers": [1, 3], "rope_parameters": rope},
        image_token_index=IMAGE,
    )


# --- Pixtral: pictures of any size, every patch a token, a break after each row


BREAK, LAST = FIRST + 1, FIRST + 2


def pixtral_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    sizes = grid(images, (48, 48), (32, 48))
    rows, columns = (sizes // 8).T.tolist()

    def item(i: int) -> list[int]:
        row = [*[IMAGE] * columns[i], BREAK]
        return [*(row * rows[i])[:-1], LAST]

    ids = written(images, item, side)
    return {**ids, "pixel_values": noise(len(sizes), 3, 48, 48), "image_sizes": sizes}


def pixtral_processor() -> Any:
    named = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return T.PixtralProcessor(
        image_processor=T.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=square(8)),
        tokenizer=tokenizer(named),
        patch_size=8,
        chat_template=chat("[IMG]"),
    )


@register(
    "pixtral",
    "vlm",
    "generates",
    "multi_image",
    "packed",
    inputs=pixtral_inputs,
    processor=pixtral_processor,
    processor_needs=("torchvision",),
    prompt=partial(dialogue, image="[IMG]"),
)
def pixtral() -> Any:
    return T.LlavaForConditionalGeneration, T.LlavaConfig(
        vision_config=T.PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 8}),
        text_config=T.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


# --- BLIP: queries read the one picture of a sample by cross-attention; BLIP captioning has a decoder do so
# The processors of the first two set the picture's tokens before the text, and before its padding.


QUERIES = 8
QFORMER = {**TOWER, "vocab_size": 512, "encoder_hidden_size": 32, "cross_attention_frequency": 2}


def blip2_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    ids = written(images, lambda _: [IMAGE] * QUERIES, side)
    return {**ids, "pixel_values": noise(len(images), 3, 48, 48)}


def instructblip_inputs(images: Sequence[int] = ONE, side: str = "left") -> dict[str, Any]:
    asked = {"qformer_input_ids": words(len(images), 6), "qformer_attention_mask": torch.ones(len(images), 6)}
    return {**blip2_inputs(images, side), **asked}


def caption_inputs(batch: int = 2) -> dict[str, Any]:
    return {"input_ids": words(batch, 10), "pixel_values": noise(batch, 3, 48, 48)}


def _blip_eye() -> Any:
    return T.BlipImageProcessor(size=square(48))


def blip2_processor() -> Any:
    return T.Blip2Processor(
        image_processor=_blip_eye(), tokenizer=tokenizer(None, "<image>"), num_query_tokens=QUERIES
    )


def instructblip_processor() -> Any:
    return T.InstructBlipProcessor(
        image_processor=_blip_eye(),
        tokenizer=tokenizer(None, "<image>"),
        qformer_tokenizer=tokenizer(),
        num_query_tokens=QUERIES,
    )


def blip_processor() -> Any:
    return T.BlipProcessor(image_processor=_blip_eye(), tokenizer=tokenizer())


@register(
    "blip2",
    "vlm",
    "generates",
    "qformer",
    inputs=blip2_inputs,
    processor=blip2_processor,
    prompt=bare,
)
def blip2() -> Any:
    return T.Blip2ForConditionalGeneration, T.Blip2Config(
        vision_config=EYE,
        qformer_config=QFORMER,
        text_config=T.LlamaConfig(**TEXT),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )


@register(
    "instructblip",
    "vlm",
    "generates",
    "qformer",
    inputs=instructblip_inputs,
    processor=instructblip_processor,
    prompt=bare,
)
def instructblip() -> Any:
    return T.InstructBlipForConditionalGeneration, T.InstructBlipConfig(
        vision_config=EYE,
        qformer_config=QFORMER,
        text_config=T.LlamaConfig(**TEXT),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )


@register(
    "blip",
    "encdec",
    "captioning",
    "generates",
    "cross",
    "softmax",
    inputs=caption_inputs,
    processor=blip_processor,
    prompt=bare,
)
def blip() -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    return T.BlipForConditionalGeneration, T.BlipConfig(
        text_config={**TOWER, **special, "vocab_size": 512, "encoder_hidden_size": 32},
        vision_config=EYE,
    )
