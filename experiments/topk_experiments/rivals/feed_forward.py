"""The paper's own two ways to save memory in a feed-forward layer (Gupta et al. 2021), written out in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topk_attention.backends.activations import activate


def in_chunks(operation: Callable[..., Tensor], chunk_size: int) -> Callable[..., Tensor]:
    """The operation on `chunk_size` rows of its first argument at a time. Backward passes compute each chunk again."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([checkpoint(operation, rows, *weights, use_reentrant=False) for rows in x.split(chunk_size)])

    return run


def sparse_topk_feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, *, k: int, activation: str = "relu") -> Tensor:
    """A feed-forward layer that keeps the k largest pre-activations, as a sparse matrix times a dense one.

    x [T, C], w_in [F, C], w_out [O, F] -> [T, O]

    Of tied pre-activations any may be kept. Torch forms the gradient of the sparse matrix as a dense [T, F].
    """
    scores = F.linear(x, w_in)
    kept = scores.topk(min(k, scores.shape[1]))
    order = kept.indices.argsort(-1)  # [T, k], so that the matrix is coalesced
    rows = torch.arange(len(x), device=x.device).repeat_interleave(order.shape[1])
    place = torch.stack([rows, kept.indices.gather(-1, order).flatten()])
    entries = activate(kept.values.gather(-1, order), activation).flatten()
    hidden = torch.sparse_coo_tensor(place, entries, scores.shape, is_coalesced=True, check_invariants=False)
    return torch.sparse.mm(hidden, w_out.T)
