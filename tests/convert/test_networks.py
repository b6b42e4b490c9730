"""Which feed-forward networks are found, and why others are skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convert_models import FAMILIES, NEURONS, inputs_of, output_of, tiny_bart, tiny_gpt2, tiny_vit
from topk_attention import convert, unconvert
from topk_attention.convert.sites import is_activation


def test_the_report_gives_a_network_inside_a_layer_the_path_of_its_first_part():
    report = convert(tiny_bart(), feed_forward_k=6)
    assert [entry.path for entry in report.replaced] == [
        f"model.{part}.layers.{i}.fc1" for part in ("encoder", "decoder") for i in range(2)
    ]
    assert {entry.reason for entry in report.replaced} == {"k = 6 of 48 neurons"}


def test_a_layer_whose_code_does_something_else_is_skipped_with_the_reason():
    model = tiny_bart()

    class Scaled(type(model.model.encoder.layers[0])):
        def forward(self, hidden_states, attention_mask, **kwargs):
            return self.fc2(self.activation_fn(2 * self.fc1(hidden_states)))

    for layer in model.model.encoder.layers:
        layer.__class__ = Scaled
    report = convert(model, feed_forward_k=6)
    assert {entry.reason for entry in report.skipped} == {
        "Scaled computes something else than fc2(activation_fn(fc1(x)))"
    }
    assert len(report.replaced) == 2


def test_a_network_with_parts_of_unknown_use_is_skipped_with_the_reason():
    model = tiny_vit()
    for layer in model.layers:
        layer.mlp.act, layer.mlp.norm = layer.mlp.activation_fn, nn.LayerNorm(48)
        del layer.mlp.activation_fn
    with pytest.raises(ValueError, match="ViTMLP does more than its projections: norm"):
        convert(model, feed_forward_k=6)


@pytest.mark.parametrize("name", ["hidden_dropout", "some_dropout", "drop"])
def test_a_network_with_dropout_at_an_unknown_place_is_skipped_with_the_reason(name):
    """It is not where other networks with this name have it, which a trial in training shows."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(32, 48), nn.Linear(48, 32), nn.GELU()

        def forward(self, x):
            return self.fc2(self.act(nn.functional.dropout(self.fc1(x), 0.1, self.training)))

    model = tiny_vit()
    for layer in model.layers:
        layer.mlp = Network()
        setattr(layer.mlp, name, nn.Dropout(0.1) if name == "drop" else 0.1)
    model.eval()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"Network applies dropout in its own code \({name}\), at an unknown place"):
        convert(model, feed_forward_k=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def gelu_cut_at_ten(x):
    return nn.functional.gelu(x).clip(-10, 10)


@pytest.mark.parametrize(
    ("family", "other"),
    [("t5", nn.Softplus()), ("t5", nn.functional.softplus), ("t5", nn.PReLU())]
    + [(family, other) for family in ("bart", "vit", "bert") for other in (nn.Tanh(), nn.ReLU6(), gelu_cut_at_ten)],
)
def test_an_activation_that_is_not_the_configurations_is_noticed(family, other):
    model = FAMILIES[family].build()
    put_activations(model, other)
    name_of_other = getattr(other, "__name__", type(other).__name__)
    with pytest.raises(
        ValueError, match=f"its activation, {name_of_other}, is not '.*', which the configuration names"
    ):
        convert(model, feed_forward_k=6)


@pytest.mark.parametrize("other", [nn.LeakyReLU(0.0), nn.GELU("tanh"), nn.SiLU()])
@pytest.mark.parametrize("family", ["bart", "vit", "bert"])
def test_another_activation_than_the_configuration_names_is_used_where_its_values_are_known(family, other):
    model, inputs = FAMILIES[family].build(), inputs_of(FAMILIES[family])
    before = output_of(model.double(), inputs)
    put_activations(model, other)
    expected = output_of(model, inputs)
    convert(model, feed_forward_k=NEURONS)
    torch.testing.assert_close(output_of(model, inputs), expected)
    assert not torch.allclose(expected, before)


def put_activations(model, other):
    places = [
        (module, name)
        for module in model.modules()
        for name in ("activation_fn", "act", "intermediate_act_fn")
        if callable(getattr(module, name, None))
    ]
    assert places
    for module, name in places:
        if isinstance(getattr(module, name), nn.Module):
            delattr(module, name)
        setattr(module, name, other)


@pytest.mark.parametrize("other", [nn.GLU(), lambda x, y: x + y, lambda x: None, nn.PReLU()])
def test_what_is_no_activation_is_an_obstacle_and_no_crash(other):
    assert not is_activation(other, "gelu")


def test_an_activation_that_works_in_place_is_known():
    assert is_activation(nn.SiLU(inplace=True), "silu")
    assert not is_activation(nn.ReLU6(), "relu")


def test_a_part_wrapped_after_conversion_is_refused_rather_than_skipped():
    model, inputs = tiny_bart().double(), inputs_of(FAMILIES["bart"])
    convert(model, feed_forward_k=6)
    layer = model.model.encoder.layers[0]
    layer.fc1 = nn.Sequential(layer.fc1)
    with pytest.raises(
        RuntimeError, match=r"fc1 of BartEncoderLayer must be what convert made .*\.Sequential; a top-k"
    ):
        output_of(model, inputs)


def test_activation_dropout_moves_into_the_network_and_back():
    model = tiny_bart(activation_dropout=0.5, dropout=0.0, attention_dropout=0.0).train()
    inputs = inputs_of(FAMILIES["bart"])
    convert(model, feed_forward_k=6)
    layer = model.model.encoder.layers[0]
    assert (layer.activation_dropout, layer.fc2.dropout_p) == (0.0, 0.5)
    torch.manual_seed(1)
    first = output_of(model, inputs)
    torch.manual_seed(2)
    assert not torch.equal(output_of(model, inputs), first)
    unconvert(model)
    assert layer.activation_dropout == 0.5


def test_the_dropout_a_network_ends_in_is_kept():
    model, inputs = tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0).train(), inputs_of(FAMILIES["gpt2"])
    for block in model.transformer.h:
        block.attn.resid_dropout.p = 0.0
    convert(model, feed_forward_k=6)
    torch.manual_seed(1)
    first = output_of(model, inputs)
    torch.manual_seed(2)
    assert not torch.equal(output_of(model, inputs), first)


