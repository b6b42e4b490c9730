"""Few rows of a key head are worked on another way than many: keys are read as they lie. Each has the same bits."""

import pytest
import torch

from adversarial import FAMILIES
from large_calls import assert_equals_the_reference, integer_inputs
from topk_attention import Completion, topk_attention

# Up to 16 rows of a key head are few: 40 queries are many for one query head, and the last ones of them are few.
MANY = 40
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def assert_same_bits(few, many):
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def selected(query, key, value, **options):
    output, selection = topk_attention(
        query, key, value, backend="cpu", enable_gqa=True, return_selection=True, **options
    )
    return output, selection.indices, selection.weights


def assert_few_are_as_many(query, key, value, num_few, **options):
    """The last queries alone, and among all, with masks and biases cut likewise. Causality aligns at the end."""
    few = {name: x[..., -num_few:, :] if name in ("attn_mask", "bias") else x for name, x in options.items()}
    results = selected(query, key, value, **options)
    assert_same_bits(selected(query[..., -num_few:, :], key, value, **few), [x[..., -num_few:, :] for x in results])


@DTYPES
@pytest.mark.parametrize("num_keys", [1, 15, 16, 17, 127, 128, 129, 700, 2100])
def test_a_row_has_the_same_bits_among_few_as_among_many(cpu_target, num_keys, dtype):
    for num_few, dim in ((1, 64), (2, 33), (3, 7), (5, 128), (16, 20)):
        query, key, value = (
            torch.randn(1, 1, MANY, dim),
            torch.randn(1, 1, num_keys, dim),
            torch.randn(1, 1, num_keys, 9),
        )
        for k in sorted({1, min(40, num_keys), num_keys}):
            tensors = [x.to(dtype) for x in (query, key, value)]
            assert_few_are_as_many(*tensors, num_few, k=k, is_causal=num_few > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_few_rows_none_misses_a_key_whatever_misleads_it(cpu_target, family):
    query, key = FAMILIES[family](torch.randn(1, 2, MANY, 37), torch.randn(1, 2, 900, 37))
    value = torch.randn(1, 2, 900, 5)
    hidden = torch.where(torch.rand(1, 2, MANY, 900) < 0.3, -torch.inf, torch.randn(1, 2, MANY, 900))
    for options in (
        {},
        {"is_causal": True},
        {"attn_mask": hidden},
        {"bias": hidden, "attn_mask": torch.rand(MANY, 900) < 0.1},
    ):
        for k in (1, 64, [300, 20]):
            assert_few_are_as_many(query, key, value, 3, k=k, **options)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 2), (32, 8)], ids=str)
def test_few_rows_do_not_depend_on_the_number_of_threads(several_threads, heads):
    num_heads, key_heads = heads
    inputs = torch.randn(1, num_heads, 2, 40), torch.randn(1, key_heads, 5000, 40), torch.randn(1, key_heads, 5000, 8)
    for options in ({}, {"completion": Completion()}, {"attn_mask": torch.rand(1, 1, 2, 5000) < 0.5}):
        first, *others = several_threads(lambda: selected(*inputs, k=50, is_causal=True, **options))  # noqa: B023
        for other in others:
            assert_same_bits(other, first)


@pytest.mark.parametrize("layout", ["heads inside", "every other key", "transposed"])
def test_keys_of_few_rows_may_lie_anywhere(cpu_target, layout):
    query, key, value = torch.randn(2, 6, 1, 24), torch.randn(2, 3, 1001, 24), torch.randn(2, 3, 1001, 24)
    other = {
        "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other key": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
        "transposed": lambda x: x.mT.contiguous().mT,
    }[layout]
    assert_same_bits(selected(query, other(key), other(value), k=30), selected(query, key, value, k=30))


@pytest.mark.parametrize("num_rows", range(1, 18))
def test_any_number_of_few_rows_fills_its_tiles(cpu_targets, num_rows):
    for heads, queries in ((num_rows, 1), (1, num_rows)):
        inputs = integer_inputs(1, heads, 1, queries, 600, 18, 3)
        assert_equals_the_reference(*inputs, targets=cpu_targets, k=9, scale=0.25, enable_gqa=True)
