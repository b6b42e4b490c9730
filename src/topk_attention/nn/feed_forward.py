"""A top-k feed-forward network as a layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import topk_feed_forward


def is_plain_linear(layer: object) -> bool:
    """Whether this is nn.Linear itself, or transformers' Conv1D, a linear layer whose weight is transposed."""
    return type(layer) is nn.Linear or _is_conv1d(layer)


def _is_conv1d(layer: object) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a plain linear layer."""
    return (layer.weight.t() if _is_conv1d(layer) else layer.weight), layer.bias


def plain_linear(owner: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of the owner's linear layer of this name. The caller uses them and not the layer.

    Raises:
        TypeError: the layer was replaced, for example by an adapter, whose own computation would be skipped.
    """
    linear = getattr(owner, name)
    if not is_plain_linear(linear):
        raise TypeError(
            f"{name} of {type(owner).__name__} must be nn.Linear, got {type(linear).__name__}; a top-k network reads "
            "its weights directly, so wrap it only after topk_attention.unconvert, or leave it out with where="
        )
    return weight_and_bias(linear)


@torch.no_grad()
def store_by_neuron(linear_out: nn.Module | None = None, *, linear_in: nn.Module | None = None) -> None:
    """Store the weights of a network's layers neuron by neuron in memory, the order in which top-k reads them.

    Shape, values, name and the parameter itself stay. Only its strides change, and a dense layer works with both. A
    state dict loads into either form.
    """
    for linear, neuron_axis in ((linear_in, 0), (linear_out, 1)):
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or weight.is_meta:
            continue
        if neuron_axis != (1 if _is_conv1d(linear) else 0) and not weight.t().is_contiguous():
            weight.data = weight.t().contiguous().t()


@torch.no_grad()
def store_as_usual(*linears: nn.Module) -> None:
    """Undo `store_by_neuron`, so that a dense layer rounds as it did before."""
    for linear in linears:
        weight = getattr(linear, "weight", None)
        if isinstance(weight, nn.Parameter) and not weight.is_contiguous():
            weight.data = weight.contiguous()


class TopKFeedForward(nn.Module):
    """A feed-forward network in which each token uses its k best neurons, built from given linear layers.

    C input size, F neurons, O output size

    linear_in    nn.Linear(C, F)
    linear_out   nn.Linear(F, O)
    linear_gate  nn.Linear(C, F) for a gated network, activation(gate) * in, or None
    k            neurons kept per token, or "all" or None for all
    activation   as in `topk_feed_forward`
    dropout_p    probability of dropping a kept activation, in training mode only
    backend      as in `topk_feed_forward`
    token_chunk_size  as in `topk_feed_forward`
    names        the layers' names in the state dict, in the order in, out, gate; with the names of the original
                 network, checkpoints of either load into the other

    The weights are not copied. That of linear_out changes its strides, so that each neuron's output weights lie
    together in memory.

    >>> import torch
    >>> layer = TopKFeedForward(nn.Linear(64, 256), nn.Linear(256, 64), k=32, activation="gelu")
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        linear_in: nn.Linear,
        linear_out: nn.Linear,
        *,
        k: int | Literal["all"] | None,
        linear_gate: nn.Linear | None = None,
        activation: str = "relu",
        dropout_p: float = 0.0,
        backend: str = "auto",
        token_chunk_size: int | None = None,
        names: tuple[str, str, str] = ("linear_in", "linear_out", "linear_gate"),
    ) -> None:
        super().__init__()
        self._names = names
        for name, linear in zip(names, (linear_in, linear_out, linear_gate), strict=True):
            self.add_module(name, linear)
        store_by_neuron(linear_in=linear_in, linear_out=linear_out)
        store_by_neuron(linear_in=linear_gate)
        self.k = k
        self.activation = activation
        self.dropout_p = dropout_p
        self.backend = backend
        self.token_chunk_size = token_chunk_size

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]; returns [..., O]."""
        name_in, name_out, name_gate = self._names
        (w_in, b_in), (w_out, b_out) = plain_linear(self, name_in), plain_linear(self, name_out)
        w_gate, b_gate = (None, None) if getattr(self, name_gate) is None else plain_linear(self, name_gate)
        if w_out.dtype != w_in.dtype:  # T5 keeps its last layer in float32
            dtype = torch.promote_types(w_in.dtype, w_out.dtype)
            x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
            w_gate, b_in, b_out, b_gate = (
                None if tensor is None else tensor.to(dtype) for tensor in (w_gate, b_in, b_out, b_gate)
            )
        return topk_feed_forward(
            x,
            w_in,
            w_out,
            k=self.k,
            w_gate=w_gate,
            b_in=b_in,
            b_out=b_out,
            b_gate=b_gate,
            activation=self.activation,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
            token_chunk_size=self.token_chunk_size,
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation!r}, backend={self.backend!r}"
