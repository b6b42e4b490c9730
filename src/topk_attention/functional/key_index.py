"""`KeyIndex`: what is kept beside keys that many calls with few queries read, as while a model generates."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..backends.calls import KeyPanels
from ..backends.cpu import key_index as kernels
from .checks import check_count, check_floating, shape_of, version_of

# Room for a quarter more keys, as caches grow.
_GROWTH = 4


class KeyIndex:
    """8-bit integers of keys, and bounds of their errors, kept beside the keys for calls that have few queries.

    A call with up to 16 queries to a key head, such as the next token of a generating model, finds in the index which
    keys can be among the k best, and reads those alone. The keys that it chooses, and its output, are those of a call
    without the index to the last bit.

    key  [..., G, M, D]  the keys, as `topk_attention` takes them
    keys_in_files        whether key lies in a file that is mapped into memory, as in a cache with storage. Rows that a
                         query may choose are then asked for all at once, not one after the other (on Linux)

    An index belongs to the tensor that it was made of and is refused with any other, or once that has changed in place.
    Changes that leave a tensor's version as it was (through `.data` or NumPy, of tensors of inference mode) are noticed
    only in keys that a query reads: build a new index after them.
    After keys were appended, removed or reordered, do the same with the index and hand it the new tensor:

    - `append(key)` where `key` begins with the keys that are indexed; only the new ones are read, and up to 31 before
      them (all, whenever their number has doubled: the index holds keys less their mean)
    - `crop(length)` and `reorder(batch_indices)`, then `append(key)`

    It takes about D + 1 bytes for each key and key head, and room for a quarter more. It also holds on to the tensor.
    Where no call can use it (tensors on other devices, float64, no compiled kernels) it takes none, and calls do
    without it; so do those that need a gradient, a k of all keys, other backends or more queries, and compiled code.

    Raises:
        TypeError: key is no tensor.
        ValueError: key has fewer than three axes or another dtype.

    >>> import torch
    >>> from topk_attention import topk_attention
    >>> key, value = torch.randn(2, 1, 8, 5000, 64)
    >>> index = KeyIndex(key)
    >>> query = torch.randn(1, 32, 1, 64)
    >>> topk_attention(query, key, value, k=64, enable_gqa=True, key_index=index).shape
    torch.Size([1, 32, 1, 64])
    """

    def __init__(self, key: Tensor, *, keys_in_files: bool = False) -> None:
        _check_key(key)
        self.keys_in_files = keys_in_files
        self._length = 0
        self._centred_length = 0
        self._panels: KeyPanels | None = None
        self._shape = (*key.shape[:-2], key.shape[-1])
        self._dtype, self._device = key.dtype, key.device
        self._of: Tensor | None = None
        self._version: int | None = None
        self.append(key)

    @property
    def length(self) -> int:
        """How many keys are indexed."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Memory of the index itself, with its room for more keys."""
        return 0 if self._panels is None else sum(part.nbytes for part in self._panels)

    def append(self, key: Tensor) -> None:
        """Index what `key` [..., G, M, D] holds behind the indexed keys. From then on the index is of this tensor.

        Raises:
            ValueError: key has fewer keys than are indexed, or differs in dtype, device or another axis.
        """
        _check_key(key)
        if (*key.shape[:-2], key.shape[-1]) != self._shape:
            wanted = [*self._shape[:-1], "M", self._shape[-1]]
            raise ValueError(f"key must have shape {_text(wanted)} to follow the indexed keys, got {shape_of(key)}")
        if key.dtype != self._dtype or key.device != self._device:
            raise ValueError(
                f"key must be {self._dtype} on {self._device} to follow the indexed keys, got {key.dtype} on "
                f"{key.device}; build a new KeyIndex(key)"
            )
        num_keys = key.shape[-2]
        if num_keys < self._length:
            raise ValueError(
                f"key must hold the {self._length} indexed keys first, got {num_keys} keys; crop({num_keys}) the index "
                "first, or build a new KeyIndex(key)"
            )
        if kernels.index_obstacle(key) is None and key.numel() > 0 and num_keys > self._length:
            self._index(key.detach())
        self._length = num_keys
        self._of = key.detach()
        self._version = version_of(key)

    def crop(self, length: int) -> None:
        """Keep the first `length` keys alone; `append(key)` then says which tensor holds them.

        Raises:
            ValueError: fewer keys are indexed.
        """
        if not isinstance(length, int) or not 0 <= length <= self._length:
            raise ValueError(f"length must be an int from 0 to the {self._length} indexed keys, got {length!r}")
        self._length, self._of = length, None

    def reorder(self, batch_indices: Tensor) -> None:
        """Let entry i of the first axis be what entry batch_indices[i] was, as beams do; `append(key)` then says which
        tensor holds the keys in this order.

        Raises:
            ValueError: keys have no batch axis.
        """
        self._check_has_batch("reorder")
        self._change_batch(lambda part: part.index_select(0, batch_indices.to(part.device)), len(batch_indices))

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat each entry of the first axis, as `torch.repeat_interleave` does; then `append(key)`.

        Raises:
            ValueError: keys have no batch axis, or repeats is below 1.
        """
        check_count("repeats", repeats)
        self._check_has_batch("repeat_interleave")
        self._change_batch(lambda part: part.repeat_interleave(repeats, dim=0), self._shape[0] * repeats)

    def copy(self) -> KeyIndex:
        """Another index of the same tensor, that grows by itself."""
        twin = KeyIndex.__new__(KeyIndex)
        vars(twin).update(vars(self))
        if self._panels is not None:
            twin._panels = KeyPanels(*(part.clone() for part in self._panels))
        return twin

    def __copy__(self) -> KeyIndex:
        return self.copy()

    def __deepcopy__(self, memo: object) -> KeyIndex:
        return self.copy()

    def __repr__(self) -> str:
        shape = [*self._shape[:-1], self._length, self._shape[-1]]
        return f"KeyIndex({_text(shape)}, {self._dtype}, {self.nbytes:,} bytes)"

    def check_is_of(self, key: Tensor) -> None:
        """Raise unless this is the tensor that the index was last made of, unchanged.

        Raises:
            ValueError: it is another one, or it has changed in place.
        """
        of = self._of
        if of is None:
            raise ValueError(
                "key_index was cropped or reordered and does not know the keys since; call key_index.append(key)"
            )
        if not _is_same(of, key):
            raise ValueError(
                f"key_index is of another tensor: {shape_of(of)} {of.dtype}, and key is {shape_of(key)} {key.dtype}; "
                "where key holds the indexed keys first call key_index.append(key), otherwise build a new KeyIndex(key)"
            )
        if self._version != version_of(key):
            raise ValueError(
                "key_index is out of date: key has changed in place since it was indexed; if only keys behind the "
                f"first {self._length} are new call key_index.append(key), otherwise build a new KeyIndex(key)"
            )

    def panels(self) -> KeyPanels | None:
        """What the kernels read; None where no call can use the index."""
        return self._panels if self._length > 0 else None

    def _index(self, key: Tensor) -> None:
        num_keys, (*leading, head_dim) = key.shape[-2], self._shape
        batch_size, num_heads = math.prod(leading[:-1]), leading[-1]
        start = self._length
        # The mean of the first keys serves the later ones less and less: bounds stay true, but more keys pass.
        if start == 0 or num_keys >= 2 * self._centred_length:
            start, self._centred_length = 0, num_keys
        room = 0 if self._panels is None else self._panels.panels.shape[2] * kernels.PANEL_ROWS
        if num_keys > room:
            wanted = num_keys + num_keys // _GROWTH
            larger = kernels.new_panels(batch_size, num_heads, head_dim, wanted + -wanted % kernels.PANEL_ROWS)
            if start > 0 and self._panels is not None:
                used = (start - 1) // kernels.PANEL_ROWS + 1
                for old, new in zip(self._panels[:3], larger[:3], strict=True):
                    new[:, :, :used] = old[:, :, :used]
                larger.centre.copy_(self._panels.centre)
            self._panels = larger
        assert self._panels is not None
        kernels.index_keys(key.reshape(batch_size, num_heads, num_keys, head_dim), start, self._panels)

    def _check_has_batch(self, method: str) -> None:
        if len(self._shape) < 3:
            raise ValueError(f"{method} is for keys with a batch axis, but these are [heads, length, size]")

    def _change_batch(self, change: Callable[[Tensor], Tensor], size: int) -> None:
        leading = self._shape[:-2]

        def changed(part: Tensor) -> Tensor:
            return change(part.view(*leading, *part.shape[1:])).flatten(0, len(leading) - 1)

        if self._panels is not None:
            self._panels = KeyPanels(*map(changed, self._panels))
        self._shape, self._of = (size, *self._shape[1:]), None


def is_of(index: KeyIndex, key: Tensor) -> bool:
    """Whether the index is of this tensor, unchanged."""
    of = index._of
    return of is not None and _is_same(of, key) and index._version == version_of(key)


def _is_same(of: Tensor, key: Tensor) -> bool:
    return (
        of.data_ptr() == key.data_ptr()
        and of.shape == key.shape
        and of.stride() == key.stride()
        and of.dtype == key.dtype
        and of.device == key.device
    )


def _check_key(key: Tensor) -> None:
    check_floating("key", key)
    if key.ndim < 3:
        raise ValueError(f"key must have shape [..., heads, length, size], got {shape_of(key)}")


def _text(shape: list[int | str] | list[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
