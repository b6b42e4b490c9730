"""A kept index of keys: their 8-bit integers, from which few rows find their best keys without reading all of K.

What it holds the kernels know: csrc/kernels/kept_index-inl.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import AttentionCall, KeyPanels
from ..operators import needs_gradient
from . import library

PANEL_ROWS = 32
# More queries that share a key head are faster in blocks, for which the kernels screen keys themselves.
MOST_ROWS = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def index_obstacle(key: Tensor) -> str | None:
    """Why keys like these cannot be indexed here, None where they can."""
    if key.device.type != "cpu":
        return f"an index is for CPU tensors, not {key.device.type}"
    if key.dtype not in _DTYPES:
        return f"{key.dtype} keys are scored in full"
    return library.problem()


def new_panels(batch_size: int, num_heads: int, head_dim: int, room: int) -> KeyPanels:
    """Memory for an index of up to `room` keys, a multiple of 32."""
    num_panels = room // PANEL_ROWS
    panel_bytes = torch.ops.topk_attention.cpu_index_panel_bytes(head_dim)
    return KeyPanels(
        panels=torch.empty(batch_size, num_heads, num_panels, panel_bytes, dtype=torch.uint8),
        numbers=torch.empty(batch_size, num_heads, num_panels, 4),
        unscreened=torch.empty(batch_size, num_heads, num_panels, dtype=torch.int32),
        centre=torch.empty(batch_size, num_heads, head_dim + -head_dim % 4),
    )


def index_keys(key: Tensor, start: int, panels: KeyPanels) -> None:
    """Index the keys [B, G, M, D] from `start` on; those before are indexed already. In place."""
    torch.ops.topk_attention.cpu_index_keys(key, start, *panels)


def is_indexed(call: AttentionCall) -> bool:
    """Whether this call reads the index that it has. Without it the result is the same."""
    if call.key_index is None or call.is_full_attention():
        return False
    rows = call.query.shape[1] // call.key.shape[1] * call.query.shape[2]
    return 0 < rows <= MOST_ROWS and not needs_gradient(*call.differentiable())
