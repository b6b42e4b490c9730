"""A cache that grows in place, in compiled code.

There a tensor is a value, so nothing can be written behind the rows of another one, and no index hangs on a tensor. So
growing and attending are operators that the compiler does not look into: they do what they do elsewhere. A layer is
known to them by its handle, a tensor, since compiled code is made anew for another number but not for another tensor.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..backends.autocast import autocast_is_on

# Numbers that are never those of a layer.
NOT_GROWN = (-1, -1)
_LAYER = "_topk_attention_cache_layer"
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_library = torch.library.Library("topk_attention", "FRAGMENT")
# The handle counts as changed, so that whatever reads it, or appends further rows, stays behind this in the order.
_library.define("cache_append(Tensor(a!) handle, Tensor key, Tensor value) -> ()", tags=torch.Tag.cudagraph_unsafe)
_library.define("cache_note_set(Tensor(a!) handle) -> ()", tags=torch.Tag.cudagraph_unsafe)
_library.define(
    "cache_rows(Tensor handle, Tensor new, SymInt length, bool of_keys) -> Tensor", tags=torch.Tag.cudagraph_unsafe
)


def new_handle(layer: Any) -> Tensor:
    """What compiled code knows a layer by."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


def layer_of(handle: Tensor) -> Any:
    """The layer with this handle."""
    return _layers[int(handle)]


def grows_in_graph(layer: Any, *new: Tensor) -> bool:
    """Whether the operators can serve a layer where code is compiled: nothing needs a gradient, and new rows fit to
    those that are there, which the layer itself holds already."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and layer.is_initialized
        and layer._count is not None
        and layer._handle is not None
        and not was_set_in_graph(layer)
        and all(x.dtype == layer.dtype and x.device == layer.device for x in new)
        and not autocast_is_on(layer.device.type)
    )


def has_grown_in_graph(layer: Any) -> bool:
    """Whether rows were appended since compiled code began to run, which it sees nowhere else.

    The note stays when it has run. The layer then has another number of rows, and whatever else changes them takes the
    note away.
    """
    return layer._count is not None and layer._grown[0] == len(layer._count)


def no_sets() -> Tensor:
    """As many rows as there were sets of compiled code, and two: compiled code is made anew for none and for one."""
    return torch.empty(2, 0, device="cpu")


def note_set_in_graph(layer: Any) -> None:
    """Note that compiled code puts keys into a layer, which the layer itself has when that code has run, not earlier.

    The number of sets that it notes is then no longer that of the layer, which an operator counts.
    """
    layer._set_at = len(layer._sets)
    torch.ops.topk_attention.cache_note_set(layer._handle)


def was_set_in_graph(layer: Any) -> bool:
    """Whether keys were put into a layer since compiled code began to run, so that its operators see others."""
    return bool(layer._set_at == len(layer._sets))


def append_in_graph(layer: Any, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """Let a layer grow; returns copies of all keys and values, which are never made where nothing but attention to this
    layer reads them."""
    handle = layer._handle
    torch.ops.topk_attention.cache_append(handle, key_states, value_states)
    layer._grown = (len(layer._count), layer.get_seq_length() + key_states.shape[-2])
    keys, values = rows_in_graph(layer, key_states, of_keys=True), rows_in_graph(layer, value_states, of_keys=False)
    setattr(keys, _LAYER, layer)
    setattr(values, _LAYER, layer)
    return keys, values


def rows_in_graph(layer: Any, like: Tensor, *, of_keys: bool) -> Tensor:
    """A copy of the keys or values of a layer that has grown since compiled code began."""
    rows: Tensor = torch.ops.topk_attention.cache_rows(layer._handle, like, layer._grown[1], of_keys)
    return rows


def layer_in_graph(key: Tensor, value: Tensor) -> Any:
    """The layer whose keys and values these are, all of them, in compiled code; None for others."""
    if not torch.compiler.is_compiling():
        return None
    layer = getattr(key, _LAYER, None)
    return layer if layer is not None and getattr(value, _LAYER, None) is layer else None


def _append(handle: Tensor, key: Tensor, value: Tensor) -> None:
    layer_of(handle).update(key, value)


def _note_set(handle: Tensor) -> None:
    layer = layer_of(handle)
    layer._sets = torch.empty(len(layer._sets) + 1, 0, device="cpu")


def _rows(handle: Tensor, new: Tensor, length: int, of_keys: bool) -> Tensor:
    del new
    layer = layer_of(handle)
    rows: Tensor = layer.keys if of_keys else layer.values
    return rows[..., :length, :].clone(memory_format=torch.contiguous_format)


_library.impl("cache_append", _append, "CompositeExplicitAutograd")
_library.impl("cache_note_set", _note_set, "CompositeExplicitAutograd")
_library.impl("cache_rows", _rows, "CompositeExplicitAutograd")


@torch.library.register_fake("topk_attention::cache_append")
def _(handle, key, value):
    return None


@torch.library.register_fake("topk_attention::cache_note_set")
def _(handle):
    return None


@torch.library.register_fake("topk_attention::cache_rows")
def _(handle, new, length, of_keys):
    return new.new_empty(*new.shape[:-2], length, new.shape[-1])
