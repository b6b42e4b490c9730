"""The three sparse products equal their definitions, in both forms."""

import pytest
import torch

from topk_attention.backends.chunked import rows
from topk_attention.backends.chunked.rows import (
    dot_with_rows,
    transpose_selection,
    weighted_sum_by_target,
    weighted_sum_of_rows,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
INDEX_DTYPES = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
SHAPES = pytest.mark.parametrize(
    ("num_rows", "k", "num_targets", "size"),
    [(1, 1, 1, 1), (7, 3, 11, 5), (13, 1, 2, 17), (5, 19, 19, 3), (40, 8, 97, 64)],
)


def selection(num_rows, k, num_targets, index_dtype):
    """Indices in no order and with repetitions."""
    return torch.randint(num_targets, (num_rows, k)).to(index_dtype)


def assert_close(actual, expected):
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if expected.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **tolerance)


@DTYPES
@INDEX_DTYPES
@SHAPES
def test_weighted_sum_of_rows_sums_what_the_indices_name(num_rows, k, num_targets, size, dtype, index_dtype):
    table, indices = torch.randn(num_targets, size, dtype=dtype), selection(num_rows, k, num_targets, index_dtype)
    weights = torch.randn(num_rows, k, dtype=dtype)
    expected = (table[indices.long()] * weights.unsqueeze(-1)).sum(1)
    assert_close(weighted_sum_of_rows(table, indices, weights), expected)


@DTYPES
@INDEX_DTYPES
@SHAPES
@pytest.mark.parametrize("gathered_elements", [1, 100, 2**21])
def test_both_forms_of_dot_with_rows_equal_the_definition(
    monkeypatch, gathered_elements, num_rows, k, num_targets, size, dtype, index_dtype
):
    monkeypatch.setattr(rows, "_GATHERED_ELEMENTS", gathered_elements)
    table, indices = torch.randn(num_targets, size, dtype=dtype), selection(num_rows, k, num_targets, index_dtype)
    left = torch.randn(num_rows, size, dtype=dtype)
    expected = (table[indices.long()] * left.unsqueeze(1)).sum(-1)
    assert_close(dot_with_rows(left, table, indices), expected)
    assert_close(rows._sampled_product(left, table, indices), expected)
    assert_close(rows._gathered_product(left, table, indices), expected)


@DTYPES
@INDEX_DTYPES
@SHAPES
def test_weighted_sum_by_target_sums_the_entries_that_point_at_it(num_rows, k, num_targets, size, dtype, index_dtype):
    indices = selection(num_rows, k, num_targets, index_dtype)
    left, weights = torch.randn(num_rows, size, dtype=dtype), torch.randn(num_rows, k, dtype=dtype)
    expected = torch.zeros(num_targets, size, dtype=dtype)
    for row in range(num_rows):
        for slot in range(k):
            expected[indices[row, slot]] += weights[row, slot] * left[row]
    transposed = transpose_selection(indices, num_targets)
    assert_close(weighted_sum_by_target(transposed, left, weights), expected)


@INDEX_DTYPES
def test_targets_that_nothing_points_at_get_exact_zeros(index_dtype):
    indices = torch.tensor([[2, 5], [5, 2]]).to(index_dtype)
    transposed = transpose_selection(indices, 9)
    sums = weighted_sum_by_target(transposed, torch.randn(2, 3), torch.randn(2, 2))
    assert (sums[[2, 5]] != 0).any(1).all()
    others = sums[[0, 1, 3, 4, 6, 7, 8]]
    assert torch.equal(others, torch.zeros_like(others))


def test_a_transposed_selection_lists_each_entry_once_in_row_order():
    indices = torch.tensor([[3, 0, 3], [1, 3, 0]])
    transposed = transpose_selection(indices, 5)
    assert transposed.order.tolist() == [1, 5, 3, 0, 2, 4]
    assert transposed.sources.tolist() == [0, 1, 1, 0, 0, 1]
    assert transposed.starts.tolist() == [0, 2, 3, 3, 6]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_sums_by_target_are_the_same_for_any_number_of_threads(num_threads):
    indices, left, weights = torch.randint(50, (2000, 16)), torch.randn(2000, 32), torch.randn(2000, 16)
    threads = torch.get_num_threads()
    expected = weighted_sum_by_target(transpose_selection(indices, 50), left, weights)
    try:
        torch.set_num_threads(num_threads)
        actual = weighted_sum_by_target(transpose_selection(indices, 50), left, weights)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(actual, expected)


def test_importing_the_products_warns_nobody():
    import subprocess
    import sys

    code = "import topk_attention.backends.chunked.rows"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
