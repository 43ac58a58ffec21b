"""Let the text read fewer visual tokens: choose them in the vision tower, or take them out layer by layer.

    python examples/reduce.py

The model is tiny and untrained, made from a configuration: this runs in seconds and downloads nothing.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import saccade as sc

# 1. A model, and a prompt with a picture: a beginning, 36 places for the picture, five words.
IMAGE = 3
torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
config = LlavaConfig(
    vision_config=CLIPVisionConfig(**small, num_hidden_layers=3, image_size=48, patch_size=8),
    text_config=LlamaConfig(**small, num_hidden_layers=6, num_key_value_heads=2, vocab_size=512),
    image_token_index=IMAGE,
    image_seq_length=36,
)
model = LlavaForConditionalGeneration(config).eval()
prompt = [1, *[IMAGE] * 36, 150, 151, 152, 153, 154]
inputs = {"input_ids": torch.tensor([prompt]), "pixel_values": torch.randn(1, 3, 48, 48)}


def answer() -> tuple[list[int], list[int]]:
    """What is written, and how many entries the cache of every layer holds at the end."""
    made = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    return made.sequences[0, len(prompt) :].tolist(), [
        layer.keys.shape[2] for layer in made.past_key_values.layers
    ]


# 2. FasterVLM sends on what the vision tower's class token looks at: the cache is short from the first layer
#    on. PyramidDrop takes out half of what is left, layer after layer. Both go together.
for stack in ("fastervlm(keep=1)", "fastervlm(keep=0.25)", "pyramiddrop", "fastervlm(keep=0.5)+pyramiddrop"):
    with sc.attach(model, sc.load(stack)):
        words, held = answer()
    print(f"{stack:32} cache {held}  answer {words}")

# 3. Which tokens stay is a method's `features` event; a method of one's own is a few lines.
from dataclasses import dataclass  # noqa: E402

from saccade.core.features import Item  # noqa: E402
from saccade.core.tokens import Tokens  # noqa: E402


@dataclass(eq=False)
class EveryOther(sc.Method):
    """A chessboard without its black squares."""

    def features(self, item: Item) -> Tokens:
        return Tokens(torch.arange(0, item.x.shape[0], 2))


with sc.attach(model, EveryOther()):
    words, held = answer()
print(f"{'every other token':32} cache {held}  answer {words}")

# 4. Outside of the block it is the model that it was.
words, held = answer()
print(f"{'bare':32} cache {held}  answer {words}")
