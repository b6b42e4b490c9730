"""Each wrong argument is named, with what it must be and what it is."""

import math

import pytest
import torch

from comparison import SIZES, attention_inputs
from topk_attention import ALiBi, BucketedBias, RelativeBias, topk_attention


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def attend(query=None, key=None, value=None, **options):
    inputs = zeros(2, 4, 7, 3), zeros(2, 4, 11, 3), zeros(2, 4, 11, 5)
    chosen = (default if given is None else given for given, default in zip((query, key, value), inputs, strict=True))
    return topk_attention(*chosen, **{"k": 3, **options})


def test_the_arguments_that_these_tests_break_one_by_one_are_fine():
    assert attend().shape == (2, 4, 7, 5)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"query": zeros(7, 3)}, r"query must have shape \[..., heads, length, size\], got \[7, 3\]"),
        ({"key": zeros(11, 3)}, r"key must have shape \[..., heads, length, size\], got \[11, 3\]"),
        ({"value": zeros(5)}, r"value must have shape \[..., heads, length, size\], got \[5\]"),
        ({"query": zeros(2, 4, 7, 0)}, r"query must have a head size of at least 1, got \[2, 4, 7, 0\]"),
        ({"key": zeros(2, 4, 11, 2)}, r"key must have shape \[2, 4, M, 3\] to match query, got \[2, 4, 11, 2\]"),
        ({"key": zeros(3, 4, 11, 3)}, r"key must have shape \[2, 4, M, 3\] to match query, got \[3, 4, 11, 3\]"),
        ({"key": zeros(2, 5, 11, 3)}, r"key must have shape \[2, 4, M, 3\] to match query, got \[2, 5, 11, 3\]$"),
        ({"key": zeros(4, 11, 3)}, r"key must have shape \[2, 4, M, 3\] to match query, got \[4, 11, 3\]"),
        ({"key": zeros(2, 2, 11, 3)}, r"got \[2, 2, 11, 3\]; fewer key heads need enable_gqa=True"),
        ({"value": zeros(2, 4, 10, 5)}, r"value must have shape \[2, 4, 11, E\] to match key, got \[2, 4, 10, 5\]"),
        ({"value": zeros(2, 3, 11, 5)}, r"value must have shape \[2, 4, 11, E\] to match key, got \[2, 3, 11, 5\]"),
        ({"value": zeros(1, 4, 11, 5)}, r"value must have shape \[2, 4, 11, E\] to match key, got \[1, 4, 11, 5\]"),
        ({"value": zeros(4, 11, 5)}, r"value must have shape \[2, 4, 11, E\] to match key, got \[4, 11, 5\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(inputs, words):
    with pytest.raises(ValueError, match=words):
        attend(**inputs)


def test_query_heads_must_be_a_multiple_of_key_heads():
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 4 and 3"):
        attend(key=zeros(2, 3, 11, 3), value=zeros(2, 3, 11, 5), enable_gqa=True)
    with pytest.raises(ValueError, match=r"key must have shape \[2, heads, M, 3\] to match query, got \[2, 2, 11, 4\]"):
        attend(key=zeros(2, 2, 11, 4), value=zeros(2, 2, 11, 5), enable_gqa=True)
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 4 and 0"):
        attend(key=zeros(2, 0, 11, 3), value=zeros(2, 0, 11, 5), enable_gqa=True)


def test_more_keys_than_int32_indices_can_name_are_refused():
    key = zeros(1).expand(2, 4, 2**31, 3)
    with pytest.raises(ValueError, match=r"key must have fewer than 2\^31 rows because indices are int32"):
        attend(key=key, value=key)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_must_be_floating_tensors(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        attend(**{name: [[1.0]]})
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"{name} must be float16, bfloat16, float32 or float64, got {dtype}"):
            attend(**{name: zeros(2, 4, 11, 3, dtype=dtype)})


@pytest.mark.parametrize(("name", "value_dim"), [("key", 3), ("value", 5)])
def test_inputs_must_share_dtype_and_device(name, value_dim):
    with pytest.raises(
        ValueError, match=f"{name} must have dtype torch.float32 like query, got torch.float64; convert"
    ):
        attend(**{name: zeros(2, 4, 11, value_dim, dtype=torch.float64)})
    with pytest.raises(ValueError, match=f"{name} must be on cpu like query, got meta; move"):
        attend(**{name: zeros(2, 4, 11, value_dim, device="meta")})


@pytest.mark.parametrize(
    "k", [0, -1, 2**31, 2**40, [1, 2, 0, 3], [1, 2, 3, 2**31], torch.tensor([1, -1, 1, 1])], ids=str
)
def test_k_must_be_positive_and_fit_int32(k):
    with pytest.raises(ValueError, match=r"k must be at least 1 and below 2\^31, got (0|-1|\d+)$"):
        attend(k=k)


@pytest.mark.parametrize(
    "k",
    [True, 1.5, "3", [1, 2, True, 4], [1, 2, 3.0, 4], torch.tensor([1.0, 2, 3, 4]), torch.tensor([True] * 4), {3}],
    ids=str,
)
def test_k_must_be_an_int(k):
    kinds = (
        r"(k must be an int, one int per head, .all. or None|each entry of k must be an int), got (bool|float|str|set) "
    )
    with pytest.raises(TypeError, match=rf"{kinds}|k must hold ints along one axis, got torch\.(float32|bool) \[4\]"):
        attend(k=k)


@pytest.mark.parametrize("k", [[], [3], [1, 2, 3], (1, 2, 3, 4, 5), torch.tensor([1, 2, 3])], ids=str)
def test_a_list_of_k_must_hold_one_number_per_query_head(k):
    with pytest.raises(ValueError, match=rf"k must hold one number for each of the 4 query heads, got {len(k)}"):
        attend(k=k)


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (0, ValueError, "query_chunk_size must be at least 1"),
        (-5, ValueError, "query_chunk_size must be at least 1"),
        (True, TypeError, "query_chunk_size must be an int, got bool True"),
        (1.5, TypeError, "query_chunk_size must be an int, got float 1.5"),
    ],
)
def test_query_chunk_size_must_be_a_positive_int(size, error, words):
    with pytest.raises(error, match=words):
        attend(query_chunk_size=size)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_dropout_must_be_a_probability_below_one(dropout_p):
    with pytest.raises(ValueError, match=f"dropout_p must be at least 0 and below 1, got {dropout_p}"):
        attend(dropout_p=dropout_p)


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match=f"scale must be finite, got {scale}"):
        attend(scale=scale)


