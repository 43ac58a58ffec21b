"""See where a model looks for each word of its answer.

    python examples/look.py [MODEL IMAGE QUESTION]

MODEL is a folder or a hub id. Without arguments the model that ships with the package looks at a drawn scene.
"""

import sys

from PIL import Image

import saccade as sc
from saccade import looking

if len(sys.argv) == 4:
    model, processor = looking.load_model(sys.argv[1])
    image, question = Image.open(sys.argv[2]), sys.argv[3]
else:
    model, processor = sc.world.load("vlm")
    image, question = sc.world.scene(9, "test").picture(), "what colour is the car ?"

seen = sc.look(model, processor, image, question, max_new_tokens=8)
print(seen.plain(width=60))

# One word, the deeper half of the layers, its strongest head anywhere.
word = next(i for i, w in enumerate(seen.words) if w.said)
heat = seen.map("text.*.self", word=word).layers("50%:").mean("layer").max("head")
heat.overlay().save("look.png")
print(f"\nfor {seen.words[word].text!r} most weight has", *heat.top(3), sep="\n  ")

# Everything in one file.
seen.save("look.safetensors")
assert sc.Recording.load("look.safetensors").answer() == seen.answer()
