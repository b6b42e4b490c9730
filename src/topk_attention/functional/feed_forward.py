"""The public operation `topk_feed_forward`: its meaning, its argument checks and its dispatch."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from torch import Tensor

from ..backends import choose_backend
from ..backends.activations import ACTIVATIONS, Cut
from ..backends.autocast import autocast_off, in_autocast_dtype
from ..backends.calls import FeedForwardCall
from ..backends.dropout import draw_seed
from .checks import (
    check_count,
    check_dropout,
    check_floating,
    check_no_tangent,
    check_same_dtype_and_device,
    shape_of,
)
from .observation import notify_observer
from .stand_in import StandIn, check_stand_in


def topk_feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    k: int | Literal["all"] | None,
    w_gate: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str = "relu",
    gate_limit: float | None = None,
    in_offset: float = 0.0,
    dropout_p: float = 0.0,
    backend: str = "auto",
    token_chunk_size: int | None = None,
    stand_in: StandIn | None = None,
) -> Tensor:
    """Let each token use only its k best feed-forward neurons (Gupta et al. 2021, section 2).

    D model size, F neurons (d_ff), O output size

    x           [..., D]  float16, bfloat16, float32 or float64
    w_in        [F, D]  same dtype and device, as in `nn.Linear`
    w_out       [O, F]  as in `nn.Linear`
    k           neurons kept per token: an int, or "all" or None for all (token chunking alone)
    w_gate      [F, D]  makes the layer gated: activation(x w_gate') * (x w_in')
    b_in        [F]
    b_gate      [F]  needs w_gate
    b_out       [O]
    activation  "relu", "relu2" (squared), "gelu", "gelu_tanh", "quick_gelu", "silu", "identity", or another name that
                transformers gives to one of them
    gate_limit  for a gated layer: before they are multiplied the gate is cut at this number from above and x w_in' at
                this number and its negative, as gpt-oss does; None cuts nothing
    in_offset   for a gated layer: what is added to x w_in' after that (gpt-oss: 1)
    dropout_p   probability of dropping a kept neuron's activation
    backend     "auto", "cpu" (compiled kernels), "chunked" (plain PyTorch, any device) or "reference"; a named one runs
                or raises; for k=None "cpu" chunks tokens as "chunked" does, because its kernels would save every neuron
                of every token
    token_chunk_size  the most tokens whose pre-activations exist at a time; by default what fits a memory budget; "cpu"
                with a k ignores it and takes at most 192 tokens a thread
    stand_in    what is added for the neurons that are not kept, see `StandIn`; same dtype and device as x. None adds
                nothing. Its tensors get gradients, dropout leaves it alone, and with k >= F it is not used.

    Returns [..., O] in the dtype of x.

    A plain layer keeps the k largest pre-activations x w_in' + b_in. For ReLU-like activations these are the largest
    activations. A gated layer keeps the k largest |activation(gate) * in|, with what is cut and added. Of tied neurons
    the one with the lower index is kept. With k >= F this is the dense layer.

    NaN counts as the best neuron of all. A token that holds NaN gets an output of NaN and changes no other token's. In
    the backward pass the NaN reaches the gradients of the neurons that the token keeps, as far as the activation's
    derivative lets it through, and no others. Output weights of a neuron that no token keeps are not read. (The
    reference multiplies all rows by all weights, so NaN may spread in both places.)

    The backward pass needs x, the weights, and for each kept neuron an int32 index and a float pre-activation (two for
    a gated layer); these are saved. Derivatives of the gradient and forward-mode derivatives exist only for
    backend="reference".

    Raises:
        TypeError: k or the stand-in is of the wrong type.
        ValueError: a shape, dtype, device, k, the activation, the limit or the backend's name does not fit.
        RuntimeError: the backend asked for cannot run here.
        NotImplementedError: an input carries a tangent, as under `torch.func.jvp`, and the backend cannot use it.

    >>> import torch
    >>> x, w_in, w_out = torch.randn(2, 128, 64), torch.randn(256, 64), torch.randn(64, 256)
    >>> topk_feed_forward(x, w_in, w_out, k=32).shape
    torch.Size([2, 128, 64])
    """
    x, w_in, w_out = in_autocast_dtype(x), in_autocast_dtype(w_in), in_autocast_dtype(w_out)
    w_gate, b_in = in_autocast_dtype(w_gate), in_autocast_dtype(b_in)
    b_out, b_gate = in_autocast_dtype(b_out), in_autocast_dtype(b_gate)
    _check_shapes(x, w_in, w_out, w_gate, b_in, b_out, b_gate)
    if isinstance(k, str) and k == "all":
        k = None
    if k is not None:
        check_count("k", k)
    if token_chunk_size is not None:
        check_count("token_chunk_size", token_chunk_size)
    check_dropout(dropout_p)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    cut = _checked_cut(gate_limit, in_offset, w_gate)
    if stand_in is not None:
        check_stand_in("stand_in", stand_in, x.shape[-1], w_out.shape[0])
        stand_in = stand_in.in_autocast_dtype()
        check_same_dtype_and_device("x", x, stand_in=stand_in.bias)
        if k is None or k >= w_in.shape[0]:
            stand_in = None
        else:
            b_out = stand_in.bias if b_out is None else b_out + stand_in.bias
    call = FeedForwardCall(
        x=x.reshape(-1, x.shape[-1]),
        w_in=w_in,
        w_out=w_out,
        w_gate=w_gate,
        b_in=b_in,
        b_gate=b_gate,
        b_out=b_out,
        k=None if k is None else min(k, w_in.shape[0]),
        activation=activation,
        dropout_p=dropout_p,
        seed=draw_seed(x.device) if dropout_p > 0 else None,
        token_chunk_size=token_chunk_size,
        cut=cut,
    )
    output = _run(call, backend)
    notify_observer(call, output)
    if stand_in is not None:
        with autocast_off(x.device.type):
            output = stand_in.added_to(output, call.x)
    return output.view(*x.shape[:-1], w_out.shape[0])


def _run(call: FeedForwardCall, backend: str) -> Tensor:
    choice = choose_backend(backend, call)
    if choice.name != "reference":
        tensors = (call.x, call.w_in, call.w_out, call.w_gate, call.b_in, call.b_gate, call.b_out)
        check_no_tangent("topk_feed_forward", choice.name, *tensors)
    with autocast_off(call.x.device.type):
        match choice.name:
            case "cpu":
                from ..backends import cpu

                return cpu.feed_forward(call)
            case "reference":
                from ..backends import reference

                return reference.feed_forward(call)
            case "chunked":
                from ..backends import chunked

                return chunked.feed_forward(call)
    raise AssertionError(choice)


def _checked_cut(gate_limit: float | None, in_offset: float, w_gate: Tensor | None) -> Cut:
    for name, number in (("gate_limit", gate_limit), ("in_offset", in_offset)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise TypeError(f"{name} must be a number, got {type(number).__name__} {number!r}")
    if gate_limit is not None and not gate_limit > 0:
        raise ValueError(f"gate_limit must be above 0, got {gate_limit}; None cuts nothing")
    if not isfinite(in_offset):
        raise ValueError(f"in_offset must be finite, got {in_offset}")
    if w_gate is None and (gate_limit is not None or in_offset != 0):
        raise ValueError("gate_limit and in_offset need w_gate, got None; a layer without a gate has neither")
    return Cut(None if gate_limit is None else float(gate_limit), float(in_offset))


def _check_shapes(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_gate: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    b_gate: Tensor | None,
) -> None:
    others = {"w_in": w_in, "w_out": w_out, "w_gate": w_gate, "b_in": b_in, "b_out": b_out, "b_gate": b_gate}
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None or name in ("x", "w_in", "w_out"):
            check_floating(name, tensor)
    check_same_dtype_and_device("x", x, **others)
    if x.ndim < 1:
        raise ValueError(f"x must have shape [..., model size], got {shape_of(x)}")
    if w_in.ndim != 2 or w_in.shape[1] != x.shape[-1] or w_in.shape[0] == 0:
        raise ValueError(f"w_in must have shape [neurons, {x.shape[-1]}] to match x, got {shape_of(w_in)}")
    num_neurons = w_in.shape[0]
    if w_out.ndim != 2 or w_out.shape[1] != num_neurons:
        raise ValueError(f"w_out must have shape [outputs, {num_neurons}] to match w_in, got {shape_of(w_out)}")
    expected = {"w_gate": (w_gate, list(w_in.shape)), "b_in": (b_in, [num_neurons]), "b_gate": (b_gate, [num_neurons])}
    expected["b_out"] = (b_out, [w_out.shape[0]])
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {shape_of(tensor)}")
    if b_gate is not None and w_gate is None:
        raise ValueError("b_gate needs w_gate, got None; pass both or neither")
