"""Calls large enough that the kernels cut them into panels, samples and blocks, and what they are compared with.

The reference takes far longer than the kernels, so what it gives is computed once for all CPU targets.
"""

import torch

from comparison import assert_same, output_and_gradients
from topk_attention import topk_attention
from topk_attention.backends import cpu


def integers(*shape, largest=3, dtype=torch.float32):
    """Small integers: products and sums of them are exact in every dtype's accumulation, and many scores are equal."""
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def integer_inputs(batch, heads, key_heads, queries, keys, head_dim, value_dim, dtype=torch.float32):
    return (
        integers(batch, heads, queries, head_dim, dtype=dtype),
        integers(batch, key_heads, keys, head_dim, dtype=dtype),
        integers(batch, key_heads, keys, value_dim, dtype=dtype),
    )


def select(query, key, value, **options):
    """Indices and weights of the kept keys."""
    options = {"backend": "cpu", **options}
    _, selection = topk_attention(query, key, value, return_selection=True, **options)
    return selection


def assert_keeps_what_the_reference_keeps(query, key, value, *, targets=None, dtypes=None, **options):
    """The same keys where scores are exact, ties included, and the weights to rounding; truth is float64.

    targets  CPU targets whose kernels are tried, the one in use if none is given
    dtypes   to which query, key and value are cast, which they must bear exactly; their own if none is given
    """
    float64 = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    expected = select(query.double(), key.double(), value.double(), **float64, backend="reference")
    for target in targets or [cpu.cpu_target()]:
        for dtype in dtypes or [query.dtype]:
            with cpu.forced_cpu_target(target):
                actual = select(query.to(dtype), key.to(dtype), value.to(dtype), **options)
            assert torch.equal(actual.indices, expected.indices), f"other keys are kept: {target}, {dtype}"
            torch.testing.assert_close(
                actual.weights.double(),
                expected.weights,
                rtol=1e-5,
                atol=1e-7,
                equal_nan=True,
                msg=lambda words, case=(target, dtype): f"{case}: {words}",
            )


def assert_equals_the_reference(*tensors, make_bias=None, targets=None, **options):
    """Output and all gradients in float64, with the kernels of each of these CPU targets, or of the one in use."""

    def attend(backend):
        def function(query, key, value, *source):
            torch.manual_seed(0)  # one draw of dropout
            bias = make_bias(*source) if make_bias else None
            return topk_attention(query, key, value, bias=bias, backend=backend, **options)

        return function

    tensors = [x.double() for x in tensors]
    expected = output_and_gradients(attend("reference"), *tensors)
    for target in targets or [cpu.cpu_target()]:
        with cpu.forced_cpu_target(target):
            actual = output_and_gradients(attend("cpu"), *tensors)
        assert_same(actual, expected, target)
