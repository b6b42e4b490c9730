"""Dropout acts on kept weights, and one seed draws one mask on every backend and for every chunking."""

import math

import pytest
import torch

from comparison import CALL_NAMES, Sizes, assert_same, attention_inputs, named_call, output_and_gradients
from topk_attention import topk_attention

K_OR_NONE = pytest.mark.parametrize("options", [{}, {"k": None}], ids=["some", "all"])


def run_with_seed(call, seed, **options):
    torch.manual_seed(seed)
    return call.run(**options)


@K_OR_NONE
@pytest.mark.parametrize("name", CALL_NAMES)
def test_one_seed_drops_the_same_weights_as_in_the_reference(tiled_backend, name, options):
    call = named_call(name)
    options = {"dropout_p": 0.4, **options}
    actual = run_with_seed(call, 11, backend=tiled_backend, **options)
    assert_same(actual, run_with_seed(call, 11, backend="reference", **options))


@K_OR_NONE
@pytest.mark.parametrize("query_chunk_size", [1, 3])
@pytest.mark.parametrize("name", CALL_NAMES)
def test_one_seed_drops_the_same_weights_in_chunks(name, query_chunk_size, options):
    call = named_call(name)
    options = {"dropout_p": 0.4, **options}
    actual = run_with_seed(call, 11, backend="chunked", query_chunk_size=query_chunk_size, **options)
    assert_same(actual, run_with_seed(call, 11, backend="reference", **options))


@K_OR_NONE
def test_manual_seed_repeats_a_draw_and_the_next_draw_differs(backend, tiling, options):
    call = named_call("plain")
    options = {"dropout_p": 0.5, "backend": backend, **options}
    torch.manual_seed(1)
    first, second = call(*call.tensors, **options), call(*call.tensors, **options)
    torch.manual_seed(1)
    again = call(*call.tensors, **options)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@K_OR_NONE
def test_dropout_of_zero_draws_nothing(backend, options):
    call = named_call("plain")
    state = torch.get_rng_state()
    assert_same([call(*call.tensors, dropout_p=0.0, backend=backend, **options)], [call.run(**options)[0]])
    assert torch.equal(torch.get_rng_state(), state)


def dropped_weights(backend, dropout_p, k, sizes, **options):
    """All weights after dropout, [B, H, N, M], read from the output of one-hot values; and those before."""
    query, key, _ = attention_inputs(sizes)
    value = torch.eye(sizes.keys, dtype=torch.float64).expand(sizes.batch, sizes.key_heads, -1, -1)
    before = topk_attention(query, key, value, k=k, backend=backend)
    return topk_attention(query, key, value, k=k, dropout_p=dropout_p, backend=backend, **options), before


MANY = Sizes(batch=2, heads=2, key_heads=2, queries=64, keys=96, head_dim=4, value_dim=1)


@pytest.mark.parametrize("k", [8, None])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_a_weight_is_dropped_or_divided_by_the_share_of_kept_ones(backend, dropout_p, k):
    after, before = dropped_weights(backend, dropout_p, k, MANY, query_chunk_size=7)
    survived = after != 0
    assert_same([after], [torch.where(survived, before / (1 - dropout_p), 0)])
    num_weights = int((before > 0).sum())
    assert num_weights == 2 * 2 * 64 * (k or 96)
    deviation = abs(int(survived.sum()) - num_weights * (1 - dropout_p))
    assert deviation < 5 * math.sqrt(num_weights * dropout_p * (1 - dropout_p))


@pytest.mark.parametrize("k", [8, None])
def test_the_mean_over_many_draws_is_the_output_without_dropout(backend, k):
    sizes, dropout_p, num_draws = Sizes(1, 2, 2, 5, 12, 3, 4), 0.3, 400
    query, key, value = attention_inputs(sizes)
    draws = torch.stack(
        [topk_attention(query, key, value, k=k, dropout_p=dropout_p, backend=backend) for _ in range(num_draws)]
    )
    expected = topk_attention(query, key, value, k=k, backend=backend)
    identity = torch.eye(sizes.keys, dtype=torch.float64).expand(1, 2, -1, -1)
    weights = topk_attention(query, key, identity, k=k, backend=backend)
    variance = weights.square() @ value.square() * dropout_p / (1 - dropout_p)
    assert ((draws.mean(0) - expected).abs() < 5 * (variance / num_draws).sqrt()).all()
    assert ((draws.var(0) / variance - 1).abs() < 0.6).all()


def correlations(masks):
    """Between each two rows of [R, C], without the diagonal."""
    standardised = (masks - masks.mean(1, keepdim=True)) / masks.std(1, keepdim=True, correction=0)
    return (standardised @ standardised.T / masks.shape[1]).fill_diagonal_(0)


@pytest.mark.parametrize("query_chunk_size", [None, 8])
def test_rows_heads_batches_and_calls_are_dropped_independently(backend, query_chunk_size):
    sizes = Sizes(batch=2, heads=2, key_heads=2, queries=16, keys=400, head_dim=2, value_dim=1)
    calls = [
        dropped_weights(backend, 0.5, None, sizes, query_chunk_size=query_chunk_size)[0].flatten(0, 2) != 0
        for _ in range(2)
    ]
    masks = torch.cat(calls).double()
    assert masks.shape == (128, 400)
    assert correlations(masks).abs().max() < 6 / math.sqrt(400)


def test_dropout_hits_heads_with_a_small_k_as_those_with_a_large_one(backend):
    sizes = MANY._replace(heads=4, key_heads=4)
    after, before = dropped_weights(backend, 0.5, [2, 96, 8, 30], sizes)
    kept_share = (after != 0).sum((0, 2, 3)) / (before != 0).sum((0, 2, 3))
    spread = 5 * (0.25 / (before != 0).sum((0, 2, 3))).sqrt()
    assert ((kept_share - 0.5).abs() < spread).all()


@K_OR_NONE
def test_a_query_without_keys_stays_zero_under_dropout(backend, tiling, options):
    call = named_call("queries_without_keys")
    output, grad_query, *_ = run_with_seed(call, 2, backend=backend, dropout_p=0.5, **options)
    for rows in (output[:, :, [0, 2]], grad_query[:, :, [0, 2]]):
        assert torch.equal(rows, torch.zeros_like(rows))


@pytest.mark.parametrize("k", [3, None])
def test_when_everything_is_dropped_the_output_and_its_gradients_are_zero(backend, tiling, k):
    inputs = attention_inputs()
    results = output_and_gradients(lambda *x: topk_attention(*x, k=k, dropout_p=1 - 2**-32, backend=backend), *inputs)
    for x in results:
        assert torch.equal(x, torch.zeros_like(x))
