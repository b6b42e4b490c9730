"""PyTorch's own layers: nn.MultiheadAttention, and the networks of nn.TransformerEncoderLayer and ...DecoderLayer.

A converted layer remains the same module, with its weights, hooks and names. Only its class changes, to a subclass that
computes with top-k. PyTorch's fused inference path would read the weights directly; the subclass switches it off.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import StandIn, topk_attention
from ..nn.feed_forward import stand_in_of, store_as_usual, topk_network
from ..nn.linears import added_to_call, full_name
from .settings import LayerSettings, layer_settings, set_layer_settings
from .sites import FeedForwardSite, added_to, hold_stand_in, known_activation, name_of, obstacle_of

_NETWORK = "_topk_attention_network"
_NESTED = "_topk_attention_former_use_nested_tensor"


class TopKMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose queries use their k best keys.

    It returns no weights. For a query that sees no key it returns zeros, where the original returns NaN. Masks are
    those of the original: bool, True = may not attend, or float, added to the scores; one that requires a gradient gets
    it.
    """

    # The fused path of nn.TransformerEncoderLayer reads this and then does not run.
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights:
            warnings.warn(
                "a converted nn.MultiheadAttention returns no attention weights; pass need_weights=False", stacklevel=2
            )
        _check_mask("attn_mask", attn_mask)
        _check_mask("key_padding_mask", key_padding_mask)
        if is_batched := query.dim() == 3:
            if not self.batch_first:
                query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        else:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        heads = [
            projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projected in self._project(query, key, value)
        ]
        # If the caller says that the mask is the causal one, the mask is not read.
        is_causal = is_causal and query.shape[1] == key.shape[1]
        settings = layer_settings(self)
        mask = None if is_causal else self._mask(attn_mask, query.shape[0], query.dtype)
        if settings.completion is not None and mask is None and (shown := _shown_keys(key_padding_mask)) is not None:
            mask, bias = shown, None
        else:
            bias = self._padding(key_padding_mask, query.dtype)
        if mask is not None and mask.requires_grad:  # a mask gets no gradient, a bias does
            bias = mask if bias is None else mask + bias
            mask = None
        output = topk_attention(
            *heads,
            k=settings.kept_keys,
            attn_mask=mask,
            bias=bias,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=settings.backend,
            completion=settings.completion,
        )
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not is_batched:
            return output.squeeze(0), None
        return (output if self.batch_first else output.transpose(0, 1)), None

    def _project(self, *inputs: Tensor) -> Iterator[Tensor]:
        if self.in_proj_weight is None:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return map(F.linear, inputs, weights, biases)

    def _mask(self, mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        """The mask [N, M] or [B * H, N, M], True = may not attend, in the form that `topk_attention` takes."""
        if mask is None:
            return None
        if mask.dim() == 3:
            mask = mask.unflatten(0, (batch, self.num_heads))
        return ~mask if mask.dtype == torch.bool else mask.to(dtype)

    @staticmethod
    def _padding(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask [B, M], True = not a key, as a bias [B, 1, 1, M]: merged with the other mask it would be larger."""
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
        return mask.to(dtype)[:, None, None, :]


def _shown_keys(mask: Tensor | None) -> Tensor | None:
    """The padding [B, M] as a mask [B, 1, 1, M] bool, True = may attend, if it says no more than which keys there are.

    Completion sums all keys that a query sees. If a mask of keys hides the others, running sums do for every query,
    while a bias makes it compute each query's own. nn.TransformerEncoder turns bool masks into 0 and -inf.
    """
    if mask is None or mask.requires_grad:
        return None
    if mask.dtype == torch.bool:
        return ~mask[:, None, None, :]
    if torch.compiler.is_compiling() or not bool(((mask == 0) | mask.isneginf()).all()):
        return None
    return (mask == 0)[:, None, None, :]


def _check_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool (True = may not attend) or floating-point (added to the scores), got {mask.dtype}; "
            "convert a 0/1 mask with .bool()"
        )


class TopKEncoderLayer(nn.TransformerEncoderLayer):
    activation_relu_or_gelu = property(lambda self: 0, lambda self, value: None)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_network_output(self, x))


class TopKDecoderLayer(nn.TransformerDecoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_network_output(self, x))


_TOPK_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: TopKMultiheadAttention,
    nn.TransformerEncoderLayer: TopKEncoderLayer,
    nn.TransformerDecoderLayer: TopKDecoderLayer,
}
_FORMER_CLASS = {topk: former for former, topk in _TOPK_CLASS.items()}


def is_torch_layer(module: nn.Module) -> bool:
    return type(module) in _TOPK_CLASS or is_converted(module)


def is_attention(module: nn.Module) -> bool:
    """Whether this is PyTorch's attention layer, its subclasses included: the report names those too."""
    return isinstance(module, nn.MultiheadAttention)


def attention_obstacle(module: Any) -> str | None:
    if type(module) not in (nn.MultiheadAttention, TopKMultiheadAttention):
        return f"it is {full_name(type(module))}, a subclass of nn.MultiheadAttention with code of its own"
    if "forward" in vars(module) and not is_converted(module):
        return f"it has {added_to_call(module)}"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds a key of its own (add_bias_kv or add_zero_attn)"
    return None


def use_topk_attention(module: nn.Module, settings: LayerSettings) -> None:
    if settings.k is None and is_converted(module):
        restore_attention(module)
    elif settings.k is not None:
        module.__class__ = TopKMultiheadAttention
        set_layer_settings(module, settings)


def is_converted(module: nn.Module) -> bool:
    return type(module) in _FORMER_CLASS


def restore_attention(module: nn.Module) -> None:
    module.__class__ = nn.MultiheadAttention
    set_layer_settings(module, None)


def feed_forward_sites(path: str, layer: Any) -> Iterator[FeedForwardSite]:
    former_class = _FORMER_CLASS.get(type(layer), type(layer))
    if not issubclass(former_class, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return
    activation = known_activation(layer.activation) or name_of(layer.activation)

    def examine() -> str | None:
        if former_class not in _TOPK_CLASS:
            return f"its layer is {full_name(former_class)}, a subclass with code of its own"
        for name in ("forward", "_ff_block"):
            if name in vars(layer):
                return f"its layer has a method {name} of its own"
        if type(layer.dropout) is not nn.Dropout:
            return f"dropout is {full_name(type(layer.dropout))}, not nn.Dropout"
        linears = {"linear1": layer.linear1, "linear2": layer.linear2}
        return obstacle_of(linears, activation, layer.activation, _bypassed(layer))

    def replace(k: int | None, backend: str, stand_in: StandIn | None) -> None:
        layer.__class__ = _TOPK_CLASS[former_class]
        setattr(layer, _NETWORK, (k, activation, backend))
        layer.stand_in = hold_stand_in(stand_in, layer.linear2)

    def restore() -> None:
        layer.__class__ = former_class
        delattr(layer, _NETWORK)
        del layer.stand_in
        store_as_usual(layer.linear1, layer.linear2)

    yield FeedForwardSite(
        f"{path}.linear1".removeprefix("."),
        layer.linear1,
        (layer.linear1,),
        layer.linear2,
        examine,
        replace,
        restore if is_converted(layer) else None,
        stand_in_of(layer),
    )


def _bypassed(layer: Any) -> dict[str, Any]:
    """The parts that a top-k network computes itself and does not call."""
    return {"activation": layer.activation, "dropout": layer.dropout}


def _network_output(layer: Any, x: Tensor) -> Tensor:
    k, activation, backend = getattr(layer, _NETWORK)
    if (reason := added_to(_bypassed(layer))) is not None:
        raise RuntimeError(
            f"{reason}, and it was added after convert; remove it, or call topk_attention.unconvert first"
        )
    return topk_network(
        x,
        layer.linear1,
        layer.linear2,
        k=k,
        activation=activation,
        dropout_p=layer.dropout.p if layer.training else 0.0,
        backend=backend,
        stand_in=stand_in_of(layer),
        names=("linear1", "linear2", ""),
    )


def watch_nested_tensors(model: nn.Module) -> None:
    """Switch nested tensors off in each nn.TransformerEncoder that holds a top-k layer, otherwise back on.

    The encoder would pass padded batches on as nested tensors, which top-k layers do not take.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        has_topk = any(map(is_converted, module.modules()))
        if has_topk and not hasattr(module, _NESTED):
            setattr(module, _NESTED, getattr(module, "use_nested_tensor", False))
            module.use_nested_tensor = False
        elif not has_topk and hasattr(module, _NESTED):
            module.use_nested_tensor = getattr(module, _NESTED)
            delattr(module, _NESTED)
