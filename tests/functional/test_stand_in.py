"""topk_feed_forward(stand_in=) adds a linear function of x, of a low rank, for the neurons that are left out."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from comparison import assert_same, output_and_gradients
from feed_forward_layers import MODEL, NEURONS, OUTPUTS, Layer, apply, random_layer
from topk_attention import StandIn, topk_feed_forward

RANK = 2
RANKS = pytest.mark.parametrize("rank", [0, RANK])
KINDS = pytest.mark.parametrize("kind", ["plain", "plain with biases", "gated", "gated with biases"])


def tensors_of(rank, model=MODEL, outputs=OUTPUTS, dtype=torch.float64):
    shapes = [(outputs,), (rank, model), (outputs, rank)] if rank else [(outputs,)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def run(layer, stand_in, **options):
    """Output and gradients of every tensor of the layer and of the stand-in."""
    present = layer.present()

    def function(*tensors):
        of_layer, of_stand_in = tensors[: len(present)], tensors[len(present) :]
        return apply(layer.with_tensors(of_layer), stand_in=StandIn(*of_stand_in), **options)

    return output_and_gradients(function, *present, *stand_in)


def run_by_definition(layer, stand_in, **options):
    present = layer.present()

    def function(*tensors):
        moved = layer.with_tensors(tensors[: len(present)])
        bias, *matrices = tensors[len(present) :]
        output = apply(moved, backend="reference", **options) + bias
        return output + moved.x @ matrices[0].T @ matrices[1].T if matrices else output

    return output_and_gradients(function, *present, *stand_in)


@RANKS
@KINDS
@pytest.mark.parametrize("k", [1, 4, NEURONS - 1])
def test_output_and_gradients_are_those_of_the_layer_plus_the_linear_function(backend, tiling, kind, k, rank):
    layer, stand_in = random_layer(kind), tensors_of(rank)
    expected = run_by_definition(layer, stand_in, k=k, activation="gelu")
    assert_same(run(layer, stand_in, k=k, activation="gelu", backend=backend), expected)


@RANKS
@KINDS
def test_gradients_match_finite_differences(backend, small_tiles, kind, rank):
    layer = random_layer(kind, tokens=4, model=3, neurons=6, outputs=2)
    present, stand_in = layer.present(), tensors_of(rank, 3, 2)

    def function(*tensors):
        moved = layer.with_tensors(tensors[: len(present)])
        options = {"k": 3, "activation": "silu", "backend": backend}
        return apply(moved, stand_in=StandIn(*tensors[len(present) :]), **options)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (*present, *stand_in)])


@RANKS
@pytest.mark.parametrize("k", [NEURONS, NEURONS + 1, None, "all"])
def test_with_every_neuron_kept_it_is_the_dense_layer_to_the_last_bit(backend, k, rank):
    layer = random_layer("gated with biases")
    options = {"k": k, "activation": "silu", "backend": backend}
    assert torch.equal(apply(layer, stand_in=StandIn(*tensors_of(rank)), **options), apply(layer, **options))


def test_dropout_leaves_it_alone(backend):
    layer, (bias, w_in, w_out) = random_layer("plain"), tensors_of(RANK)
    output = apply(layer, k=4, dropout_p=1 - 2**-32, backend=backend, stand_in=StandIn(bias, w_in, w_out))
    assert_same([output], [bias + layer.x @ w_in.T @ w_out.T])


@RANKS
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_x_may_have_any_leading_axes(backend, rank, shape):
    layer, stand_in = random_layer("plain"), StandIn(*tensors_of(rank))
    x = torch.randn(*shape, MODEL, dtype=torch.float64)
    output = topk_feed_forward(x, layer.w_in, layer.w_out, k=4, backend=backend, stand_in=stand_in)
    flat = topk_feed_forward(x.reshape(-1, MODEL), layer.w_in, layer.w_out, k=4, backend=backend, stand_in=stand_in)
    assert output.shape == (*shape, OUTPUTS)
    assert_same([output.reshape(-1, OUTPUTS)], [flat])


def test_a_token_that_is_not_finite_spoils_its_own_output_alone(fast_backend):
    layer, stand_in = random_layer("plain"), StandIn(*tensors_of(RANK))
    expected = apply(layer, k=4, backend=fast_backend, stand_in=stand_in)
    layer.x[3, 1] = torch.nan
    output = apply(layer, k=4, backend=fast_backend, stand_in=stand_in)
    assert output[3].isnan().all()
    expected[3] = torch.nan
    torch.testing.assert_close(output, expected, equal_nan=True)


@RANKS
def test_autocast_casts_it_like_the_weights(backend, rank):
    layer, tensors = random_layer("gated with biases", dtype=torch.float32), tensors_of(rank, dtype=torch.float32)
    options = {"k": 6, "activation": "silu", "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        output = apply(layer, stand_in=StandIn(*tensors), **options)
    low = Layer(*(x.bfloat16() for x in layer))
    expected = apply(low, stand_in=StandIn(*(x.bfloat16() for x in tensors)), **options)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_compiled_calls_equal_eager_ones():
    layer, stand_in = random_layer("gated", dtype=torch.float32), tensors_of(RANK, dtype=torch.float32)

    def function(x, w_in, w_out, w_gate, *tensors):
        options = {"k": 4, "w_gate": w_gate, "activation": "silu", "backend": "chunked"}
        return topk_feed_forward(x, w_in, w_out, stand_in=StandIn(*tensors), **options)

    arguments = [*layer.present(), *stand_in]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(output_and_gradients(compiled, *arguments), output_and_gradients(function, *arguments))


def test_stand_ins_can_be_made_in_functions_that_are_traced_or_transformed():
    def function(bias):
        return StandIn(bias).bias * 2

    biases = torch.randn(2, 3)
    assert torch.equal(torch.vmap(function)(biases), biases * 2)
    assert torch.equal(torch.func.grad(lambda bias: function(bias).sum())(biases[0]), torch.full((3,), 2.0))
    assert torch.equal(make_fx(function)(biases[0])(biases[1]), biases[1] * 2)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"bias": 0.5}, TypeError, "bias must be a tensor, got float"),
        ({"bias": zeros(3, dtype=torch.int64)}, ValueError, "bias must be float16, .* got torch.int64"),
        ({"bias": zeros(1, 3)}, ValueError, r"bias must have shape \[outputs\], got \[1, 3\]"),
        ({"bias": zeros(3), "w_in": zeros(2, 5)}, ValueError, "w_in needs w_out, got None; pass both or neither"),
        ({"bias": zeros(3), "w_out": zeros(3, 2)}, ValueError, "w_out needs w_in, got None; pass both or neither"),
        (
            {"bias": zeros(3), "w_in": zeros(5), "w_out": zeros(3, 2)},
            ValueError,
            r"w_in must have shape \[rank, model size\], got \[5\]",
        ),
        ({"bias": torch.tensor([0, torch.inf, torch.nan])}, ValueError, "bias must hold finite numbers, got 2 of 3"),
        (
            {"bias": zeros(3), "w_in": torch.full((2, 5), torch.nan), "w_out": zeros(3, 2)},
            ValueError,
            "w_in must hold finite numbers, got 10 of 10",
        ),
        (
            {"bias": zeros(3), "w_in": zeros(0, 5), "w_out": zeros(3, 0)},
            ValueError,
            r"w_in must have shape \[rank, model size\], got \[0, 5\]",
        ),
        (
            {"bias": zeros(3), "w_in": zeros(2, 5), "w_out": zeros(2, 3)},
            ValueError,
            r"w_out must have shape \[3, 2\] to match bias and w_in, got \[2, 3\]",
        ),
        (
            {"bias": zeros(3), "w_in": zeros(2, 5).double(), "w_out": zeros(3, 2)},
            ValueError,
            "w_in must have dtype torch.float32 like bias, got torch.float64; convert one",
        ),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(tensors, error, words):
    with pytest.raises(error, match=words):
        StandIn(**tensors)


@pytest.mark.parametrize(
    ("stand_in", "error", "words"),
    [
        (zeros(3), TypeError, "stand_in must be a StandIn or None, got Tensor"),
        (StandIn(zeros(5)), ValueError, r"stand_in must have a bias of shape \[3\], got \[5\]"),
        (
            StandIn(zeros(3), zeros(2, 3), zeros(3, 2)),
            ValueError,
            r"stand_in must have a w_in of shape \[2, 5\], got \[2, 3\]",
        ),
        (StandIn(zeros(3).double()), ValueError, "stand_in must have dtype torch.float32 like x, got torch.float64"),
        (StandIn(zeros(3, device="meta")), ValueError, "stand_in must be on cpu like x, got meta; move"),
    ],
)
@pytest.mark.parametrize("k", [4, NEURONS])
def test_a_stand_in_that_does_not_fit_the_layer_is_refused(stand_in, error, words, k):
    with pytest.raises(error, match=words):
        topk_feed_forward(zeros(7, 5), zeros(NEURONS, 5), zeros(3, NEURONS), k=k, stand_in=stand_in)
