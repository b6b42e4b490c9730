"""Gated layers that cut the gate and the other factor before they multiply, and add a number, as gpt-oss does."""

from __future__ import annotations

import pytest
import torch

from comparison import assert_same, best_entries
from topk_attention import topk_feed_forward

TOKENS, MODEL, NEURONS, OUTPUTS = 7, 5, 40, 3
CUTS = pytest.mark.parametrize(("limit", "offset"), [(0.5, 1.0), (0.5, 0.0), (None, 1.0), (None, -2.5), (3, 0)])


def layer(tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (tokens, MODEL), "w_in": (NEURONS, MODEL), "w_out": (OUTPUTS, NEURONS), "w_gate": (NEURONS, MODEL)}
    shapes |= {"b_in": (NEURONS,), "b_gate": (NEURONS,), "b_out": (OUTPUTS,)}
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def dense(x, w_in, w_out, w_gate, b_in, b_gate, b_out, k, limit, offset):
    """The formula by torch's own operations, with all but the k largest products of each token zeroed."""
    gate, value = x @ w_gate.T + b_gate, x @ w_in.T + b_in
    if limit is not None:
        gate, value = torch.minimum(gate, torch.tensor(float(limit))), value.clip(-limit, limit)
    hidden = gate * torch.sigmoid(gate) * (value + offset)
    kept = best_entries(hidden.detach().abs(), torch.ones_like(hidden, dtype=torch.bool), k)
    return torch.where(kept, hidden, 0) @ w_out.T + b_out


def with_gradients(function, tensors):
    output = function(**tensors)
    signs = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * signs).sum(), list(tensors.values()))]


@CUTS
@pytest.mark.parametrize("k", [1, 6, NEURONS])
@pytest.mark.parametrize("tokens", [2, TOKENS, 30])  # the kernels go other ways for a few
def test_output_and_gradients_are_those_of_the_formula(backend, tokens, k, limit, offset):
    tensors = layer(tokens)
    expected = with_gradients(lambda **given: dense(**given, k=k, limit=limit, offset=offset), tensors)
    found = with_gradients(
        lambda **given: topk_feed_forward(
            **given, k=k, activation="silu", gate_limit=limit, in_offset=offset, backend=backend
        ),
        tensors,
    )
    assert_same(found, expected)


@CUTS
def test_the_cut_decides_which_neurons_are_kept(backend, limit, offset):
    tensors = layer()
    options = {"k": 6, "activation": "silu", "backend": backend}
    cut = topk_feed_forward(**tensors, **options, gate_limit=limit, in_offset=offset)
    plain = topk_feed_forward(**tensors, **options)
    assert (limit == 3) or not torch.allclose(cut, plain, rtol=1e-3)


def test_at_the_limit_itself_the_gradient_passes(backend):
    ones = torch.ones(1, 1, dtype=torch.float64)
    x = ones.clone().requires_grad_()
    options = {"k": 1, "activation": "identity", "gate_limit": 1.0, "backend": backend}
    topk_feed_forward(x, ones, ones, w_gate=ones, **options).backward()
    assert x.grad.item() == 2.0
    x.grad = None
    topk_feed_forward(x, 1.5 * ones, ones, w_gate=ones, **options).backward()
    assert x.grad.item() == 1.0


def test_nan_in_a_gate_is_not_cut(backend):
    tensors = {name: tensor.detach().clone() for name, tensor in layer().items()}
    tensors["x"][2] = torch.nan
    output = topk_feed_forward(**tensors, k=6, activation="silu", gate_limit=0.5, in_offset=1.0, backend=backend)
    assert output.isnan().any(1).tolist() == [token == 2 for token in range(TOKENS)]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gate_limit": 0.0}, ValueError, "gate_limit must be above 0, got 0.0; None cuts nothing"),
        ({"gate_limit": float("nan")}, ValueError, "gate_limit must be above 0, got nan"),
        ({"gate_limit": "7"}, TypeError, "gate_limit must be a number, got str '7'"),
        ({"in_offset": True}, TypeError, "in_offset must be a number, got bool True"),
        ({"in_offset": float("inf")}, ValueError, "in_offset must be finite, got inf"),
        ({"w_gate": None, "b_gate": None, "gate_limit": 7.0}, ValueError, "gate_limit and in_offset need w_gate, got"),
        ({"w_gate": None, "b_gate": None, "in_offset": 1.0}, ValueError, "gate_limit and in_offset need w_gate, got"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(options, error, words):
    with pytest.raises(error, match=words):
        topk_feed_forward(**layer() | options, k=6)
