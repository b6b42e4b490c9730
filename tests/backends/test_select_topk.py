"""select_topk is a stable sort that stops at k."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topk_attention.backends.chunked.selection import select_topk


def first_k_of_a_stable_sort(scores, k):
    indices = scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    return scores.gather(1, indices), indices


def assert_selects_like_a_stable_sort(scores, k):
    values, indices = select_topk(scores, k)
    assert values.shape == indices.shape == (scores.shape[0], min(k, scores.shape[1]))
    assert indices.dtype == torch.int64
    assert torch.equal(values, scores.gather(1, indices))
    assert (indices[:, 1:] > indices[:, :-1]).all()
    for row, (expected_values, expected_indices) in enumerate(zip(*first_k_of_a_stable_sort(scores, k), strict=True)):
        # At -inf nothing is chosen, so which of those entries fill up a row is left open.
        assert torch.equal(indices[row][values[row] != -math.inf], expected_indices[expected_values != -math.inf])


WIDTHS = pytest.mark.parametrize("width", [1, 2, 7, 47, 48, 49, 97, 500, 1003])
KS = pytest.mark.parametrize("k", [1, 2, 3, 7, 31])


@WIDTHS
@KS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_distinct_scores_are_selected_like_a_stable_sort(width, k, dtype):
    assert_selects_like_a_stable_sort(torch.stack([torch.randperm(width) for _ in range(20)]).to(dtype), k)


@WIDTHS
@KS
@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_tied_scores_are_selected_like_a_stable_sort(width, k, levels):
    assert_selects_like_a_stable_sort(torch.randint(levels, (20, width)).double(), k)


@WIDTHS
@KS
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_hidden_scores_are_never_preferred(width, k, share):
    scores = torch.randint(3, (20, width)).double()
    assert_selects_like_a_stable_sort(scores.masked_fill(torch.rand(20, width) < share, -math.inf), k)


@WIDTHS
@KS
def test_the_best_in_any_place_are_found(width, k):
    rows = torch.arange(width)
    scores = torch.zeros(width, width).double()
    scores[rows, rows] = 1.0  # row i has its best entry in column i
    assert_selects_like_a_stable_sort(scores, k)
    assert_selects_like_a_stable_sort(-scores, k)


def test_zero_and_negative_zero_are_tied():
    _, indices = select_topk(torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0]]), 2)
    assert indices.tolist() == [[0, 1], [0, 1]]


@WIDTHS
@KS
def test_nan_counts_as_largest(width, k):
    scores = torch.randn(width, width).double()
    scores[torch.arange(width), torch.arange(width)] = math.nan
    values, indices = select_topk(scores, k)
    assert values.isnan().any(1).all()
    assert (indices == torch.arange(width)[:, None]).any(1).all()


def test_infinity_is_larger_than_any_number():
    scores = torch.randn(5, 60)
    scores[torch.arange(5), [0, 13, 29, 58, 59]] = math.inf
    _, indices = select_topk(scores, 1)
    assert indices.flatten().tolist() == [0, 13, 29, 58, 59]


def test_no_rows_are_fine():
    values, indices = select_topk(torch.empty(0, 60), 3)
    assert values.shape == indices.shape == (0, 3)


@given(
    rows=st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([0.0, 1.0, -1.0, -math.inf, 2.5]), min_size=n * 9, max_size=n * 9),
            min_size=1,
            max_size=5,
        )
    ),
    k=st.integers(1, 10),
)
def test_any_rows_are_selected_like_a_stable_sort(rows, k):
    assert_selects_like_a_stable_sort(torch.tensor(rows, dtype=torch.float64), k)


@given(cut=st.integers(1, 59), k=st.integers(1, 12), levels=st.integers(1, 30), seed=st.integers(0, 1000))
def test_the_best_of_two_blocks_bests_are_the_best_of_all(cut, k, levels, seed):
    scores = torch.randint(levels, (8, 60), generator=torch.Generator().manual_seed(seed)).double()
    parts = [select_topk(scores[:, :cut], k), select_topk(scores[:, cut:], k)]
    indices = torch.cat([parts[0][1], parts[1][1] + cut], dim=1)
    values, positions = select_topk(torch.cat([parts[0][0], parts[1][0]], dim=1), k)
    expected_values, expected_indices = first_k_of_a_stable_sort(scores, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices.gather(1, positions), expected_indices)
