"""An index of the keys in a cache layer that grows in place: while a model generates, each new token adds its own key.

Like the sums for completion it hangs on the very key tensor that it is of. Only a layer of `TopKCache` hands it on, and
only with keys that nobody else has changed; whatever else is done to a cache, another tensor has no index, and the next
call makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.autocast import in_autocast_dtype
from ..backends.cpu.key_index import MOST_ROWS, index_obstacle
from ..backends.operators import is_transformed
from ..functional import KeyIndex
from ..functional.checks import version_of
from ..functional.key_index import is_of

_INDEX = "_topk_attention_index"
# Below this a call reads the keys themselves as fast as their index: new keys of each head take some microseconds.
LEAST_KEYS = 2048


class CachedIndex:
    """The index of one layer's keys. There is none until a call asks for it.

    keys_in_files  as `KeyIndex` has it
    when_made      called whenever all keys have been indexed, which takes long where there are many
    """

    def __init__(self, keys_in_files: bool = False, when_made: Callable[[], None] | None = None) -> None:
        self._keys_in_files, self._when_made = keys_in_files, when_made
        self._index: KeyIndex | None = None
        self._version: int | None = None

    @property
    def is_made(self) -> bool:
        """Whether a call has asked for it."""
        return self._index is not None

    def is_of(self, key: Tensor | None) -> bool:
        """Whether the layer has put this tensor there and nobody has changed it in place."""
        return getattr(key, _INDEX, None) is self and key is not None and self._version == version_of(key)

    def go_on_with(self, key: Tensor, begins_with_these: bool) -> None:
        """Be that of another key tensor.

        begins_with_these  whether it begins with the keys that are indexed, or has only these
        """
        if not begins_with_these or key.shape[-2] == 0:  # without a key, those of another batch may follow
            self._index = None
        elif self._index is not None and self._index.length > key.shape[-2]:
            self._index.crop(key.shape[-2])
        self._version = version_of(key)
        setattr(key, _INDEX, self)

    def reorder(self, batch_indices: Tensor) -> None:
        """Follow keys whose batch entries are put in another order."""
        if self._index is not None:
            self._index.reorder(batch_indices)

    def over_all(self, key: Tensor) -> KeyIndex:
        """The index of this tensor, which carries it; keys that are not indexed yet are."""
        if not self.is_of(key):
            self.go_on_with(key, False)
        if self._index is None:
            self._index = KeyIndex(key, keys_in_files=self._keys_in_files)
            if self._when_made is not None:
                self._when_made()
        elif not is_of(self._index, key):
            self._index.append(key)
        return self._index


def index_of_cached(query: Tensor, key: Tensor, k: int | tuple[int, ...] | None, backend: str) -> KeyIndex | None:
    """The index of cached keys for a call that can use one; None for others.

    query  [B, H, N, D]
    key    [B, G, M, D]
    """
    cached: CachedIndex | None = getattr(key, _INDEX, None)
    if cached is None or k is None or is_transformed() or backend not in ("auto", "cpu"):
        return None
    rows, num_keys = query.shape[1] // key.shape[1] * query.shape[2], key.shape[2]
    if rows > MOST_ROWS or num_keys < LEAST_KEYS or (k if isinstance(k, int) else min(k)) >= num_keys:
        return None
    if (torch.is_grad_enabled() and query.requires_grad) or in_autocast_dtype(key) is not key:
        return None
    return cached.over_all(key) if index_obstacle(key) is None else None
