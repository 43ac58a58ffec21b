"""A tiny byte-level tokenizer, and a chat template, for processors that need no download."""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS, FIRST = 0, 1, 2, 3
"""The ids of the common special tokens, and of a family's own first one."""
CORPUS = (
    "user: What is on the table? assistant: A red cup stands on the left of the blue box.",
    "user: Where is the cat? assistant: The cat sits under the green chair, near the door.",
    "Is there a dog in the picture? yes no white black yellow square circle above below right",
)


@cache
def _trained(specials: tuple[str, ...]) -> str:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            min_frequency=1,
            special_tokens=["<pad>", "<s>", "</s>", *specials],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return words.to_str()


def tokenizer(
    named: dict[str, str] | None = None, *specials: str, bos: bool = True, eos: bool = False
) -> Any:
    """A tokenizer whose special tokens, the `named` ones first, have ids from `FIRST` on."""
    named = named or {}
    words = Tokenizer.from_str(_trained((*named.values(), *specials)))
    if bos:
        words.post_processor = processors.TemplateProcessing(
            single=f"<s> $A{' </s>' if eos else ''}",
            pair="<s> $A $B",
            special_tokens=[("<s>", BOS), ("</s>", EOS)],
        )
    return T.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=2048,
        extra_special_tokens=named or list(specials),
    )


def chat(image: str = "", video: str = "") -> str:
    """A chat template that renders what `dialogue` writes."""
    return (
        "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}"
        f"{{% if c['type'] == 'image' %}}{image}{{% elif c['type'] == 'video' %}}{video}"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def dialogue(n_images: int, question: str, videos: int = 0, *, image: str = "", video: str = "") -> str:
    """One turn of a user with pictures and clips before the question."""
    return f"user: {image * n_images}{video * videos}{question}\nassistant:"


def bare(n_images: int, question: str) -> str:
    """Text without a mark of the picture."""
    return question
