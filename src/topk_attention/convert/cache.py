"""`TopKCache`: transformers' cache with keys and values that grow in place.

DynamicCache joins all cached keys and values with the new ones in each layer for each token. That copies the whole
context once a token. Here the new rows are written behind the others, and attention is handed a view.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import StoredCache
from ..storage.folder import Progress
from .cache_in_graph import (
    NOT_GROWN,
    append_in_graph,
    grows_in_graph,
    has_grown_in_graph,
    new_handle,
    no_sets,
    note_set_in_graph,
    rows_in_graph,
    was_set_in_graph,
)
from .cached_index import CachedIndex
from .cached_sums import known_sums, pass_sums_on, sum_keeping_layer
from .growing_rows import GrowingRows, fit_together, grows_in_place
from .position_bias import CACHE_NAMES
from .settings import NAME, remembered_settings
from .stored_layers import stored_in

_WATCHED = "_topk_attention_grows_caches"


@cache
def growing_layer() -> Any:
    """The class of layers that grow in place. Like all classes of a cache it exists once transformers is there."""

    base: Any = sum_keeping_layer()

    class GrowingLayer(base):
        """A DynamicLayer that writes new rows behind those it has.

        `keys` and `values` are views. Whoever puts other tensors there is believed: the next rows follow those. Where
        the memory must not change (gradients, transformed code), rows are joined as in a DynamicLayer. Compiled code
        leaves growing to operators, which change `keys` where it does not see it: `_grown` tells how many rows there
        are.
        """

        __qualname__ = "GrowingLayer"

        _keys: Tensor | None = None
        _values: Tensor | None = None
        # As many rows without columns as there are rows: what compiled code reads, for which rows whose memory is full
        # are another case, compiled anew.
        _count: Tensor | None = None
        # How many rows there were when compiled code began to run, and how many there are where it has come to.
        _grown: tuple[int, int] = NOT_GROWN
        # Memory of the keys and of the values.
        _memory: tuple[GrowingRows, GrowingRows] | None = None
        # Of the keys, while the memory is this layer's own.
        _index: CachedIndex | None = None
        # None for a layer that compiled code has made, which cannot make this, until other code has come here.
        _handle: Tensor | None = None
        # How often compiled code put keys here, and the number at which it last did.
        _sets: Tensor
        _set_at: int = -1

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._begin_handle()

        @classmethod
        def take_over(cls, layer: Any) -> None:
            """Let a plain DynamicLayer grow in place from now on."""
            keys, values = (vars(layer).pop(name, None) for name in ("keys", "values"))
            layer.__class__ = cls
            layer._begin_handle()
            layer.keys, layer.values = keys, values

        def _begin_handle(self) -> None:
            if not torch.compiler.is_compiling():
                self._handle, self._sets = new_handle(self), no_sets()

        @property
        def keys(self) -> Any:
            return self._now(self._keys, of_keys=True)

        @keys.setter
        def keys(self, rows: Tensor | None) -> None:
            if rows is not None and self._is_set_in_graph():
                self._values = self.values  # as they have grown, which the next line forgets
                note_set_in_graph(self)
            self._keys, self._grown = rows, NOT_GROWN
            self._count = None if rows is None or rows.numel() == 0 else torch.empty(rows.shape[-2], 0, device="cpu")

        @property
        def values(self) -> Any:
            return self._now(self._values, of_keys=False)

        @values.setter
        def values(self, rows: Tensor | None) -> None:
            if rows is not None and self._is_set_in_graph() and not was_set_in_graph(self):
                self.keys = self.keys
            self._values = rows

        def _is_set_in_graph(self) -> bool:
            return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and self._handle is not None

        def _now(self, rows: Tensor | None, *, of_keys: bool) -> Tensor | None:
            if torch.compiler.is_compiling() and rows is not None and has_grown_in_graph(self):
                return rows_in_graph(self, rows, of_keys=of_keys)
            return rows

        def get_seq_length(self) -> int:
            if torch.compiler.is_compiling():
                return self._grown[1] if has_grown_in_graph(self) else 0 if self._count is None else len(self._count)
            return super().get_seq_length()

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if grows_in_graph(self, key_states, value_states):
                return append_in_graph(self, key_states, value_states)
            if not (
                grows_in_place(key_states, value_states)
                and fit_together(self.keys, key_states)
                and fit_together(self.values, value_states)
            ):
                self._forget_memory()
                return super().update(key_states, value_states, *args, **kwargs)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if self._handle is None:
                self._begin_handle()
            before = known_sums(self.keys, self.values)
            index = self._index or CachedIndex()
            keys_are_indexed = index.is_of(self.keys)
            memory = self._own_memory()
            if memory and memory[0].have_room(self.keys, key_states) and memory[1].have_room(self.values, value_states):
                keys, values = memory
                self.keys, self.values = keys.append(self.keys, key_states), values.append(self.values, value_states)
            else:
                keys, all_keys = GrowingRows.beginning_with(self.keys, key_states)
                values, all_values = GrowingRows.beginning_with(self.values, value_states)
                self.keys, self.values, self._memory = all_keys, all_values, (keys, values)
            pass_sums_on(self.keys, self.values, before)
            index.go_on_with(self.keys, keys_are_indexed)
            self._index = index
            return self.keys, self.values

        def reorder_cache(self, beam_idx: Tensor) -> None:
            memory = self._own_memory() if grows_in_place(self.keys, self.values) else None
            if memory is None:
                super().reorder_cache(beam_idx)
                self._forget_memory()
                return
            before = known_sums(self.keys, self.values)
            index = self._index or CachedIndex()
            keys_are_indexed = index.is_of(self.keys)
            keys, all_keys = memory[0].reordered(self.keys, beam_idx)
            values, all_values = memory[1].reordered(self.values, beam_idx)
            self.keys, self.values, self._memory = all_keys, all_values, (keys, values)
            pass_sums_on(self.keys, self.values, before, lambda x: x.index_select(0, beam_idx.to(x.device)))
            if keys_are_indexed:
                index.reorder(beam_idx)
            index.go_on_with(self.keys, keys_are_indexed)
            self._index = index

        def crop(self, tokens_to_remove: int) -> None:
            index = self._index if self._index is not None and self._index.is_of(self.keys) else None
            super().crop(tokens_to_remove)
            if index is not None:
                index.go_on_with(self.keys, True)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._forget_memory()

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._forget_memory()

        def reset(self) -> None:
            super().reset()
            self._forget_memory()

        def _forget_memory(self) -> None:
            self._memory = self._index = None

        def _own_memory(self) -> tuple[GrowingRows, GrowingRows] | None:
            """The memory of this layer, if `keys` and `values` are what lies in it."""
            memory = self._memory
            return memory if memory and memory[0].hold(self.keys) and memory[1].hold(self.values) else None

        def __getstate__(self) -> dict[str, Any]:
            """What copies and pickles hold: the rows alone, in memory of their own."""
            own = ("_memory", "_index", "_keys", "_values", "_count", "_grown", "_handle", "_sets", "_set_at")
            rows = {name: None if (x := getattr(self, name)) is None else x.clone() for name in ("keys", "values")}
            return {name: value for name, value in vars(self).items() if name not in own} | rows

        def __setstate__(self, state: dict[str, Any]) -> None:
            self._begin_handle()
            for name, value in state.items():
                setattr(self, name, value)

    return GrowingLayer


@cache
def topk_cache() -> Any:
    """The class `TopKCache`.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers.cache_utils import DynamicCache, DynamicLayer
    except ImportError as error:
        raise ImportError(
            "TopKCache is a cache of transformers, which is not installed; pip install topk-attention[hf]"
        ) from error

    class TopKCache(DynamicCache):
        """A key-value cache of transformers whose layers grow in place.

        config  the configuration of the model: its sliding-window, linear and other layers get the cache layers that
                `DynamicCache(config=config)` would give them; without it every layer grows
        storage a folder for files that hold the keys and values of the layers that grow; it needs `config`. A new or
                empty folder begins a cache, one with a cache of this model continues it
        progress  progress(name of the work, steps done, steps in all) while a folder is read through, and for each
                layer whose stored keys the first token has indexed

        It takes the place of a `DynamicCache` wherever that is used: `model(..., past_key_values=cache)`, `generate`,
        beams, assisted and prompt-lookup decoding, a chat that keeps its cache, `copy.deepcopy`, pickle. Tokens are the
        same. A converted model takes one by default in `generate`.

        `layer.keys` and `layer.values` are views of memory that has room for up to a quarter more rows. They keep their
        contents while the cache grows, but not when it is cropped and then grows again: clone what must outlast that.
        Where gradients are enabled, rows are joined anew for each token, as in a DynamicCache; in compiled code also
        under autocast.

        With storage a context may be larger than memory: a step reads the rows that it chooses, and what the system has
        memory for stays in memory. The disk holds what `cache.storage.commit()` counted, which is also called every 256
        tokens or 30 seconds, by `cache.storage.close()`, and when the process ends by itself; after a crash the folder
        holds the tokens of the last one. The batch stays as it is: beams are refused. Nothing may require a gradient.
        Whether the weights are those that made the cache is not checked.

        Raises:
            OSError: a file cannot be written; the cache holds the tokens of before this forward pass.
            RuntimeError: the folder is in use, or the system is Windows.
            ValueError: offloading is asked for, or the folder holds something else, or what it holds is not whole.

        >>> from transformers import LlamaConfig
        >>> cache = TopKCache(config=LlamaConfig(num_hidden_layers=2))
        >>> keys, values = cache.update(torch.randn(1, 8, 10, 64), torch.randn(1, 8, 10, 64), layer_idx=0)
        >>> cache.get_seq_length()
        10
        """

        __qualname__ = "TopKCache"

        layer_class_to_replicate: Any
        # The files; None where keys and values lie in memory.
        storage: StoredCache | None = None

        def __init__(
            self,
            ddp_cache_data: Iterable[tuple[Tensor | None, ...]] | None = None,
            config: Any = None,
            offloading: bool = False,
            offload_only_non_sliding: bool = False,
            storage: str | Path | None = None,
            progress: Progress | None = None,
        ) -> None:
            del offload_only_non_sliding
            if offloading:
                raise ValueError(
                    "offloading must be False: a TopKCache grows where the model computes; use "
                    "transformers.DynamicCache(config=config, offloading=True), or "
                    'generate(..., cache_implementation="offloaded")'
                )
            super().__init__(ddp_cache_data, config=config)
            self._let_layers_grow()
            if storage is not None:
                if ddp_cache_data is not None:
                    raise ValueError("ddp_cache_data must be None with storage, whose folder says what the cache holds")
                self.storage = stored_in(storage, self.layers, growing_layer(), config, progress)

        def _let_layers_grow(self) -> None:
            """Turn the plain growing layers, and no others, into such that grow in place."""
            growing = growing_layer()
            for layer in self.layers:
                if type(layer) is DynamicLayer:
                    growing.take_over(layer)
            if self.layer_class_to_replicate is DynamicLayer:
                self.layer_class_to_replicate = growing

    return TopKCache


