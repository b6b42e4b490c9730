"""Networks with adapters of PEFT and with quantised weights: the kept neurons are those of the whole layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from convert_models import FAMILIES, NEURONS, Family, inputs_of, output_and_gradients, output_of, tiny_llama
from dense_networks import keep_best_neurons
from topk_attention import TopKFeedForward, convert, fit_stand_ins, unconvert
from topk_attention.nn import feed_forward, linears

K = 6
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft reads it
    "ignore:fan_in_fan_out is set to False",
    "ignore:`lora_bias=True` was passed but the targeted layer",
)
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True, "r": 4},
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(params=["made", "called"])
def way(request, monkeypatch):
    """With weights that are made for the call, as for many tokens, or by calls of the layers, as for few."""
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", 0 if request.param == "made" else 10**9)
    return request.param


def tiny_phi3():
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": NEURONS, "num_hidden_layers": 2}
    config = transformers.Phi3Config(**sizes, num_attention_heads=4, pad_token_id=0, initializer_range=0.5)
    return transformers.Phi3ForCausalLM(config).eval()


ADAPTED = {name: FAMILIES[name] for name in ("llama", "gpt2", "bert", "t5", "flan_t5")}
ADAPTED["phi3"] = Family(tiny_phi3, "decoder", 2, 2, None, ".down_proj")
CASES = [(family, "lora") for family in ADAPTED] + [(family, "dora") for family in ("llama", "gpt2", "phi3")]
CASES += [("gpt2", "bias"), ("phi3", "bias"), ("llama", "rslora")]


def adapted(peft, model, **options):
    """A PeftModel with random adapters on all linear layers."""
    config = peft.LoraConfig(**{"r": 3, "target_modules": "all-linear", "init_lora_weights": False} | options)
    torch.manual_seed(1)
    whole = peft.get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + torch.rand_like(p))
            elif name.endswith("lora_B.default.bias"):
                p.normal_()
    return whole


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_outputs_and_all_gradients_are_those_of_a_dense_topk(family, kind, way, peft):
    family = ADAPTED[family]
    whole, inputs = adapted(peft, family.build(), **KINDS[kind]), inputs_of(family)
    masked = copy.deepcopy(whole)
    keep_best_neurons(masked, K, family.linear_out[1:], (family.linear_in or "")[1:])
    report = convert(whole, feed_forward_k=K)
    assert len(report.replaced) == family.num_networks
    assert not report.skipped
    expected = output_and_gradients(masked, inputs)
    assert any("lora_A" in name for name in expected[1])
    assert_same(output_and_gradients(whole, inputs), expected)


@pytest.mark.parametrize("first", ["convert", "adapters"])
def test_adapters_are_switched_merged_saved_and_loaded_on_a_converted_model(first, way, peft, tmp_path, tokens):
    model = tiny_llama().double()
    if first == "convert":
        convert(model, feed_forward_k=K)
    whole = adapted(peft, model)
    if first == "adapters":
        convert(whole, feed_forward_k=K)
    base = tiny_llama().double()
    convert(base, feed_forward_k=K)
    with torch.no_grad():
        whole.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        whole.double()
        output = whole(tokens).logits
        whole.set_adapter("other")
        other = whole(tokens).logits
        assert not torch.allclose(other, output)
        whole.set_adapter("default")
        torch.testing.assert_close(whole(tokens).logits, output)
        with whole.disable_adapter():
            torch.testing.assert_close(whole(tokens).logits, base(tokens).logits)

        whole.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
        torch.testing.assert_close(loaded(tokens).logits, output)

        whole.merge_adapter()
        torch.testing.assert_close(whole(tokens).logits, output)
        whole.unmerge_adapter()
        whole.base_model.set_adapter(["default", "other"])
        both = whole(tokens).logits
        merged = whole.merge_and_unload(adapter_names=["default", "other"])
        torch.testing.assert_close(merged(tokens).logits, both)
        assert merged is model
        convert(merged)  # it remembers the k under its own names
        torch.testing.assert_close(merged(tokens).logits, both)
        unconvert(merged)
        dense = merged(tokens).logits
        convert(merged, feed_forward_k=1000)
        torch.testing.assert_close(merged(tokens).logits, dense)


def test_dropout_on_the_way_to_an_adapter_of_the_first_layers_acts_in_training(peft, tokens, monkeypatch):
    whole = adapted(peft, tiny_llama(), lora_dropout=0.5, target_modules=["gate_proj", "up_proj"])
    convert(whole, feed_forward_k=K)
    expected = whole(tokens).logits
    whole.train()
    results = []
    for few in (0, 10**9):
        monkeypatch.setattr(feed_forward, "_FEW_TOKENS", few)
        torch.manual_seed(2)
        results.append(output_and_gradients(whole, {"input_ids": tokens}))
    assert_same(*results)
    assert not torch.allclose(results[0][0], expected)


def test_dropout_on_the_way_to_an_adapter_of_the_last_layer_has_it_called_in_training(peft, tokens):
    whole = adapted(peft, tiny_llama(), lora_dropout=0.5)
    convert(whole, feed_forward_k=K)
    whole(tokens)
    with pytest.warns(UserWarning, match="because down_proj has an adapter with dropout, in training"):
        whole.train()(tokens)


def test_made_weights_are_not_kept_for_the_backward_pass(peft, monkeypatch):
    """Gradient checkpointing and other hooks around see everything else that is saved."""
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", 0)
    whole = adapted(peft, tiny_llama())
    convert(whole, feed_forward_k=K)
    network = whole.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    weights = {p.data_ptr() for p in network.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = network(x)
    assert any(t.shape == (80, K) for t in saved)
    large = [t for t in saved if t.numel() >= NEURONS * 32 and t.untyped_storage().data_ptr() not in weights]
    assert not [t.shape for t in large if NEURONS in t.shape]
    trained = [x, *(p for p in network.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(output.sum(), trained)
    actual = torch.autograd.grad(checkpoint(network, x, use_reentrant=False).sum(), trained)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["gate_proj.base_layer.weight", "x"])
def test_what_changes_between_forward_and_backward_is_an_error(name, peft, monkeypatch):
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", 0)
    whole = adapted(peft, tiny_llama())
    convert(whole, feed_forward_k=K)
    network = whole.base_model.model.model.layers[0].mlp
    x = torch.randn(1, 40, 32, dtype=torch.float64, requires_grad=True)
    wide = x * 1
    loss = network(wide).sum()
    with torch.no_grad():
        (wide if name == "x" else network.get_parameter(name)).mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place after the forward pass|modified by an inplace operation"):
        loss.backward()


def test_small_adapters_of_bfloat16_weights_are_not_rounded_away(peft):
    """Added to the weight, whose steps near 1 are larger, each number of the adapter would vanish."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.up, network.down = nn.Linear(256, 8, bias=False), nn.Linear(8, 8, bias=False)
    network.up.weight.data = torch.randint(0, 2, (8, 256)) * 2.0 - 1
    network.down.weight.data = torch.eye(8)
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["up"])
    peft.inject_adapter_in_model(config, network.bfloat16())
    network.up.lora_A["default"].weight.data.fill_(0.002)
    network.up.lora_B["default"].weight.data.fill_(1.0)
    layer = TopKFeedForward(network.up, network.down, k=8, activation="identity")
    x = torch.ones(100, 256, dtype=torch.bfloat16)
    expected = (network.up.base_layer.weight.double() + 0.002).sum(1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0].double(), expected, rtol=0.01, atol=0.02)


