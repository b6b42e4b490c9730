"""Networks that are split over two modules (BERT, RoBERTa, MiniLM, ...).

The first module holds the first linear layer and the activation. The second one holds the second linear layer; it also
adds the residual and normalises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..functional import topk_feed_forward
from ..nn.feed_forward import plain_linear, store_as_usual, store_by_neuron
from .sites import FeedForwardSite, activation_of, num_neurons, obstacle_of


class TopKIntermediate(nn.Module):
    """Takes the place of the first half and returns its input unchanged: the second half computes both."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.dense = original.dense
        self.original = (original,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class TopKOutput(nn.Module):
    """Both halves of the network, then dropout, residual and normalisation as in the original second half."""

    def __init__(
        self, intermediate: TopKIntermediate, original: Any, k: int | None, activation: str, backend: str
    ) -> None:
        super().__init__()
        self.dense = original.dense
        store_by_neuron(linear_in=intermediate.dense, linear_out=self.dense)
        self.LayerNorm = original.LayerNorm
        self.dropout = original.dropout
        # In tuples they are no submodules, so the state dict stays that of the original.
        self.intermediate = (intermediate,)
        self.original = (original,)
        self.k = k
        self.activation = activation
        self.backend = backend

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        w_in, b_in = plain_linear(self.intermediate[0], "dense")
        w_out, b_out = plain_linear(self, "dense")
        hidden_states = topk_feed_forward(
            hidden_states,
            w_in,
            w_out,
            k=self.k,
            b_in=b_in,
            b_out=b_out,
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
    activation = activation_of(model, path, module)
    obstacle = obstacle_of(linears, activation, original_intermediate.intermediate_act_fn)
    if set(dict(original_output.named_children())) != {"dense", "LayerNorm", "dropout"}:
        obstacle = f"{type(original_output).__name__} does more than dense, dropout, residual and LayerNorm"

    def replace(k: int | None, backend: str) -> None:
        first = TopKIntermediate(original_intermediate)
        second = TopKOutput(first, original_output, k, str(activation), backend)
        module.intermediate, module.output = first.train(module.training), second.train(module.training)

    def restore() -> None:
        original_intermediate.dense, original_output.dense = intermediate.dense, output.dense
        store_as_usual(original_intermediate.dense, original_output.dense)
        module.intermediate = original_intermediate.train(module.training)
        module.output = original_output.train(module.training)

    yield FeedForwardSite(
        f"{path}.intermediate",
        intermediate,
        num_neurons(linears["intermediate.dense"]),
        obstacle,
        replace,
        None if original_intermediate is intermediate else restore,
    )
