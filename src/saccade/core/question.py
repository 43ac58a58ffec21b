"""A question about pictures, which can be asked again with others, and its answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from saccade.core.errors import InputError

if TYPE_CHECKING:
    from saccade.core.session import Session


class Answer(str):
    """What the model said, what it took, and what a driver met on its way."""

    session_summary: str = ""
    seconds: float = 0.0
    tokens: int = 0  # that were generated

    def __init__(self, *_: Any) -> None:
        self.pictures: dict[str, Image.Image] = {}
        self.found: dict[str, Any] = {}


@dataclass(frozen=True)
class Question:
    """Words, the pictures that they are about, and who makes inputs of both."""

    processor: Any
    images: Sequence[Image.Image]
    text: str
    options: Mapping[str, Any] = field(
        default_factory=dict
    )  # of generate(), greedy unless they say otherwise

    def inputs(self, model: Any, images: Sequence[Image.Image] | None = None, text: str | None = None) -> Any:
        """What the model is given for these pictures and words, its own unless others are named."""
        images = self.images if images is None else images
        made = prepare(self.processor, images, self.text if text is None else text)
        return made.to(model.device, model.dtype)

    def ask(
        self, session: Session, images: Sequence[Image.Image] | None = None, text: str | None = None
    ) -> Answer:
        """The answer of the session's model, its methods at work."""
        model: Any = session.model
        inputs = self.inputs(model, images, text)
        start = time.perf_counter()
        made = model.generate(**inputs, **{"do_sample": False, **self.options})
        seconds = time.perf_counter() - start
        ids = getattr(made, "sequences", made)[0]
        said = ids[0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :]
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        answer = Answer(tokenizer.decode(said, skip_special_tokens=True).strip())
        answer.session_summary, answer.seconds, answer.tokens = session.summary(), seconds, len(said)
        return answer


def prepare(processor: Any, images: Sequence[Image.Image], question: str) -> Any:
    """Inputs of the model for one turn, in the chat format where the processor has one."""
    text = question
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    options: dict[str, Any] = {"images": list(images)} if images else {}
    begin = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    if begin and text.startswith(begin):
        options["add_special_tokens"] = False
    try:
        return processor(text=text, return_tensors="pt", **options)
    except ValueError:
        if len(images) < 2:
            raise
        options["images"] = [list(images)]  # some take the pictures of each prompt as a list of their own
        return processor(text=[text], return_tensors="pt", **options)


def pictures_of(image: Image.Image | Sequence[Image.Image] | None) -> list[Image.Image]:
    """A picture, several, or none, as a list in RGB."""
    if image is None:
        return []
    images = [image] if isinstance(image, Image.Image) else list(image)
    for one in images:
        if not isinstance(one, Image.Image):
            raise InputError(f"A {type(one).__name__} is no picture.", "open it with PIL.Image.open")
    return [one.convert("RGB") for one in images]
