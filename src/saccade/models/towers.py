"""Where the families keep their towers, and what they call things. Data only."""

from __future__ import annotations

# The first pattern that is found in a module's path names its tower.
TOWERS: tuple[tuple[str, str], ...] = (
    ("qformer", r"(^|\.)(qformer|perceiver|resampler|perceiver_resampler)(\.|$)"),
    ("text", r"(^|\.)(text_model|language_model|text_decoder|text_encoder|text)(\.|$)"),
    ("vision", r"(^|\.)(vision|visual|image_encoder|vision_tower|vision_model|vision_encoder|vit|video_tower|image_tower)(\.|_|$)"),
    ("audio", r"(^|\.)audio"),
    ("encoder", r"(^|\.)encoder(\.|$)"),
    ("text", r""),
)

# Names of the attribute under which a layer keeps attention to another sequence.
CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "attn2")

# Where a configuration keeps the id of the placeholder of a modality.
PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "image": ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}

# Configuration entries that name tokens with a meaning of their own rather than words.
SPECIAL_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "vision_start_token_id",
    "vision_end_token_id", "boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index",
)  # fmt: skip

# State that a model keeps between calls and that an extra pass must put back.
TRANSIENT = ("rope_deltas",)
