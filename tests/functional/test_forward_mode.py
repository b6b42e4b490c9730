"""Forward-mode derivatives are right or refused, never silently absent."""

import pytest
import torch
from torch.autograd import forward_ad

from comparison import SIZES, attention_inputs, named_call
from feed_forward_layers import apply, random_layer
from topk_attention import topk_attention

# torch's own: its rules for forward mode use what newer torch calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

K_OR_NONE = pytest.mark.parametrize("k", [3, None])
HOW = pytest.mark.parametrize("how", ["torch.func.jvp", "dual tensors", "jacfwd", "jvp of jvp"])


def derivative(function, how, tensors, wanted):
    """The output's derivative in a direction that moves one of the tensors."""

    def of_wanted(x):
        return function(*tensors[:wanted], x, *tensors[wanted + 1 :])

    x = tensors[wanted]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    if how == "torch.func.jvp":
        return torch.func.jvp(of_wanted, (x,), (direction,))[1]
    if how == "jacfwd":
        return torch.func.jacfwd(lambda step: of_wanted(x + step * direction))(torch.zeros((), dtype=x.dtype))
    if how == "jvp of jvp":
        return torch.func.jvp(lambda y: torch.func.jvp(of_wanted, (y,), (direction,))[1], (x,), (direction,))[1]
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(of_wanted(forward_ad.make_dual(x, direction))).tangent


def numerical_derivative(function, tensors, wanted, step=1e-6):
    x = tensors[wanted]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    sides = [function(*tensors[:wanted], x + side * direction, *tensors[wanted + 1 :]) for side in (step, -step)]
    return (sides[0] - sides[1]) / (2 * step)


@K_OR_NONE
@pytest.mark.parametrize("how", ["torch.func.jvp", "dual tensors"])
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("name", ["dense_bias", "relative_bias"])
def test_the_reference_has_forward_mode_derivatives_of_attention(name, wanted, how, k):
    call = named_call(name, smallest_gap=1e-3)

    def function(*tensors):
        return call(*tensors, k=k, backend="reference")

    actual = derivative(function, how, call.tensors, wanted)
    torch.testing.assert_close(actual, numerical_derivative(function, call.tensors, wanted), rtol=1e-6, atol=1e-8)


@K_OR_NONE
@HOW
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("name", ["dense_bias", "bucketed_bias"])
def test_fast_backends_refuse_forward_mode_derivatives_of_attention(fast_backend, name, wanted, how, k):
    call = named_call(name)
    words = f'topk_attention has no forward-mode derivative .* on "(chunked|{fast_backend})"; use backend="reference"'
    with pytest.raises(NotImplementedError, match=words):
        derivative(lambda *x: call(*x, k=k, backend=fast_backend), how, call.tensors, wanted)


@HOW
@pytest.mark.parametrize(("k", "num_queries"), [(3, 7), (3, 1), (None, 7), (None, 1)])
def test_auto_refuses_forward_mode_derivatives_of_attention(k, num_queries, how):
    inputs = attention_inputs(SIZES._replace(queries=num_queries, value_dim=3))
    with pytest.raises(NotImplementedError, match="topk_attention has no forward-mode derivative"):
        derivative(lambda *x: topk_attention(*x, k=k), how, inputs, 1)


@K_OR_NONE
@HOW
@pytest.mark.parametrize("wanted", range(7))
def test_fast_backends_refuse_forward_mode_derivatives_of_feed_forward_layers(fast_backend, wanted, how, k):
    layer = random_layer("gated with biases")
    words = (
        f'topk_feed_forward has no forward-mode derivative .* on "(chunked|{fast_backend})"; use backend="reference"'
    )
    with pytest.raises(NotImplementedError, match=words):
        derivative(
            lambda *x: apply(layer.with_tensors(x), k=k, activation="silu", backend=fast_backend), how, layer, wanted
        )


@K_OR_NONE
@pytest.mark.parametrize("how", ["torch.func.jvp", "dual tensors"])
@pytest.mark.parametrize("wanted", range(7))
def test_the_reference_has_forward_mode_derivatives_of_feed_forward_layers(wanted, how, k):
    layer = random_layer("gated with biases")

    def function(*tensors):
        return apply(layer.with_tensors(tensors), k=k, activation="silu", backend="reference")

    actual = derivative(function, how, layer, wanted)
    torch.testing.assert_close(actual, numerical_derivative(function, layer, wanted), rtol=1e-5, atol=1e-7)


def test_without_tangents_a_forward_mode_context_changes_nothing(fast_backend):
    inputs = attention_inputs()
    expected = topk_attention(*inputs, k=3, backend=fast_backend)
    with forward_ad.dual_level():
        assert torch.equal(topk_attention(*inputs, k=3, backend=fast_backend), expected)
