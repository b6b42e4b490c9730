"""Whether the model of a layer holds a part of each sequence, the others being on other processes.

The context in which it does is `topk_attention.distributed.sequence_parallel`. It leaves on each module what computes
attention there, so that nothing imports torch.distributed where nobody uses it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_topk_attention_shared_sequence"
_ENDED = "ended"


class SharedSequence(Protocol):
    """Attention of sequences that several processes share."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """`topk_attention` of the whole sequence, for this process's tokens."""


def shared_sequence(module: nn.Module) -> SharedSequence | None:
    """What computes attention of this layer, or None where its model holds whole sequences.

    Raises:
        RuntimeError: the layer is computed again for a backward pass (gradient checkpointing) whose forward pass ran
            within a context that has ended.
    """
    found = vars(module).get(_ATTRIBUTE)
    if found is None or not isinstance(found, str):
        return found
    if torch._C._current_graph_task_id() != -1:  # within a backward pass
        raise RuntimeError(
            "this layer is computed again for its backward pass (gradient checkpointing) after sequence_parallel has "
            "ended, where it would attend to its own part of the sequence alone; run the backward pass within the "
            "context too"
        )
    if not torch.compiler.is_compiling():
        del vars(module)[_ATTRIBUTE]  # the model is used otherwise now, maybe with gradient checkpointing
    return None


def share_sequence(model: nn.Module, shared: SharedSequence | None) -> None:
    """Let every layer of a model attend this way; None ends that."""
    for module in model.modules():
        vars(module)[_ATTRIBUTE] = _ENDED if shared is None else shared


def shares_sequence(model: nn.Module) -> bool:
    """Whether the model is within such a context."""
    return any(not isinstance(vars(module).get(_ATTRIBUTE, _ENDED), str) for module in model.modules())
