"""Draws look.png: `python docs/_look.py`."""

from pathlib import Path

from PIL import Image

import saccade as sc

WORDS = ("car", "boat", "fish")
GAP = 12

model, processor = sc.world.load("vlm")
picture = sc.world.scene(9, "test").picture()
seen = sc.look(model, processor, picture, "describe the image .")
print(seen.answer())
heats = [seen.map("text.*.self", word=word).mean("layer", "head").overlay() for word in WORDS]
width, height = heats[0].size
panels = [picture.resize((width, width), Image.Resampling.NEAREST), *heats]
page = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), "white")
for number, panel in enumerate(panels):
    page.paste(panel, (number * (width + GAP), 0))
page.thumbnail((1600, 1600))
page.save(Path(__file__).with_name("look.png"), optimize=True)
