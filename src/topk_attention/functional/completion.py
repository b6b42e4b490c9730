"""Completion: the keys that a query does not keep enter its softmax as one more entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.autocast import autocast_off, in_autocast_dtype
from ..backends.calls import KeySums, accumulation_dtype
from ..backends.visible_keys import sum_over_keys
from .checks import check_floating, shape_of


@dataclass(frozen=True, eq=False)
class Completion:
    """What top-k attention adds for the rest, the keys that a query sees and does not keep.

    The softmax of a query gets one more entry, beside the exp(score) of the kept keys. With n keys in the rest, whose
    scores have the mean m, it has

    weight  mass_scale * n * exp((1 - lift) * m + lift * smallest kept score)
    value   the mean of (1 + scale * query . key[j] - the mean of that) * value[j]: exp(score) to the first order

    These means are exact, and no score of the rest is computed for them: a sum over the rest is one over all visible
    keys, of keys, of values and of key times value, less one over the kept keys.

    mass_scale  a finite number of at least 0, or one for each query head: a list, a tuple, or a tensor [H] of any
                floating dtype, which gets a gradient; 0 is top-k attention alone
    lift        0 to 1. exp(m) is less than the mean of exp(score). The smallest kept score tells how far scores spread,
                and 0.35 was best for a language model on text that no table reports on (LOG.md).

    Where all scores of the rest are equal, lift = 0 gives the output of full attention.

    >>> import torch
    >>> from topk_attention import topk_attention
    >>> q, key, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
    >>> topk_attention(q, key, v, k=16, completion=Completion()).shape
    torch.Size([2, 8, 128, 64])
    """

    mass_scale: float | Sequence[float] | Tensor = 1.0
    lift: float = 0.35

    def __post_init__(self) -> None:
        if isinstance(self.lift, bool) or not isinstance(self.lift, int | float):
            raise TypeError(f"lift must be a number from 0 to 1, got {type(self.lift).__name__} {self.lift!r}")
        if not 0 <= self.lift <= 1:
            raise ValueError(f"lift must be from 0 to 1, got {self.lift}")
        scale = self.mass_scale
        if isinstance(scale, Tensor):
            check_floating("mass_scale", scale)
            if scale.ndim > 1:
                raise ValueError(f"mass_scale must be one number, or one for each head, got {shape_of(scale)}")
            return
        numbers = scale if isinstance(scale, list | tuple) else [scale]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(
                    "mass_scale must be a number, one number for each head, or a tensor of them, got "
                    f"{type(number).__name__} {number!r}"
                )
            if not 0 <= number < math.inf:
                raise ValueError(f"mass_scale must be finite and at least 0, got {number}")
        if isinstance(scale, list):
            object.__setattr__(self, "mass_scale", tuple(scale))

    def __str__(self) -> str:
        """The scales and the lift in a short phrase, for reports."""
        scale = self.mass_scale.tolist() if isinstance(self.mass_scale, Tensor) else self.mass_scale
        scale = [scale] if isinstance(scale, int | float) else scale
        if min(scale) == max(scale):
            return f"mass scale {scale[0]:g}, lift {self.lift:g}"
        return f"mass scales {min(scale):g} to {max(scale):g}, lift {self.lift:g}"

    def sums(self, key: Tensor, value: Tensor) -> KeySums:
        """Sums over keys [..., M, D] and values [..., M, E], for `topk_attention(key_sums=...)`.

        With more keys later, `sums.plus(completion.sums(new_keys, new_values))` has those of all. Under autocast they
        are sums of the keys and values as attention casts them.
        """
        check_floating("key", key)
        check_floating("value", value)
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have shape {shape_of(key)} but for its last axis, like key, got {shape_of(value)}"
            )
        key, value = in_autocast_dtype(key.detach()), in_autocast_dtype(value.detach())
        with autocast_off(key.device.type):
            return sum_over_keys(key, value)

    def per_head(self, num_heads: int, query: Tensor) -> Tensor:
        """The scales [H] in the accumulation dtype of a call with this query."""
        dtype = accumulation_dtype(query.dtype)
        scale = self.mass_scale
        if isinstance(scale, int | float):
            return torch.full((num_heads,), scale, dtype=dtype, device=query.device)
        if isinstance(scale, Tensor):
            if scale.device != query.device:
                raise ValueError(f"mass_scale must be on {query.device} like query, got {scale.device}")
            scale = scale.to(dtype)
        else:
            scale = torch.tensor(scale, dtype=dtype, device=query.device)
        if scale.ndim == 1 and scale.shape[0] != num_heads:
            raise ValueError(
                f"mass_scale must hold one number for each of the {num_heads} query heads, got {scale.shape[0]}"
            )
        return scale.expand(num_heads)


def check_completion(name: str, completion: object, num_heads: int | None) -> None:
    """Raise unless this is a Completion with one scale, or with one for each of the heads, if their number is known."""
    if not isinstance(completion, Completion):
        raise TypeError(f"{name} must be a Completion or None, got {type(completion).__name__} {completion!r}")
    scale = completion.mass_scale
    num_scales = scale.numel() if isinstance(scale, Tensor) and scale.ndim == 1 else None
    num_scales = len(scale) if isinstance(scale, tuple) else num_scales
    if num_scales is not None and num_heads is not None and num_scales != num_heads:
        raise ValueError(
            f"{name} must hold one mass_scale for each of the {num_heads} query heads, got {num_scales}; one number "
            "serves them all"
        )
