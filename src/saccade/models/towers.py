"""Where the families keep their towers, and what they call things. Data only."""

from __future__ import annotations

# The first pattern that is found in a module's path names its tower.
TOWERS: tuple[tuple[str, str], ...] = (
    ("qformer", r"(^|\.)(qformer|perceiver|resampler|perceiver_resampler)(\.|$)"),
    ("encoder", r"(^|\.)language_model\.encoder(\.|$)"),
    ("text", r"(^|\.)(text_model|language_model|text_decoder|text_encoder|text)(\.|$)"),
    ("video", r"(^|\.)video_tower(\.|$)"),
    ("codes", r"(^|\.)vq(model|vae)(\.|$)"),
    (
        "vision",
        r"(^|\.)(vision|visual|image_encoder|vision_tower|vision_model|vision_encoder|vit|image_tower)(\.|_|$)",
    ),
    ("vision", r"(^|\.)(img_processor|timm_model)\."),
    ("projector", r"(^|\.)multi_modal_projector(\.|$)"),
    ("audio", r"(^|\.)audio"),
    ("encoder", r"(^|\.)encoder(\.|$)"),
    ("text", r""),
)

# What a configuration of pictures names.
SEES = ("image_size", "patch_size", "num_channels", "backbone_config")

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

# Arguments of a layer, (batch, 1, tokens, 1) or (batch, tokens, width), that say something of every token.
BY_TOKEN = ("full_text_row_masked_out_mask", "per_layer_input")

# State that a model keeps between calls and that an extra pass must put back.
TRANSIENT = ("rope_deltas",)

# Where a model without `get_image_features` keeps the tower and the projector, if it has one, whose features its
# text reads by cross-attention.
CROSS_FEATURES = ("vision_model", "multi_modal_projector")

# Where a model keeps what embeds words and pictures together, the features of pictures in the places of its words.
EMBEDDER = "embed_tokens_extend"

# What the output with the features of pictures has where these are words for codes. Its last hidden state, a map
# (batch, channels, rows, columns), is what the codes were chosen for.
CODES = "image_tokens"

# Towers whose attention modules add the stream by themselves.
OWN_RESIDUAL = ("codes",)

# Names of attention modules that attend from channels to channels.
OVER_CHANNELS = ("channel_attn",)

# What the norm and the projection are called that make one vector of a picture of its class token.
READOUT = ("post_layernorm", "visual_projection")

# Families whose `get_image_features` gives one tensor for all pictures and tiles of a sample; each is a run of
# neighbours in the prompt.
BY_SAMPLE = ("idefics2", "idefics3", "smolvlm")

# Configuration entries that hold a soft cap on the logits.
LOGIT_CAPS = ("final_logit_softcapping",)

# Arguments of a layer that hold a place for every token and every other, or shape the tokens as a grid.
BY_PLACE = {
    "alibi", "position_bias", "relative_pos", "rope", "input_dimensions", "freqs_ci", "rotary_emb",
    "spatial_position_embeddings", "object_queries_position_embeddings",
}  # fmt: skip

# Arguments of a denoiser that say something of places and not of samples.
UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb", "img_shapes", "txt_seq_lens")

# Names under which a pipeline keeps its denoisers, and the tower that their sites belong to.
DENOISERS = (("unet", "unet"), ("transformer", "dit"), ("transformer_2", "dit2"))

# Names of the first argument of a denoiser.
LATENT_INPUTS = ("hidden_states", "sample", "x")
