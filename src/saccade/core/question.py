"""A question about pictures, which can be asked again with others, and its answer."""

from __future__ import annotations

import inspect
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
    first: float = 0.0  # seconds until its first token was there, which a batch waits for together
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
        if not images:  # what a tokenizer makes has no type to change
            return made.to(model.device)
        check_seen(model, self.processor, made)
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


def check_seen(model: Any, processor: Any, made: Mapping[str, Any]) -> None:
    """Refuse pictures that nobody looks at."""
    pixels = [name for name in made if "pixel" in name]
    if not pixels:
        raise InputError(
            f"{type(processor).__name__} makes nothing of pictures.",
            "give the processor of a vision-language model, or ask without a picture",
        )
    taken = inspect.signature(model.forward).parameters
    if not any(name in taken for name in pixels):
        raise InputError(
            f"{type(model).__name__} takes no pictures.", "ask without one, or give a vision-language model"
        )


def prepare(processor: Any, images: Sequence[Image.Image], question: str) -> Any:
    """Inputs of the model for one turn, in the chat format where the processor has one."""
    text = written(processor, len(images), question)
    lost = InputError(
        "The prompt has no place for the picture: no token that stands for it.",
        "give the processor the chat template of its model: processor.chat_template = ...",
    )
    unmarked = bool(images) and str(getattr(processor, "image_token", None) or text) not in text
    try:
        made = _prepared(processor, images, text)
    except ValueError as e:
        if unmarked:
            raise lost from e
        raise
    place = getattr(processor, "image_token_id", None)  # some replace it by others
    if unmarked and place is not None and not bool((made["input_ids"] == place).any()):
        raise lost
    return made


def _prepared(processor: Any, images: Sequence[Image.Image], text: str) -> Any:
    options: dict[str, Any] = {"images": list(images)} if images else {}
    options |= _begun(processor, text)
    try:
        return processor(text=text, return_tensors="pt", **options)
    except ValueError:
        if len(images) < 2:
            raise
        options["images"] = [list(images)]  # some take the pictures of each prompt as a list of their own
        return processor(text=[text], return_tensors="pt", **options)


def prepare_batch(processor: Any, images: Sequence[Sequence[Image.Image]], texts: Sequence[str]) -> Any:
    """Inputs for several prompts, each with its own pictures, as many of them in each; padded on the left."""
    options: dict[str, Any] = {"images": [list(own) for own in images]} if images[0] else {}
    options |= _begun(processor, texts[0])
    tokenizer = getattr(processor, "tokenizer", processor)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"  # no option, for a Q-former's tokenizer pads on the right
    try:
        return processor(text=list(texts), padding=True, return_tensors="pt", **options)
    finally:
        tokenizer.padding_side = side


def written(processor: Any, images: int, question: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt of a conversation: pictures, what was asked and answered before, and the question."""
    if not getattr(processor, "chat_template", None):
        if earlier:
            raise InputError(
                f"{type(processor).__name__} has no chat template, without which there is one turn.",
                "give it the template of its model: processor.chat_template = ...",
            )
        return question
    asked = [text for text, _ in earlier] + [question]
    turns = []
    for number, text in enumerate(asked):
        seen = [{"type": "image"} for _ in range(images if number == 0 else 0)]
        turns.append({"role": "user", "content": [*seen, {"type": "text", "text": text}]})
        if number < len(earlier):
            said = [{"type": "text", "text": earlier[number][1]}]
            turns.append({"role": "assistant", "content": said})
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _begun(processor: Any, text: str) -> dict[str, Any]:
    """Not to begin a text twice that the template has begun."""
    begin = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    return {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def pictures_of(image: Image.Image | Sequence[Image.Image] | None) -> list[Image.Image]:
    """A picture, several, or none, as a list in RGB."""
    if image is None:
        return []
    images = [image] if isinstance(image, Image.Image) else list(image)
    for one in images:
        if not isinstance(one, Image.Image):
            raise InputError(f"A {type(one).__name__} is no picture.", "open it with PIL.Image.open")
    return [one.convert("RGB") for one in images]
