"""Each wrong argument of topk_feed_forward is named, with what it must be and what it is."""

import math

import pytest
import torch

from topk_attention import topk_feed_forward


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def apply(**changes):
    arguments = {"x": zeros(7, 5), "w_in": zeros(11, 5), "w_out": zeros(3, 11), "k": 4, **changes}
    return topk_feed_forward(**arguments)


def test_the_arguments_that_these_tests_break_one_by_one_are_fine():
    gated = {"w_gate": zeros(11, 5), "b_in": zeros(11), "b_gate": zeros(11), "b_out": zeros(3)}
    assert apply(**gated).shape == (7, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": zeros(())}, r"x must have shape \[..., model size\], got \[\]"),
        ({"x": zeros(7, 6)}, r"w_in must have shape \[neurons, 6\] to match x, got \[11, 5\]"),
        ({"w_in": zeros(5)}, r"w_in must have shape \[neurons, 5\] to match x, got \[5\]"),
        ({"w_in": zeros(0, 5)}, r"w_in must have shape \[neurons, 5\] to match x, got \[0, 5\]"),
        ({"w_in": zeros(1, 11, 5)}, r"w_in must have shape \[neurons, 5\] to match x, got \[1, 11, 5\]"),
        ({"w_out": zeros(11, 3)}, r"w_out must have shape \[outputs, 11\] to match w_in, got \[11, 3\]"),
        ({"w_out": zeros(11)}, r"w_out must have shape \[outputs, 11\] to match w_in, got \[11\]"),
        ({"w_gate": zeros(5, 11)}, r"w_gate must have shape \[11, 5\], got \[5, 11\]"),
        ({"b_in": zeros(3)}, r"b_in must have shape \[11\], got \[3\]"),
        ({"b_in": zeros(1, 11)}, r"b_in must have shape \[11\], got \[1, 11\]"),
        ({"b_out": zeros(11)}, r"b_out must have shape \[3\], got \[11\]"),
        ({"w_gate": zeros(11, 5), "b_gate": zeros(5)}, r"b_gate must have shape \[11\], got \[5\]"),
        ({"b_gate": zeros(11)}, r"b_gate needs w_gate, got None; pass both or neither"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        apply(**changes)


def test_x_must_be_a_floating_tensor():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        apply(x=[1.0])
    with pytest.raises(ValueError, match=r"x must be float16, bfloat16, float32 or float64, got torch.int64"):
        apply(x=zeros(7, 5, dtype=torch.int64))


SHAPES = {"w_in": (11, 5), "w_out": (3, 11), "w_gate": (11, 5), "b_in": (11,), "b_out": (3,), "b_gate": (11,)}


@pytest.mark.parametrize("name", SHAPES)
def test_weights_must_be_tensors(name):
    gate = {"w_gate": zeros(11, 5)} if name == "b_gate" else {}
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        apply(**gate, **{name: [1.0]})


@pytest.mark.parametrize("name", SHAPES)
def test_weights_must_share_the_dtype_and_device_of_x(name):
    gate = {"w_gate": zeros(11, 5)} if name == "b_gate" else {}
    with pytest.raises(ValueError, match=f"{name} must have dtype torch.float32 like x, got torch.float64; convert"):
        apply(**gate, **{name: zeros(SHAPES[name], dtype=torch.float64)})
    with pytest.raises(ValueError, match=f"{name} must be on cpu like x, got meta; move"):
        apply(**gate, **{name: zeros(SHAPES[name], device="meta")})


@pytest.mark.parametrize("name", ["k", "token_chunk_size"])
def test_k_and_token_chunk_size_must_be_positive_ints(name):
    for number in (0, -1, 2**31):
        with pytest.raises(ValueError, match=rf"{name} must be at least 1 and below 2\^31, got {number}"):
            apply(**{name: number})
    for other in (True, 1.5, "3", [4], torch.tensor(4)):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {type(other).__name__} "):
            apply(**{name: other})


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_must_be_a_probability_below_one(dropout_p):
    with pytest.raises(ValueError, match=f"dropout_p must be at least 0 and below 1, got {dropout_p}"):
        apply(dropout_p=dropout_p)


@pytest.mark.parametrize("activation", ["tanh", "", "ReLU"])
def test_an_unknown_activation_is_refused(activation):
    with pytest.raises(ValueError, match=f"activation must be one of relu, gelu, .*got {activation!r}"):
        apply(activation=activation)


@pytest.mark.parametrize("name", ["fast", ""])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=f'backend must be one of "auto", "cpu", "triton", "chunked".*got {name!r}'):
        apply(backend=name)
