"""A bias is added to the scores, is never a full matrix unless it was given as one, and gets its gradient."""

import itertools
import math

import pytest
import torch

from comparison import (
    SIZES,
    assert_same,
    attention_inputs,
    causal_visibility,
    dense_attention,
    output_and_gradients,
)
from topk_attention import ALiBi, BucketedBias, RelativeBias, topk_attention

SCORES_SHAPE = (SIZES.batch, SIZES.heads, SIZES.queries, SIZES.keys)
K_OR_NONE = pytest.mark.parametrize("k", [3, None])
LENGTHS = pytest.mark.parametrize(("queries", "keys"), [(7, 11), (11, 7), (9, 9), (1, 11), (11, 1)], ids=str)


def spread(relative_values, num_queries, num_keys):
    """[H, N, M] from [H, N + M - 1], entry by entry."""
    rows = [
        torch.stack([relative_values[:, j - i + num_queries - 1] for j in range(num_keys)], dim=-1)
        for i in range(num_queries)
    ]
    return torch.stack(rows, dim=-2)


def assert_bias_equals_dense(backend, make_bias, make_dense, source, *, queries=7, keys=11, k=3, **options):
    """The same output and the same gradients, that of the bias's source included."""
    inputs = attention_inputs(SIZES._replace(queries=queries, keys=keys))
    visible = causal_visibility(queries, keys) if options.get("is_causal") else None

    def with_bias(query, key, value, source):
        return topk_attention(query, key, value, k=k, bias=make_bias(source), backend=backend, **options)

    def with_dense(query, key, value, source):
        return dense_attention(query, key, value, k=k, visible=visible, bias=make_dense(source))

    assert_same(output_and_gradients(with_bias, *inputs, source), output_and_gradients(with_dense, *inputs, source))


@K_OR_NONE
@pytest.mark.parametrize(
    "shape",
    [*itertools.product(*((size, 1) for size in SCORES_SHAPE)), *(SCORES_SHAPE[4 - n :] for n in range(4))],
    ids=str,
)
def test_a_dense_bias_broadcasts_and_its_gradient_sums_over_what_it_was_broadcast_to(backend, small_tiles, shape, k):
    bias = torch.randn(shape, dtype=torch.float64)
    assert_bias_equals_dense(backend, lambda b: b, lambda b: b.expand(SCORES_SHAPE), bias, k=k)


@K_OR_NONE
@pytest.mark.parametrize("batch_shape", [(3, 2), (3, 1), (1, 2), (1, 1), ()], ids=str)
def test_a_dense_bias_broadcasts_over_several_batch_axes(backend, tiling, batch_shape, k):
    query, key, value = (x.unflatten(0, (3, 2)) for x in attention_inputs(SIZES._replace(batch=6)))
    bias = torch.randn(*batch_shape, SIZES.heads, 1, SIZES.keys, dtype=torch.float64)

    def attend(bias):
        return topk_attention(query, key, value, k=k, bias=bias, backend=backend)

    def dense(bias):
        return dense_attention(query, key, value, k=k, bias=bias)

    assert_same(output_and_gradients(attend, bias), output_and_gradients(dense, bias))


@K_OR_NONE
def test_a_bias_may_have_any_strides(backend, tiling, k):
    bias = torch.randn(SIZES.keys, 2 * SIZES.queries, SIZES.heads, dtype=torch.float64).permute(2, 1, 0)[:, ::2]
    assert not bias.is_contiguous()
    assert_bias_equals_dense(backend, lambda b: b, lambda b: b, bias, k=k)


@K_OR_NONE
@LENGTHS
@pytest.mark.parametrize("heads", [1, SIZES.heads])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_a_relative_bias_is_read_by_the_distance_between_key_and_query(
    backend, tiling, heads, queries, keys, is_causal, k
):
    values = torch.randn(heads, queries + keys - 1, dtype=torch.float64)
    assert_bias_equals_dense(
        backend,
        RelativeBias,
        lambda v: spread(v, queries, keys),
        values,
        queries=queries,
        keys=keys,
        is_causal=is_causal,
        k=k,
    )


