"""Models inside a PeftModel or a SentenceTransformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convert_models import tiny_bert, tiny_llama
from topk_attention import MeanK, calibrate, convert, unconvert


class SentenceTransformer(nn.Sequential):
    """What matters of the class of this name: it holds a transformers model and is none."""

    __module__ = "sentence_transformers.sentence_transformer"


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.auto_model = model
        self.config = model.config


def test_a_sentence_transformer_converts_the_model_inside(tokens):
    inner = tiny_bert()
    whole = SentenceTransformer(Holder(inner), nn.Identity())
    expected = inner(tokens)[0]
    report = convert(whole, attention_k=3)
    assert [entry.path for entry in report.replaced] == [f"encoder.layer.{n}.attention.self" for n in range(2)]
    assert inner.config.topk_attention["every_attention_k"] == 3
    assert whole[0].config is inner.config
    unconvert(whole)
    assert whole[0].config is inner.config
    assert torch.equal(inner(tokens)[0], expected)
    assert list(calibrate(whole, [tokens], target=MeanK(4))) == [entry.path for entry in report.replaced]


def test_a_sentence_transformer_without_a_transformers_model_is_named():
    with pytest.raises(TypeError, match="got a SentenceTransformer without one: Linear"):
        convert(SentenceTransformer(nn.Linear(2, 2)), attention_k=3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
def test_a_peft_model_remembers_k_under_the_names_of_the_model_that_is_saved(tokens):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny_llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    expected = adapted(tokens).logits
    convert(adapted, attention_k=3)
    assert adapted.config is adapted.base_model.config is model.config
    paths = [f"layers.{n}.self_attn" for n in range(2)]
    assert list(model.config.topk_attention["attention_k"]) == paths
    assert not torch.equal(adapted(tokens).logits, expected)
    unconvert(adapted)
    assert torch.equal(adapted(tokens).logits, expected)


PROMPTS = {
    "prompt tuning": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    ),
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_are_keys_like_others_and_train(kind, tokens):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(tiny_llama(), PROMPTS[kind](peft)).eval()
    expected = adapted(input_ids=tokens).logits
    convert(adapted, attention_k=tokens.shape[1] + 4)
    assert adapted.config._attn_implementation == "topk"
    torch.testing.assert_close(adapted(input_ids=tokens).logits, expected)
    convert(adapted, attention_k=3)
    assert not torch.equal(adapted(input_ids=tokens).logits, expected)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    unconvert(adapted)
    assert torch.equal(adapted(input_ids=tokens).logits, expected)
    with pytest.raises(TypeError, match=r"must not put learned prompts .* calibrate model\.get_base_model\(\)"):
        calibrate(adapted, [tokens], target=MeanK(4))