def test_conv1d_weights_keep_their_layout_and_lie_neuron_by_neuron():
    model = tiny_gpt2().requires_grad_(False)
    convert(model, feed_forward_k=6)
    network = model.transformer.h[0].mlp
    assert network.c_fc.weight.shape == (32, 48)
    assert network.c_fc.weight.t().is_contiguous()
    assert network.c_proj.weight.is_contiguous()
    unconvert(model)
    assert model.transformer.h[0].mlp.c_fc.weight.is_contiguous()


def test_opt_layers_compute_their_network_themselves_too():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    model, inputs = OPTForCausalLM(config).eval().double(), inputs_of(FAMILIES["gpt2"])
    with torch.no_grad():
        expected = output_of(model, inputs)
        report = convert(model, attention_k=1000, feed_forward_k=1000)
        torch.testing.assert_close(output_of(model, inputs), expected)
    assert len(report.replaced) == 4


def test_a_kind_of_layer_that_is_not_found_is_named():
    report = convert(nn.MultiheadAttention(32, 4), attention_k=3, feed_forward_k=6)
    assert report.not_found == ("feed-forward",)
    assert str(report).startswith(
        "MultiheadAttention: 1 attention layers replaced, no feed-forward layer of a known kind found\n"
    )


@pytest.mark.parametrize("name", ["gpt_neox", "nemotron", "qwen3", "phi", "pegasus", "electra", "camembert"])
def test_families_that_nothing_was_written_for_compute_what_they_did(name):
    from transformers import AutoConfig, AutoModel

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = sizes | heads | {"num_key_value_heads": 4, "max_position_embeddings": 64}
    if name == "pegasus":
        options = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
        options |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    if name == "nemotron":
        options["hidden_act"] = "silu"
    model = AutoModel.from_config(AutoConfig.for_model(name, **options)).eval()
    inputs = inputs_of(FAMILIES["bart" if name == "pegasus" else "gpt2"])
    with torch.no_grad():
        expected = output_of(model, inputs)
        report = convert(model, attention_k=1000, feed_forward_k=1000)
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-3, atol=1e-4)
        convert(model, attention_k=2, feed_forward_k=2)
        assert (output_of(model, inputs) - expected).abs().max() > 1e-3
    assert {entry.kind for entry in report.replaced} == {"attention", "feed_forward"}
    assert not report.skipped


def test_umt5_says_that_it_builds_its_bias_in_full():
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    assert "its code builds the position bias in full" in str(convert(model, attention_k=3))
