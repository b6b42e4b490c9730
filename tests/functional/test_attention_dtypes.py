"""Every floating dtype, with sums in float32 or float64, and autocast."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from comparison import (
    CALL_NAMES,
    Sizes,
    assert_same,
    assert_within_measured_allowance,
    attention_inputs,
    largest_errors,
    named_call,
)
from topk_attention import RelativeBias, topk_attention
from topk_attention.backends import cpu
from topk_attention.backends.chunked import tiles

LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
K_OR_NONE = pytest.mark.parametrize("options", [{}, {"k": None}], ids=["some", "all"])
FAST_BACKENDS = ["chunked"] if cpu.problem() else ["chunked", "cpu"]
MANY_ROWS = Sizes(batch=16, heads=4, key_heads=4, queries=17, keys=23, head_dim=16, value_dim=8)


@pytest.fixture
def two_key_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 1024)


def in_float64(call):
    options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in call.options.items()
    }
    return replace(call, tensors=tuple(x.double() for x in call.tensors), options=options)


def assert_as_close_to_float64_as_the_reference(name, dtype, **options):
    """Every fast backend; what the reference gives in float64 and in the dtype is computed once for all."""
    errors = {backend: [] for backend in ("reference", *FAST_BACKENDS)}
    for draw in range(3):
        call = named_call(name, MANY_ROWS, dtype, smallest_gap=0 if "k" in options else 1e-5, first_seed=1000 * draw)

        def run(call, backend, draw=draw):
            torch.manual_seed(draw)
            return call.run(backend=backend, **options)

        truth = run(in_float64(call), "reference")
        for backend, so_far in errors.items():
            so_far.append(largest_errors(run(call, backend), truth))
    errors = {backend: torch.stack(of_draws) for backend, of_draws in errors.items()}
    for backend in FAST_BACKENDS:
        assert_within_measured_allowance(errors[backend], errors["reference"], dtype, backend)


@LOW_PRECISION
@K_OR_NONE
@pytest.mark.parametrize("name", CALL_NAMES)
def test_low_precision_is_as_close_to_float64_as_the_reference(two_key_blocks, name, dtype, options):
    assert_as_close_to_float64_as_the_reference(name, dtype, **options)


@LOW_PRECISION
@K_OR_NONE
def test_outputs_and_gradients_have_the_dtype_of_their_inputs(backend, dtype, options):
    for x in named_call("plain", dtype=dtype, smallest_gap=0).run(backend=backend, **options):
        assert x.dtype == dtype


@LOW_PRECISION
@K_OR_NONE
def test_dropout_in_low_precision_is_as_close_to_float64_as_the_reference(two_key_blocks, dtype, options):
    assert_as_close_to_float64_as_the_reference("causal", dtype, dropout_p=0.3, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [300, None])
def test_sums_over_many_keys_are_kept_in_float32(backend, dtype, k):
    num_keys = 4096
    query, key = torch.zeros(1, 1, 2, 4, dtype=dtype), torch.zeros(1, 1, num_keys, 4, dtype=dtype)
    value = torch.ones(1, 1, num_keys, 3, dtype=dtype)
    output = topk_attention(query, key, value, k=k, backend=backend)
    assert torch.equal(output, torch.ones_like(output))


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relative", [False, True], ids=["dense", "relative"])
@pytest.mark.parametrize("k", [3, None])
def test_a_bias_may_have_another_dtype_and_gets_its_gradient_in_it(backend, relative, bias_dtype, k):
    query, key, value = attention_inputs(dtype=torch.float32)
    shape = (4, 7 + 11 - 1) if relative else (4, 7, 11)
    source = torch.randint(-2, 3, shape).to(bias_dtype).requires_grad_()
    output = topk_attention(query, key, value, k=k, bias=RelativeBias(source) if relative else source, backend=backend)
    assert output.dtype == torch.float32
    output.square().sum().backward()
    same = source.detach().float().requires_grad_()
    topk_attention(
        query, key, value, k=k, bias=RelativeBias(same) if relative else same, backend=backend
    ).square().sum().backward()
    assert source.grad.dtype == bias_dtype
    torch.testing.assert_close(source.grad, same.grad.to(bias_dtype), check_dtype=False)


@pytest.mark.parametrize("k", [3, 11, None])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_scaled_dot_product_attention(backend, tiling, autocast_dtype, k):
    inputs = [x.requires_grad_() for x in attention_inputs(dtype=torch.float32)]
    with torch.autocast("cpu", autocast_dtype):
        output = topk_attention(*inputs, k=k, backend=backend)
        assert output.dtype == F.scaled_dot_product_attention(*inputs).dtype == autocast_dtype
    gradients = torch.autograd.grad(output.float().square().sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in gradients)
    expected = topk_attention(*(x.to(autocast_dtype) for x in inputs), k=k, backend=backend)
    assert torch.equal(output, expected)
    assert_same(gradients, torch.autograd.grad(expected.float().square().sum(), inputs))


@pytest.mark.parametrize("k", [3, None])
def test_a_backward_pass_under_autocast_sums_in_float32_too(tiled_backend, k):
    inputs = [x.requires_grad_() for x in attention_inputs(dtype=torch.float32)]
    output = topk_attention(*inputs, k=k, backend=tiled_backend)
    expected = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(output.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_autocast_accepts_inputs_of_different_dtypes(backend):
    query, key, value = attention_inputs(dtype=torch.float32)
    bias = torch.randn(4, 7, 11)
    with torch.autocast("cpu", torch.bfloat16):
        output = topk_attention(query.bfloat16(), key, value, k=3, bias=bias, attn_mask=bias[0], backend=backend)
    expected = topk_attention(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), k=3, bias=bias, attn_mask=bias[0], backend=backend
    )
    assert torch.equal(output, expected)


def test_autocast_leaves_float64_alone(backend):
    inputs = attention_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = topk_attention(*inputs, k=3, backend=backend)
    assert torch.equal(output, topk_attention(*inputs, k=3, backend=backend))
