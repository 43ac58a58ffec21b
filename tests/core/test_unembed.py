"""From hidden states to words: the model's own logits, and the head alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from helpers import greedy, method, shared, unchanged
from torch import Tensor
from torch.testing import assert_close
from zoo import family, run, select
from zoo.base import TEXT, enliven, words

import saccade as sc
from saccade.core.errors import AttachError

QUIRKS: dict[str, Any] = {
    "a scale on the logits": lambda: T.CohereForCausalLM(T.CohereConfig(**TEXT, logit_scale=0.0625)),
    "a divisor of the logits": lambda: T.GraniteForCausalLM(T.GraniteConfig(**TEXT, logits_scaling=8.0)),
    "a tight cap": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(**TEXT, head_dim=16, final_logit_softcapping=0.5)),
    "a projection behind the norm": lambda: T.OPTForCausalLM(
        T.OPTConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, ffn_dim=96, num_attention_heads=4,
                    word_embed_proj_dim=32)),
}  # fmt: skip
REFUSED = {"blip2", "instructblip", "blip", "gemma3n", "chameleon"}
"""Without a head, without a forward of words alone, or with more behind the last layer than modules."""


def last_states(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """What the last decoder layer gave, and the logits of the same forward."""
    seen: list[Tensor] = []
    names = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1].isdigit()]
    text = [
        n
        for n in names
        if not any(t in n for t in ("vision", "visual", "encoder.", "qformer", "video", "image"))
    ]
    deep = [n for n in text if n.count(".") == min(n.count(".") for n in text)]
    hook = model.get_submodule(deep[-1]).register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    logits = run(model, inputs)
    hook.remove()
    return seen[-1], logits


@pytest.mark.parametrize(
    "f", [p for tag in ("llm", "vlm", "encdec") for p in select(tag) if p.id not in REFUSED]
)
def test_the_last_layers_states_give_the_models_logits(f: Any) -> None:
    model = shared(f.name)
    h, logits = last_states(model, f.inputs())
    with unchanged(model), sc.attach(model) as session:
        assert_close(session.unembed(h), logits, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_what_families_do_to_their_logits_is_part_of_it(quirk: str) -> None:
    model = enliven(QUIRKS[quirk]()).eval()
    h, logits = last_states(model, {"input_ids": words(2, 9)})
    with sc.attach(model) as session:
        assert_close(session.unembed(h), logits)


def test_without_the_norm_it_is_the_head_alone() -> None:
    for name in ("llama", "gpt2"):
        model = shared(name)
        h = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
        with sc.attach(model) as session:
            assert_close(session.unembed(h, norm=False), h @ model.lm_head.weight.T)
            assert not torch.allclose(session.unembed(h), h @ model.lm_head.weight.T)


def test_a_scale_and_a_cap_stay_without_the_norm() -> None:
    h = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    for quirk, after in (
        ("a scale on the logits", lambda raw: raw * 0.0625),
        ("a tight cap", lambda raw: 0.5 * torch.tanh(raw / 0.5)),
    ):
        model = enliven(QUIRKS[quirk]()).eval()
        with sc.attach(model) as session:
            assert_close(session.unembed(h, norm=False), after(h @ model.lm_head.weight.T))


def test_a_model_without_a_head_is_refused() -> None:
    for name in ("vit", "bert", *REFUSED):
        with sc.attach(shared(name)) as session, pytest.raises(AttachError, match="hidden states into words"):
            session.unembed(torch.zeros(1, 1, 64))


def test_gradients_flow_through_it() -> None:
    model = shared("llama")
    h = torch.zeros(1, 1, 64).normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    with sc.attach(model) as session:
        session.unembed(h).sum().backward()
    assert h.grad is not None
    assert h.grad.abs().sum() > 0


def test_it_leaves_a_running_generation_alone() -> None:
    """Found in the middle of one, beside what is cached."""
    model, inputs = shared("qwen2_5_vl"), family("qwen2_5_vl").inputs()
    bare = greedy(model, inputs)

    def look(base: Tensor, branches: Any, p: Any) -> Tensor:
        p.run.unembed(torch.zeros(1, 64))
        return base

    with sc.attach(model, method(prediction=look)()):
        assert torch.equal(greedy(model, inputs), bare)
