"""Answers that a text-to-text model writes (T5, UnifiedQA, BART): greedy decoding of every input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

# UnifiedQA's answers are a few words; a longer answer is wrong in any case.
MAX_NEW_TOKENS = 32
_MAX_BATCH_TOKENS = 4096


@torch.no_grad()
def generated_answers(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[int, str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_batch_tokens: int = _MAX_BATCH_TOKENS,
) -> Iterator[dict[int, str]]:
    """Yield the answers of one batch after another: number -> text without special tokens. Longest inputs come first.

    inputs  number -> text, see `unifiedqa.input_text`

    Inputs of about equal length share a batch of at most `max_batch_tokens` tokens, padding included.
    """
    token_ids = {number: tokenizer(text)["input_ids"] for number, text in inputs.items()}
    for batch in batches_by_length({number: len(ids) for number, ids in token_ids.items()}, max_batch_tokens):
        padded = tokenizer.pad({"input_ids": [token_ids[number] for number in batch]}, return_tensors="pt")
        output = model.generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        written = tokenizer.batch_decode(output, skip_special_tokens=True)
        yield {number: text.strip() for number, text in zip(batch, written, strict=True)}


def batches_by_length(lengths: Mapping[int, int], max_tokens: int) -> list[list[int]]:
    """Numbers in batches of at most max_tokens tokens when padded to the longest of the batch; longest first.

    >>> batches_by_length({0: 3, 1: 7, 2: 4, 3: 3}, max_tokens=8)
    [[1], [2, 0], [3]]
    """
    result: list[list[int]] = []
    for number in sorted(lengths, key=lambda number: -lengths[number]):
        if not result or (len(result[-1]) + 1) * lengths[result[-1][0]] > max_tokens:
            result.append([])
        result[-1].append(number)
    return result


def share_in_longer_inputs(lengths: Sequence[int], k: float) -> float:
    """The share of tokens in inputs of more than k tokens; in shorter inputs top-k attention is full attention.

    >>> share_in_longer_inputs([3, 7], k=3)
    0.7
    """
    return sum(length for length in lengths if length > k) / sum(lengths)
