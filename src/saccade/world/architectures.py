"""The world's tiny models: standard architectures made from configurations, and their processors."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

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


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(INDEX, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.add_tokens([AddedToken(letter, single_word=True, normalized=False) for letter in LETTERS])
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip


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


def vlm_processor() -> LlavaProcessor:
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer(), patch_size=PATCH, chat_template=CHAT,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
