"""Steer a vision-language model, look at what changed, and get the model back as it was.

    python examples/steer.py

The model is tiny and untrained, made from a configuration, so that this runs in seconds and downloads
nothing. With a real one only the first step differs: `AutoModelForImageTextToText.from_pretrained(...)`, and
inputs from its processor.
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


def answer() -> torch.Tensor:
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return ids[0, len(prompt) :]


bare = answer()
print("bare     ", bare.tolist())

# 2. A stack is methods joined by "+", with options in brackets. `saccade methods` lists what there is,
#    `saccade show vhr` says what a method does and what its options mean. Here: the heads that listen to the
#    picture three times as loud, and half of the attention that rests on the first token.
stack = sc.load("vhr(alpha=3.0)+zerotuning(gamma=0.5)")

# 3. Inside the block the model answers with the methods: in a forward, in `generate`, with beams, in batches.
with sc.attach(model, stack) as session:
    print("steered  ", answer().tolist())
    print(session.summary())

    # What a method found on its way is kept. VHR tells which heads it chose, layer by layer.
    for layer, heads in session.results["vhr"]["chosen"].items():
        print(f"    layer {layer}: heads {heads[0].nonzero()[:, 0].tolist()} were made louder")

    # 4. The model alone for a moment, to compare.
    with session.paused():
        assert torch.equal(answer(), bare)

# 5. Outside it is the model that it was, to the bit.
assert torch.equal(answer(), bare)
print("afterwards", answer().tolist())

# 6. The same in Python, in the deeper half of the layers and in two heads: a pattern of sites names layers by
#    number or by percent.
narrow = sc.ZeroTuning(gamma=10.0, sites="text.50%:.self", heads=(0, 3))
with sc.attach(model, narrow):
    print("narrow   ", answer().tolist())

# 7. What a model cannot give is refused when attaching, with a way out.
try:
    sc.attach(model.model.language_model, sc.VHR())
except sc.SaccadeError as refusal:
    print("refused: ", refusal)
