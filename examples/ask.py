"""Ask with and without a method, and record beside one's own generation.

python examples/ask.py [MODEL IMAGE QUESTION]
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

bare = sc.ask(model, processor, image, question, max_new_tokens=8)
steered = sc.ask(model, processor, image, question, stack="zerotuning(gamma=30.0)", max_new_tokens=8)
print(f"bare        {bare}  ({bare.tokens} tokens, {bare.seconds:.2f} s)")
print(f"zerotuning  {steered}\n{steered.session_summary}")

# The same by hand: only the shares of attention are kept, 5 numbers a head and row.
with sc.attach(model, sc.Record(reduce="segments", dtype="float32")) as session:
    model.generate(**looking.prepare(processor, [image], question), max_new_tokens=8)
for layer, share in session.results["Record"].share().items():
    print(layer, "  ".join(f"{name} {value:.0%}" for name, value in share.items()))
