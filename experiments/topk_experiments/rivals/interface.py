"""The one interface of all methods, and its argument checks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from topk_attention.functional.checks import check_dropout, check_floating, check_same_dtype_and_device, shape_of


class AttentionMethod(nn.Module):
    """A method of computing attention.

    B batch, H heads, N queries, M keys, D head size, E value size
    """

    can_drop = True  # whether the method forms attention weights, on which dropout could act

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """
        query      [B, H, N, D]  any floating dtype
        key        [B, H, M, D]  same dtype and device as query
        value      [B, H, M, E]  same dtype and device as query
        key_mask   [B, M]  bool, True = may attend
        is_causal  query i sees keys j <= i + M - N: the last query sees all keys
        dropout_p  probability of dropping an attention weight, in training and evaluation mode alike

        Returns [B, H, N, E] in the dtype of query. A query that may attend to nothing returns zeros.

        Raises:
            TypeError: an argument is no tensor, or key_mask is not bool.
            ValueError: a shape, dtype or device does not fit, or the method forms no weights to drop.
        """
        _check(query, key, value, key_mask)
        check_dropout(dropout_p)
        if dropout_p > 0 and not self.can_drop:
            raise ValueError(
                f"dropout_p must be 0 for {type(self).__name__}, which never forms attention weights that could be "
                f"dropped, got {dropout_p}"
            )
        return self.attend(query, key, value, key_mask, is_causal, dropout_p)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool, dropout_p: float
    ) -> Tensor:
        """`forward` after its checks."""
        raise NotImplementedError


def visible_keys(
    num_queries: int, num_keys: int, key_mask: Tensor | None, offset: int | None, device: torch.device
) -> Tensor:
    """Which keys each query may attend to: bool, broadcasts to [B, H, N, M].

    offset  the last key that the first query sees; each further query sees one more. None: all queries see all keys
    """
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if offset is not None:
        visible = visible.tril_(offset)
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _check(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [batch, heads, length, size], got {shape_of(tensor)}")
    check_same_dtype_and_device("query", query, key=key, value=value)
    batch, heads, _, size = query.shape
    if key.shape[:2] != query.shape[:2] or key.shape[3] != size:
        raise ValueError(f"key must have shape [{batch}, {heads}, M, {size}] to match query, got {shape_of(key)}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape [{batch}, {heads}, {key.shape[2]}, E] to match key, got {shape_of(value)}"
        )
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor (True = may attend), got {kind}; convert it with .bool()")
    if list(key_mask.shape) != [batch, key.shape[2]]:
        raise ValueError(f"key_mask must have shape [{batch}, {key.shape[2]}], got {shape_of(key_mask)}")
    if key_mask.device != query.device:
        raise ValueError(f"key_mask must be on {query.device} like query, got {key_mask.device}; move it")
