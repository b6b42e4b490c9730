"""topk_attention is attention over the k best keys, however it is cut into pieces."""

import math

import pytest
import torch
import torch.nn.functional as F

from comparison import (
    CALL_NAMES,
    SIZES,
    Sizes,
    assert_same,
    attention_inputs,
    causal_visibility,
    dense_attention,
    named_call,
    output_and_gradients,
)
from topk_attention import topk_attention
from topk_attention.backends.chunked import tiles

KEYS = SIZES.keys


def attend(backend, **options):
    return lambda query, key, value: topk_attention(query, key, value, backend=backend, **options)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("k", [1, 2, 4, 5, KEYS - 1])
def test_output_and_gradients_are_those_of_softmax_over_the_k_best_keys(backend, tiling, k, is_causal):
    inputs = attention_inputs()
    visible = causal_visibility(SIZES.queries, KEYS) if is_causal else None
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, visible=visible), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, is_causal=is_causal), *inputs), expected)


def full_attention_options(name):
    options = {
        "plain": {},
        "bool mask": {"attn_mask": torch.rand(SIZES.batch, 1, KEYS, KEYS) < 0.7},
        "float mask": {"attn_mask": torch.randn(KEYS, KEYS, dtype=torch.float64)},
        "causal": {"is_causal": True},
        "grouped heads": {"enable_gqa": True},
        "scale": {"scale": 0.3},
    }[name]
    if name == "bool mask":
        options["attn_mask"][..., 0] = True  # SDPA has no rule for a query without keys
    return options


@pytest.mark.parametrize("k", [KEYS, KEYS + 1, 1000, None])
@pytest.mark.parametrize("name", ["plain", "bool mask", "float mask", "causal", "grouped heads", "scale"])
def test_with_k_at_least_the_number_of_keys_it_is_scaled_dot_product_attention(backend, tiling, name, k):
    sizes = SIZES._replace(queries=KEYS, key_heads=2 if name == "grouped heads" else SIZES.heads)
    inputs, options = attention_inputs(sizes), full_attention_options(name)
    expected = output_and_gradients(lambda *x: F.scaled_dot_product_attention(*x, **options), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, **options), *inputs), expected)


@pytest.mark.parametrize("k", [KEYS, 1000, None])
def test_asking_for_the_selection_changes_no_output_and_no_gradient(backend, tiling, k):
    inputs = attention_inputs()
    expected = output_and_gradients(attend(backend, k=k), *inputs)
    assert_same(output_and_gradients(lambda *x: attend(backend, k=k, return_selection=True)(*x)[0], *inputs), expected)


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("name", CALL_NAMES)
def test_fast_backends_equal_the_reference(tiled_backend, name, k):
    call = named_call(name)
    options = {} if k is not None else {"k": None}
    assert_same(call.run(backend=tiled_backend, **options), call.run(backend="reference", **options))


@pytest.mark.parametrize("name", CALL_NAMES)
def test_fast_backends_keep_the_keys_the_reference_keeps(tiled_backend, name):
    call = named_call(name)
    indices, weights = call.select(backend=tiled_backend)
    expected_indices, expected_weights = call.select(backend="reference")
    assert torch.equal(indices, expected_indices)
    assert_same([weights], [expected_weights])


@pytest.mark.parametrize("k", [3, None])
def test_small_tiles_do_cut_the_inputs_into_chunks_and_blocks(small_tiles, k):
    inputs = attention_inputs()
    topk_attention(*inputs, k=k, backend="chunked")
    assert len({tile.step.queries for tile in small_tiles}) > 1
    assert len({tile.keys for tile in small_tiles}) > 2
    assert len({tile.step.query_heads for tile in small_tiles}) == SIZES.heads
    scored = torch.zeros(SIZES.batch, SIZES.heads, SIZES.queries, KEYS, dtype=torch.int64)
    for (batches, _, heads, queries), keys in small_tiles:
        scored[
            batches.start : batches.stop,
            heads.start : heads.stop,
            queries.start : queries.stop,
            keys.start : keys.stop,
        ] += 1
    assert torch.equal(scored, torch.ones_like(scored))


