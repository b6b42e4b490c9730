"""Neither the number of threads nor the layout of the inputs changes a bit of the results."""

import pytest
import torch

from comparison import Sizes, attention_inputs, output_and_gradients
from topk_attention import RelativeBias, topk_attention


def assert_equal_bits(first, *others):
    for other in others:
        for position, (a, b) in enumerate(zip(first, other, strict=True)):
            assert torch.equal(a, b), f"[{position}]"


BIASES = {
    "none": (lambda heads, queries, keys: None, None),
    "relative": (lambda heads, queries, keys: (heads, queries + keys - 1), RelativeBias),
    "relative, one for all heads": (lambda heads, queries, keys: (1, queries + keys - 1), RelativeBias),
    "dense": (lambda heads, queries, keys: (heads, queries, keys), lambda source: source),
    "of queries": (lambda heads, queries, keys: (queries, 1), lambda source: source),
    "of keys": (lambda heads, queries, keys: (keys,), lambda source: source),
    "of heads": (lambda heads, queries, keys: (heads, 1, 1), lambda source: source),
    "a single number": (lambda heads, queries, keys: (1,), lambda source: source),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(1, 1, 1, 300, 900, 64, 64), id="one head"),
        pytest.param(Sizes(1, 2, 1, 1100, 700, 8, 24), id="grouped heads, several chunks"),
        pytest.param(Sizes(3, 4, 2, 70, 300, 20, 12), id="six key heads"),
        pytest.param(Sizes(3, 4, 4, 30, 90, 64, 64), id="a dozen key heads"),
    ],
)
def test_results_are_equal_to_the_bit_for_any_number_of_threads(several_threads, sizes, bias):
    inputs = attention_inputs(sizes, torch.float32)
    shape_of, make_bias = BIASES[bias]
    shape = shape_of(sizes.heads, sizes.queries, sizes.keys)
    source = [] if shape is None else [torch.randn(shape)]
    k = 512 if sizes.queries == 1100 else 24

    def attend(query, key, value, *source):
        torch.manual_seed(2)
        options = {"bias": make_bias(*source) if source else None, "is_causal": True, "enable_gqa": True}
        return topk_attention(query, key, value, k=k, dropout_p=0.1, backend="cpu", **options)

    assert_equal_bits(*several_threads(lambda: output_and_gradients(attend, *inputs, *source)))


def as_rows_of_tokens(x):
    """[B, L, H, D] seen as [B, H, L, D], the layout of a projection's output."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_part_of_wider_rows(x):
    storage = torch.full((*x.shape[:3], 3 * x.shape[3]), torch.nan, dtype=x.dtype)
    storage[..., x.shape[3] : 2 * x.shape[3]] = x
    return storage[..., x.shape[3] : 2 * x.shape[3]]


def with_every_other_element(x):
    storage = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    storage[..., ::2] = x
    return storage[..., ::2]


def as_columns(x):
    return x.mT.contiguous().mT


def with_the_batch_inside(x):
    return x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)


LAYOUTS = [as_rows_of_tokens, as_part_of_wider_rows, with_every_other_element, as_columns, with_the_batch_inside]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 20])
def test_any_layout_gives_the_same_and_is_left_as_it_was(layout, head_dim, dtype):
    inputs = attention_inputs(Sizes(2, 4, 2, 30, 600, head_dim, head_dim), dtype)

    def attend(query, key, value):
        return topk_attention(query, key, value, k=20, enable_gqa=True, backend="cpu")

    strided = [layout(x) for x in inputs]
    assert_equal_bits(output_and_gradients(attend, *inputs), output_and_gradients(attend, *strided))
    assert all(torch.equal(a, b) for a, b in zip(inputs, strided, strict=True))
    assert all(a.stride() == layout(b).stride() for a, b in zip(strided, inputs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_output_may_have_any_layout(layout):
    inputs = [x.requires_grad_() for x in attention_inputs(Sizes(2, 4, 2, 30, 600, 64, 64), torch.float32)]
    output = topk_attention(*inputs, k=20, enable_gqa=True, backend="cpu")
    grad_output = torch.randn(output.shape)
    expected = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
    assert_equal_bits(expected, torch.autograd.grad(output, inputs, layout(grad_output)))


@pytest.mark.parametrize(
    "layout", [lambda x: x, as_columns, with_every_other_element], ids=["rows", "columns", "spread"]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_mask_may_have_any_layout_and_float_dtype(layout, dtype):
    query, key, value = attention_inputs(Sizes(2, 4, 4, 30, 600, 16, 16), torch.float32)
    mask = torch.randint(0, 2, (2, 1, 30, 600)).to(dtype)
    actual, expected = (
        topk_attention(query, key, value, k=20, attn_mask=layout(mask), backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_heads_equal_repeated_key_heads(key_heads):
    query, key, value = attention_inputs(Sizes(2, 8, key_heads, 30, 600, 64, 64), torch.float32)
    repeated = [x.repeat_interleave(8 // key_heads, dim=1) for x in (key, value)]
    options = {"k": [20, 3, 600, 40, 1, 2, 3, 500], "is_causal": True, "backend": "cpu"}
    output, *gradients = output_and_gradients(
        lambda *x: topk_attention(*x, enable_gqa=True, **options), query, key, value
    )
    expected, grad_query, *rest = output_and_gradients(lambda *x: topk_attention(*x, **options), query, *repeated)
    assert_equal_bits([output, gradients[0]], [expected, grad_query])
    for grad, of_each in zip(gradients[1:], rest, strict=True):
        torch.testing.assert_close(grad, of_each.unflatten(1, (key_heads, -1)).sum(2), rtol=1e-4, atol=1e-4)


def test_heads_that_share_memory_are_read_as_they_are():
    query, key, value = attention_inputs(Sizes(2, 4, 1, 30, 600, 64, 64), torch.float32)
    expanded = [x.expand(2, 4, 600, 64) for x in (key, value)]
    options = {"k": 20, "backend": "cpu"}
    assert torch.equal(
        topk_attention(query, *expanded, **options), topk_attention(query, key, value, enable_gqa=True, **options)
    )


def test_a_second_backward_pass_and_one_without_a_bias_give_equal_gradients():
    tensors = [*attention_inputs(Sizes(1, 2, 2, 40, 700, 64, 64), torch.float32), torch.zeros(2, 739)]
    leaves = [x.requires_grad_() for x in tensors]
    output = topk_attention(*leaves[:3], k=20, bias=RelativeBias(leaves[3]), backend="cpu")
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    assert_equal_bits(first, torch.autograd.grad(output.sum(), leaves))
    for i, leaf in enumerate(leaves):
        alone = [x.detach().requires_grad_(x is leaf) for x in leaves]
        output = topk_attention(*alone[:3], k=20, bias=RelativeBias(alone[3]), backend="cpu")
        assert_equal_bits(torch.autograd.grad(output.sum(), alone[i]), [first[i]])
    plain = topk_attention(*leaves[:3], k=20, backend="cpu")
    assert_equal_bits(torch.autograd.grad(plain.sum(), leaves[:3]), first[:3])
