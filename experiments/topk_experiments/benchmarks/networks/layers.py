"""A model of one layer with random weights, copies of it that share these, and its network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from topk_attention import convert

from .works import EXPERTS, Work


def new_model(work: Work) -> nn.Module:
    """As its class draws it, in float32 and in evaluation mode."""
    import transformers

    return getattr(transformers, work.about.model)(work.config).float().eval()


def copied(model: nn.Module, *, trains: bool) -> nn.Module:
    """A copy with the same weights in memory, as parameters of its own."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=trains) for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def network_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The network of its layer, router included: x [1, T, D] -> [1, T, D]."""
    network = model.layers[0].mlp

    def run(x: Tensor) -> Tensor:
        output = network(x)
        return output[0] if isinstance(output, tuple) else output  # gpt-oss returns the scores of its router too

    return run


def weights_of(model: Any) -> list[Tensor]:
    return list(model.layers[0].mlp.parameters())


def prepared(model: Any, work: Work, method: str, *, trains: bool, backend: str = "auto") -> nn.Module:
    """A copy that computes with this method; "topk-all" keeps every neuron."""
    model = copied(model, trains=trains)
    if method in EXPERTS:
        model.set_experts_implementation(method)
    elif method != "dense":
        k: Any = "all" if method == "topk-all" else work.k(method)
        convert(model, feed_forward_k=k, backend=backend)
    return model


def busiest(model: Any, work: Work, x: Tensor) -> float | None:
    """Tokens of the expert that gets most, as a multiple of the mean; None where there is one network."""
    if not work.about.experts:
        return None
    counts = torch.zeros(work.num_experts)

    def count(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        index = arguments[1]
        counts.add_(torch.bincount(index.flatten(), minlength=work.num_experts))

    network = model.layers[0].mlp
    handle = network.experts.register_forward_pre_hook(count)
    with torch.no_grad():
        network(x)
    handle.remove()
    return float(counts.max() / counts.mean())
