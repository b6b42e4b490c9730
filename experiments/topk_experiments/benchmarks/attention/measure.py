"""What the processes that measure memory and time need to know of attention; the floor is the score product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ...runs.turns import Operation, Tensors
from .check import check
from .methods import new_inputs, new_method
from .works import Point, Work

_WARM_UP_LENGTH = 64
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


def _tiny(work: Work) -> Work:
    return replace(work, length=min(work.length, _WARM_UP_LENGTH))


OPERATION = Operation(Work, Point, new_method, new_inputs, check, score_product, _tiny)
