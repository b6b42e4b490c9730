"""Experts picked from a stack: their gradients are written into one of the whole stack."""

from __future__ import annotations

import threading

import pytest
import torch

from topk_attention.backends.activations import Cut
from topk_attention.nn import experts
from topk_attention.nn.experts import ExpertWeights, routing_of, sum_of_experts

NUM_EXPERTS, NEURONS, SIZE, TOKENS = 4, 11, 7, 13


def new_weights():
    torch.manual_seed(0)
    shapes = (NUM_EXPERTS, 2, NEURONS, SIZE), (NUM_EXPERTS, SIZE, NEURONS), (NUM_EXPERTS, 2, NEURONS)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def summed(weights, x, pick=lambda stack: stack):
    """The third expert has no tokens."""
    gate_in, w_out, b_gate_in = map(pick, weights)
    index = torch.tensor([0, 1, 3]).repeat(TOKENS)[: 2 * TOKENS].view(TOKENS, 2)
    routing = routing_of(index, torch.full(index.shape, 0.5, dtype=x.dtype), NUM_EXPERTS)
    stacks = ExpertWeights(w_out, gate_in=gate_in, b_gate_in=b_gate_in)
    return sum_of_experts(x, routing, stacks, k=4, activation="silu", cut=Cut(), backend="chunked")


@pytest.fixture
def x():
    return torch.randn(TOKENS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def expected(x, monkeypatch):
    """Gradients of stacks whose experts PyTorch picks and joins."""
    weights = new_weights()
    with monkeypatch.context() as patch:
        patch.setattr(experts, "_each", lambda name, stack: stack)
        return torch.autograd.grad(summed(weights, x).square().sum(), weights)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_experts_that_pytorch_picks_and_joins(x, expected):
    weights = new_weights()
    assert all(gradient[2].count_nonzero() == 0 for gradient in expected)
    assert_same(torch.autograd.grad(summed(weights, x).square().sum(), weights), expected)


def test_a_second_backward_pass_leaves_the_gradients_of_the_first_as_they_are(x, expected):
    weights = new_weights()
    loss = summed(weights, x).square().sum()
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert_same(torch.autograd.grad(2 * loss, weights), [2 * gradient for gradient in expected])
    assert_same(first, expected)


def test_backward_passes_of_two_threads_through_the_same_stack_do_not_mix(x, expected, monkeypatch):
    weights = new_weights()
    loss = summed(weights, x).square().sum()
    found, barrier, written = {}, threading.Barrier(2), experts._Written.backward

    def backward(ctx, gradient):
        barrier.wait(10)  # each part is written by both at the same time
        return written(ctx, gradient)

    def run(factor):
        found[factor] = torch.autograd.grad(factor * loss, weights, retain_graph=True)

    monkeypatch.setattr(experts._Written, "backward", staticmethod(backward))
    threads = [threading.Thread(target=run, args=(factor,)) for factor in (1.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor in (1.0, 3.0):
        assert_same(found[factor], [factor * gradient for gradient in expected])


def test_gradients_of_strided_stacks_lie_as_the_stacks_do(x, expected):
    gate_in, w_out, b_gate_in = new_weights()
    halves = gate_in.detach().transpose(1, 2).flatten(1, 2).requires_grad_()  # interleaved, as in gpt-oss
    lying = w_out.detach().mT.contiguous().requires_grad_()

    def pick(stack):
        if stack is halves:
            return stack.unflatten(1, (-1, 2)).transpose(1, 2)
        return stack.mT if stack is lying else stack

    found = torch.autograd.grad(summed([halves, lying, b_gate_in], x, pick).square().sum(), [halves, lying])
    assert_same(found, [expected[0].transpose(1, 2).flatten(1, 2), expected[1].mT])
    assert all(gradient.is_contiguous() for gradient in found)


def test_the_gradient_of_an_expert_does_not_wait_for_the_others(x, monkeypatch):
    """At most one expert's own gradient exists beside that of the stack."""
    weights, waiting = new_weights(), []
    written = experts._Written.backward

    def backward(ctx, gradient):
        result = written(ctx, gradient)
        waiting.append(result[0].untyped_storage().data_ptr() != gradient.untyped_storage().data_ptr())
        return result

    monkeypatch.setattr(experts._Written, "backward", staticmethod(backward))
    found = torch.autograd.grad(summed(weights, x).square().sum(), weights)
    # gate and up with their biases, and the output's weights, of three experts
    assert waiting == [True] * 15
    assert len({gradient.untyped_storage().data_ptr() for gradient in found}) == 3
