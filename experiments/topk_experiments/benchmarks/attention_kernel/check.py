"""Whether a method computes what it is timed for: against the reference backend in float64, at a short length."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...rivals.names import kept
from ...runs.checking import NEAR_TIE, largest_error, output_and_gradients
from .methods import new_inputs, new_operation, run_topk
from .works import Work

_NAMES = ("query", "key", "value", "bias")

# Odd, and k a quarter of it: kernels meet full tiles and leftovers, and most keys are left out.
_LENGTH = 333
_K = 83
_HEADS = 2


def check(method: str, work: Work, seed: int = 0) -> float | None:
    """Compare output and gradients of a method with the truth, for the work's options.

    Top-k attention must draw the same dropout as the reference; PyTorch's draws its own and is checked without.

    Returns the largest difference as a fraction of its tensor's largest entry; None for Performer, an approximation.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    if method == "performer":
        return None
    small = replace(
        work,
        length=min(work.length, _LENGTH),
        num_heads=min(work.num_heads, _HEADS),
        k=min(work.k, _K),
        dropout_p=0.0 if method == "sdpa" else work.dropout_p,
    )
    torch.manual_seed(seed)
    inputs = new_inputs(small)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    k = kept(method, small.k)
    output_gradient = torch.randn(exact[0].shape, dtype=torch.float64) * _is_clear(small, exact, k)
    torch.manual_seed(seed)
    truth = output_and_gradients(run_topk(small, k, "reference", *exact), exact, _NAMES, output_gradient)
    torch.manual_seed(seed)
    output = new_operation(method, small)(*inputs)
    return largest_error(
        output_and_gradients(output, inputs, _NAMES, output_gradient), truth, told=f"{method}, {small}"
    )


def _is_clear(work: Work, tensors: tuple[Tensor, ...], k: int | None) -> Tensor:
    """[1, H, L, 1], True for queries whose k-th best score is well above the next."""
    if k is None or k >= work.length:
        return torch.ones(1, work.num_heads, work.length, 1, dtype=torch.bool)
    without_gradient = (tensor.detach() for tensor in tensors)
    _, selection = run_topk(work, k + 1, "reference", *without_gradient, return_selection=True)
    next_best, kth_best = selection.weights.topk(2, largest=False).values.unbind(-1)
    # Logarithms of weights are scores, up to a constant of the row. A weight of 0 is an empty slot: nothing to mistake.
    return ~(kth_best.log() - next_best.log() < NEAR_TIE).unsqueeze(-1)
