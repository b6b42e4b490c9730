"""Each derivative is that of its activation."""

import pytest
import torch

from topk_attention.backends.activations import ACTIVATIONS, activate, activate_backward


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_is_what_autograd_finds(name):
    z = torch.randn(1000, dtype=torch.float64).mul(3).requires_grad_()
    grad = torch.randn(1000, dtype=torch.float64)
    (expected,) = torch.autograd.grad(activate(z, name), z, grad)
    torch.testing.assert_close(activate_backward(grad, z.detach(), name), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_is_the_slope(name):
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)
    z = z[z.abs() > 1e-3]  # relu has no slope at 0
    slope = (activate(z + 1e-6, name) - activate(z - 1e-6, name)) / 2e-6
    torch.testing.assert_close(activate_backward(torch.ones_like(z), z, name), slope, rtol=1e-6, atol=1e-8)


def test_relu_passes_no_gradient_at_zero():
    assert activate_backward(torch.ones(1), torch.zeros(1), "relu").item() == 0