@pytest.mark.parametrize(
    "inputs", [{}, {"key": zeros(2, 4, 0, 3), "value": zeros(2, 4, 0, 5)}], ids=["keys", "no keys"]
)
@pytest.mark.parametrize("name", ["fast", "", "Chunked"])
def test_an_unknown_backend_is_refused(name, inputs):
    with pytest.raises(ValueError, match=f'backend must be one of "auto", "cpu", "triton", "chunked".*got {name!r}'):
        attend(backend=name, **inputs)


def test_a_mask_must_be_bool_or_float():
    for dtype in (torch.int64, torch.uint8):
        words = (
            rf"attn_mask must be bool \(True = may attend\) or float .*got {dtype}; convert a 0/1 mask with .bool\(\)"
        )
        with pytest.raises(TypeError, match=words):
            attend(attn_mask=torch.ones(7, 11, dtype=dtype))
    with pytest.raises(TypeError, match="attn_mask must be a tensor or None, got list"):
        attend(attn_mask=[True] * 11)


def test_a_mask_that_requires_a_gradient_is_refused():
    with pytest.raises(ValueError, match="attn_mask gets no gradient but requires one; pass it as bias="):
        attend(attn_mask=zeros(7, 11, requires_grad=True))


@pytest.mark.parametrize("name", ["attn_mask", "bias"])
@pytest.mark.parametrize(
    "shape",
    [(7, 10), (6, 11), (3, 7, 11), (4, 1, 7, 11), (7,), (11, 7), (2, 4, 7, 11, 1), (1, 2, 4, 7, 11), (0, 11)],
    ids=str,
)
def test_a_mask_or_bias_that_does_not_broadcast_is_refused(name, shape):
    words = rf"{name} must broadcast to \[2, 4, 7, 11\], got \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=words):
        attend(**{name: zeros(shape)})


