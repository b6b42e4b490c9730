"""Sums that a caller keeps are taken for those that completion would compute."""

from __future__ import annotations

import pytest
import torch

from topk_attention import Completion, topk_attention


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_kept_sums_give_the_outputs_and_gradients_of_computed_ones(backend, queries, padded):
    torch.manual_seed(0)
    query = torch.randn(2, 4, queries, 6).double()
    key, value = torch.randn(2, 2, 19, 6).double(), torch.randn(2, 2, 19, 5).double()
    shown = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    shown[0, ..., :6] = not padded
    key[0, :, 2] = torch.nan if padded else 1.0  # in a hidden key
    completion = Completion([0.5, 1, 2, 3], lift=0.2)
    rows = shown.transpose(2, 3)
    sums = completion.sums(*(torch.where(rows, x, 0) for x in (key, value)))
    results = []
    for name, key_sums in (("reference", None), (backend, None), (backend, sums)):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        output = topk_attention(
            *inputs,
            k=3,
            attn_mask=shown if padded else None,
            enable_gqa=True,
            backend=name,
            completion=completion,
            key_sums=key_sums,
        )
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for others in results[1:]:
        for tensor, expected in zip(others, results[0], strict=True):
            torch.testing.assert_close(tensor, expected)


def test_sums_that_differ_change_a_padded_call():
    """They are read, and not computed again."""
    query, key, value = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    shown = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    options = {"k": 2, "attn_mask": shown, "completion": Completion()}
    other = Completion().sums(key, value + 1)
    assert not torch.equal(
        topk_attention(query, key, value, **options, key_sums=other), topk_attention(query, key, value, **options)
    )


def test_under_autocast_sums_are_those_of_the_rounded_keys():
    key, value = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    rounded = Completion().sums(key.bfloat16(), value.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        sums = Completion().sums(key, value)
        topk_attention(key[:, :, :1], key, value, k=2, completion=Completion(), key_sums=sums)
    for total, expected in zip(sums, rounded, strict=True):
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, expected)