def test_autocast_gives_what_it_gives_to_called_layers(peft, monkeypatch):
    whole = adapted(peft, tiny_llama()).float()
    convert(whole, feed_forward_k=NEURONS)
    network = whole.base_model.model.model.layers[0].mlp
    x, results = torch.randn(2, 40, 32), []
    for few in (0, 10**9):
        monkeypatch.setattr(feed_forward, "_FEW_TOKENS", few)
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(x)
        output.float().square().sum().backward()
        results.append([output.float(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(results[0]) == 7
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.03 * float(other.detach().abs().max()))


def test_stand_ins_are_fitted_to_the_whole_layers_and_added(way, peft, tokens):
    whole = adapted(peft, tiny_llama())
    merged = copy.deepcopy(whole).merge_and_unload()
    batches = [{"input_ids": tokens}]
    stand_ins = [fit_stand_ins(model, batches, feed_forward_k=K, rank=4) for model in (whole, merged)]
    with torch.no_grad():
        for model, fitted in zip((whole, merged), stand_ins, strict=True):
            convert(model, feed_forward_k=fitted)
        torch.testing.assert_close(whole(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
        without = copy.deepcopy(merged)
        convert(without, feed_forward_k=K)
        assert not torch.allclose(without(tokens).logits, merged(tokens).logits)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig"])
def test_other_adapters_are_named_at_conversion_and_act_with_a_warning_later(kind, peft, tokens):
    def attach(model):
        options = {"feedforward_modules": ["down_proj"]} if kind == "IA3Config" else {}
        return peft.get_peft_model(model, getattr(peft, kind)(target_modules=["down_proj"], **options))

    whole = attach(tiny_llama())
    with pytest.raises(ValueError, match=r"down_proj is peft\.tuners\..*, not nn\.Linear"):
        convert(whole, feed_forward_k=K)
    model = tiny_llama()
    convert(model, feed_forward_k=NEURONS)
    later = attach(model)
    with pytest.warns(UserWarning, match=r"computes every neuron, because down_proj is peft\.tuners\."):
        torch.testing.assert_close(later(tokens).logits, whole(tokens).logits)


class Quantised(nn.Linear):
    """Not nn.Linear itself, as those of bitsandbytes."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1))


def test_quantised_layers_of_a_class_of_their_own_are_never_read_by_their_weights(tokens):
    def quantise(model):
        for layer in model.model.layers:
            layer.mlp.up_proj.__class__ = Quantised
        return model

    model = quantise(tiny_llama())
    with pytest.raises(ValueError, match=r"up_proj is .*\.Quantised, not nn\.Linear"):
        convert(model, feed_forward_k=K)
    expected = model(tokens).logits
    later = tiny_llama()
    convert(later, feed_forward_k=NEURONS)
    quantise(later)
    with pytest.warns(UserWarning, match=r"because up_proj is .*\.Quantised, not nn\.Linear"):
        torch.testing.assert_close(later(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_layers_of_bitsandbytes_are_refused_at_conversion_and_called_later(kind, tokens):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def quantise(model):
        for layer in model.model.layers:
            former = layer.mlp.up_proj
            quantised = getattr(bitsandbytes.nn, kind)(former.in_features, former.out_features, bias=False)
            quantised.load_state_dict(former.state_dict())
            layer.mlp.up_proj = quantised.to("cpu")
        return model

    model, later = quantise(tiny_llama()), tiny_llama()
    with pytest.raises(ValueError, match=rf"up_proj is bitsandbytes\..*\.{kind}, not nn\.Linear"):
        convert(model, feed_forward_k=K)
    convert(later, feed_forward_k=NEURONS)
    quantise(later)
    with torch.no_grad():
        expected = model(tokens).logits
        with pytest.warns(UserWarning, match=rf"because up_proj is bitsandbytes\..*\.{kind}, not nn\.Linear"):
            torch.testing.assert_close(later(tokens).logits, expected)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weights_that_torchao_quantised_are_read_as_numbers(family, config, way, torchao):
    family = ADAPTED[family]
    model, inputs = family.build(), inputs_of(family, torch.float32)
    torchao.quantize_(model, getattr(torchao, config)())
    masked = copy.deepcopy(model)
    keep_best_neurons(masked, K, "down_proj")
    with torch.no_grad():
        dense, expected = output_of(model, inputs), output_of(masked, inputs)
        report = convert(model, feed_forward_k=NEURONS)
        assert len(report.replaced) == 2
        torch.testing.assert_close(output_of(model, inputs), dense, rtol=1e-3, atol=1e-3)
        convert(model, feed_forward_k=K)
        torch.testing.assert_close(output_of(model, inputs), expected, rtol=1e-3, atol=1e-3)
        unconvert(model)
        torch.testing.assert_close(output_of(model, inputs), dense)


def test_weights_of_torchao_with_adapters_train_the_adapters(way, torchao, peft, tokens):
    results = []
    for topk in (False, True):
        model = tiny_llama()
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="instantiated without `get_apply_tensor_subclass`"):
            whole = peft.get_peft_model(
                model, peft.LoraConfig(r=3, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
            ).eval()
        if topk:
            convert(whole, feed_forward_k=NEURONS)
        results.append(output_and_gradients(whole, {"input_ids": tokens}))
    assert any("lora_A" in name for name in results[0][1])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_weights_whose_layer_quantises_its_input_too_are_named_and_called(torchao, tokens):
    model = tiny_llama()
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"which changes the layer's input as well \(act_quant_kwargs\)"):
        convert(model, feed_forward_k=K)
    with torch.no_grad():
        expected = model(tokens).logits
        later = tiny_llama()
        convert(later, feed_forward_k=NEURONS)
        torchao.quantize_(later, torchao.Int8DynamicActivationInt8WeightConfig())
        with pytest.warns(UserWarning, match="changes the layer's input as well"):
            torch.testing.assert_close(later(tokens).logits, expected)


def test_pefts_layers_are_those_that_are_known(peft):
    """What is read of PEFT's layers is written for their code: where it moves, layers are called and this fails."""
    lora = peft.tuners.lora
    known = [linears.full_name(lora.layer.Linear), linears.full_name(lora.torchao.TorchaoLoraLinear)]
    assert known == list(linears._LORA)
    assert linears.full_name(lora.variants.DoraLinearVariant) == linears._DORA


def test_a_network_with_adapters_compiles_into_one_graph(peft, monkeypatch):
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", 0)
    whole = adapted(peft, tiny_llama())
    convert(whole, feed_forward_k=K)
    network = whole.base_model.model.model.layers[0].mlp
    x = torch.randn(1, 40, 32, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in network.parameters() if p.requires_grad)]
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        torch.autograd.grad(compiled(x).sum(), trained), torch.autograd.grad(network(x).sum(), trained), strict=True
    ):
        torch.testing.assert_close(one, other)
