"""The context in which a converted model holds this process's part of each sequence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.shared_sequence import share_sequence, shares_sequence
from .attention import Method, sequence_parallel_attention
from .ranks import Ranks
from .spans import Order, check_order

# Layers that pass something from token to token, which a shard would cut off.
_MIXES_TOKENS = (nn.Conv1d, nn.Conv2d, nn.RNNBase, nn.MultiheadAttention)
_SAFE_LAYER_TYPES = ("full_attention",)


class _Shared:
    """The attention of a model's layers within the context; it counts the calls."""

    def __init__(self, mesh: Any, order: Order, method: Method) -> None:
        self.mesh, self.order, self.method, self.num_calls = mesh, order, method, 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.num_calls += 1
        return sequence_parallel_attention(
            query, key, value, self.mesh, order=self.order, method=self.method, **options
        )


@contextmanager
def sequence_parallel(
    model: nn.Module, mesh: Any, *, order: Order = "zigzag", method: Method = "auto"
) -> Iterator[None]:
    """Within this context each process holds a part of every sequence, and the model computes as one that holds all.

    model  a model of transformers that runs top-k attention: after `convert`, or loaded with attn_implementation="topk"
    mesh, order, method  as in `sequence_parallel_attention`

    Give the model this rank's tokens, as `shard_batch` cuts them, with their position_ids. Attention is that of the
    whole sequence; all other layers compute token by token. The loss is a mean over the labels of all ranks: take
    `sequence_loss`, or the inputs of `shard_batch(shift_labels=True)`. Run the backward pass within the context too;
    with gradient checkpointing it must be. The sum over ranks of a weight's gradients is the gradient of one process
    (DistributedDataParallel divides it by the number of ranks).

    What is not attention draws its dropout on each rank for itself. The attention mask may hide padding, nothing else.

    Raises:
        TypeError, ValueError: the model does not run top-k attention, passes something from token to token otherwise
            (convolutions, recurrence, sliding windows), or is not told positions; or mesh, order or method do not fit.
        RuntimeError: the model is within such a context already.

    >>> # with sequence_parallel(model, mesh):
    >>> #     shard = shard_batch(batch, mesh, shift_labels=True)
    >>> #     model(**shard).loss.backward()
    """
    check_order(order)
    if method not in ("auto", "heads", "keys"):
        raise ValueError(f'method must be "auto", "heads" or "keys", got {method!r}')
    Ranks.of(mesh)
    _check_model(model)
    if shares_sequence(model):
        raise RuntimeError("model is within sequence_parallel already; leave that context first")
    shared = _Shared(mesh, order, method)
    arguments = _arguments(model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        shared.num_calls = 0
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        if "position_ids" in arguments and given.get("position_ids") is None:
            raise ValueError(
                "position_ids must be given within sequence_parallel: without them each process would count from 0; "
                "take them from shard_batch(batch, mesh) or sequence_positions(length, mesh)"
            )
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if "attention_mask" in arguments and given.get("attention_mask") is None and tokens is not None:
            # Without a mask transformers would take a jump of positions for the beginning of another sequence.
            kwargs = kwargs | {"attention_mask": torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)}
        return args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if shared.num_calls == 0:
            raise RuntimeError(
                f"no attention layer of {type(module).__name__} ran over the processes of sequence_parallel; convert "
                "the model with topk_attention.convert(model, attention_k=...) first"
            )

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after),
    ]
    share_sequence(model, shared)
    try:
        yield
    finally:
        share_sequence(model, None)
        for hook in hooks:
            hook.remove()


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    name, arguments = type(model).__name__, _arguments(model)
    if not arguments & {"input_ids", "inputs_embeds"}:
        raise ValueError(
            f"model must be a model of transformers, whose forward takes input_ids or inputs_embeds, got {name}; pass "
            "the model inside (model.module of DistributedDataParallel)"
        )
    has_distances = any(getattr(module, "has_relative_attention_bias", False) for module in model.modules())
    if "position_ids" not in arguments and not has_distances:
        raise ValueError(
            f"model must take position_ids, or know distances alone, but {name} counts the positions of its tokens "
            "itself, which would start from 0 on each process"
        )
    for path, module in model.named_modules():
        if isinstance(module, _MIXES_TOKENS):
            raise ValueError(
                f"model must pass nothing from token to token but by attention of its layers, but {path} is a "
                f"{type(module).__name__}"
            )
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in (None, "topk"):
            raise ValueError(
                f'model must run top-k attention, but {path or name} has attn_implementation="{implementation}"; '
                "convert it with topk_attention.convert(model, attention_k=...) first"
            )
        others = set(getattr(config, "layer_types", None) or ()) - set(_SAFE_LAYER_TYPES)
        if others:
            raise ValueError(
                f"model must attend to whole sequences, but {name} has layers of type {', '.join(sorted(others))}"
            )
