"""Corners that a comparison of two backends cannot see, because both share the code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from topk_attention import ALiBi, BucketedBias, RelativeBias, topk_attention


def test_a_half_precision_bucket_table_sums_its_gradient_in_float32():
    table = torch.zeros(8, 1, dtype=torch.bfloat16, requires_grad=True)
    BucketedBias(table).relative_values(2048, 2048).sum().backward()
    exact = torch.zeros(8, 1, requires_grad=True)
    BucketedBias(exact).relative_values(2048, 2048).sum().backward()
    torch.testing.assert_close(table.grad, exact.grad.bfloat16(), rtol=0, atol=0)


def test_half_precision_slopes_neither_round_far_distances_nor_overflow():
    values = ALiBi(torch.tensor([0.25], dtype=torch.bfloat16)).relative_values(1, 1005)
    torch.testing.assert_close(values, ALiBi(torch.tensor([0.25])).relative_values(1, 1005), rtol=0, atol=0)
    assert ALiBi(torch.tensor([0.5], dtype=torch.float16)).relative_values(1, 140_000).isfinite().all()


def test_dropout_never_hides_a_nan_that_a_query_sees(backend):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 1, 200, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    key[0, 0, 3] = torch.nan
    output = topk_attention(query, key, value, k=2, dropout_p=0.5, backend=backend)
    assert output.isnan().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("chosen", ["auto", "cpu", "chunked", "reference"])
def test_every_backend_runs_under_vmap(chosen, k):
    query, key = torch.randn(3, 1, 2, 5, 8), torch.randn(3, 1, 2, 9, 8)

    def attend(one_query, one_key):
        return topk_attention(one_query, one_key, one_key, k=k, backend=chosen)

    expected = torch.stack([attend(*pair) for pair in zip(query, key, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(query, key), expected)


def test_values_of_size_zero_still_have_a_selection(backend):
    query = torch.tensor([[[[1.0]]]])
    key = torch.tensor([[[[3.0], [1.0], [2.0]]]])
    output, selection = topk_attention(query, key, key[..., :0], k=2, return_selection=True, backend=backend)
    assert output.shape == (1, 1, 1, 0)
    assert selection.indices.tolist() == [[[[0, 2]]]]


@pytest.mark.parametrize("backend", ["auto", "cpu", "chunked"], indirect=True)
@pytest.mark.parametrize("option", ["mask", "alibi", "relative"])
def test_dynamic_shapes_compile_with_masks_and_biases(backend, option):
    def attend(query):
        length = query.shape[2]
        options = {
            "mask": lambda: {"attn_mask": torch.ones(2, 1, 1, length, dtype=torch.bool)},
            "alibi": lambda: {"bias": ALiBi(torch.ones(2))},
            "relative": lambda: {"bias": RelativeBias(torch.zeros(2, 2 * length - 1))},
        }[option]()
        return topk_attention(query, query, query, k=3, is_causal=True, backend=backend, **options)

    torch.compiler.reset()  # code compiled for other parameters counts against torch's limit
    compiled = torch.compile(attend, backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (7, 12):
        query = torch.randn(2, 2, length, 4)
        torch.testing.assert_close(compiled(query), attend(query))


def test_a_fresh_process_can_export_before_it_ever_ran():
    code = (
        "import torch, topk_attention\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, q):\n"
        "        return topk_attention.topk_attention(q, q, q, k=2)\n"
        "q = torch.randn(1, 2, 5, 4)\n"
        "exported = torch.export.export(M(), (q,)).module()\n"
        "assert torch.equal(exported(q), M()(q))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_k_may_be_any_sequence_of_ints():
    query = torch.randn(1, 3, 5, 4)
    expected = topk_attention(query, query, query, k=[1, 2, 3])
    for k in (range(1, 4), (1, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).numpy()):
        assert torch.equal(topk_attention(query, query, query, k=k), expected)


def test_all_is_none():
    query = torch.randn(1, 3, 5, 4)
    assert torch.equal(topk_attention(query, query, query, k="all"), topk_attention(query, query, query, k=None))
