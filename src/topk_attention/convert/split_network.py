"""Networks that are split over two modules (BERT, RoBERTa, MiniLM, ...).

The first module holds the first linear layer and the activation. The second one holds the second linear layer; it also
adds the residual and normalises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..functional import StandIn
from ..nn.feed_forward import stand_in_of, store_as_usual, topk_network
from ..nn.linears import added_to_call
from .sites import FeedForwardSite, activation_of, added_to, hold_stand_in, obstacle_of, sharded_by_itself, share_hooks


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
        self,
        intermediate: TopKIntermediate,
        original: Any,
        k: int | None,
        activation: str,
        backend: str,
        stand_in: StandIn | None,
    ) -> None:
        super().__init__()
        self.dense = original.dense
        self.LayerNorm = original.LayerNorm
        self.dropout = original.dropout
        # In tuples they are no submodules, so the state dict stays that of the original.
        self.intermediate = (intermediate,)
        self.original = (original,)
        self.k = k
        self.activation = activation
        self.backend = backend
        self.stand_in = hold_stand_in(stand_in, original.dense)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        first = self.intermediate[0]
        if (added := added_to_call(first, but="_forward_pre_hooks")) is not None:
            raise RuntimeError(
                f"the first half of a top-k network, {type(first.original[0]).__name__}, has {added}, added after "
                "convert; it returns its input unchanged, so remove that, or call topk_attention.unconvert first"
            )
        if self._forward_pre_hooks:
            raise RuntimeError(
                f"the second half of a top-k network, {type(self.original[0]).__name__}, has {added_to_call(self)}, "
                "added after convert; its input is that of the whole network and not the neurons, so remove that, or "
                "call topk_attention.unconvert first"
            )
        hidden_states = topk_network(
            hidden_states,
            first.dense,
            self.dense,
            k=self.k,
            activation=self.activation,
            dropout_p=0.0,
            backend=self.backend,
            stand_in=stand_in_of(self),
            names=("intermediate.dense", "output.dense", ""),
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
    # Those of a converted network may be others by now: an adapter may have taken the place of one.
    linears: dict[str, Any] = {"intermediate.dense": intermediate.dense, "output.dense": output.dense}
    act = original_intermediate.intermediate_act_fn
    activation = activation_of(model, path, module, act)

    def examine() -> str | None:
        if set(dict(original_output.named_children())) != {"dense", "LayerNorm", "dropout"}:
            return f"{type(original_output).__name__} does more than dense, dropout, residual and LayerNorm"
        halves = {"intermediate": intermediate, "output": output}
        if (sharded := sharded_by_itself(halves)) is not None:
            return sharded
        return obstacle_of(linears, activation, act, {"intermediate_act_fn": act}) or added_to(halves)

    def replace(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        original_intermediate.dense, original_output.dense = intermediate.dense, output.dense
        first = TopKIntermediate(original_intermediate)
        second = TopKOutput(first, original_output, k, str(activation), backend, stand_in)
        module.intermediate, module.output = first.train(module.training), second.train(module.training)

    def restore() -> None:
        if (sharded := sharded_by_itself({"intermediate": intermediate, "output": output})) is not None:
            raise RuntimeError(f"{path} cannot be restored: {sharded}")
        original_intermediate.dense, original_output.dense = intermediate.dense, output.dense
        store_as_usual(original_intermediate.dense, original_output.dense)
        share_hooks(intermediate, original_intermediate)
        share_hooks(output, original_output)
        module.intermediate = original_intermediate.train(module.training)
        module.output = original_output.train(module.training)

    yield FeedForwardSite(
        f"{path}.intermediate",
        intermediate,
        (linears["intermediate.dense"],),
        linears["output.dense"],
        examine,
        replace,
        None if original_intermediate is intermediate else restore,
        stand_in_of(output),
    )
