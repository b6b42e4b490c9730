"""Of keys with equal scores the one with the lower index is kept."""

import random

import pytest
import torch

from comparison import (
    Sizes,
    assert_same,
    attention_inputs,
    causal_visibility,
    dense_attention,
    output_and_gradients,
    small_integers,
)
from topk_attention import topk_attention


def selected(scores, backend, **options):
    """The selection of queries whose scores against M keys are exactly the rows of `scores` [N, M]."""
    num_keys = len(scores[0])
    query = torch.tensor(scores, dtype=torch.float64)[None, None]
    key = torch.eye(num_keys, dtype=torch.float64)[None, None]
    _, selection = topk_attention(
        query, key, key, scale=1.0, backend=backend, return_selection=True, **{"k": 3, **options}
    )
    return selection.indices[0, 0].tolist()


def best_in_plain_python(row, k, visible):
    by_score_then_index = sorted((j for j in range(len(row)) if visible[j]), key=lambda j: (-row[j], j))
    kept = sorted(by_score_then_index[:k])
    return kept + [-1] * (min(k, len(row)) - len(kept))


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([5, 5, 5, 5, 5, 5], [0, 1, 2]),
        ([1, 5, 5, 5, 5, 5], [1, 2, 3]),
        ([5, 1, 5, 1, 5, 5], [0, 2, 4]),
        ([1, 1, 1, 1, 1, 9], [0, 1, 5]),
        ([1, 1, 9, 9, 1, 1], [0, 2, 3]),
        ([9, 9, 9, 1, 1, 1], [0, 1, 2]),
        ([9, 7, 8, 7, 7, 9], [0, 2, 5]),
        ([-2, -2, -2, -1, -2, -2], [0, 1, 3]),
        ([0, -1, 1, -1, 0, 0], [0, 2, 4]),
    ],
)
def test_of_tied_keys_the_lower_index_is_kept(backend, tiling, scores, kept):
    assert selected([scores], backend) == [kept]


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 12, 22])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_ties_within_and_across_key_blocks_are_broken_as_by_a_stable_sort(backend, tiling, levels, k, is_causal):
    numbers = random.Random(levels * 100 + k)
    num_queries, num_keys = 19, 23
    scores = [[numbers.randrange(levels) for _ in range(num_keys)] for _ in range(num_queries)]
    visible = causal_visibility(num_queries, num_keys) if is_causal else torch.ones(num_queries, num_keys).bool()
    expected = [best_in_plain_python(row, k, seen) for row, seen in zip(scores, visible.tolist(), strict=True)]
    assert selected(scores, backend, k=k, is_causal=is_causal) == expected


def test_small_tiles_put_ties_into_different_key_blocks(small_tiles):
    assert selected([[5] * 40], "chunked") == [[0, 1, 2]]
    assert len(small_tiles) > 2


@pytest.mark.parametrize("k", [1, 3, 10])
def test_hidden_keys_take_no_part_in_ties(backend, tiling, k):
    num_keys = 23
    visible = torch.rand(19, num_keys) < 0.5
    expected = [best_in_plain_python([7] * num_keys, k, seen) for seen in visible.tolist()]
    assert selected([[7] * num_keys] * 19, backend, k=k, attn_mask=visible) == expected


@pytest.mark.parametrize("k", [1, 4, 10])
def test_with_all_scores_equal_the_output_is_the_mean_of_the_first_k_values(backend, tiling, k):
    query, key, value = attention_inputs()
    output = topk_attention(torch.zeros_like(query), key, value, k=k, backend=backend)
    assert_same([output], [value[:, :, :k].mean(2, keepdim=True).expand_as(output)])
    output = topk_attention(query, key, value, k=k, scale=0.0, backend=backend)
    assert_same([output], [value[:, :, :k].mean(2, keepdim=True).expand_as(output)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("k", [1, 3, 7, [1, 2, 3, 4]], ids=str)
def test_integer_inputs_full_of_ties_select_the_same_keys_in_every_dtype(backend, tiling, k, is_causal, dtype):
    sizes = Sizes(batch=2, heads=4, key_heads=2, queries=13, keys=17, head_dim=4, value_dim=3)
    query = small_integers(sizes.batch, sizes.heads, sizes.queries, sizes.head_dim)
    key = small_integers(sizes.batch, sizes.key_heads, sizes.keys, sizes.head_dim)
    options = {"k": k, "is_causal": is_causal, "enable_gqa": True, "scale": 0.5}
    identity = torch.eye(sizes.keys, dtype=torch.float64).expand(sizes.batch, sizes.key_heads, -1, -1)
    weights = dense_attention(
        query, key, identity, k=k, scale=0.5, visible=causal_visibility(13, 17) if is_causal else None
    )
    value = torch.zeros(*key.shape[:3], sizes.value_dim, dtype=dtype)
    _, selection = topk_attention(
        query.to(dtype), key.to(dtype), value, backend=backend, return_selection=True, **options
    )
    kept = torch.zeros(*weights.shape[:3], sizes.keys + 1, dtype=torch.bool)
    kept.scatter_(-1, selection.indices.where(selection.indices >= 0, sizes.keys).long(), True)
    assert torch.equal(kept[..., :-1], weights > 0)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradients_flow_to_the_kept_one_of_tied_keys_alone(backend, tiling, k):
    query, key = small_integers(2, 2, 13, 4), small_integers(2, 2, 17, 4)
    value = torch.randn(2, 2, 17, 3, dtype=torch.float64)
    expected = output_and_gradients(lambda *x: dense_attention(*x, k=k, scale=0.5), query, key, value)
    actual = output_and_gradients(lambda *x: topk_attention(*x, k=k, scale=0.5, backend=backend), query, key, value)
    assert_same(actual, expected)


def test_ties_do_not_depend_on_chunk_or_block_size(small_tiles):
    query, key, value = small_integers(1, 2, 13, 4), small_integers(1, 2, 17, 4), small_integers(1, 2, 17, 3)

    def indices(**options):
        _, selection = topk_attention(query, key, value, k=5, scale=0.5, return_selection=True, **options)
        return selection.indices

    expected = indices(backend="reference")
    for query_chunk_size in (None, 1, 2, 5, 12, 13, 14):
        assert torch.equal(indices(backend="chunked", query_chunk_size=query_chunk_size), expected)