def test_masks_and_biases_must_be_on_the_device_of_query():
    with pytest.raises(ValueError, match="attn_mask must be on cpu like query, got meta"):
        attend(attn_mask=zeros(7, 11, device="meta"))
    for bias in (
        zeros(7, 11, device="meta"),
        RelativeBias(zeros(4, 17, device="meta")),
        BucketedBias(zeros(8, 4, device="meta"), max_distance=6),
        ALiBi(zeros(4, device="meta")),
    ):
        with pytest.raises(ValueError, match="bias must be on cpu like query, got meta"):
            attend(bias=bias)


def test_a_bias_must_be_a_floating_tensor_or_a_known_description():
    with pytest.raises(TypeError, match="bias must be a tensor, RelativeBias, BucketedBias, ALiBi or None, got float"):
        attend(bias=0.5)
    with pytest.raises(ValueError, match=r"bias must be float16, bfloat16, float32 or float64, got torch.int64"):
        attend(bias=zeros(7, 11, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bias must be float16, bfloat16, float32 or float64, got torch.bool"):
        attend(bias=zeros(7, 11, dtype=torch.bool))


@pytest.mark.parametrize("width", [1, 16, 18, 77])
def test_a_relative_bias_must_have_a_column_for_each_distance(width):
    words = (
        r"RelativeBias values must have 17 columns for 7 queries and 11 keys \(queries \+ keys - 1\), " f"got {width}"
    )
    with pytest.raises(ValueError, match=words):
        attend(bias=RelativeBias(zeros(4, width)))


@pytest.mark.parametrize("heads", [2, 3, 5])
def test_a_bias_must_be_for_one_head_or_all(heads):
    for bias in (
        RelativeBias(zeros(heads, 17)),
        BucketedBias(zeros(8, heads), max_distance=6),
        ALiBi(zeros(heads)),
    ):
        with pytest.raises(ValueError, match=f"bias must be for 1 head or 4 heads to match query, got {heads}"):
            attend(bias=bias)


def test_a_bias_of_the_wrong_shape_or_type_cannot_be_made():
    with pytest.raises(ValueError, match=r"RelativeBias values must be a floating tensor of shape \[heads, queries"):
        RelativeBias(zeros(17))
    with pytest.raises(ValueError, match=r"RelativeBias values must be a floating tensor .*got torch.int64 \[4, 17\]"):
        RelativeBias(zeros(4, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"BucketedBias table must be a floating tensor of shape \[buckets, heads\]"):
        BucketedBias(zeros(2, 8, 4))
    with pytest.raises(ValueError, match=r"ALiBi slopes must be a floating tensor of shape \[heads\], got .*\[1, 4\]"):
        ALiBi(zeros(1, 4))
    with pytest.raises(ValueError, match=r"ALiBi slopes must be a floating tensor .*got torch.int64 \[4\]"):
        ALiBi(zeros(4, dtype=torch.int64))


def test_a_bucketed_bias_needs_enough_buckets_and_a_larger_max_distance():
    with pytest.raises(ValueError, match="BucketedBias table needs at least 4 buckets, got 3"):
        BucketedBias(zeros(3, 4))
    with pytest.raises(ValueError, match="BucketedBias table needs at least 2 buckets, got 1"):
        BucketedBias(zeros(1, 4), bidirectional=False)
    with pytest.raises(ValueError, match="max_distance must be larger than the 8 distances with a bucket of their own"):
        BucketedBias(zeros(32, 4), max_distance=8)
    with pytest.raises(ValueError, match=r"max_distance must be larger than the 16 distances .*got 16"):
        BucketedBias(zeros(32, 4), bidirectional=False, max_distance=16)
    BucketedBias(zeros(32, 4), max_distance=9)


def test_alibi_needs_a_head():
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        ALiBi.geometric_slopes(0)


@pytest.mark.parametrize("k", [3, None])
def test_a_refused_call_draws_no_random_numbers(k):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="scale"):
        topk_attention(*attention_inputs(SIZES, torch.float32), k=k, dropout_p=0.5, scale=math.nan)
    inputs_alone = torch.get_rng_state()
    torch.set_rng_state(state)
    attention_inputs(SIZES, torch.float32)
    assert torch.equal(inputs_alone, torch.get_rng_state())
