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

from ..functional import topk_feed_forward
from ..nn.feed_forward import store_as_usual, store_by_neuron
from .sites import FeedForwardSite, activation_of, num_neurons, obstacle_of

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

    def __init__(self, layer: nn.Module, original: _Original, k: int | None, activation: str, backend: str) -> None:
        super().__init__()
        self.weight, self.bias = original.fc2.weight, original.fc2.bias
        # In tuples they are no submodules, so the state dict stays that of the original.
        self.layer = (layer,)
        self.original = (original,)
        self.k = k
        self.activation = activation
        self.dropout_p = original.activation_dropout or 0.0
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.layer[0].fc1
        if type(first) is not TopKFirst:
            raise TypeError(
                f"fc1 of {type(self.layer[0]).__name__} must be what convert made of it, got {type(first).__name__}; a "
                "top-k network reads its weights directly, so wrap it only after topk_attention.unconvert, or leave it "
                "out with where="
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
    activation = activation_of(model, path, layer)
    obstacle = obstacle_of({"fc1": original.fc1, "fc2": original.fc2}, activation, original.activation_fn)
    if obstacle is None and not _computes_the_network(layer):
        obstacle = f"{type(layer).__name__} computes something else than fc2(activation_fn(fc1(x)))"

    def replace(k: int | None, backend: str) -> None:
        store_by_neuron(linear_in=original.fc1, linear_out=original.fc2)
        first, second = TopKFirst(original.fc1), TopKSecond(layer, original, k, str(activation), backend)
        layer.fc1, layer.fc2 = first.train(layer.training), second.train(layer.training)
        layer.activation_fn = nn.Identity()
        if original.activation_dropout is not None:
            layer.activation_dropout = 0.0

    def restore() -> None:
        for linear, now in ((original.fc1, fc1), (original.fc2, fc2)):
            linear.weight, linear.bias = now.weight, now.bias
            store_as_usual(linear)
        layer.fc1, layer.fc2 = original.fc1.train(layer.training), original.fc2.train(layer.training)
        layer.activation_fn = original.activation_fn
        if original.activation_dropout is not None:
            layer.activation_dropout = original.activation_dropout

    yield FeedForwardSite(
        f"{path}.fc1", fc1, num_neurons(original.fc1), obstacle, replace, restore if is_converted else None
    )


def _computes_the_network(layer: nn.Module) -> bool:
    """Whether the layer's code has the lines that are known to be replaceable."""
    try:
        source = inspect.getsource(inspect.unwrap(type(layer).forward))
    except (OSError, TypeError):
        return False
    return len(re.findall(r"self\.(?:fc1|fc2|activation_fn)\b", source)) == 3 and _NETWORK.search(source) is not None
