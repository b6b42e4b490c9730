"""Weights that are made for one call and made again for its backward pass."""

from __future__ import annotations

import torch
from torch import nn

from topk_attention.nn.made_weights import MadeWeights


def test_a_tensor_that_takes_the_place_of_a_dropped_weight_is_saved_as_it_is():
    made, stored = MadeWeights(), nn.Parameter(torch.randn(64, 64))
    rows = [torch.randn(64, 64, requires_grad=True) for _ in range(20)]
    with made.again_in_backward():
        # As where the last layer is in float32 and the first one is not.
        whole = made.add(lambda: stored * 2, [stored]).double()
        squares = [(row * 3).square() for row in rows]  # each saves a new tensor as large as the weight was
        output = torch.stack(squares).sum() + whole.sum()
    output.backward()
    for row in rows:
        torch.testing.assert_close(row.grad, 18 * row.detach())
    assert torch.equal(stored.grad, torch.full_like(stored, 2))