@pytest.mark.parametrize("k", [3, None])
def test_keys_in_the_future_of_a_whole_chunk_are_never_scored(small_tiles, k):
    sizes = SIZES._replace(batch=1, heads=1, key_heads=1, queries=32, keys=32)
    topk_attention(*attention_inputs(sizes), k=k, is_causal=True, backend="chunked")
    scores = sum(tile.step.num_rows * len(tile.keys) for tile in small_tiles)
    assert scores < 0.7 * 32 * 32


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("name", ["plain", "everything_at_once", "relative_bias", "k_per_head"])
@pytest.mark.parametrize("query_chunk_size", [1, 2, SIZES.queries - 1, SIZES.queries, SIZES.queries + 1, 10**6])
def test_query_chunk_size_changes_nothing(tiling, name, query_chunk_size, k):
    call = named_call(name)
    options = {"backend": "chunked"} if k is not None else {"backend": "chunked", "k": None}
    assert_same(call.run(query_chunk_size=query_chunk_size, **options), call.run(**options))
    assert torch.equal(call.select(query_chunk_size=query_chunk_size, **options)[0], call.select(**options)[0])


@pytest.mark.parametrize("tile_bytes", [8, 64, 4096])
@pytest.mark.parametrize("key_block_per_k", [1, 2])
@pytest.mark.parametrize("queries_before_blocks", [1, 3, 128])
def test_key_block_size_changes_nothing(monkeypatch, tile_bytes, key_block_per_k, queries_before_blocks):
    call = named_call("everything_at_once")
    expected, expected_indices = call.run(backend="reference"), call.select(backend="reference")[0]
    monkeypatch.setattr(tiles, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(tiles, "_KEY_BLOCK_PER_K", key_block_per_k)
    monkeypatch.setattr(tiles, "_QUERY_CHUNK_BEFORE_KEYS_ARE_BLOCKED", queries_before_blocks)
    assert_same(call.run(backend="chunked"), expected)
    assert torch.equal(call.select(backend="chunked")[0], expected_indices)
    without_k = call.run(backend="reference", k=None)
    assert_same(call.run(backend="chunked", k=None), without_k)


@pytest.mark.parametrize("k", [8, None])
def test_the_number_of_threads_changes_nothing(fast_backend, k):
    inputs = attention_inputs(Sizes(batch=2, heads=2, key_heads=2, queries=150, keys=300, head_dim=16, value_dim=8))
    function = attend(fast_backend, k=k, query_chunk_size=64)
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            indices = attend(fast_backend, k=k, return_selection=True)(*inputs)[1].indices
            results.append([indices, *output_and_gradients(function, *inputs)])
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("query_chunk_size", [1, 1023, 1024])
def test_query_chunk_size_is_an_upper_bound(scored_tiles, query_chunk_size, k):
    length = 2047 if query_chunk_size > 1 else 5
    inputs = attention_inputs(Sizes(1, 1, 1, length, 4, 1, 1))
    topk_attention(*inputs, k=k, query_chunk_size=query_chunk_size, backend="chunked")
    chunks = [len(tile.step.queries) for tile in scored_tiles]
    assert max(chunks) <= query_chunk_size
    assert sum(chunks) == length


def test_scores_are_scaled_by_the_root_of_the_head_size_unless_told_otherwise(backend, tiling):
    query, key, value = attention_inputs()
    by_default = topk_attention(query, key, value, k=3, backend=backend)
    assert_same([topk_attention(query, key, value, k=3, scale=3**-0.5, backend=backend)], [by_default])
    assert_same([topk_attention(query * 3**-0.5, key, value, k=3, scale=1.0, backend=backend)], [by_default])


def test_a_negative_scale_keeps_the_keys_with_the_smallest_products(backend, tiling):
    query, key, value = attention_inputs()
    expected = output_and_gradients(lambda *x: dense_attention(-x[0], x[1], x[2], k=3, scale=0.5), query, key, value)
    assert_same(output_and_gradients(attend(backend, k=3, scale=-0.5), query, key, value), expected)


@pytest.mark.parametrize(
    ("queries", "keys"), [(5, 11), (11, 5), (1, 11), (11, 1), (1, 1), (7, 7)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("k", [2, 20, None])
def test_causal_queries_are_aligned_with_the_last_keys(backend, tiling, queries, keys, k):
    inputs = attention_inputs(SIZES._replace(queries=queries, keys=keys))
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert torch.equal(visible, causal_visibility(queries, keys))
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, visible=visible), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, is_causal=True), *inputs), expected)


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("num_new", [1, 4])
def test_decoding_with_cached_keys_gives_the_last_rows_of_the_full_run(backend, tiling, num_new, k):
    query, key, value = attention_inputs(SIZES._replace(queries=KEYS))
    everything = topk_attention(query, key, value, k=k, is_causal=True, backend=backend)
    last = topk_attention(query[:, :, -num_new:], key, value, k=k, is_causal=True, backend=backend)
    assert_same([last], [everything[:, :, -num_new:]])
    earlier = topk_attention(query[:, :, :-1], key[:, :, :-1], value[:, :, :-1], k=k, is_causal=True, backend=backend)
    assert_same([earlier], [everything[:, :, :-1]])


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize("per_head", [[3, 1, KEYS, 2], [1000, 1000, 1000, 5], [2, 2, 2, 2], [20, 30, 40, 50]])
def test_each_head_keeps_its_own_k(backend, tiling, per_head, kind):
    inputs = attention_inputs()
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=per_head), *inputs)
    assert_same(output_and_gradients(attend(backend, k=kind(per_head)), *inputs), expected)


