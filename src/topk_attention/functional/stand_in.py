"""`StandIn`: what a feed-forward layer adds for the neurons that a token does not keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from ..backends.autocast import autocast_is_on, in_autocast_dtype
from .checks import check_floating, check_same_dtype_and_device, shape_of


@dataclass(frozen=True, eq=False)  # tensors have no single answer to ==
class StandIn:
    """What a feed-forward layer adds for the neurons that a token does not keep: w_out (w_in x) + bias.

    D model size, O output size, R rank

    bias   [O]     alone: a constant, the mean of what these neurons give
    w_in   [R, D]  with w_out: what changes with the layer's input x, of rank R
    w_out  [O, R]

    It is fitted for one layer and one k, on text like that of later use: `fit_stand_ins`. Where every neuron is kept,
    nothing is added.

    >>> import torch
    >>> from topk_attention import topk_feed_forward
    >>> x, w_in, w_out = torch.randn(2, 128, 64), torch.randn(256, 64), torch.randn(64, 256)
    >>> topk_feed_forward(x, w_in, w_out, k=32, stand_in=StandIn(torch.zeros(64))).shape
    torch.Size([2, 128, 64])
    """

    bias: Tensor
    w_in: Tensor | None = None
    w_out: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_finite()

    def _check_finite(self) -> None:
        # Programs that are compiled or traced, and functions that torch.func transforms, cannot stop at a number.
        # Tensors on meta and fake ones have none.
        is_transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        if is_transformed or torch._C._len_torch_dispatch_stack() > 0:
            return
        for name, tensor in self.tensors().items():
            if tensor.is_meta or isinstance(tensor, FakeTensor) or bool(tensor.isfinite().all()):
                continue
            raise ValueError(
                f"{name} must hold finite numbers, got {int((~tensor.isfinite()).sum())} of {tensor.numel()} that are "
                "nan or infinite; fit the stand-in again on a model and a text whose numbers are finite"
            )

    def _check_shapes(self) -> None:
        check_floating("bias", self.bias)
        if self.bias.ndim != 1:
            raise ValueError(f"bias must have shape [outputs], got {shape_of(self.bias)}")
        if self.w_in is None and self.w_out is None:
            return
        if self.w_in is None or self.w_out is None:
            missing, given = ("w_in", "w_out") if self.w_in is None else ("w_out", "w_in")
            raise ValueError(f"{given} needs {missing}, got None; pass both or neither")
        check_floating("w_in", self.w_in)
        check_floating("w_out", self.w_out)
        if self.w_in.ndim != 2 or self.w_in.shape[0] == 0:
            raise ValueError(f"w_in must have shape [rank, model size], got {shape_of(self.w_in)}")
        expected = [self.bias.shape[0], self.w_in.shape[0]]
        if list(self.w_out.shape) != expected:
            raise ValueError(f"w_out must have shape {expected} to match bias and w_in, got {shape_of(self.w_out)}")
        check_same_dtype_and_device("bias", self.bias, w_in=self.w_in, w_out=self.w_out)

    @property
    def rank(self) -> int:
        """The rank of what changes with the input; 0 for a constant."""
        return 0 if self.w_in is None else self.w_in.shape[0]

    def __str__(self) -> str:
        """The kind of stand-in in a short phrase, for reports."""
        return f"rank {self.rank}" if self.rank else "constant"

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        named = {"bias": self.bias, "w_in": self.w_in, "w_out": self.w_out}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> StandIn:
        """The same in another dtype, on another device."""
        return UncheckedStandIn(
            **{name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors().items()}
        )

    def detach(self) -> StandIn:
        """The same without gradients."""
        return UncheckedStandIn(**{name: tensor.detach() for name, tensor in self.tensors().items()})

    def in_autocast_dtype(self) -> StandIn:
        """The same in the dtype that autocast gives to matrix products, if autocast is on."""
        if not autocast_is_on(self.bias.device.type):
            return self
        return UncheckedStandIn(**{name: in_autocast_dtype(tensor) for name, tensor in self.tensors().items()})

    def added_to(self, output: Tensor, x: Tensor) -> Tensor:
        """The output [..., O] with what changes with x [..., D], and without the bias."""
        if self.w_in is None or self.w_out is None:
            return output
        rows = output.reshape(-1, output.shape[-1])
        low = F.linear(x.reshape(-1, x.shape[-1]), self.w_in)  # [T, R]
        # In one step: the product and the sum would each be as large as the output.
        return torch.addmm(rows, low, self.w_out.t()).view(output.shape)


class UncheckedStandIn(StandIn):
    """A stand-in of tensors that were looked at before: it is made in each forward pass, and a look at every number
    would wait for the device."""

    def __post_init__(self) -> None:
        """Nothing to look at again."""


def check_stand_in(name: str, stand_in: object, model_size: int, output_size: int) -> None:
    """Raise unless this is a StandIn for a layer of these sizes."""
    if not isinstance(stand_in, StandIn):
        raise TypeError(f"{name} must be a StandIn or None, got {type(stand_in).__name__}")
    if stand_in.bias.shape[0] != output_size:
        raise ValueError(f"{name} must have a bias of shape [{output_size}], got {shape_of(stand_in.bias)}")
    if stand_in.w_in is not None and stand_in.w_in.shape[1] != model_size:
        raise ValueError(
            f"{name} must have a w_in of shape [{stand_in.rank}, {model_size}], got {shape_of(stand_in.w_in)}"
        )
