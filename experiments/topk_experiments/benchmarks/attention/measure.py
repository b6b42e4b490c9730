"""What the processes that measure need to know of attention; the floor is the score product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...rivals.names import kept, method_of
from ...runs.checks import NEAR_TIE
from ...runs.turns import Operation, Tensors, at_most
from .methods import heads_of, input_names, is_package, new_inputs, new_method, reference, run_topk
from .works import Point, Work

# Of the check. Odd, and k and chunks a quarter of it: kernels meet full tiles and leftovers, most keys are left out.
_LENGTH = 333
# Of points, whose memory is measured in the same process: at 333 the check left holes in the heap that raised the peak
# of a layer at L = 2,048 from 97 to as much as 114 MiB.
_LENGTH_OF_POINTS = 193
# The buffer must stay in cache, so that the product is timed and not the memory behind it. Of the tiles tried (1 to 8
# MiB, 256 to 2,048 keys; L = 2,048, one thread) these were fastest: median 87 GFLOP/s, the others 72 to 81.
_TILE_BYTES = 2 * 2**20
_TILE_KEYS = 256


def score_product(work: Work, inputs: Tensors) -> Callable[[], None]:
    """All scores that attention must look at, tile by tile into one buffer."""
    query, key = (tensor.detach()[0] for tensor in inputs[:2])  # [H, L, D]
    num_keys = min(work.length, _TILE_KEYS)
    num_queries = max(1, min(work.length, _TILE_BYTES // (query.element_size() * work.num_heads * num_keys)))
    buffer = query.new_empty(work.num_heads * num_queries * num_keys)

    def run() -> None:
        for start in range(0, work.length, num_queries):
            end = min(start + num_queries, work.length)
            visible = end if work.is_causal else work.length
            for first_key in range(0, visible, num_keys):
                queries = query[:, max(start, first_key) if work.is_causal else start : end]
                keys = key[:, first_key : min(first_key + num_keys, visible)]
                shape = (work.num_heads, queries.shape[1], keys.shape[1])
                torch.bmm(queries, keys.mT, out=buffer[: math.prod(shape)].view(shape))

    return run


def small(method: str, work: Work) -> Work | None:
    """The work at a short length, for the check; None for performer-pytorch, which is an approximation.

    This library must draw the same dropout as its reference backend; rivals draw their own and are checked without.
    """
    if is_package(method, work):
        return None
    longest = _LENGTH_OF_POINTS if isinstance(work, Point) else _LENGTH
    return replace(
        at_most(work, {"length": longest, "num_heads": 2, "k": longest // 4}),
        chunk_size=None if work.chunk_size is None else min(work.chunk_size, longest // 4),
        dropout_p=work.dropout_p if method_of(method).is_ours else 0.0,
    )


@torch.no_grad()
def is_clear(method: str, work: Work, tensors: Tensors) -> Tensor | float:
    """0 for queries whose k-th best score is close to the next, otherwise 1: [1, H, L, 1], of a layer [1, L, 1]."""
    k = kept(method, work.k)
    if k is None or k >= work.length:
        return 1.0
    query, key, value, others = heads_of(work, tuple(tensor.double() for tensor in tensors))
    whole = replace(work, dropout_p=0.0)
    _, selection = run_topk(whole, k + 1, "reference", query, key, value, *others, return_selection=True)
    next_best, kth_best = selection.weights.topk(2, largest=False).values.unbind(-1)
    # Logarithms of weights are scores, up to a constant of the row. A weight of 0 is an empty slot: nothing to mistake.
    clear = ~(kth_best.log() - next_best.log() < NEAR_TIE)
    return (clear.all(1) if work.projections else clear).unsqueeze(-1)


OPERATION = Operation(
    Work,
    Point,
    new_method,
    new_inputs,
    score_product,
    tiny={"length": 64},
    small=small,
    reference=reference,
    is_clear=is_clear,
    input_names=input_names,
    # The gradient of the key projection's bias is zero apart from rounding.
    least_scale=lambda work: 0.1 if work.projections else 0.0,
)