@K_OR_NONE
def test_a_relative_bias_may_have_any_strides(backend, tiling, k):
    values = torch.randn(2 * 17, SIZES.heads, dtype=torch.float64).t()[:, ::2]
    assert not values.is_contiguous()
    assert_bias_equals_dense(backend, RelativeBias, lambda v: spread(v, 7, 11), values, k=k)


@K_OR_NONE
def test_biases_of_grouped_heads_are_those_of_the_query_heads(backend, tiling, k):
    inputs = attention_inputs(SIZES._replace(key_heads=2))
    values = torch.randn(SIZES.heads, 17, dtype=torch.float64)
    expected = output_and_gradients(
        lambda q, key, v, b: dense_attention(q, key, v, k=k, bias=spread(b, 7, 11)), *inputs, values
    )
    for make_bias in (RelativeBias, lambda b: spread(b, 7, 11)):
        actual = output_and_gradients(
            lambda q, key, v, b, make_bias=make_bias: topk_attention(
                q, key, v, k=k, bias=make_bias(b), enable_gqa=True, backend=backend
            ),
            *inputs,
            values,
        )
        assert_same(actual, expected)


@K_OR_NONE
@pytest.mark.parametrize("kind", ["dense", "relative"])
def test_minus_inf_in_a_bias_hides_keys_and_gets_zero_gradient(backend, tiling, kind, k):
    values = torch.randn(SIZES.heads, 17, dtype=torch.float64)
    values[:, 9:] = -math.inf
    values[0] = -math.inf  # this head sees nothing
    source = spread(values, 7, 11) if kind == "dense" else values
    finite = source.masked_fill(source.isneginf(), 0)

    def dense(query, key, value, source):
        bias = source if kind == "dense" else spread(source, 7, 11)
        return dense_attention(query, key, value, k=k, visible=~spread(values.isneginf(), 7, 11), bias=bias)

    def attend(query, key, value, source):
        return topk_attention(
            query, key, value, k=k, bias=source if kind == "dense" else RelativeBias(source), backend=backend
        )

    inputs = attention_inputs()
    actual, expected = output_and_gradients(attend, *inputs, source), output_and_gradients(dense, *inputs, finite)
    assert_same(actual, expected)
    hidden = source.isneginf()
    assert torch.equal(actual[-1][hidden], torch.zeros_like(actual[-1][hidden]))