def __getattr__(name: str) -> Any:
    # So that a cache can be pickled, although its classes are made only when transformers is there.
    if name == "GrowingLayer":
        return growing_layer()
    if name == "TopKCache":
        return topk_cache()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def grow_caches_of_converted_models(generation_mixin: Any) -> None:
    """Let `generate` begin with a TopKCache where it would begin with a DynamicCache and attention is top-k.

    generation_mixin  transformers' GenerationMixin

    A cache that the caller hands over, or names by cache_implementation=, stays what it is.
    """
    if _WATCHED in vars(generation_mixin):
        return
    setattr(generation_mixin, _WATCHED, True)
    original = generation_mixin._prepare_cache_for_generation

    @functools.wraps(original)
    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        was_given = any(model_kwargs.get(name) is not None for name in CACHE_NAMES)
        result = original(self, generation_config, model_kwargs, *args, **kwargs)
        if not was_given and generation_config.cache_implementation is None and _attends_topk(self):
            made = next((model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs), None)
            _let_grow(getattr(made, "self_attention_cache", made))
        return result

    generation_mixin._prepare_cache_for_generation = _prepare_cache_for_generation


def _let_grow(made: Any) -> None:
    """Turn the empty cache that generate has just made, if it is a plain DynamicCache, into a TopKCache."""
    topk = topk_cache()
    if type(made) is topk.__base__ and not made.offloading:
        made.__class__ = topk
        made._let_layers_grow()


def _attends_topk(model: nn.Module) -> bool:
    """Whether a layer of this model, or some layer that has yet to find its k, keeps some keys alone."""
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config(decoder=True)._attn_implementation != NAME:
        return False
    known = [settings for module in model.modules() if (settings := remembered_settings(module)) is not None]
    return not known or any(settings.k is not None for settings in known)
