"""Let a driver answer: it runs the model several times, here to crop what the model looks at and ask again.

    python examples/drive.py [MODEL IMAGE QUESTION]

Without arguments the model that ships with the package looks at a drawn scene.
"""

import sys
from dataclasses import dataclass

from PIL import Image

import saccade as sc
from saccade import looking

if len(sys.argv) == 4:
    model, processor = looking.load_model(sys.argv[1])
    image, question = Image.open(sys.argv[2]), sys.argv[3]
else:
    model, processor = sc.world.load("vlm")
    image, question = sc.world.scene(9, "test").picture().resize((384, 384)), "what colour is the car ?"

# A driver stands in a stack like a method; the stack's methods act in its answers.
bare = sc.ask(model, processor, image, question, max_new_tokens=8)
answer = sc.ask(model, processor, image, question, stack="vicrop+zerotuning(gamma=2.0)", max_new_tokens=8)
print(f"bare    {bare}\nvicrop  {answer}")
print(f"        it looked at {answer.found['boxes'][0]}, {answer.seconds:.2f} s")
for name, picture in answer.pictures.items():
    picture.save(f"drive_{name}.png")


# One of one's own says what is done with a session and a question.
@dataclass(eq=False)
class Halves(sc.Driver):
    """Ask about both halves of the picture, and then about the one of which more was said."""

    def run(self, session: sc.Session, question: sc.Question) -> sc.Answer:
        whole = question.images[0]
        middle, (width, height) = whole.width // 2, whole.size
        halves = [whole.crop(box) for box in ((0, 0, middle, height), (middle, 0, width, height))]
        said = [question.ask(session, [half]) for half in halves]
        best = max(range(2), key=lambda i: len(set(said[i].split())))
        answer = question.ask(session, [whole, halves[best]])
        answer.found["halves"] = said
        return answer


answer = sc.ask(model, processor, image, question, stack=Halves(), max_new_tokens=8)
print(f"halves  {answer}\n        {answer.found['halves']}")
