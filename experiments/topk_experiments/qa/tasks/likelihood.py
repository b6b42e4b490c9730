"""Choices scored by a decoder model: the log-likelihood of each as the continuation of the question."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .prompts import Prompt

# Keys in the cache of a batch, with prefix and a copy for every choice: 16,384 of SmolLM2-135M's take 750 MB.
_MAX_CACHED_TOKENS = 16_384
# Fixed cost of a call, in tokens: with SmolLM2-135M on one core a call takes 0.12 s and a token 2.6 ms.
_CALL_TOKENS = 48
_NO_TARGET = -100


@torch.no_grad()
def choice_log_likelihoods(
    model: Any, prompts: Mapping[int, Prompt], *, max_cached_tokens: int = _MAX_CACHED_TOKENS
) -> Iterator[dict[int, list[float]]]:
    """Yield the scores of one batch of prompts after another: number -> log-likelihood of each choice, over its tokens.

    model    a causal transformers model
    prompts  number -> prompt, in any order; the longest are read first

    Nothing is computed twice: a prefix is read once for all its prompts, a question once for all its choices. Only
    questions of equal length share a batch. Choices are padded at their ends, which a causal model does not see. The
    result is the same as for each sequence by itself.
    """
    for prefix in dict.fromkeys(prompt.prefix for prompt in prompts.values()):
        cache = None
        if prefix:
            cache = model(input_ids=torch.tensor([prefix]), use_cache=True, logits_to_keep=1).past_key_values
        for batch in batches(
            {n: prompt for n, prompt in prompts.items() if prompt.prefix == prefix}, max_cached_tokens
        ):
            scores = _read_batch(model, cache, [prompts[number] for number in batch])
            yield dict(zip(batch, scores, strict=True))


def batches(prompts: Mapping[int, Prompt], max_cached_tokens: int) -> list[list[int]]:
    """Numbers of prompts in batches whose contexts are equally long; longest first.

    >>> lengths = {0: 2, 1: 3, 2: 2, 3: 2}
    >>> batches({number: Prompt((), (1,) * length, ((1,), (2,))) for number, length in lengths.items()}, 12)
    [[1], [0, 2], [3]]
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in prompts.items():
        by_length.setdefault(len(prompt.context), []).append(number)
    result: list[list[int]] = []
    for _, numbers in sorted(by_length.items(), reverse=True):
        room = 0
        for number in numbers:
            size = prompts[number].num_tokens * len(prompts[number].choices)
            if size > room:
                result.append([])
                room = max(size, max_cached_tokens)
            result[-1].append(number)
            room -= size
    return result


def _read_batch(model: Any, prefix_cache: Any, prompts: Sequence[Prompt]) -> list[list[float]]:
    contexts = torch.tensor([prompt.context for prompt in prompts])  # [B, C]
    cache = None if prefix_cache is None else _rows_of(prefix_cache, [0] * len(prompts))
    output = model(input_ids=contexts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    first = output.logits[:, -1].float().log_softmax(-1)  # [B, V]
    scores = [[first[row, choice[0]].item() for choice in prompt.choices] for row, prompt in enumerate(prompts)]
    places = [
        (row, n) for row, prompt in enumerate(prompts) for n, choice in enumerate(prompt.choices) if len(choice) > 1
    ]
    choices = [torch.tensor(prompts[row].choices[number]) for row, number in places]
    for group in padded_groups([len(choice) - 1 for choice in choices]):
        read = pad_sequence([choices[place][:-1] for place in group], batch_first=True)  # [R, L]
        targets = pad_sequence([choices[place][1:] for place in group], batch_first=True, padding_value=_NO_TARGET)
        cache = _rows_of(output.past_key_values, [places[place][0] for place in group])
        rest = _log_likelihood(model(input_ids=read, past_key_values=cache, use_cache=True).logits, targets)
        for place, score in zip(group, rest.tolist(), strict=True):
            row, number = places[place]
            scores[row][number] += score
    return scores


def padded_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of rows to read together, each padded to the longest of its group, for the least work.

    >>> padded_groups([1, 9, 2, 400])
    [[3], [1, 2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    # best[n] = (work, first row of the last group) for the n longest rows
    best = [(0, 0)]
    for end in range(1, len(order) + 1):
        best.append(min((best[s][0] + _CALL_TOKENS + (end - s) * lengths[order[s]], s) for s in range(end)))
    groups = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [R, L, V] and targets [R, L] -> summed log-likelihoods [R]."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_NO_TARGET, reduction="none")
    return -losses.view_as(targets).sum(-1)


def _rows_of(cache: Any, rows: Sequence[int]) -> Any:
    """A new cache with these rows of another, which stays as it is: caches replace tensors, never write into them."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(torch.tensor(rows))
    return chosen
