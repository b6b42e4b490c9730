"""A top-k feed-forward network as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import topk_feed_forward


def plain_linear(owner: nn.Module, name: str) -> nn.Linear:
    """The owner's linear layer of this name, whose weights are used without calling it.

    Raises:
        TypeError: it has become something else, such as an adapter, whose own computation would be skipped.
    """
    linear = getattr(owner, name)
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"{name} of {type(owner).__name__} must be nn.Linear, got {type(linear).__name__}; a top-k network reads "
            "its weights directly, so wrap it only after topk_attention.unconvert, or leave it out with where="
        )
    return linear


@torch.no_grad()
def store_by_neuron(linear_out: nn.Module) -> None:
    """Let the weight [O, F] of a network's last layer lie in memory neuron by neuron, as top-k reads it.

    Shape, values, name and the parameter itself stay; only its strides change, which a dense layer does not mind. A
    state dict loads into either form.
    """
    weight = getattr(linear_out, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not weight.is_meta and not weight.t().is_contiguous():
        weight.data = weight.t().contiguous().t()


class TopKFeedForward(nn.Module):
    """A feed-forward network in which each token uses its k best neurons, around linear layers it is handed.

    C input size, F neurons, O output size

    linear_in    nn.Linear(C, F)
    linear_out   nn.Linear(F, O)
    linear_gate  nn.Linear(C, F) for a gated network, activation(gate) * in, or None
    k            neurons kept per token, or None for all
    names        what the layers are called in the state dict, in the order in, out, gate: give the original's names
                 and its checkpoints load into this layer, and the other way round

    The weights are used where they are; that of linear_out changes its strides, so that each neuron's output weights
    lie together. Dropout acts on kept activations, in training mode only.

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
        k: int | None,
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
        store_by_neuron(linear_out)
        self.k = k
        self.activation = activation
        self.dropout_p = dropout_p
        self.backend = backend
        self.token_chunk_size = token_chunk_size

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]; returns [..., O]."""
        name_in, name_out, name_gate = self._names
        linear_in, linear_out = plain_linear(self, name_in), plain_linear(self, name_out)
        linear_gate = None if getattr(self, name_gate) is None else plain_linear(self, name_gate)
        return topk_feed_forward(
            x,
            linear_in.weight,
            linear_out.weight,
            k=self.k,
            w_gate=None if linear_gate is None else linear_gate.weight,
            b_in=linear_in.bias,
            b_out=linear_out.bias,
            b_gate=None if linear_gate is None else linear_gate.bias,
            activation=self.activation,
            dropout_p=self.dropout_p if self.training else 0.0,
            backend=self.backend,
            token_chunk_size=self.token_chunk_size,
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation!r}, backend={self.backend!r}"
