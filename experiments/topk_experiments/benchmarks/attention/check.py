"""Whether a method computes what it is timed for: against float64, at a short length."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...rivals.names import kept, method_of
from ...runs.checks import NEAR_TIE, largest_error
from ...runs.turns import Tensors
from .methods import heads_of, input_names, is_package, new_inputs, new_method, reference, run_topk
from .works import Point, Work

# Odd, and k and chunks a quarter of it: kernels meet full tiles and leftovers, most keys are left out.
_LENGTH = 333
# Of points, whose memory is measured in the same process: at 333 the check left holes in the heap that raised the peak
# of a layer at L = 2,048 from 97 to as much as 114 MiB.
_LENGTH_OF_POINTS = 193
_HEADS = 2
# The gradient of the key projection's bias is zero apart from rounding.
_LEAST_SCALE_OF_LAYERS = 0.1


def check(method: str, work: Work, seed: int = 0) -> float | None:
    """Compare output and gradients of a method with the truth, for the work's options.

    This library must draw the same dropout as its reference backend; rivals draw their own and are checked without.
    Random features are compared with their weights written out.

    Returns the largest difference as a fraction of its tensor's largest entry; None for performer-pytorch, which is an
    approximation.

    Raises:
        CheckFailedError: they differ by more than rounding.
    """
    if is_package(method, work):
        return None
    longest = _LENGTH_OF_POINTS if isinstance(work, Point) else _LENGTH
    small = replace(
        work,
        length=min(work.length, longest),
        num_heads=min(work.num_heads, _HEADS),
        k=min(work.k, longest // 4),
        chunk_size=None if work.chunk_size is None else min(work.chunk_size, longest // 4),
        dropout_p=work.dropout_p if method_of(method).is_ours else 0.0,
    )
    torch.manual_seed(seed)
    computed = new_method(method, small)
    tensors = computed.stored(new_inputs(small))
    k = kept(method, small.k)
    return largest_error(
        computed.run,
        computed.truth or reference(small, k),
        tensors,
        _is_clear(small, tensors, k),
        names=input_names(small),
        what=f"{method}, {small}",
        seed=seed,
        least_scale=_LEAST_SCALE_OF_LAYERS if small.projections else 0.0,
    )


@torch.no_grad()
def _is_clear(work: Work, tensors: Tensors, k: int | None) -> Tensor | float:
    """0 for queries whose k-th best score is close to the next, otherwise 1: [1, H, L, 1], of a layer [1, L, 1]."""
    if k is None or k >= work.length:
        return 1.0
    query, key, value, others = heads_of(work, tuple(tensor.double() for tensor in tensors))
    whole = replace(work, dropout_p=0.0)
    _, selection = run_topk(whole, k + 1, "reference", query, key, value, *others, return_selection=True)
    next_best, kth_best = selection.weights.topk(2, largest=False).values.unbind(-1)
    # Logarithms of weights are scores, up to a constant of the row. A weight of 0 is an empty slot: nothing to mistake.
    is_clear = ~(kth_best.log() - next_best.log() < NEAR_TIE)
    return (is_clear.all(1) if work.projections else is_clear).unsqueeze(-1)
