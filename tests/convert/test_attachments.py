"""What hangs on the call of a layer acts, or the layer is skipped with the reason. Nothing is ignored."""

from __future__ import annotations

import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from convert_models import FAMILIES, NEURONS, inputs_of, output_of, tiny_bart, tiny_bert, tiny_llama, tiny_t5
from topk_attention import convert, unconvert

# A model, and the part of its first network that comes after the activation.
LAST = {
    "llama": "model.layers.0.mlp.down_proj",
    "bert": "encoder.layer.0.output.dense",
    "t5": "encoder.block.0.layer.1.DenseReluDense.wo",
    "gpt2": "transformer.h.0.mlp.c_proj",
    "bart": "model.encoder.layers.0.fc2",
}
CALLS = pytest.mark.filterwarnings("ignore:a top-k network calls its layers")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Own(torch.Tensor):
    """A tensor type with arithmetic of its own, as quantized and sharded weights have."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def patched(layer):
    former = layer.forward
    layer.forward = lambda x: 2 * former(x)


def own_type(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Own))


ATTACHED = {
    "a forward hook": (lambda layer: layer.register_forward_hook(lambda *_: None), r"has a forward hook \(.*lambda"),
    "a pre-hook": (lambda layer: layer.register_forward_pre_hook(lambda *_: None), r"has a forward pre-hook"),
    "a backward hook": (lambda layer: layer.register_full_backward_hook(lambda *_: None), "has a backward hook"),
    "pruning": (
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        r"has a forward pre-hook \(torch.nn.utils.prune.RandomUnstructured\)",
    ),
    "a parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        "has a parametrization",
    ),
    "spectral norm": (parametrizations.spectral_norm, "has a parametrization"),
    "another forward": (patched, "has a forward method of its own"),
    "another type": (own_type, r"the weight of .* is .*\.Own, no ordinary tensor"),
}


@pytest.mark.parametrize("family", LAST)
@pytest.mark.parametrize("what", ATTACHED)
def test_a_network_with_something_attached_to_a_layer_is_skipped_with_the_reason(what, family):
    attach, words = ATTACHED[what]
    model, inputs = FAMILIES[family].build(), inputs_of(FAMILIES[family], torch.float32)
    attach(model.get_submodule(LAST[family]))
    expected = output_of(model, inputs)
    report = convert(model, feed_forward_k=NEURONS)
    (skipped,) = report.skipped
    assert len(report.replaced) == FAMILIES[family].num_networks - 1
    assert re.search(words, skipped.reason)
    torch.testing.assert_close(output_of(model, inputs), expected)


def test_hooks_on_the_activation_are_a_reason_to_skip_the_network(tokens):
    model = tiny_llama()
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    (skipped,) = convert(model, feed_forward_k=6).skipped
    assert skipped.reason.startswith("act_fn has a forward hook")


def test_hooks_on_a_network_go_on_acting_and_can_be_removed(tokens):
    model, seen = tiny_llama(), []
    network = model.model.layers[0].mlp
    earlier = network.register_forward_hook(lambda module, args, output: seen.append("output"))
    convert(model, feed_forward_k=6)
    later = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append("input"))
    model(tokens)
    assert seen == ["input", "output"]
    unconvert(model)
    model(tokens)
    assert seen == ["input", "output"] * 2
    earlier.remove()
    later.remove()
    model(tokens)
    assert len(seen) == 4
    assert model.model.layers[0].mlp is network


def test_a_network_whose_own_forward_was_replaced_is_skipped_with_the_reason(tokens):
    model = tiny_llama()
    network = model.model.layers[0].mlp
    network.forward = types.MethodType(lambda self, x: 0 * x, network)
    (skipped,) = convert(model, feed_forward_k=6).skipped
    assert skipped.reason == "LlamaMLP has a forward method of its own"


def test_halves_of_a_network_with_hooks_are_skipped_with_the_reason():
    for half in ("intermediate", "output"):
        model = tiny_bert()
        getattr(model.encoder.layer[0], half).register_forward_hook(lambda *_: None)
        (skipped,) = convert(model, feed_forward_k=6).skipped
        assert skipped.reason.startswith(f"{half} has a forward hook")


def dense_topk(layer, x, k):
    hidden = layer.gate_proj(x)
    hidden = F.silu(hidden) * layer.up_proj(x)
    kept = hidden.abs() >= hidden.abs().topk(k).values[..., -1:]
    return layer.down_proj(torch.where(kept, hidden, 0))


@pytest.mark.parametrize("what", ATTACHED)
def test_what_is_attached_to_a_layer_after_conversion_acts_and_a_warning_names_it(what):
    attach, words = ATTACHED[what]
    model = tiny_llama().double()
    convert(model, feed_forward_k=6)
    network = model.model.layers[0].mlp
    attach(network.down_proj)
    x = torch.randn(2, 5, 32, dtype=torch.double, requires_grad=True)
    with pytest.warns(UserWarning, match="computes every neuron, because .*down_proj") as caught:
        output = network(x)
    assert re.search(words, str(caught[0].message))
    torch.testing.assert_close(output, dense_topk(network, x, 6))
    parameters = list(network.down_proj.parameters())
    gradients = torch.autograd.grad(output.sum(), [x, *parameters])
    torch.testing.assert_close(gradients, torch.autograd.grad(dense_topk(network, x, 6).sum(), [x, *parameters]))


@CALLS
def test_pruned_weights_go_on_learning(tokens):
    gradients = []
    for topk in (False, True):
        model = tiny_llama()
        if topk:
            convert(model, feed_forward_k=NEURONS)
        layer = model.model.layers[0].mlp.down_proj
        torch.manual_seed(0)
        prune.random_unstructured(layer, "weight", 0.5)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(layer.weight_orig.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("path", "words"),
    [("fc1", "fc1 of BartEncoderLayer has a forward hook"), ("activation_fn", "activation_fn of BartEncoderLayer has")],
)
def test_what_would_see_other_values_than_before_is_refused_in_words(path, words):
    model, inputs = tiny_bart(), inputs_of(FAMILIES["bart"], torch.float32)
    convert(model, feed_forward_k=6)
    layer = model.model.encoder.layers[0]
    handle = getattr(layer, path).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=rf"{words}.*added after convert; .* or call topk_attention.unconvert first"):
        output_of(model, inputs)
    handle.remove()
    output_of(model, inputs)
    layer.fc2.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"fc2 of BartEncoderLayer has a forward pre-hook"):
        output_of(model, inputs)


def test_the_halves_of_a_network_refuse_hooks_that_would_see_other_values(tokens):
    model, seen = tiny_bert(), []
    convert(model, feed_forward_k=6)
    layer = model.encoder.layer[0]
    layer.intermediate.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    layer.output.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(tokens)
    assert len(seen) == 2
    handle = layer.intermediate.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="the first half of a top-k network, BertIntermediate, has a forward hook"):
        model(tokens)
    handle.remove()
    layer.output.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="the second half of a top-k network, BertOutput, has a forward pre-hook"):
        model(tokens)


def test_a_second_conversion_and_unconvert_keep_what_was_put_in_the_place_of_a_layer(tokens):
    model = tiny_llama()
    convert(model, feed_forward_k=6)
    network = model.model.layers[0].mlp
    network.up_proj = nn.Sequential(network.up_proj)
    report = convert(model, feed_forward_k=7)
    assert [entry.path for entry in report.skipped] == ["model.layers.0.mlp"]
    assert type(model.model.layers[0].mlp.up_proj) is nn.Sequential
    unconvert(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Sequential


def test_weights_that_were_exchanged_after_conversion_are_those_of_a_second_one():
    model, inputs = tiny_bart(), inputs_of(FAMILIES["bart"], torch.float32)
    convert(model, feed_forward_k=NEURONS)
    state = {name: torch.randn_like(tensor) / 8 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        expected = output_of(model, inputs)
        convert(model, feed_forward_k=NEURONS + 1)
        torch.testing.assert_close(output_of(model, inputs), expected)


@CALLS
@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
@pytest.mark.parametrize("first", ["convert", "offload"])
def test_offloaded_weights_are_loaded_or_their_network_is_skipped(first, how, tmp_path, tokens):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def offload(model):
        if how == "map":
            places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
            accelerate.dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
        elif how == "disk":
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    model = tiny_llama()
    with torch.no_grad():
        expected = tiny_llama()(tokens).logits
        if first == "convert":
            convert(model, attention_k=100, feed_forward_k=NEURONS)
            offload(model)
        else:
            offload(model)
            report = convert(model, attention_k=100, feed_forward_k=NEURONS)
            assert "weights that accelerate moves for each call" in report.skipped[-1].reason
            assert len([entry for entry in report.replaced if entry.kind == "attention"]) == 2
        torch.testing.assert_close(model(tokens).logits, expected)


@CALLS
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("first", ["convert", "adapters"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "bart"])
def test_lora_on_all_linear_layers_works_in_both_orders(family, first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs = inputs_of(FAMILIES[family])

    def adapted(model):
        lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(model, lora).double()

    model = FAMILIES[family].build().double()
    if first == "convert":
        convert(model, attention_k=1000, feed_forward_k=NEURONS)
        whole = adapted(model)
    else:
        whole = adapted(model)
        report = convert(model, attention_k=1000, feed_forward_k=NEURONS)
        assert bool(report.skipped) == (family == "bart")  # it takes the weights out of its layers
        assert all("is peft.tuners.lora.layer.Linear, not nn.Linear" in entry.reason for entry in report.skipped)
    output = output_of(whole, inputs)
    output.sum().backward()
    # No adapter is passed by. BERT's pooler does not belong to the output.
    assert all(p.grad is not None for name, p in whole.named_parameters() if "lora" in name and "pooler" not in name)
    unconvert(model)
    torch.testing.assert_close(output_of(whole, inputs), output)


def test_subclasses_of_pytorchs_layers_and_patched_ones_are_named_with_the_reason():
    class Own(nn.MultiheadAttention):
        pass

    class Layer(nn.TransformerEncoderLayer):
        pass

    model = nn.ModuleDict({"one": Own(8, 2), "two": nn.MultiheadAttention(8, 2), "three": Layer(8, 2, 16)})
    model["two"].forward = types.MethodType(lambda self, *args, **kwargs: None, model["two"])
    report = convert(model, attention_k=2)
    reasons = {entry.path: entry.reason for entry in report.entries}
    assert reasons["one"].endswith("Own, a subclass of nn.MultiheadAttention with code of its own")
    assert f"{__name__}." in reasons["one"]
    assert reasons["two"] == "it has a forward method of its own"
    assert reasons["three.self_attn"] == "k = 2"
    with pytest.raises(ValueError, match=r"its layer is .*Layer, a subclass with code of its own"):
        convert(model, feed_forward_k=2)


def test_parts_of_pytorchs_layers_that_are_not_called_are_watched():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    handle = layer.dropout.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="dropout has a forward hook"):
        convert(layer, feed_forward_k=4)
    handle.remove()
    convert(layer, feed_forward_k=4)
    layer(torch.randn(1, 3, 8))
    layer.dropout.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"dropout has a forward hook .* it was added after convert"):
        layer(torch.randn(1, 3, 8))


def test_an_attention_layer_whose_patched_forward_does_not_read_the_interface_is_named(tokens):
    model = tiny_llama()
    layer = model.model.layers[0].self_attn
    layer.forward = types.MethodType(lambda self, hidden_states, **kwargs: (hidden_states, None), layer)
    report = convert(model, attention_k=4)
    assert [entry.path for entry in report.replaced] == ["model.layers.1.self_attn"]
    (skipped,) = report.skipped
    assert skipped.path == "model.layers.0.self_attn"
    assert "its forward method was replaced" in skipped.reason


def test_layers_whose_weights_are_sharded_are_converted(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_llama()
        for layer in model.model.layers:
            fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
        report = convert(model, attention_k=4, feed_forward_k=6)
        assert not report.skipped
        assert len(report.replaced) == 4
    finally:
        dist.destroy_process_group()


def test_what_hangs_on_the_table_of_the_position_bias_acts():
    model, inputs = tiny_t5().double(), inputs_of(FAMILIES["t5"])
    layer = model.encoder.block[0].layer[0].SelfAttention
    layer.relative_attention_bias.register_forward_hook(lambda module, args, output: 3 * output)
    expected = output_of(model, inputs)
    convert(model, attention_k=1000)
    torch.testing.assert_close(output_of(model, inputs), expected)
    parametrize.register_parametrization(layer.relative_attention_bias, "weight", Doubled())
    output = output_of(model, inputs)
    assert not torch.allclose(output, expected)
    unconvert(model)
    torch.testing.assert_close(output_of(model, inputs), output)
