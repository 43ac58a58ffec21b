"""The world's tiny models: standard architectures made from configurations, and their processors."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from saccade.world import text
from saccade.world.kinds import GRID, LETTERS, PATCH, SIZE
from saccade.world.words import INDEX, WORDS

MEAN, STD = 0.5, 0.25  # of pixels in 0 to 1
CHAT = (
    "<s> {% for message in messages %}{{ message['role'] }} : "
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """The world's words, and behind them the special tokens that an architecture asks for."""
    words = Tokenizer(WordLevel(_with(special.values()), unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in LETTERS])
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens=special, padding_side="left",
    )  # fmt: skip


def _with(special: Iterable[str]) -> dict[str, int]:
    more = [token for token in special if token not in INDEX]
    return INDEX | {token: len(WORDS) + number for number, token in enumerate(more)}


def vlm() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=384, num_hidden_layers=8,
        num_attention_heads=4, max_position_embeddings=1024, rms_norm_eps=1e-5, initializer_range=0.05,
        tie_word_embeddings=True, bos_token_id=INDEX["<s>"], eos_token_id=INDEX["</s>"],
        pad_token_id=INDEX["<pad>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=INDEX["<image>"], vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=GRID * GRID, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=INDEX["<s>"], eos_token_id=INDEX["</s>"], pad_token_id=INDEX["<pad>"], max_new_tokens=64
    )
    return model


def _images() -> CLIPImageProcessorPil:
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )


def vlm_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=_images(), tokenizer=tokenizer(image_token="<image>"), patch_size=PATCH,
        chat_template=CHAT,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def lm_tokenizer() -> PreTrainedTokenizerFast:
    """A text begins with `<s>`; a number is read digit by digit."""
    words = Tokenizer(WordLevel(text.INDEX, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", text.INDEX["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left", model_max_length=2048, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def lm() -> LlamaForCausalLM:
    index = text.INDEX
    config = LlamaConfig(
        vocab_size=len(text.WORDS), hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5,
        initializer_range=0.05, tie_word_embeddings=True, bos_token_id=index["<s>"],
        eos_token_id=index["</s>"], pad_token_id=index["<pad>"],
    )  # fmt: skip
    return LlamaForCausalLM(config)


VISION = {"video_token": "<video>", "vision_start_token": "<vision>", "vision_end_token": "</vision>"}
FINE, MERGE = PATCH // 2, 2


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 4, "hidden_size": 64, "intermediate_size": 192, "num_heads": 4, "patch_size": FINE,
        "spatial_merge_size": MERGE, "window_size": 4 * PATCH, "fullatt_block_indexes": [3],
        "out_hidden_size": 128, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }  # fmt: skip
    text = {
        "vocab_size": len(WORDS) + len(VISION), "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "initializer_range": 0.05,
        "bos_token_id": INDEX["<s>"], "eos_token_id": INDEX["</s>"], "pad_token_id": INDEX["<pad>"],
        # theta so small that one column more still turns the slowest waves, which are the width's
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    ids = _with(VISION.values())
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=INDEX["<image>"], tie_word_embeddings=True,
        **{f"{name}_id": ids[token] for name, token in VISION.items()},
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=INDEX["<s>"], eos_token_id=INDEX["</s>"], pad_token_id=INDEX["<pad>"], max_new_tokens=64
    )
    return model


def qwen_processor() -> PaddleOCRVLProcessor:
    """What Qwen2_5_VLProcessor does to pictures; that one also asks for videos, and they for torchvision."""
    images = Qwen2VLImageProcessorPil(
        patch_size=FINE, merge_size=MERGE, image_mean=[MEAN] * 3, image_std=[STD] * 3,
        size={"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
    )  # fmt: skip
    return PaddleOCRVLProcessor(
        image_processor=images, tokenizer=tokenizer(image_token="<image>", **VISION),
        chat_template=CHAT.replace("<image>", "<vision><image></vision>"),
    )  # fmt: skip


END = "<end>"


def clip() -> CLIPModel:
    part = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "hidden_act": "gelu"}
    vision = part | {"num_hidden_layers": 5, "image_size": SIZE, "patch_size": PATCH, "projection_dim": 128}
    text = part | {
        "num_hidden_layers": 4, "projection_dim": 128, "vocab_size": len(WORDS) + 1,
        "max_position_embeddings": 77, "bos_token_id": INDEX["<s>"], "eos_token_id": len(WORDS),
        "pad_token_id": INDEX["<pad>"],
    }  # fmt: skip
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=128))


def clip_processor() -> CLIPProcessor:
    """A text ends with a token of the highest id: an end of id 2, as `</s>` has, CLIP looks for elsewhere."""
    words = tokenizer(end_token=END)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {END}", special_tokens=[("<s>", INDEX["<s>"]), (END, len(WORDS))]
    )
    words.eos_token, words.padding_side, words.model_max_length = END, "right", 77
    return CLIPProcessor(_images(), words)
