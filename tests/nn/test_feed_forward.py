"""A top-k layer stores frozen output weights neuron by neuron in memory and changes nothing else about them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from topk_attention import TopKFeedForward, convert, unconvert
from topk_attention.nn.feed_forward import store_by_neuron

MODEL, NEURONS = 10, 24


class Dense(nn.Module):
    def __init__(self, gated=False):
        super().__init__()
        self.up = nn.Linear(MODEL, NEURONS)
        self.down = nn.Linear(NEURONS, MODEL)
        self.gate = nn.Linear(MODEL, NEURONS) if gated else None

    def forward(self, x):
        hidden = F.silu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


def frozen(gated=False):
    return Dense(gated).requires_grad_(False)


def topk(dense, **options):
    options = {"k": 5, "activation": "silu", "names": ("up", "down", "gate")} | options
    return TopKFeedForward(dense.up, dense.down, linear_gate=dense.gate, **options)


def is_by_neuron(weight):
    return weight.shape == (MODEL, NEURONS) and weight.stride() == (1, MODEL)


def test_only_the_strides_of_the_weight_change():
    linear = nn.Linear(NEURONS, MODEL).requires_grad_(False)
    weight, values = linear.weight, linear.weight.detach().clone()
    x = torch.randn(3, NEURONS)
    before = linear(x)
    store_by_neuron(linear)
    assert linear.weight is weight
    assert is_by_neuron(weight)
    assert torch.equal(weight, values)
    torch.testing.assert_close(linear(x), before)
    pointer = weight.data_ptr()
    store_by_neuron(linear)
    assert weight.data_ptr() == pointer


@pytest.mark.parametrize("has_weight", [True, False])
def test_what_has_no_weights_of_its_own_to_rearrange_is_left_alone(has_weight):
    module = nn.Linear(NEURONS, MODEL, device="meta").requires_grad_(False) if has_weight else nn.Identity()
    store_by_neuron(module)
    assert not has_weight or module.weight.is_contiguous()


@pytest.mark.parametrize("gated", [False, True])
def test_state_dicts_go_both_ways_through_files(tmp_path, gated):
    dense, other = frozen(gated), topk(frozen(gated))
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    other.load_state_dict(torch.load(tmp_path / "dense.pt"))
    assert is_by_neuron(other.down.weight)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), other.parameters(), strict=True))
    torch.save(other.state_dict(), tmp_path / "topk.pt")
    fresh = Dense(gated)
    fresh.load_state_dict(torch.load(tmp_path / "topk.pt"))
    assert fresh.down.weight.is_contiguous()
    x = torch.randn(3, MODEL)
    assert torch.equal(fresh(x), dense(x))


@pytest.mark.parametrize("by", [copy.deepcopy, lambda layer: layer.double().float(), lambda layer: layer.to("cpu")])
def test_copies_and_casts_keep_the_order_in_memory(by):
    layer = topk(frozen())
    expected = layer.down.weight.detach().clone()
    changed = by(layer)
    assert is_by_neuron(changed.down.weight)
    assert torch.equal(changed.down.weight, expected)


def test_weights_that_train_their_gradients_and_an_optimizers_state_stay_contiguous(tmp_path):
    layer = topk(Dense())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(torch.randn(30, MODEL)).square().sum().backward()
        optimizer.step()
    weight = layer.down.weight
    state = optimizer.state[weight]
    assert all(x.is_contiguous() for x in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = copy.deepcopy(layer)
    resumed = torch.optim.AdamW(again.parameters(), lr=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    x = torch.randn(30, MODEL)
    for model, its_optimizer in ((layer, optimizer), (again, resumed)):
        its_optimizer.zero_grad()
        model(x).square().sum().backward()
        its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_an_optimizer_made_before_goes_on_with_the_same_weight():
    dense = Dense()
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.1)
    dense(torch.randn(3, MODEL)).square().sum().backward()
    optimizer.step()
    layer = topk(dense)
    before = dense.down.weight.detach().clone()
    optimizer.zero_grad()
    layer(torch.randn(3, MODEL)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(dense.down.weight, before)


def test_tied_weights_stay_tied():
    first, second = frozen(), frozen()
    second.down.weight = first.down.weight
    layers = [topk(first), topk(second)]
    assert layers[0].down.weight is layers[1].down.weight
    assert is_by_neuron(layers[0].down.weight)
    one_matrix = frozen()
    one_matrix.down.weight = nn.Parameter(one_matrix.up.weight.detach().t(), requires_grad=False)
    layer = topk(one_matrix)
    assert layer.down.weight.data_ptr() == layer.up.weight.data_ptr()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 11, 12, 50])
@pytest.mark.parametrize("k", [NEURONS, None])
def test_with_every_neuron_it_equals_the_dense_layer(backend, k, tokens, gated):
    dense = Dense(gated).double()
    layer = topk(copy.deepcopy(dense), k=k, backend=backend)
    x = torch.randn(2, tokens, MODEL, dtype=torch.float64, requires_grad=True)
    outputs = [module(x) for module in (layer, dense)]
    grad_output = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad(output, [x, *module.parameters()], grad_output)
        for output, module in zip(outputs, (layer, dense), strict=True)
    ]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_a_converted_model_saves_ordinary_safetensors(tmp_path):
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model.requires_grad_(False), feed_forward_k=6)
    assert all(layer.mlp.down_proj.weight.stride() == (1, 8) for layer in model.model.layers)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, original[name]) for name, tensor in saved.items())
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = torch.arange(20)[None]
    unconvert(model)
    torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits)
