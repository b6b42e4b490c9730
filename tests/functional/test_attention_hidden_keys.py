"""Masks, queries without keys, and what NaN and inf may reach."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from comparison import (
    SIZES,
    assert_same,
    attention_inputs,
    causal_visibility,
    dense_attention,
    output_and_gradients,
)
from topk_attention import RelativeBias, topk_attention

SCORES_SHAPE = (SIZES.batch, SIZES.heads, SIZES.queries, SIZES.keys)
KS = pytest.mark.parametrize("k", [1, 3, SIZES.keys, None])


def attend(backend, **options):
    return lambda query, key, value: topk_attention(query, key, value, backend=backend, **options)


def broadcast_shapes():
    """[B|1, H|1, N|1, M|1] in every combination, then with leading axes left out."""
    return [*itertools.product(*((size, 1) for size in SCORES_SHAPE)), *(SCORES_SHAPE[4 - n :] for n in range(4))]


@pytest.mark.parametrize("shape", broadcast_shapes(), ids=str)
@pytest.mark.parametrize("k", [3, None])
def test_a_bool_mask_broadcasts_and_true_means_may_attend(backend, small_tiles, shape, k):
    inputs, mask = attention_inputs(), torch.rand(shape) < 0.6
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, visible=mask.expand(SCORES_SHAPE)), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, attn_mask=mask), *inputs), expected)


@pytest.mark.parametrize("shape", broadcast_shapes(), ids=str)
@pytest.mark.parametrize("k", [3, None])
def test_a_float_mask_broadcasts_and_is_added_to_the_scores(backend, small_tiles, shape, k):
    inputs, mask = attention_inputs(), torch.randn(shape, dtype=torch.float64)
    mask = mask.masked_fill(torch.rand(shape) < 0.3, -math.inf)
    visible, finite = mask.isfinite().expand(SCORES_SHAPE), mask.nan_to_num(neginf=0).expand(SCORES_SHAPE)
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, visible=visible, bias=finite), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, attn_mask=mask), *inputs), expected)


@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [3, None])
def test_a_float_mask_may_have_another_dtype_than_query(backend, mask_dtype, k):
    inputs = attention_inputs()
    mask = torch.randint(-3, 4, SCORES_SHAPE).to(mask_dtype).masked_fill(torch.rand(SCORES_SHAPE) < 0.2, -math.inf)
    expected = output_and_gradients(attend(backend, k=k, attn_mask=mask.double()), *inputs)
    actual = output_and_gradients(attend(backend, k=k, attn_mask=mask), *inputs)
    assert all(x.dtype == torch.float64 for x in actual)
    assert_same(actual, expected)


@KS
def test_a_one_dimensional_mask_hides_keys(backend, tiling, k):
    query, key, value = attention_inputs()
    mask = torch.arange(SIZES.keys) % 3 != 1
    expected = topk_attention(query, key[:, :, mask], value[:, :, mask], k=k, backend=backend)
    assert_same([topk_attention(query, key, value, k=k, attn_mask=mask, backend=backend)], [expected])


@KS
def test_padded_keys_count_as_absent(backend, tiling, k):
    query, key, value = attention_inputs()
    lengths = [4, 9]
    mask = (torch.arange(SIZES.keys) < torch.tensor(lengths)[:, None])[:, None, None, :]
    output = topk_attention(query, key, value, k=k, attn_mask=mask, backend=backend)
    for b, length in enumerate(lengths):
        alone = topk_attention(query[b], key[b, :, :length], value[b, :, :length], k=k, backend=backend)
        assert_same([output[b]], [alone])


@KS
def test_mask_and_causality_hide_together(backend, tiling, k):
    inputs, mask = attention_inputs(), torch.rand(SCORES_SHAPE) < 0.6
    visible = mask & causal_visibility(SIZES.queries, SIZES.keys)
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, visible=visible), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, attn_mask=mask, is_causal=True), *inputs), expected)


@pytest.mark.parametrize("k", [6, 8, 20])
def test_a_query_that_sees_fewer_than_k_keys_uses_all_of_them(backend, tiling, k):
    inputs = attention_inputs()
    mask = torch.zeros(SIZES.queries, SIZES.keys, dtype=torch.bool)
    for i in range(SIZES.queries):
        mask[i, torch.randperm(SIZES.keys)[: min(i + 1, 5)]] = True
    expected = output_and_gradients(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, attn_mask=mask), *inputs), expected)


def mask_out(hidden, kind):
    """Options that hide the keys where `hidden` [N, M] is True, in one of the possible ways."""
    minus_inf = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -math.inf)
    return {"bool": {"attn_mask": ~hidden}, "float": {"attn_mask": minus_inf}, "bias": {"bias": minus_inf}}[kind]


MASK_KINDS = pytest.mark.parametrize("kind", ["bool", "float", "bias"])


@KS
@MASK_KINDS
def test_a_query_without_keys_returns_zeros_and_gets_zero_gradient(backend, tiling, kind, k):
    inputs = attention_inputs()
    hidden = torch.rand(SIZES.queries, SIZES.keys) < 0.3
    empty = [0, 3, SIZES.queries - 1]
    hidden[empty] = True
    output, grad_query, grad_key, grad_value = output_and_gradients(
        attend(backend, k=k, **mask_out(hidden, kind)), *inputs
    )
    for rows in (output[:, :, empty], grad_query[:, :, empty]):
        assert torch.equal(rows, torch.zeros_like(rows))
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, visible=~hidden), *inputs)
    assert_same([output, grad_query, grad_key, grad_value], expected)


@KS
@MASK_KINDS
def test_when_no_query_has_a_key_everything_is_zero(backend, tiling, kind, k):
    hidden = torch.ones(SIZES.queries, SIZES.keys, dtype=torch.bool)
    for x in output_and_gradients(attend(backend, k=k, **mask_out(hidden, kind)), *attention_inputs()):
        assert torch.equal(x, torch.zeros_like(x))


@KS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@MASK_KINDS
def test_hidden_nan_or_inf_reaches_no_output_and_no_gradient(backend, tiling, kind, poison, k):
    query, key, value = attention_inputs()
    hidden = torch.rand(SIZES.queries, SIZES.keys) < 0.3
    hidden[:, [0, 5]] = True
    hidden[[2, SIZES.queries - 1]] = True
    function = attend(backend, k=k, **mask_out(hidden, kind))
    expected = output_and_gradients(function, query, key, value)
    key[:, :, 0], value[:, :, 0] = poison, poison
    key[:, 1, 5, 1], value[:, 1, 5, 1] = poison, poison
    query[:, :, 2], query[:, 0, SIZES.queries - 1, 0] = poison, poison
    assert_same(output_and_gradients(function, query, key, value), expected)


@KS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_or_inf_in_the_future_does_not_reach_the_past(backend, tiling, poison, k):
    query, key, value = attention_inputs(SIZES._replace(queries=SIZES.keys))
    clean = topk_attention(query, key, value, k=k, is_causal=True, backend=backend)
    key[:, :, 6:], value[:, :, 6:], query[:, :, 6:] = poison, poison, poison
    output = topk_attention(query, key, value, k=k, is_causal=True, backend=backend)
    assert_same([output[:, :, :6]], [clean[:, :, :6]])
    assert output[:, :, 6:].isnan().all()


@KS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_hidden_nan_behind_a_relative_bias_of_minus_inf_does_not_reach_the_output(backend, tiling, poison, k):
    query, key, value = attention_inputs(SIZES._replace(queries=SIZES.keys))
    values = torch.randn(SIZES.heads, 2 * SIZES.keys - 1, dtype=torch.float64)
    values[:, SIZES.keys :] = -math.inf  # causal
    options = {"k": k, "bias": RelativeBias(values), "backend": backend}
    clean = topk_attention(query, key, value, **options)
    key[:, :, 6:], value[:, :, 6:] = poison, poison
    output = topk_attention(query, key, value, **options)
    assert_same([output[:, :, :6]], [clean[:, :, :6]])


@KS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_or_inf_in_a_visible_key_makes_its_rows_nan_and_leaves_others_untouched(backend, tiling, where, poison, k):
    query, key, value = attention_inputs()
    mask = torch.ones(SIZES.batch, 1, SIZES.queries, SIZES.keys, dtype=torch.bool)
    mask[:, :, [1, 4], 7] = False
    clean = topk_attention(query, key, value, k=k, attn_mask=mask, backend=backend)
    broken = torch.zeros_like(clean, dtype=torch.bool)
    if where == "key":
        key[0, 2, 7, 1] = poison
        broken[0, 2, [0, 2, 3, 5, 6]] = True
    else:
        query[0, 2, 3, 1] = poison
        broken[0, 2, 3] = True
    output = topk_attention(query, key, value, k=k, attn_mask=mask, backend=backend)
    assert output[broken].isnan().all()
    assert_same([output[~broken]], [clean[~broken]])


@KS
def test_nan_in_the_value_of_a_used_key_reaches_its_column_in_the_rows_that_use_it(backend, tiling, k):
    query, key, value = attention_inputs()
    mask = torch.ones(SIZES.queries, SIZES.keys, dtype=torch.bool)
    mask[[1, 4], 7] = False
    bias = torch.zeros(SIZES.keys, dtype=torch.float64)
    bias[7] = 100.0  # always among the best
    options = {"k": k, "attn_mask": mask, "bias": bias, "backend": backend}
    clean = topk_attention(query, key, value, **options)
    value[0, 2, 7, 1] = math.nan
    output = topk_attention(query, key, value, **options)
    broken = torch.zeros_like(clean, dtype=torch.bool)
    broken[0, 2, [0, 2, 3, 5, 6], 1] = True
    assert output[broken].isnan().all()
    assert_same([output[~broken]], [clean[~broken]])


@KS
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_a_nan_row_reaches_no_gradient_of_keys_and_queries_it_has_nothing_to_do_with(backend, tiling, where, k):
    query, key, value = attention_inputs()
    mask = torch.ones(SIZES.queries, SIZES.keys, dtype=torch.bool)
    mask[:, 7] = False
    mask[2] = torch.arange(SIZES.keys) == 7  # query 2 and key 7 see only each other
    function = attend(backend, k=k, attn_mask=mask)
    clean = output_and_gradients(function, query, key, value)
    {"query": query[:, :, 2], "key": key[:, :, 7], "value": value[:, :, 7]}[where].fill_(math.nan)
    output, grad_query, grad_key, grad_value = output_and_gradients(function, query, key, value)
    assert output[:, :, 2].isnan().all()
    other_queries, other_keys = torch.arange(SIZES.queries) != 2, torch.arange(SIZES.keys) != 7
    actual = [output[:, :, other_queries], grad_query[:, :, other_queries]]
    actual += [grad_key[:, :, other_keys], grad_value[:, :, other_keys]]
    expected = [clean[0][:, :, other_queries], clean[1][:, :, other_queries]]
    expected += [clean[2][:, :, other_keys], clean[3][:, :, other_keys]]
    assert_same(actual, expected)


@KS
def test_a_score_that_overflows_to_minus_inf_hides_its_key(backend, tiling, k):
    query, key, value = attention_inputs(dtype=torch.float32)
    far = torch.arange(SIZES.keys) % 6 != 0
    query[:], key[:], key[:, :, far] = 1e25, 1e-25, -1e25
    expected, selected = topk_attention(query, key, value, k=k, attn_mask=~far, backend=backend, return_selection=True)
    value[:, :, far] = math.nan
    output, selection = topk_attention(query, key, value, k=k, backend=backend, return_selection=True)
    torch.testing.assert_close(output, expected)
    assert torch.equal(selection.indices, selected.indices)


@KS
def test_a_query_whose_scores_all_overflow_to_minus_inf_returns_zeros(backend, tiling, k):
    query, key, value = attention_inputs(dtype=torch.float32)
    query[:], key[:] = 1e25, -1e25
    function = attend(backend, k=k)
    for x in output_and_gradients(function, query, key, value):
        assert torch.equal(x, torch.zeros_like(x))


@KS
def test_large_scores_do_not_overflow_the_softmax(backend, tiling, k):
    query, key, value = attention_inputs(dtype=torch.float32)
    expected = output_and_gradients(
        lambda *x: dense_attention(*x, k=k, scale=200.0), *(x.double() for x in (query, key, value))
    )
    output, *_ = output_and_gradients(attend(backend, k=k, scale=200.0), query, key, value)
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=1e-3)
