"""More elements than an int32 can count."""

from __future__ import annotations

import torch

from topk_attention import topk_attention


def test_inputs_of_more_than_2_31_elements_are_indexed_right(fast_backend):
    # Every head reads the same memory, so the input is large and its storage is not.
    heads, num_keys, size = 1025, 2**14, 2**7
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, 1, size, generator=generator)
    key, value = (torch.randn(1, 1, num_keys, size, generator=generator).expand(1, heads, -1, -1) for _ in range(2))
    assert key.numel() > 2**31
    output = topk_attention(query, key, value, k=4, backend=fast_backend)
    last = slice(heads - 2, heads)
    expected = topk_attention(query[:, last], key[:, last], value[:, last], k=4, backend="reference")
    torch.testing.assert_close(output[:, last], expected)
    torch.testing.assert_close(
        output[:, :2], topk_attention(query[:, :2], key[:, :2], value[:, :2], k=4, backend="reference")
    )
