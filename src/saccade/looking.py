"""Asking a vision-language model about pictures, and seeing where it looks while it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from saccade.core.driver import Driver, split
from saccade.core.errors import InputError
from saccade.core.method import Method
from saccade.core.question import Answer, Question, pictures_of, prepare
from saccade.core.record import Recording
from saccade.core.recorder import Record
from saccade.core.session import attach
from saccade.core.system import System
from saccade.loading import failure, quiet
from saccade.loading import load_model as load_model
from saccade.stack import load

if TYPE_CHECKING:
    from saccade.core.call import AttentionCall

    Images = Image.Image | Sequence[Image.Image] | None
    Stacked = str | System | Iterable[System] | None

VOCABULARY = (
    "<pad> <s> </s> <unk> <image> user assistant : what is on the table ? a red cup and box left of right"
)


# ---- asking -------------------------------------------------------------------------------------------


def ask(
    model: Any,
    processor: Any,
    image: Images,
    question: str,
    stack: Stacked = None,
    max_new_tokens: int = 64,
    **generate: Any,
) -> Answer:
    """The answer to a question about a picture, several, or none; greedy unless `generate` says otherwise. A
    driver in the stack runs with the stack's methods attached.

    >>> sc.ask(model, processor, image, "What is on the table?", stack="var")
    """
    driver, methods = _parts(stack)
    asked = Question(processor, pictures_of(image), question, {"max_new_tokens": max_new_tokens, **generate})
    with attach(model, methods) as session:
        return session.run(driver, asked) if driver else asked.ask(session)


def look(
    model: Any,
    processor: Any,
    image: Images,
    question: str,
    stack: Stacked = None,
    *,
    sites: str = "text.*.self",
    rows: str | int | slice = "generated",
    columns: str = "all",
    heads: tuple[int, ...] | None = None,
    reduce: str | None = None,
    dtype: str = "float16",
    max_new_tokens: int = 64,
    **generate: Any,
) -> Recording:
    """Where the model looks while it answers, the methods of the stack being at work. See `Record` for the
    choice of what is kept; `recording.answer()` is the answer.

    >>> seen = sc.look(model, processor, image, "What is on the table?")
    >>> seen.map("text.*.self", word="cup").mean("layer", "head").overlay().save("cup.png")
    """
    images = pictures_of(image)
    asked = Question(processor, images, question, {"max_new_tokens": max_new_tokens, **generate})
    driver, methods = _parts(stack)
    if driver:
        name = type(driver).__name__
        raise InputError(
            f"{name} is a driver: it runs several times, and one run is looked at.",
            "take it out of the stack; sc.ask(...).pictures shows what it met",
        )
    record = Record(sites=sites, rows=rows, columns=columns, heads=heads, reduce=reduce, dtype=dtype)
    with attach(model, methods, record) as session:
        session.locate(processor, images)
        asked.ask(session)
        session.locate(processor, [])
        recording: Recording = session.results["Record"]
    recording.prompt = question
    return recording.with_words(processor).with_pictures(images)


def _parts(stack: Stacked) -> tuple[Driver | None, list[Method]]:
    """The driver of a stack, where it has one, and its methods."""
    if stack is None:
        return None, []
    if isinstance(stack, System):
        return split([stack])
    return split(load(stack) if isinstance(stack, str) else stack)


# ---- the demonstration --------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class _LookAway(Method):
    """A method in a line: lower the scores of the pictures' tokens, on the fused kernel."""

    def bias(self, call: AttentionCall) -> torch.Tensor:
        return -3.0 * call.columns("image")


def demo(out: str = "demo.png") -> None:
    """Attach, observe, steer and detach, on a drawn scene and a tiny model that has learnt nothing yet."""
    model, processor = untrained()
    picture, question = scene(), "what is on the table ?"
    with quiet():
        inputs = prepare(processor, [picture], question)
        bare = model(**inputs).logits
        seen = look(model, processor, picture, question, max_new_tokens=6)
        with attach(model, Record(rows="all")):
            observed = model(**inputs).logits
        steered = look(model, processor, picture, question, _LookAway(sites="text.*.self"), max_new_tokens=6)
        after = model(**inputs).logits

    def on_image(recording: Recording) -> float:
        shares = [layer["image"] for layer in recording.share().values()]
        return sum(shares) / len(shares)

    size = sum(p.numel() for p in model.parameters())
    print(f"A drawn scene, and a {type(model).__name__} of {size:,} random weights:")
    print("neither its answer nor its map means anything yet, but all that is done to it is real.\n")
    print(seen.plain())
    print(
        f"\nobserve  {len(seen.sites)} layers, {seen.nbytes:,} bytes kept; logits are {_same(bare, observed)}"
    )
    before, now = on_image(seen), on_image(steered)
    print(f"steer    -3 on the picture's scores: {now:.0%} of attention on it, where it was {before:.0%};")
    print(f"         the answer is then {steered.answer()!r}")
    print(f"detach   logits are {_same(bare, after)}")
    try:
        seen.overlay().save(out)
    except OSError as e:
        raise InputError(f"{out} cannot be written: {e}.", "run the demo in a folder of yours") from e
    print(f"\nThe overlay is in {out}. With a model of your own, a folder or a hub id:")
    print('  saccade look photo.jpg --ask "What is on the table?" --model MODEL -o look.png')


def _same(a: torch.Tensor, b: torch.Tensor) -> str:
    return "the bare model's, to the bit" if torch.equal(a, b) else f"off by {(a - b).abs().max():.1e}"


def scene() -> Image.Image:
    """A red cup on a table."""
    picture = Image.new("RGB", (96, 96), (205, 190, 165))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 60, 96, 96), (150, 125, 100))
    for box in ((14, 48, 82, 56), (20, 56, 27, 86), (69, 56, 76, 86)):
        draw.rectangle(box, (120, 72, 40), (60, 35, 20))
    draw.rectangle((40, 28, 56, 48), (205, 45, 40), (90, 15, 15))
    draw.arc((51, 31, 64, 44), -90, 90, (205, 45, 40), 3)
    return picture


def untrained() -> tuple[Any, Any]:
    """A tiny LLaVA with random weights, and its processor; nothing is downloaded."""
    known = {word: i for i, word in enumerate(VOCABULARY.split())}
    split = Tokenizer(WordLevel(known, "<unk>"))
    split.pre_tokenizer = WhitespaceSplit()
    with quiet(), torch.random.fork_rng():
        try:
            import transformers as hf

            kinds = hf.LlavaForConditionalGeneration, hf.LlavaProcessor, hf.CLIPImageProcessor
        except (ImportError, RuntimeError) as e:
            raise failure("the demo's model", True, e) from e
        model_of, processor_of, pictures_of = kinds
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=split, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
        )  # fmt: skip
        side = {"height": 96, "width": 96}
        processor = processor_of(
            image_processor=pictures_of(size=side, do_center_crop=False),
            tokenizer=tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template="<s> user : {% for c in messages[0]['content'] %}"
            "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}assistant :",
        )
        tower = {
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "initializer_range": 0.2,
        }
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(hidden_size=64, image_size=96, patch_size=8, **tower),
            text_config=hf.LlamaConfig(hidden_size=64, vocab_size=len(known), eos_token_id=None, **tower),
            image_token_index=known["<image>"],
            image_seq_length=144,
        )
        torch.manual_seed(0)
        model = model_of(config).eval()
        model.generation_config.suppress_tokens = list(range(VOCABULARY.split().index("what")))
        return model, processor
