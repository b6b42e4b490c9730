"""Sentence embeddings: windows of a text, one vector each, and the distance between the vectors of two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import Text

# progress(windows done, windows in all)
Progress = Callable[[int, int], None]


def first_windows(text: Text, tokenizer: Any, num_windows: int, num_tokens: int) -> tuple[list[list[int]], int]:
    """The first windows of a text, and the number of characters that they cover.

    Each window holds num_tokens token ids, with the special tokens that the model expects.

    Raises:
        ValueError: num_tokens leaves no room beside the special tokens, or the text is too short.
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=False)
    if num_tokens <= num_special:
        raise ValueError(
            f"tokens must be at least {num_special + 1} ({num_special} of them are special), got {num_tokens}"
        )
    cut = tokenizer(
        text.content,
        truncation=True,
        max_length=num_tokens,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    whole = [window for window in cut["input_ids"] if len(window) == num_tokens]
    if len(whole) < num_windows:
        raise ValueError(
            f"{text.source} is too short: {num_windows:,} windows of {num_tokens:,} tokens needed, it has "
            f"{len(whole):,}; give a longer text, or ask for fewer or shorter windows"
        )
    last_offsets = cut["offset_mapping"][num_windows - 1]
    return whole[:num_windows], max(end for _, end in last_offsets)


def embedding_of(output: Any, attention_mask: Tensor | None = None) -> Tensor:
    """One unit vector [B, D] per sequence from a model's output: the mean of its hidden states [B, N, D].

    attention_mask  [B, N]  1 for a real token, 0 for padding, which does not count
    """
    hidden = output[0]
    if attention_mask is None:
        mean = hidden.mean(1)
    else:
        weights = attention_mask.to(hidden).unsqueeze(-1)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return F.normalize(mean, dim=-1)


def hidden_states(
    model: nn.Module, windows: Sequence[Sequence[int]], *, batch_size: int = 8, progress: Progress | None = None
) -> Tensor:
    """The model's hidden states [windows, N, D] for windows of N tokens each; `embedding_of([states])` embeds them."""
    with torch.no_grad():
        parts = []
        for first, batch in _batches(windows, batch_size):
            parts.append(model(input_ids=batch)[0])
            if progress is not None:
                progress(first + len(batch), len(windows))
    return torch.cat(parts)


def embedding_error(ours: Tensor, expected: Tensor) -> float:
    """The mean distance between the unit vectors of two runs, which is their relative error.

    The cosine of two such vectors is 1 - distance^2 / 2.

    >>> embedding_error(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]))  # cosine 0.6
    0.894427...
    """
    return (ours.double() - expected.double()).norm(dim=1).mean().item()


def _batches(windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(windows), batch_size):
        yield first, torch.tensor(windows[first : first + batch_size])
