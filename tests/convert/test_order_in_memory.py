"""Parameters of a model that trains stay contiguous; a frozen model's networks store theirs by neuron."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector

from convert_models import FAMILIES, inputs_of, output_of, tiny_llama
from topk_attention import convert, unconvert


@pytest.fixture
def process_group(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_model_that_trains_stay_contiguous(family):
    model = FAMILIES[family].build()
    convert(model, attention_k=3, feed_forward_k=5)
    assert all(p.is_contiguous() for p in model.parameters())
    parameters_to_vector(model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_stores_by_neuron_until_it_trains_or_is_restored(family):
    model, inputs = FAMILIES[family].build().requires_grad_(False), inputs_of(FAMILIES[family], torch.float32)
    convert(model, feed_forward_k=5)
    by_neuron = [name for name, p in model.named_parameters() if not p.is_contiguous()]
    assert len(by_neuron) == FAMILIES[family].num_networks
    expected = output_of(model, inputs)
    next(model.parameters()).requires_grad_()
    convert(model, feed_forward_k=5)  # one weight trains: all lie as usual
    assert all(p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(output_of(model, inputs), expected)
    next(model.parameters()).requires_grad_(False)
    convert(model, feed_forward_k=5)
    unconvert(model)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_keep_their_order_in_which_optimizers_know_them(family):
    model = FAMILIES[family].build()
    names = [name for name, _ in model.named_parameters()]
    convert(model, attention_k=3, feed_forward_k=5)
    assert [name for name, _ in model.named_parameters()] == names
    convert(model, feed_forward_k=6)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(FAMILIES[family].build().state_dict())


def test_lbfgs_trains_a_converted_model(tokens):
    model = tiny_llama()
    convert(model, attention_k=8, feed_forward_k=32)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert closure() < before


@pytest.mark.parametrize("as_view", [False, True])
def test_a_model_converted_inside_distributed_data_parallel_gets_its_gradients(as_view, tokens, process_group):
    model = tiny_llama()
    convert(model, feed_forward_k=24)
    model(input_ids=tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model = tiny_llama()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    convert(model, feed_forward_k=24)
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_a_converted_model_is_sharded_by_fsdp2_layer_by_layer(tokens, process_group):
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    convert(model, attention_k=8, feed_forward_k=24)
    expected = model(input_ids=tokens, labels=tokens).loss
    expected.backward()
    gradient = model.model.layers[0].mlp.down_proj.weight.grad
    model.zero_grad()
    for layer in model.model.layers:
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight.grad.full_tensor(), gradient)
