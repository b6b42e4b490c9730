"""The paper's own two forms of a feed-forward layer, against the plain one."""

import functools

import pytest
import torch
import torch.nn.functional as F

from topk_attention import topk_feed_forward
from topk_experiments.rivals.feed_forward import in_chunks, sparse_topk_feed_forward


def dense(x, w_in, w_out):
    return F.linear(F.linear(x, w_in).relu(), w_out)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = ((13, 5), (11, 5), (5, 11))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def output_and_gradients(operation, tensors):
    output = operation(*tensors)
    torch.manual_seed(1)
    return output, *torch.autograd.grad(output, tensors, torch.randn_like(output))


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 20])
def test_chunks_change_neither_output_nor_gradients(tensors, chunk_size):
    expected = output_and_gradients(dense, tensors)
    torch.testing.assert_close(output_and_gradients(in_chunks(dense, chunk_size), tensors), expected)


def test_only_one_chunk_is_computed_at_a_time(tensors):
    rows = []

    def operation(x, w_in, w_out):
        rows.append(len(x))
        return dense(x, w_in, w_out)

    output = in_chunks(operation, 5)(*tensors)
    assert rows == [5, 5, 3]
    output.sum().backward()
    assert sorted(rows) == [3, 3, 5, 5, 5, 5]  # the backward pass computes each again


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("k", [1, 4, 11, 30])
def test_the_sparse_form_keeps_the_k_largest_pre_activations(tensors, k, activation):
    reference = functools.partial(topk_feed_forward, k=k, activation=activation, backend="reference")
    sparse = functools.partial(sparse_topk_feed_forward, k=k, activation=activation)
    torch.testing.assert_close(output_and_gradients(sparse, tensors), output_and_gradients(reference, tensors))