def test_k_may_be_a_scalar_tensor(backend):
    inputs = attention_inputs()
    expected = topk_attention(*inputs, k=3, backend=backend)
    assert torch.equal(topk_attention(*inputs, k=torch.tensor(3), backend=backend), expected)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("k", [3, [3, 1, 2, KEYS], None], ids=["one k", "k per head", "no k"])
def test_grouped_query_heads_share_their_key_head(backend, tiling, key_heads, k):
    inputs = attention_inputs(SIZES._replace(key_heads=key_heads))
    repeats = SIZES.heads // key_heads

    def with_repeated_heads(query, key, value):
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        return dense_attention(query, key, value, k=k)

    expected = output_and_gradients(with_repeated_heads, *inputs)
    assert_same(output_and_gradients(attend(backend, k=k, enable_gqa=True), *inputs), expected)


@pytest.mark.parametrize("k", [3, None])
def test_heads_and_batches_do_not_mix(backend, tiling, k):
    query, key, value = attention_inputs()
    together = topk_attention(query, key, value, k=k, backend=backend)
    for b in range(SIZES.batch):
        for h in range(SIZES.heads):
            one_head = (x[b : b + 1, h : h + 1] for x in (query, key, value))
            assert_same([topk_attention(*one_head, k=k, backend=backend)], [together[b : b + 1, h : h + 1]])


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("value_dim", [1, 2, 3, 17])
def test_values_may_have_another_size_than_keys(backend, tiling, value_dim, k):
    inputs = attention_inputs(SIZES._replace(value_dim=value_dim))
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k), *inputs)
    assert_same(output_and_gradients(attend(backend, k=k), *inputs), expected)


@pytest.mark.parametrize("k", [3, None])
def test_inputs_without_a_batch_axis_are_one_batch(backend, tiling, k):
    query, key, value = attention_inputs(SIZES._replace(batch=1))
    mask = torch.rand(SIZES.queries, KEYS) < 0.7
    options = {"k": k, "attn_mask": mask, "is_causal": True, "backend": backend}
    expected = topk_attention(query, key, value, **options)
    assert_same([topk_attention(query[0], key[0], value[0], **options)], [expected[0]])


@pytest.mark.parametrize("k", [3, [1, 2, 3, 4], None], ids=["one k", "k per head", "no k"])
@pytest.mark.parametrize("mask_batch", [(), (1, 1), (3, 1), (1, 2), (3, 2)], ids=str)
def test_several_batch_axes_are_flattened_and_restored(backend, tiling, mask_batch, k):
    query, key, value = attention_inputs(SIZES._replace(batch=6))
    mask = torch.rand(*mask_batch, 1, SIZES.queries, KEYS) < 0.7
    unflattened = [x.unflatten(0, (3, 2)) for x in (query, key, value)]
    flat_mask = mask.expand(3, 2, 1, SIZES.queries, KEYS).reshape(6, 1, SIZES.queries, KEYS)
    expected = output_and_gradients(attend(backend, k=k, attn_mask=flat_mask), query, key, value)
    actual = output_and_gradients(attend(backend, k=k, attn_mask=mask), *unflattened)
    assert_same([x.flatten(0, 1) for x in actual], expected)
    _, selection = topk_attention(*unflattened, k=k, attn_mask=mask, backend=backend, return_selection=True)
    assert selection.indices.shape[:-1] == (3, 2, SIZES.heads, SIZES.queries)


