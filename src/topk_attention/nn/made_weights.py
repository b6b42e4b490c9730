"""Weights that are made for one call and made again for its backward pass, so that nothing keeps them in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.autocast import autocast_off, in_autocast_dtype
from ..backends.operators import is_transformed


class _Made(NamedTuple):
    address: int
    make: Callable[[], Tensor]
    made_of: tuple[tuple[Tensor, int], ...]  # with the version that each had


class _Again(NamedTuple):
    """A view of a weight that is made again, in place of the view."""

    made: _Made
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Kept(NamedTuple):
    tensor: Any  # what the hooks around this made of it
    version: int | None


class MadeWeights:
    """Collects the weights that are made inside `again_in_backward`."""

    def __init__(self) -> None:
        self._made: list[_Made] = []
        # They are known by their addresses, which must not become those of other tensors, as where their caller needs
        # another dtype and drops them.
        self._alive: list[Tensor] = []

    def add(self, make: Callable[[], Tensor], made_of: list[Tensor]) -> Tensor:
        """What `make` returns, a new tensor that depends on nothing but the tensors `made_of`."""
        device_type = made_of[0].device.type
        with autocast_off(device_type):
            tensor = make()
        dtype = in_autocast_dtype(tensor).dtype
        tensor = tensor.to(dtype)

        def make_again() -> Tensor:
            with torch.no_grad(), autocast_off(device_type):
                return make().to(dtype)

        if self._is_active():
            versions = tuple((part, part._version) for part in made_of)
            self._alive.append(tensor)
            self._made.append(_Made(tensor.untyped_storage().data_ptr(), make_again, versions))
        return tensor

    @contextmanager
    def again_in_backward(self) -> Iterator[None]:
        """Within this context no operation saves one of these weights for its backward pass."""
        if not self._is_active():
            yield
            return
        # Only the innermost hooks are asked: those of gradient checkpointing, for example, have to see the others.
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(tensor: Tensor) -> _Again | _Kept:
            address = tensor.untyped_storage().data_ptr()
            for made in self._made:
                if made.address == address != 0:  # which it is on meta
                    return _Again(made, tensor.shape, tensor.stride(), tensor.storage_offset())
            return _Kept(tensor, tensor._version) if around is None else _Kept(around[0](tensor), None)

        def unpack(packed: _Again | _Kept) -> Tensor:
            if isinstance(packed, _Again):
                for part, version in packed.made.made_of:
                    _check_version(part, version)
                return packed.made.make().as_strided(packed.size, packed.stride, packed.offset)
            if packed.version is None:
                assert around is not None
                return around[1](packed.tensor)
            _check_version(packed.tensor, packed.version)
            return packed.tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        # Their memory is free for other tensors now.
        self._made.clear()
        self._alive.clear()

    @staticmethod
    def _is_active() -> bool:
        """Not in code that is compiled or traced, which decides itself what it computes again, nor under torch.func,
        which has no such hooks."""
        return torch.is_grad_enabled() and not is_transformed() and torch._C._len_torch_dispatch_stack() == 0


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "a tensor of a top-k network that is needed for gradients was changed in place after the forward pass: "
            f"shape {list(tensor.shape)} is at version {tensor._version}, expected version {version}; change it after "
            "the backward pass"
        )
