"""The BERT kind (BERT, RoBERTa, MiniLM, ...): separate query, key and value layers, and a network whose two halves sit
in two modules, the second of which also adds the residual and normalises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..functional import topk_feed_forward
from ..nn.feed_forward import plain_linear, store_by_neuron
from .sites import FeedForwardSite, obstacle_of


def is_attention(module: nn.Module) -> bool:
    parts = (getattr(module, name, None) for name in ("query", "key", "value"))
    return all(isinstance(part, nn.Module) for part in parts) and hasattr(module, "attention_head_size")


class TopKIntermediate(nn.Module):
    """Stands where the first half was and passes its input on: the second half computes both."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.dense = original.dense
        self.original = (original,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class TopKOutput(nn.Module):
    """Both halves of the network, then dropout, residual and normalisation as in the original second half."""

    def __init__(self, intermediate: TopKIntermediate, original: Any, k: int, activation: str, backend: str) -> None:
        super().__init__()
        self.dense = original.dense
        store_by_neuron(self.dense)
        self.LayerNorm = original.LayerNorm
        self.dropout = original.dropout
        # In tuples they are no submodules, so the state dict stays that of the original.
        self.intermediate = (intermediate,)
        self.original = (original,)
        self.k = k
        self.activation = activation
        self.backend = backend

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        first, second = plain_linear(self.intermediate[0], "dense"), plain_linear(self, "dense")
        hidden_states = topk_feed_forward(
            hidden_states,
            first.weight,
            second.weight,
            k=self.k,
            b_in=first.bias,
            b_out=second.bias,
            activation=self.activation,
            backend=self.backend,
        )
        return self.LayerNorm(self.dropout(hidden_states) + input_tensor)

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation!r}, backend={self.backend!r}"


def feed_forward_sites(model: nn.Module, path: str, module: nn.Module) -> Iterator[FeedForwardSite]:
    intermediate, output = getattr(module, "intermediate", None), getattr(module, "output", None)
    if not isinstance(intermediate, nn.Module) or not isinstance(output, nn.Module):
        return
    original_intermediate: Any = getattr(intermediate, "original", (intermediate,))[0]
    original_output: Any = getattr(output, "original", (output,))[0]
    if not hasattr(original_intermediate, "intermediate_act_fn") or not hasattr(original_output, "LayerNorm"):
        return
    linears = {"intermediate.dense": original_intermediate.dense, "output.dense": original_output.dense}
    activation = _activation(module, model)
    obstacle = obstacle_of(linears, activation)
    if set(dict(original_output.named_children())) != {"dense", "LayerNorm", "dropout"}:
        obstacle = f"{type(original_output).__name__} does more than dense, dropout, residual and LayerNorm"

    def replace(k: int, backend: str) -> None:
        first = TopKIntermediate(original_intermediate)
        second = TopKOutput(first, original_output, k, str(activation), backend)
        module.intermediate, module.output = first.train(module.training), second.train(module.training)

    def restore() -> None:
        original_intermediate.dense, original_output.dense = intermediate.dense, output.dense
        module.intermediate = original_intermediate.train(module.training)
        module.output = original_output.train(module.training)

    yield FeedForwardSite(
        f"{path}.intermediate",
        intermediate,
        getattr(linears["intermediate.dense"], "out_features", 0),
        obstacle,
        replace,
        None if original_intermediate is intermediate else restore,
    )


def _activation(layer: nn.Module, model: nn.Module) -> object:
    """The layer itself does not keep its configuration; its attention does, or else the model."""
    for module in (*layer.modules(), model):
        if (activation := getattr(getattr(module, "config", None), "hidden_act", None)) is not None:
            return activation
    return None
