"""Every layer that holds attention or a feed-forward network is in the report, with the true reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from topk_attention import convert

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class OddExperts(nn.Module):
    """Experts in a form that nothing knows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(4, 48, 32)), nn.Parameter(torch.randn(4, 32, 48))


def test_experts_are_listed():
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    )
    for layer in model.model.layers:
        layer.mlp.experts = OddExperts()
    report = convert(model, attention_k=4, feed_forward_k=4)
    assert [entry.path for entry in report.skipped] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert report.skipped[0].reason == (
        f"{__name__}.OddExperts holds the weights of all its experts in tensors of three axes, in a form that is not "
        "known here"
    )
    assert report.not_found == ()
    assert len(convert(model, attention_k=4).entries) == 2  # of the kind that was asked for alone


class FusedMLP(torch.nn.Module):
    """A network with gate and up in one matrix, under names that no model family has."""

    def __init__(self):
        super().__init__()
        self.both, self.down = torch.nn.Linear(32, 96), torch.nn.Linear(48, 32)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * up)


def test_gate_and_up_in_one_matrix_are_named():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    model.model.layers[1].mlp = FusedMLP()
    report = convert(model, attention_k=4, feed_forward_k=4)
    assert [entry.path for entry in report.skipped] == ["model.layers.1.mlp"]
    assert "FusedMLP holds gate and up in one matrix, both, and this" in report.skipped[0].reason


def test_an_activation_that_no_configuration_names_is_known_by_its_values():
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4)
    model, tokens = transformers.OpenAIGPTLMHeadModel(config).eval(), torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        report = convert(model, feed_forward_k=128)
        torch.testing.assert_close(model(tokens).logits, expected)
    assert [entry.path for entry in report.replaced] == ["transformer.h.0.mlp"]


@pytest.mark.parametrize("name", ["LongT5", "PegasusX"])
def test_hand_written_attention_beside_converted_layers_is_listed(name):
    if name == "LongT5":
        config = transformers.LongT5Config(
            vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, local_radius=4
        )
        model, path = transformers.LongT5Model(config), "encoder.block.0.layer.0.LocalSelfAttention"
    else:
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "block_size": 8, "num_global_tokens": 4}
        model = transformers.PegasusXModel(transformers.PegasusXConfig(vocab_size=97, d_model=32, **sizes, **heads))
        path = "encoder.layers.0.self_attn"
    report = convert(model, attention_k=4, feed_forward_k=6)
    reasons = {entry.path: entry.reason for entry in report.skipped if entry.kind == "attention"}
    assert list(reasons) == [path]
    assert "computes attention in its own code and does not ask transformers' attention interface" in reasons[path]


def test_no_trial_runs_where_no_network_was_asked_for(monkeypatch):
    from topk_attention.convert import network_module

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    monkeypatch.setattr(network_module, "_is_plain", lambda *_: pytest.fail("a trial"))
    convert(model, attention_k=4)


def test_a_network_whose_trial_fails_is_skipped_with_the_error():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Linear(47, 32)
    training = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=r"LlamaMLP could not be tried, RuntimeError: mat1 and mat2 shapes"):
        convert(model, feed_forward_k=4)
    assert [module.training for module in model.modules()] == training