@pytest.mark.parametrize("k", [3, [1, 2, 3, 4], None], ids=["one k", "k per head", "no k"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(SIZES._replace(batch=0), id="no batch"),
        pytest.param(SIZES._replace(queries=0), id="no queries"),
        pytest.param(SIZES._replace(keys=0), id="no keys"),
        pytest.param(SIZES._replace(queries=0, keys=0), id="no queries and no keys"),
        pytest.param(SIZES._replace(batch=0, keys=0), id="no batch and no keys"),
        pytest.param(SIZES._replace(value_dim=0), id="empty values"),
    ],
)
def test_empty_inputs_give_zeros_of_the_right_shape_and_zero_gradients(backend, sizes, k):
    inputs = [x.requires_grad_() for x in attention_inputs(sizes)]
    output = topk_attention(*inputs, k=k, backend=backend)
    assert output.shape == (sizes.batch, sizes.heads, sizes.queries, sizes.value_dim)
    assert torch.equal(output, torch.zeros_like(output))
    output.sum().backward()
    for x in inputs:
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("k", [3, [], None], ids=str)
def test_without_heads_output_selection_and_gradients_are_empty(backend, k):
    inputs = [x.requires_grad_() for x in attention_inputs(SIZES._replace(heads=0, key_heads=0))]
    output, selection = topk_attention(*inputs, k=k, backend=backend, return_selection=True)
    assert topk_attention(*inputs, k=k, backend=backend).shape == output.shape == (2, 0, SIZES.queries, SIZES.value_dim)
    assert selection.indices.shape == selection.weights.shape == (2, 0, SIZES.queries, 0)
    output.sum().backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


def test_without_keys_even_broken_queries_give_zeros(backend):
    query, key, value = attention_inputs(SIZES._replace(keys=0), torch.float16)
    query[0, 0, 0, 0] = math.nan
    query[0, 0, 1] = 60_000  # their sum overflows
    output = topk_attention(query, key, value, k=3, backend=backend)
    assert torch.equal(output, torch.zeros_like(output))


def test_without_keys_the_selection_is_empty(backend):
    _, selection = topk_attention(
        *attention_inputs(SIZES._replace(keys=0)), k=3, backend=backend, return_selection=True
    )
    for part in selection:
        assert part.shape == (SIZES.batch, SIZES.heads, SIZES.queries, 0)


def test_without_a_batch_the_selection_is_empty(backend):
    _, selection = topk_attention(
        *attention_inputs(SIZES._replace(batch=0)), k=3, backend=backend, return_selection=True
    )
    for part in selection:
        assert part.shape == (0, SIZES.heads, SIZES.queries, 3)


def as_transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_every_other_row(x):
    storage = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), math.nan, dtype=x.dtype)
    storage[:, :, ::2] = x
    return storage[:, :, ::2]


def as_columns(x):
    return x.mT.contiguous().mT


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("layout", [as_transposed, as_every_other_row, as_columns])
def test_strides_of_the_inputs_do_not_matter(backend, tiling, layout, k):
    inputs = attention_inputs()
    strided = [layout(x) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    options = {"k": k, "is_causal": True}
    expected = output_and_gradients(attend(backend, **options), *inputs)
    assert_same(output_and_gradients(attend(backend, **options), *strided), expected)


@pytest.mark.parametrize("k", [3, None])
def test_expanded_inputs_get_the_sum_of_their_gradients(backend, tiling, k):
    inputs = attention_inputs(SIZES._replace(batch=1, heads=1, key_heads=1))

    def expanded(query, key, value):
        grown = [x.expand(SIZES.batch, SIZES.heads, -1, -1) for x in (query, key, value)]
        return topk_attention(*grown, k=k, backend=backend)

    def repeated(query, key, value):
        grown = [x.repeat(SIZES.batch, SIZES.heads, 1, 1) for x in (query, key, value)]
        return dense_attention(*grown, k=k)

    assert_same(output_and_gradients(expanded, *inputs), output_and_gradients(repeated, *inputs))


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("name", ["float_mask", "dense_bias", "relative_bias", "everything_at_once"])
def test_the_arguments_are_left_as_they_were(backend, tiling, name, k):
    call = named_call(name)
    mask = call.options.get("attn_mask")
    before = [x.clone() for x in (*call.tensors, *([] if mask is None else [mask]))]
    call.run(backend=backend, **({} if k is not None else {"k": None}))
    after = [*call.tensors, *([] if mask is None else [mask])]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("k", [3, KEYS, None])
@pytest.mark.parametrize("name", CALL_NAMES)
def test_auto_equals_the_reference(name, k):
    call = named_call(name)
    options = {} if k == 3 else {"k": k}
    assert_same(call.run(backend="auto", **options), call.run(backend="reference", **options))
