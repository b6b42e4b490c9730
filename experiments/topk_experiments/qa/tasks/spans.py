"""Answers as spans of the passage, by a BERT with a span head (Devlin et al. 2018).

Question and passage share one input. A passage that is too long is read in overlapping windows, and the best span of
all windows is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .generation import batches_by_length
from .questions import Question

MAX_LENGTH = 384
STRIDE = 128
MAX_ANSWER_TOKENS = 30
_MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Window:
    """One input of the model: a question and a part of its passage.

    question  number of the question
    inputs    name -> output of the tokenizer
    first     number of the passage's first token in the input
    offsets   for each token of the passage its characters, [start, end)
    """

    question: int
    inputs: dict[str, list[int]]
    first: int
    offsets: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.inputs["input_ids"])


def read_windows(
    questions: Mapping[int, Question], tokenizer: Any, *, max_length: int = MAX_LENGTH, stride: int = STRIDE
) -> list[Window]:
    """All windows of all questions, in their order.

    stride  passage tokens that two neighbouring windows share

    Raises:
        ValueError: a question has no passage, or leaves no room for it.
    """
    windows = []
    for number, question in questions.items():
        if not question.passage:
            raise ValueError(f"a span model needs a passage to mark, this question has none: {question.text!r}")
        # Room for the question with its special tokens, for the shared tokens, and for one new token.
        taken = len(tokenizer(question.text.strip())["input_ids"]) + 1 + stride + 1
        if taken > max_length:
            raise ValueError(f"max_length must be at least {taken} for {question.text!r}, got {max_length}")
        read = tokenizer(
            question.text.strip(),
            question.passage,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in read if name not in ("offset_mapping", "overflow_to_sample_mapping")]
        for row in range(len(read["input_ids"])):
            of_passage = [token for token, part in enumerate(read.sequence_ids(row)) if part == 1]
            offsets = tuple(tuple(read["offset_mapping"][row][token]) for token in of_passage)
            windows.append(Window(number, {name: read[name][row] for name in names}, of_passage[0], offsets))
    return windows


def target_tokens(window: Window, question: Question) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), the first token of the input, if the window lacks a part.

    Raises:
        ValueError: the file does not say where the answer begins.
    """
    if not question.answer_starts:
        raise ValueError(f"answers must have their first characters to train a span model: {question.text!r}")
    start = question.answer_starts[0]
    end = start + len(question.answers[0])
    if not window.offsets or start < window.offsets[0][0] or end > window.offsets[-1][1]:
        return 0, 0
    first = max(token for token, (begin, _) in enumerate(window.offsets) if begin <= start)
    last = min(token for token, (_, finish) in enumerate(window.offsets) if finish >= end)
    return window.first + first, window.first + last


def pad_windows(windows: Sequence[Window], tokenizer: Any) -> dict[str, Tensor]:
    """The model's inputs, name -> [B, L]."""
    return dict(tokenizer.pad([window.inputs for window in windows], return_tensors="pt"))


@torch.no_grad()
def marked_answers(
    model: Any,
    tokenizer: Any,
    questions: Mapping[int, Question],
    *,
    max_length: int = MAX_LENGTH,
    stride: int = STRIDE,
    max_batch_tokens: int = _MAX_BATCH_TOKENS,
) -> Iterator[dict[int, str]]:
    """Yield the answers of one batch of questions after another: number -> span with the highest score. Longest first.

    All windows of a question share a batch.
    """
    by_question: dict[int, list[Window]] = {}
    for window in read_windows(questions, tokenizer, max_length=max_length, stride=stride):
        by_question.setdefault(window.question, []).append(window)
    lengths = {n: len(of_question) * max(w.num_tokens for w in of_question) for n, of_question in by_question.items()}
    for batch in batches_by_length(lengths, max_batch_tokens):
        windows = [window for number in batch for window in by_question[number]]
        output = model(**pad_windows(windows, tokenizer))
        best: dict[int, tuple[float, str]] = {}
        for window, starts, ends in zip(windows, output.start_logits, output.end_logits, strict=True):
            score, first, last = best_span(window, starts, ends)
            passage = questions[window.question].passage
            text = passage[window.offsets[first][0] : window.offsets[last][1]]
            if window.question not in best or score > best[window.question][0]:
                best[window.question] = score, text
        yield {number: best[number][1] for number in batch}


def best_span(window: Window, start_logits: Tensor, end_logits: Tensor) -> tuple[float, int, int]:
    """The best sum of start and end logits [L] over all spans of at most MAX_ANSWER_TOKENS tokens of the passage.

    Returns the sum, and first and last token of the span, counted from the first token of the passage.
    """
    passage = slice(window.first, window.first + len(window.offsets))
    sums = start_logits[passage, None] + end_logits[None, passage]  # [P, P]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(MAX_ANSWER_TOKENS - 1)
    sums = sums.masked_fill(~allowed, -torch.inf)
    first, last = divmod(int(sums.argmax()), len(window.offsets))
    return sums[first, last].item(), first, last
