"""The mask for `attn_implementation="topk"`: a description of what is visible in place of a [B, 1, N, M] tensor.

Some model families compute with the mask before attention reads it (Siglip2, Doge, LASR, T5Gemma 2), or hand it to
layers of their own that add it to scores (BigBirdPegasus). The description turns into a tensor for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Code that adds a mask to scores means a mask of numbers: 0 where a query may see a key.
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


@dataclass(frozen=True, eq=False)
class CompactMask:
    """Which keys each query may see, as transformers describes it.

    As an argument of a torch function, and for every attribute of a tensor, it is the mask [B, 1, N, M] bool, True =
    may attend. Added to scores it is a mask of numbers, as in eager attention.

    B batch, N queries, M keys

    mask_function  (batch, head, query, key) indices -> bool, on positions in the whole sequence
    padding        [B, all tokens so far] bool, True = a real token, or None
    q_offset       position of the first query; an int, or an int tensor with a static cache
    kv_offset      position of the first key
    may_be_none    whether eager attention gets no mask where nothing is hidden
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    mask_function: Callable[..., Any]
    padding: Tensor | None
    use_vmap: bool
    device: torch.device | str
    may_be_none: bool = False

    # generate() prepares masks in advance for static caches. It treats them as the 4-D tensors that they usually are.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch_size, 1, self.q_length, self.kv_length)

    def __getitem__(self, index: Any) -> Tensor:
        """Part of the mask as a tensor, for models whose own selector of keys reads it."""
        return self.dense()[index]

    @property
    def is_bidirectional(self) -> bool:
        """Whether nothing but padding is hidden."""
        from transformers.masking_utils import bidirectional_mask_function

        return self.mask_function is bidirectional_mask_function

    @property
    def is_causal(self) -> bool:
        """Whether nothing but padding and later keys is hidden."""
        from transformers.masking_utils import causal_mask_function

        return self.mask_function is causal_mask_function

    # Without this line Python would take an object with __getitem__ alone for an endless sequence.
    __iter__ = None

    dtype = torch.bool

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        scores = next((x for x in args if isinstance(x, Tensor) and x.is_floating_point()), None)
        adds_to = scores.dtype if scores is not None and func in _ADDITIONS else None

        def written_out(argument: Any) -> Any:
            if isinstance(argument, CompactMask):
                return argument.dense() if adds_to is None else argument.additive(adds_to)
            if isinstance(argument, list | tuple):  # as torch.cat takes
                return type(argument)(written_out(part) for part in argument)
            return argument

        return func(*map(written_out, args), **{name: written_out(x) for name, x in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        # Only what no field and no method has comes here. Python itself asks for private names, e.g. to copy an object.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dense(), name)

    def __invert__(self) -> Tensor:
        return ~self.dense()

    def __add__(self, scores: Tensor) -> Tensor:
        return self.additive(scores.dtype) + scores

    def additive(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, N, M] in this dtype: 0 where a query may see a key, the lowest finite number elsewhere."""
        visible = self.dense()
        lowest = torch.finfo(dtype).min
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, lowest)

    def as_eager(self, dtype: torch.dtype) -> Tensor | None:
        """What eager attention would get: None, or the mask of numbers in this dtype."""
        hides_nothing = self.is_bidirectional and self.key_padding() is None
        return None if self.may_be_none and hides_nothing else self.additive(dtype)

    def contiguous(self) -> CompactMask:
        return self

    def to(self, device: torch.device | str, **_: object) -> CompactMask:
        offset = self.q_offset.to(device) if isinstance(self.q_offset, Tensor) else self.q_offset
        padding = None if self.padding is None else self.padding.to(device)
        return replace(self, q_offset=offset, padding=padding, device=device)

    def key_padding(self) -> Tensor | None:
        """[B, 1, 1, M] bool, or None where every key is a real token."""
        if self.padding is None:
            return None
        return self._key_padding() if torch.compiler.is_compiling() else self._known_padding

    @cached_property  # once for all layers
    def _known_padding(self) -> Tensor | None:
        return self._key_padding()

    def _key_padding(self) -> Tensor | None:
        from transformers.masking_utils import prepare_padding_mask

        padding = prepare_padding_mask(self.padding, self.kv_length, self.kv_offset)
        padding = padding[:, self.kv_offset : self.kv_offset + self.kv_length].bool()
        # The values cannot be read while tracing; then the padding stays.
        if not torch.compiler.is_compiling() and bool(padding.all()):
            return None
        return padding[:, None, None, :]

    def dense(self, queries: range | None = None) -> Tensor:
        """[B, 1, n, M] bool for a range of the queries, all by default."""
        from transformers.masking_utils import sdpa_mask

        start, length = (0, self.q_length) if queries is None else (queries.start, len(queries))
        mask = sdpa_mask(
            batch_size=self.batch_size,
            q_length=length,
            kv_length=self.kv_length,
            q_offset=self.q_offset + start,
            kv_offset=self.kv_offset,
            mask_function=self.mask_function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        assert mask is not None
        return mask


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | CompactMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    allow_is_bidirectional_skip: bool = False,
    **_: object,
) -> CompactMask:
    """transformers calls this in place of its own mask builders. It always returns a mask, so nothing is guessed."""
    from transformers.masking_utils import causal_mask_function

    if isinstance(attention_mask, CompactMask):  # prepared by generate()
        return attention_mask
    if isinstance(q_offset, Tensor):
        # The cache increases this same tensor before attention reads the mask, so keep a copy.
        q_offset = q_offset.clone() if torch.compiler.is_compiling() else int(q_offset)
    return CompactMask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        causal_mask_function if mask_function is None else mask_function,  # "or" stops the compiler of torch 2.10
        attention_mask,
        use_vmap,
        device,
        allow_is_bidirectional_skip,
    )
