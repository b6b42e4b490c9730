"""Shards of a model's inputs, and the loss over all tokens of a sequence that several processes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..backends.calls import accumulation_dtype
from .ranks import Ranks
from .shards import sequence_positions, shard_sequence
from .spans import Order


def shard_batch(
    batch: Mapping[str, Tensor], mesh: Any, *, order: Order = "zigzag", shift_labels: bool = False
) -> dict[str, Tensor]:
    """This rank's tokens of a model's inputs, which every rank has whole.

    batch  tensors [B, N, ...] by name: input_ids, attention_mask, labels, ...
    mesh, order  as in `shard_sequence`
    shift_labels  for models that predict the next token: adds "shift_labels", where each token has the label of the
           next one, and "num_items_in_batch", the number of labels of all ranks. Models of transformers then compute
           this rank's part of the loss: the sum over ranks is the loss of one process. A model's own shift would pair
           the last token of a shard with none
    Returns the shards, and "position_ids" [B, n] unless the batch has them: the positions in the whole sequence.

    Raises:
        ValueError, TypeError: the tensors are not of one length, labels are missing, or the mesh does not fit.
    """
    shapes = {name: list(tensor.shape) for name, tensor in batch.items()}
    if not shapes or any(len(shape) < 2 for shape in shapes.values()) or len({s[1] for s in shapes.values()}) > 1:
        raise ValueError(f"batch must hold tensors [batch, tokens, ...] of one number of tokens, got {shapes}")
    whole = dict(batch)
    if shift_labels:
        if "labels" not in batch:
            raise ValueError(f"shift_labels=True needs labels in the batch, got {', '.join(batch)}")
        whole["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    shards = {name: shard_sequence(tensor, mesh, dim=1, order=order) for name, tensor in whole.items()}
    first = next(iter(batch.values()))
    if "position_ids" not in batch:
        positions = sequence_positions(first.shape[1], mesh, order=order, device=first.device)
        shards["position_ids"] = positions.expand(first.shape[0], -1)
    if shift_labels:
        shards["num_items_in_batch"] = (whole["shift_labels"] != -100).sum()
    return shards


def sequence_loss(logits: Tensor, labels: Tensor, mesh: Any, *, ignore_index: int = -100) -> Tensor:
    """The mean cross-entropy over the labels of all ranks.

    logits  [B, n, V] of this rank's tokens
    labels  [B, n] of this rank's tokens, as the logits are to predict them ("shift_labels" of `shard_batch` for models
            that predict the next token)
    Returns the loss of the whole sequence, the same on every rank. Its gradient on a rank is that of the rank's own
    tokens: the sum over ranks of a weight's gradients is the gradient of one process.

    Every rank of the mesh must call it. Without any label it is NaN, as in `torch.nn.functional.cross_entropy`.
    """
    ranks = Ranks.of(mesh)
    own = F.cross_entropy(
        logits.flatten(0, -2).to(accumulation_dtype(logits.dtype)),
        labels.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
    )
    of_all = torch.stack([own.detach().double(), (labels != ignore_index).sum().to(own.device).double()])
    dist.all_reduce(of_all, group=ranks.group)
    total, count = of_all
    return own / count.to(own.dtype) + ((total - own.detach()) / count).to(own.dtype)
