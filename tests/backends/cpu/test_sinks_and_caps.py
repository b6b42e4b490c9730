"""Attention sinks and a soft cap in the kernels of every target: each way to find the kept keys ends in one softmax."""

import pytest
import torch

from comparison import output_and_gradients
from topk_attention import KeyIndex, topk_attention
from topk_attention.backends import cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_index_changes_nothing_beside_a_sink_and_a_cap(cpu_target, dtype):
    query, key, value = (torch.randn(2, heads, n, 32).to(dtype) for heads, n in ((6, 1), (2, 900), (2, 900)))
    options = {"k": 20, "enable_gqa": True, "backend": "cpu", "sinks": torch.randn(6), "softcap": 3.0}
    expected = topk_attention(query, key, value, **options)
    index = KeyIndex(key)
    assert torch.equal(topk_attention(query, key, value, key_index=index, **options), expected)
    plain = topk_attention(query, key, value, **options | {"sinks": None, "softcap": None})
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("num_keys", [300, 1500])
def test_screened_and_unscreened_kernels_cap_alike(cpu_targets, num_keys):
    torch.manual_seed(5)
    query, key, value = (torch.randn(1, 2, n, 16) for n in (80, num_keys, num_keys))
    options = {"k": 9, "is_causal": True, "softcap": 0.7}
    sinks = torch.randn(2)

    def run(backend, *tensors):
        return output_and_gradients(
            lambda q, k, v, s: topk_attention(q, k, v, sinks=s, backend=backend, **options), *tensors
        )

    truth = run("reference", *(x.double() for x in (query, key, value, sinks)))
    for target in cpu_targets:
        with cpu.forced_cpu_target(target):
            results = run("cpu", query, key, value, sinks)
        for actual, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(
                actual.double(), expected, rtol=2e-4, atol=2e-5, msg=lambda m, t=target: f"{t}: {m}"
            )


def test_the_kernels_cap_small_and_large_scores_to_the_last_bits(cpu_target):
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        scores = torch.logspace(-6, 2, 400, dtype=torch.float64).to(dtype)
        query = torch.cat([scores, -scores]).view(1, 1, -1, 1)
        key = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 1, 2, 1)
        _, selection = topk_attention(
            query, key, key, k=2, scale=1.0, softcap=1.0, backend="cpu", return_selection=True
        )
        capped = query.double().flatten().tanh()
        expected = torch.stack([capped.sigmoid(), (-capped).sigmoid()], -1)
        actual = selection.weights.view(-1, 2).double()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