def t5_buckets(distance, bidirectional, num_buckets, max_distance):
    """Bucket of one distance (key less query), in plain Python."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    growth = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + int(growth * (num_buckets - exact)), num_buckets - 1)


BUCKETS = pytest.mark.parametrize(
    ("bidirectional", "num_buckets", "max_distance"),
    [(True, 8, 6), (False, 6, 7), (True, 32, 128), (False, 32, 128), (True, 4, 2), (False, 2, 3)],
)


@K_OR_NONE
@LENGTHS
@BUCKETS
def test_a_bucketed_bias_is_read_from_its_table_by_bucket(
    backend, tiling, bidirectional, num_buckets, max_distance, queries, keys, k
):
    table = torch.randn(num_buckets, SIZES.heads, dtype=torch.float64)
    buckets = torch.tensor(
        [
            [t5_buckets(j - (i + keys - queries), bidirectional, num_buckets, max_distance) for j in range(keys)]
            for i in range(queries)
        ]
    )
    assert_bias_equals_dense(
        backend,
        lambda table: BucketedBias(table, bidirectional=bidirectional, max_distance=max_distance),
        lambda table: table[buckets].permute(2, 0, 1),
        table,
        queries=queries,
        keys=keys,
        is_causal=not bidirectional,
        k=k,
    )


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (1, 300), (17, 300)], ids=str)
@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
def test_a_bucketed_bias_is_the_bias_of_t5(is_decoder, queries, keys):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=8, d_kv=2, num_heads=4, is_decoder=is_decoder)
    t5 = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    table = t5.relative_attention_bias.weight
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    expected = t5.compute_bias(queries, keys, past_seen_tokens=keys - queries)
    bias = BucketedBias(
        table,
        bidirectional=not is_decoder,
        max_distance=config.relative_attention_max_distance,
    )
    window = bias.relative_values(queries, keys).unfold(-1, keys, 1).flip(-2)
    assert torch.equal(window, expected[0])


@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
@K_OR_NONE
def test_attention_with_a_bucketed_bias_equals_attention_with_the_bias_of_t5(backend, tiling, is_decoder, k):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=8,
        d_kv=2,
        num_heads=SIZES.heads,
        is_decoder=is_decoder,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
    )
    t5 = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()

    def dense(table):
        buckets = t5._relative_position_bucket(
            torch.arange(SIZES.keys) - torch.arange(SIZES.keys - SIZES.queries, SIZES.keys)[:, None],
            bidirectional=not is_decoder,
            num_buckets=8,
            max_distance=9,
        )
        return table[buckets].permute(2, 0, 1)

    table = torch.randn(8, SIZES.heads, dtype=torch.float64)
    assert_bias_equals_dense(
        backend,
        lambda table: BucketedBias(table, bidirectional=not is_decoder, max_distance=9),
        dense,
        table,
        k=k,
        is_causal=is_decoder,
    )


@K_OR_NONE
@LENGTHS
@pytest.mark.parametrize("heads", [1, SIZES.heads])
def test_alibi_subtracts_slope_times_distance(backend, tiling, heads, queries, keys, k):
    distance = torch.tensor([[abs(j - (i + keys - queries)) for j in range(keys)] for i in range(queries)])
    slopes = torch.rand(heads, dtype=torch.float64)
    assert_bias_equals_dense(
        backend, ALiBi, lambda s: -s[:, None, None] * distance, slopes, queries=queries, keys=keys, k=k
    )


def test_alibi_slopes_of_eight_heads_are_powers_of_one_half():
    assert torch.equal(ALiBi.geometric_slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 16, 20])
def test_alibi_slopes_are_those_of_bloom(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)  # slope times position 0 and 1
    torch.testing.assert_close(ALiBi.geometric_slopes(num_heads), alibi[:, 0, 1])


@K_OR_NONE
def test_a_bias_shared_by_two_calls_gets_the_sum_of_their_gradients(backend, tiling, k):
    values = torch.randn(SIZES.heads, 17, dtype=torch.float64)
    first, second = attention_inputs(), attention_inputs()

    def attend(values, *calls):
        bias = RelativeBias(values)
        return sum(topk_attention(*inputs, k=k, bias=bias, backend=backend).sin() for inputs in calls)

    _, both = output_and_gradients(lambda v: attend(v, first, second), values)
    parts = [output_and_gradients(lambda v, inputs=inputs: attend(v, inputs), values)[1] for inputs in (first, second)]
    assert_same([both], [sum(parts)])


@K_OR_NONE
@pytest.mark.parametrize("kind", [RelativeBias, lambda values: spread(values, 7, 11)], ids=["relative", "dense"])
def test_a_bias_alone_may_require_a_gradient(backend, tiling, kind, k):
    inputs, values = attention_inputs(), torch.randn(SIZES.heads, 17, dtype=torch.float64)
    actual = output_and_gradients(lambda v: topk_attention(*inputs, k=k, bias=kind(v), backend=backend), values)
    expected = output_and_gradients(lambda v: dense_attention(*inputs, k=k, bias=spread(v, 7, 11)), values)
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["dense", "relative"])
def test_a_bias_for_no_keys_gets_zero_gradient(backend, kind):
    query, key, value = attention_inputs(SIZES._replace(keys=0), torch.float32)
    shape = (query.shape[2], 1) if kind == "dense" else (1, query.shape[2] - 1)
    numbers = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = numbers if kind == "dense" else RelativeBias(numbers)
    output = topk_attention(query, key, value, k=3, bias=bias, backend=backend)
    assert output.dtype == query.dtype
    output.sum().backward()
    assert torch.equal(numbers.grad, torch.zeros_like(numbers))
