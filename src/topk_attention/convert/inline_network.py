"""Networks that are computed inside the forward method of a whole layer (BART, Whisper, OPT, ...).

The layer itself calls fc2(dropout(activation(fc1(x)))). After conversion the last part computes the whole network, and
all other parts return their input unchanged.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..functional import StandIn, topk_feed_forward
from ..nn.feed_forward import stand_in_of, store_as_usual
from ..nn.linears import added_to_call, full_name
from .sites import FeedForwardSite, activation_of, hold_stand_in, obstacle_of, own_forward, share_hooks

_NETWORK = re.compile(
    r"(?P<x>\w+) = self\.activation_fn\(self\.fc1\((?P=x)\)\)\s+"
    r"((?P=x) = nn\.functional\.dropout\((?P=x), p=self\.activation_dropout, training=self\.training\)\s+)?"
    r"(?P=x) = self\.fc2\((?P=x)\)\s"
    r"|"
    r"(?P<y>\w+) = self\.fc1\((?P=y)\)\s+"
    r"(?P=y) = self\.activation_fn\((?P=y)\)\s+"
    r"((?P=y) = nn\.functional\.dropout\((?P=y), p=self\.activation_dropout, training=self\.training\)\s+)?"
    r"(?P=y) = self\.fc2\((?P=y)\)\s"
)


class _Original(NamedTuple):
    fc1: Any
    fc2: Any
    activation_fn: Any
    activation_dropout: float | None


class TopKFirst(nn.Module):
    """Takes the place of the first linear layer, holds its weights, and returns its input unchanged."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        return x


class TopKSecond(nn.Module):
    """Takes the place of the second linear layer, holds its weights, and computes the whole network."""

    def __init__(
        self,
        layer: nn.Module,
        original: _Original,
        k: int | None,
        activation: str,
        backend: str,
        stand_in: StandIn | None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = original.fc2.weight, original.fc2.bias
        # In tuples they are no submodules, so the state dict stays that of the original.
        self.layer = (layer,)
        self.original = (original,)
        self.k = k
        self.activation = activation
        self.dropout_p = original.activation_dropout or 0.0
        self.backend = backend
        self.stand_in = hold_stand_in(stand_in, original.fc2)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer[0]
        first: Any = layer.fc1
        if type(first) is not TopKFirst:
            raise RuntimeError(
                f"fc1 of {type(layer).__name__} must be what convert made of it, got {full_name(type(first))}; a top-k "
                "network reads its weights directly, so wrap it only after topk_attention.unconvert, or leave it out "
                "with where="
            )
        for name, part, acts_as_before in (
            ("fc1", first, "_forward_pre_hooks"),
            ("activation_fn", layer.activation_fn, ""),
            ("fc2", self, "_forward_hooks"),
        ):
            if (added := added_to_call(part, but=acts_as_before)) is not None:
                raise RuntimeError(
                    f"{name} of {type(layer).__name__} has {added}, added after convert; a top-k network computes "
                    "everything in fc2, so remove that, or call topk_attention.unconvert first, or leave the layer out "
                    "with where="
                )
        return topk_feed_forward(
            x,
            first.weight,
            self.weight,
            k=self.k,
            b_in=first.bias,
            b_out=self.bias,
            activation=self.activation,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
            stand_in=stand_in_of(self),
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation!r}, backend={self.backend!r}"


def feed_forward_sites(model: nn.Module, path: str, layer: Any) -> Iterator[FeedForwardSite]:
    children = dict(layer.named_children())
    if not {"fc1", "fc2"} < set(children) or not callable(getattr(layer, "activation_fn", None)):
        return
    if set(children) <= {"fc1", "fc2", "activation_fn"}:
        return  # a network that is a module of its own
    fc1, fc2 = layer.fc1, layer.fc2
    is_converted = isinstance(fc2, TopKSecond)
    if is_converted:
        original = fc2.original[0]
    else:
        original = _Original(fc1, fc2, layer.activation_fn, getattr(layer, "activation_dropout", None))
    act = original.activation_fn
    activation = activation_of(model, path, layer, act)

    def examine() -> str | None:
        if not is_converted:
            linears, bypassed = {"fc1": fc1, "fc2": fc2}, {"activation_fn": act}
        elif type(fc1) is not TopKFirst:
            return f"fc1 is {full_name(type(fc1))}, put there after an earlier conversion"
        else:
            linears, bypassed = {}, {"fc1": fc1, "fc2": fc2, "activation_fn": layer.activation_fn}
        obstacle = obstacle_of(linears, activation, act, bypassed, moves_weights=True)
        if obstacle is None and not _computes_the_network(layer):
            obstacle = f"{type(layer).__name__} computes something else than fc2(activation_fn(fc1(x)))"
        return obstacle

    def take_weights() -> None:
        """Give the original layers the weights and hooks of their places: they may be others by now."""
        if is_converted and type(fc1) is not TopKFirst:
            raise ValueError(f"{path}.fc1 must be what convert made of it, got {full_name(type(fc1))}; unwrap it first")
        for linear, now in ((original.fc1, fc1), (original.fc2, fc2)):
            linear.weight, linear.bias = now.weight, now.bias
            share_hooks(now, linear)

    def replace(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        take_weights()
        first = TopKFirst(original.fc1)
        second = TopKSecond(layer, original, k, str(activation), backend, stand_in)
        layer.fc1, layer.fc2 = first.train(layer.training), second.train(layer.training)
        layer.activation_fn = nn.Identity()
        if original.activation_dropout is not None:
            layer.activation_dropout = 0.0

    def restore() -> None:
        take_weights()
        store_as_usual(original.fc1, original.fc2)
        layer.fc1, layer.fc2 = original.fc1.train(layer.training), original.fc2.train(layer.training)
        if not isinstance(original.activation_fn, nn.Module):
            del layer.activation_fn  # the place of a child module takes no plain function
        layer.activation_fn = original.activation_fn
        if original.activation_dropout is not None:
            layer.activation_dropout = original.activation_dropout

    yield FeedForwardSite(
        f"{path}.fc1",
        fc1,
        (original.fc1,),
        original.fc2,
        examine,
        replace,
        restore if is_converted else None,
        stand_in_of(fc2),
    )


def _computes_the_network(layer: nn.Module) -> bool:
    """Whether the layer's code has the lines that are known to be replaceable."""
    try:
        source = inspect.getsource(own_forward(layer))
    except (OSError, TypeError):
        return False
    return len(re.findall(r"self\.(?:fc1|fc2|activation_fn)\b", source)) == 3 and _NETWORK.search(source) is not None
