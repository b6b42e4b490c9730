"""Feed-forward networks with gate and up in one matrix, and those with the activations and forms of other families.

Each is judged by the original model, in float64, whose other neurons are zeroed before its last layer reads them.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from convert_models import NEURONS, output_and_gradients
from dense_networks import keep_best_neurons
from topk_attention import convert, unconvert
from topk_attention.nn import TopKFeedForward

SIZES = {
    "hidden_size": 32,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
OLD_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOONSHINE = {
    "hidden_size": 32,
    "intermediate_size": NEURONS,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "decoder_start_token_id": 1,
    "encoder_hidden_act": "gelu",
}
K = 5


class Kind(NamedTuple):
    """A tiny model and its network's layers; "" for the first where neurons are ranked by what they give."""

    model: str
    config: str
    options: dict[str, Any]
    linear_out: str
    linear_in: str = ""
    generates: bool = True

    def build(self):
        torch.manual_seed(0)
        options = COMMON | self.options
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**options)).double().eval()
        with torch.no_grad():  # far from uniform, so that a wrong half or activation shows
            for module in model.modules():
                if hasattr(module, "weight") and module.weight is not None and module.weight.ndim == 2:
                    module.weight.normal_(std=0.3)
        return model


KINDS = {
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", SIZES, "down_proj"),
    "glm4": Kind("Glm4ForCausalLM", "Glm4Config", SIZES, "down_proj"),
    "modernbert": Kind("ModernBertModel", "ModernBertConfig", SIZES, "mlp.Wo", generates=False),
    "modernbert decoder": Kind("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", SIZES, "mlp.Wo"),
    "moonshine": Kind("MoonshineForConditionalGeneration", "MoonshineConfig", MOONSHINE, "fc2", generates=False),
    "lfm2": Kind(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        SIZES | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "w2",
    ),
    "clip": Kind("CLIPTextModel", "CLIPTextConfig", SIZES, "fc2", "fc1", generates=False),
    "nemotron": Kind("NemotronForCausalLM", "NemotronConfig", SIZES, "down_proj", "up_proj"),
    "persimmon": Kind("PersimmonForCausalLM", "PersimmonConfig", SIZES, "dense_4h_to_h", "dense_h_to_4h"),
    "gpt1": Kind("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", OLD_SIZES, "mlp.c_proj", "mlp.c_fc"),
    "mpt": Kind("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "down_proj", "up_proj"),
    "xlm": Kind("XLMModel", "XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "lin2", "lin1", generates=False),
    "gptj": Kind("GPTJForCausalLM", "GPTJConfig", OLD_SIZES | {"rotary_dim": 4}, "fc_out", "fc_in"),
    "bloom": Kind("BloomForCausalLM", "BloomConfig", OLD_SIZES, "dense_4h_to_h", "dense_h_to_4h"),
    "falcon": Kind("FalconForCausalLM", "FalconConfig", FALCON, "dense_4h_to_h", "dense_h_to_4h"),
}
FUSED = ("phi3", "glm4", "modernbert", "modernbert decoder")


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def inputs_of(kind):
    generator = torch.Generator().manual_seed(1)
    tokens = 3 + torch.randperm(90, generator=generator)[:40].view(2, 20)
    if kind.config == "MoonshineConfig":
        sound = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
        return {"input_values": sound, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def assert_same(actual, expected, kind):
    # BLOOM's gelu computes its derivative with numbers of nine digits.
    allowed = {"rtol": 1e-3, "atol": 1e-4} if kind is KINDS["bloom"] else {}
    torch.testing.assert_close(actual[0], expected[0], **allowed)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        torch.testing.assert_close(
            gradient, expected[1][name], **allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_outputs_and_all_gradients_are_those_of_a_dense_topk(kind):
    model, inputs = kind.build(), inputs_of(kind)
    dense = output_and_gradients(model, inputs)
    masked = copy.deepcopy(model)
    if kind is KINDS["moonshine"]:  # its encoder has no gates
        keep_best_neurons(masked.model.encoder, K, "fc2", "fc1")
        keep_best_neurons(masked.model.decoder, K, "fc2")
    else:
        keep_best_neurons(masked, K, kind.linear_out, kind.linear_in)
    report = convert(model, feed_forward_k=1000)
    assert len(report.replaced) == 2
    assert not report.skipped
    assert_same(output_and_gradients(model, inputs), dense, kind)
    convert(model, feed_forward_k=K)
    actual, expected = output_and_gradients(model, inputs), output_and_gradients(masked, inputs)
    assert_same(actual, expected, kind)
    assert not torch.allclose(actual[0], dense[0])


def test_it_generates_saves_loads_and_comes_back(kind, tmp_path):
    model, inputs = kind.build(), inputs_of(kind)
    original, state = model.get_submodule(""), {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        dense = model(**inputs)[0]
        options = {"max_new_tokens": 4, "do_sample": False, "no_repeat_ngram_size": 1}
        if kind.generates:
            tokens = model.generate(**inputs, **options)
            convert(model, feed_forward_k=1000)
            assert torch.equal(model.generate(**inputs, **options), tokens)
        convert(model, feed_forward_k=K)
        output = model(**inputs)[0]
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert loaded.state_dict().keys() == state.keys()
        torch.testing.assert_close(loaded(**inputs)[0], dense)
        convert(loaded)
        torch.testing.assert_close(loaded(**inputs)[0], output)
        unconvert(model)
        assert torch.equal(model(**inputs)[0], dense)
    assert model.get_submodule("") is original
    assert not any(isinstance(module, TopKFeedForward) for module in model.modules())
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_weight_is_read_in_place(name, monkeypatch):
    """Gate and up are the halves of its rows: nothing of its size is copied in a forward pass without gradients."""
    import topk_attention.nn.feed_forward as module

    kind, halves = KINDS[name], []
    run = module.topk_feed_forward
    monkeypatch.setattr(
        module,
        "topk_feed_forward",
        lambda x, w_in, w_out, **options: halves.append((w_in, options["w_gate"])) or run(x, w_in, w_out, **options),
    )
    model = kind.build()
    convert(model, feed_forward_k=K)
    with torch.no_grad():
        model(**inputs_of(kind))
    weights = [p for path, p in model.named_parameters() if path.endswith(("gate_up_proj.weight", "Wi.weight"))]
    assert len(halves) == len(weights) == 2
    for (w_in, w_gate), weight in zip(halves, weights, strict=True):
        gate_size = w_gate.numel()
        assert (w_gate.data_ptr(), w_in.data_ptr()) == (weight.data_ptr(), weight.view(-1)[gate_size:].data_ptr())
        assert w_gate.is_contiguous()
        assert w_in.is_contiguous()


@pytest.mark.parametrize("name", ["modernbert", "mpt", "xlm", "moonshine"])
def test_dropout_of_the_network_acts_in_training_alone(name):
    kind = KINDS[name]
    model = kind.build()
    for module in model.modules():
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dropped = {"modernbert": ("drop", nn.Dropout(0.5)), "mpt": ("hidden_dropout", 0.5), "xlm": ("dropout", 0.5)}
    inputs = inputs_of(kind)
    for module in list(model.modules()):
        is_network = name in dropped and hasattr(module, kind.linear_out.rpartition(".")[2])
        if is_network and hasattr(module, dropped[name][0]):
            setattr(module, *dropped[name])
    model.eval()
    dense = model(**inputs)[0]
    convert(model, feed_forward_k=1000)
    torch.testing.assert_close(model(**inputs)[0], dense)
    model.train()
    torch.manual_seed(0)
    first = model(**inputs)[0]
    assert torch.allclose(first, dense) == (name not in dropped)
    unconvert(model)
    torch.manual_seed(0)
    assert torch.allclose(model(**inputs)[0], dense) == (name not in dropped)


def test_a_layer_of_its_own_takes_gate_and_up_in_one_matrix(backend):
    torch.manual_seed(0)
    both, out = nn.Linear(8, 2 * NEURONS).double(), nn.Linear(NEURONS, 6).double()
    x = torch.randn(3, 70, 8, dtype=torch.float64)
    gate, up = nn.Linear(8, NEURONS).double(), nn.Linear(8, NEURONS).double()
    for gate_rows in ("first", "last"):
        rows = slice(0, NEURONS) if gate_rows == "first" else slice(NEURONS, None)
        others = slice(NEURONS, None) if gate_rows == "first" else slice(0, NEURONS)
        for layer, part in ((gate, rows), (up, others)):
            layer.load_state_dict({"weight": both.weight[part], "bias": both.bias[part]})
        fused = TopKFeedForward(both, out, k=K, gate_rows=gate_rows, activation="silu", backend=backend)
        apart = TopKFeedForward(up, out, linear_gate=gate, k=K, activation="silu", backend=backend)
        torch.testing.assert_close(fused(x), apart(x))
        (fused(x).square().sum() + apart(x).square().sum()).backward()
        torch.testing.assert_close(both.weight.grad[rows], gate.weight.grad)
        torch.testing.assert_close(both.bias.grad[others], up.bias.grad)
        for layer in (both, gate, up):
            layer.zero_grad()


@pytest.mark.parametrize("model", ["Moonshine", "Moshi"])
def test_which_half_is_the_gate_is_found_by_a_trial_and_never_guessed(model):
    """Moonshine's decoder and Moshi have other halves under the same names."""
    if model == "Moonshine":
        build, path = KINDS["moonshine"].build, "model.decoder.layers.0.mlp"
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
        config = transformers.MoshiConfig(vocab_size=99, ffn_dim=96, head_dim=8, **sizes)
        build, path = lambda: transformers.MoshiForCausalLM(config).eval(), "model.layers.0.mlp"
    with torch.device("meta"):
        reasons = {entry.path: entry.reason for entry in convert(build(), attention_k=4, feed_forward_k=K).skipped}
    assert "which half is which shows only with weights; load it first" in reasons[path]
    converted = build()
    network, x = converted.get_submodule(path), torch.randn(1, 9, 32, dtype=converted.dtype)
    expected = network(x)
    convert(converted, feed_forward_k=1000)
    assert converted.get_submodule(path).gate_rows == ("last" if model == "Moonshine" else "first")
    torch.testing.assert_close(converted.get_submodule(path)(x), expected)
    convert(converted, feed_forward_k=1001)
    torch.testing.assert_close(converted.get_submodule(path)(x), expected)


def test_gate_rows_that_do_not_fit_are_named():
    both, out = nn.Linear(8, 2 * NEURONS), nn.Linear(NEURONS, 6)
    with pytest.raises(ValueError, match='gate_rows must be "first", "last" or None, got \'second\''):
        TopKFeedForward(both, out, k=K, gate_rows="second")
    with pytest.raises(ValueError, match="linear_in computes the gate, but there is a linear_gate too; pass one"):
        TopKFeedForward(both, out, k=K, gate_rows="first", linear_gate=nn.Linear(8, NEURONS))
    with pytest.raises(ValueError, match=r"needs a linear_in with 96 outputs, two for each .* got 48"):
        TopKFeedForward(nn.Linear(8, NEURONS), out, k=K, gate_rows="first")
