"""Cache layers whose keys and values lie in files: what `TopKCache(storage=folder)` is made of."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.cpu.key_index import MOST_ROWS
from ..storage import StoredCache
from ..storage.folder import Progress
from .cached_index import CachedIndex
from .cached_sums import known_sums, pass_sums_on, sum_keeping_layer

# Of the configuration, what decides whether cached states can be those of the model. Weights it does not tell.
_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)


def stored_in(
    folder: str | Path, layers: list[Any], growing: type, config: Any, progress: Progress | None
) -> StoredCache:
    """Let the layers of a cache that are of the class `growing` keep their rows in the files of a folder.

    A folder that holds a cache already is read through once. The indexes of its keys are not kept there: each layer's
    is made when the first token asks for it, in memory.

    Raises:
        OSError, RuntimeError, ValueError: as `StoredCache`, and where the model cannot be continued.
    """
    if config is None:
        raise ValueError("storage needs config, the configuration of the model; give TopKCache(config=model.config)")
    if not str(folder):  # would be the current folder
        raise ValueError('storage must name a folder, got ""; give the path of an empty or a new one')
    growing_ones = [index for index, layer in enumerate(layers) if type(layer) is growing]
    others = {type(layer).__name__ for layer in layers if type(layer) is not growing} - {"DummyLayer"}
    if not growing_ones:
        raise ValueError(
            f"storage needs a model with layers that attend to all tokens, got {', '.join(sorted(others))} alone; use "
            "a cache without storage, which stays as small as its windows"
        )
    decoder = config.get_text_config(decoder=True)
    about = {name: getattr(decoder, name, None) for name in _SHAPE}
    stored = StoredCache(folder, layers=growing_ones, about=about)
    try:
        if stored.num_tokens and others:
            raise ValueError(
                f"storage {folder} holds {stored.num_tokens} tokens, which this model cannot continue, as what its "
                f"{', '.join(sorted(others))} held is lost; give an empty folder"
            )
        for _ in stored.check(progress):
            pass
    except BaseException:
        stored.close()
        raise
    ours = [layers[index] for index in growing_ones]

    def when_indexed() -> None:
        if progress is not None:
            progress("Indexing the stored keys", sum(layer._index.is_made for layer in ours), len(ours))

    for index, layer in zip(growing_ones, ours, strict=True):
        layer.__class__ = stored_layer()
        layer._stored, layer._number, layer._index = stored, index, CachedIndex(True, when_indexed)
        if stored.num_tokens:
            layer.lazy_initialization(layer.keys, layer.values)
    return stored


@cache
def stored_layer() -> Any:
    """The class of layers whose rows lie in files."""
    base: Any = sum_keeping_layer()

    class StoredLayer(base):
        """A layer whose `keys` and `values` are views of a file that is mapped into memory."""

        __qualname__ = "StoredLayer"

        _stored: StoredCache
        _number: int
        # The views that were handed out last: sums hang on them.
        _views: tuple[Tensor, Tensor] | None = None
        _index: CachedIndex

        @property
        def keys(self) -> Tensor | None:
            return self._current(0)

        @property
        def values(self) -> Tensor | None:
            return self._current(1)

        def _current(self, which: int) -> Tensor | None:
            if self._views is None or self._views[0].shape[-2] != self._stored.length(self._number):
                before, self._views = self._views, self._stored.tensors(self._number)
                if before is not None and self._views is not None:  # rows were taken away, here or in the storage
                    self._index.go_on_with(self._views[0], self._index.is_of(before[0]))
            return None if self._views is None else self._views[which]

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

        @torch.compiler.disable
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            before, keys_are_indexed = known_sums(self.keys, self.values), self._index.is_of(self.keys)
            self._views = self._stored.append(self._number, key_states, value_states)
            self.lazy_initialization(key_states, value_states)
            pass_sums_on(*self._views, before)
            self._index.go_on_with(self._views[0], keys_are_indexed)
            # More queries than use an index read all keys, and so does the call that makes one.
            self._stored.expect_random_reads(self._number, self._index.is_made and key_states.shape[-2] <= MOST_ROWS)
            return self._views

        def get_seq_length(self) -> int:
            return self._stored.length(self._number)

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0:  # which is refused
                super().crop(tokens_to_remove)
            self._crop_to(max(0, self.get_seq_length() + tokens_to_remove))

        def reset(self) -> None:
            self._crop_to(0)

        def _crop_to(self, length: int) -> None:
            self._stored.crop(self._number, length)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self._check_order("beam_idx", beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            self._check_order("indices", indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            if repeats != 1:
                self._refuse(f"repeats must be 1, got {repeats}")

        def _check_order(self, name: str, indices: Tensor) -> None:
            """Raise unless this is the batch as it is."""
            if self.keys is not None and indices.tolist() != list(range(len(self.keys))):
                self._refuse(f"{name} must be 0 to {len(self.keys) - 1} in this order, got {indices.tolist()!s:.60}")

        def _refuse(self, what: str) -> None:
            raise ValueError(
                f"{what}: a cache with storage keeps its batch, as all its rows would have to be copied; use a "
                "TopKCache without storage for beams and for other ways that change the batch"
            )

        def offload(self) -> None:
            raise ValueError("a cache with storage cannot be offloaded: its keys and values lie in files already")

    return StoredLayer


def __getattr__(name: str) -> Any:
    # So that whoever pickles a cache is told why that cannot be, not that this class is not found.
    if name == "StoredLayer":
        return stored_layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
