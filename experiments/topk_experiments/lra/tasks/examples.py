"""Labelled sequences of small whole numbers, packed: a whole data set takes a few megabytes on disk."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "validation", "test")


class Batch(NamedTuple):
    """B examples of P sequences each (two in tasks that compare pairs), padded at the end to the longest, L.

    tokens  [B, P, L]  int64, 0 for padding, 1 + value otherwise
    mask    [B, P, L]  bool, False for padding; None if nothing is padded
    labels  [B]        int64
    """

    tokens: Tensor
    mask: Tensor | None
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.tokens.to(device), mask, self.labels.to(device))


class Examples(NamedTuple):
    """N examples, each of P out of S sequences; a sequence may be part of many examples.

    values     [T]      uint8, all sequences one after another
    starts     [S + 1]  int64, the start of each sequence, and T
    sequences  [N, P]   int32, the sequences of each example
    labels     [N]      uint8
    """

    values: np.ndarray
    starts: np.ndarray
    sequences: np.ndarray
    labels: np.ndarray

    @property
    def num_examples(self) -> int:
        """The number of examples (`len` counts the fields of the tuple)."""
        return len(self.labels)

    def sequence(self, number: int) -> np.ndarray:
        """Values of one sequence, uint8 [L]."""
        return self.values[self.starts[number] : self.starts[number + 1]]

    def lengths(self) -> np.ndarray:
        """The length of the longest sequence of each example, int64 [N]."""
        return np.diff(self.starts)[self.sequences].max(1)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The examples with these numbers.

        >>> writer = ExamplesWriter()
        >>> writer.add([bytes([3, 0]), bytes([7])], label=1)
        >>> writer.examples().batch([0]).tokens
        tensor([[[4, 1],
                 [8, 0]]])
        """
        parts = [[self.sequence(number) for number in self.sequences[example]] for example in numbers]
        length = max(len(sequence) for example in parts for sequence in example)
        tokens = np.zeros((len(parts), self.sequences.shape[1], length), dtype=np.int64)
        padded = False
        for row, example in zip(tokens, parts, strict=True):
            for line, sequence in zip(row, example, strict=True):
                line[: len(sequence)] = sequence
                line[: len(sequence)] += 1
                padded |= len(sequence) < length
        all_tokens = torch.from_numpy(tokens)
        labels = torch.from_numpy(self.labels[list(numbers)].astype(np.int64))
        return Batch(all_tokens, all_tokens != 0 if padded else None, labels)

    def take(self, numbers: Sequence[int] | np.ndarray) -> Examples:
        """The examples with these numbers, in this order; all sequences are kept."""
        return self._replace(sequences=self.sequences[numbers], labels=self.labels[numbers])

    def majority_share(self, num_classes: int) -> float:
        """Accuracy of always answering with the most frequent label."""
        return float(np.bincount(self.labels, minlength=num_classes).max() / len(self.labels))

    def sha256(self) -> str:
        """Hash of all arrays."""
        whole = hashlib.sha256()
        for field in self:
            whole.update(f"{field.dtype.str} {field.shape} ".encode() + np.ascontiguousarray(field).tobytes())
        return whole.hexdigest()

    def to_bytes(self) -> bytes:
        """The content of a compressed .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self._asdict())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Examples:
        """Examples from the content that `to_bytes` returned."""
        with np.load(io.BytesIO(content)) as arrays:
            return cls(*(arrays[name] for name in cls._fields))

    @classmethod
    def concatenated(cls, parts: Sequence[Examples]) -> Examples:
        """All examples of several sets, in order."""
        writer_starts = [np.zeros(1, dtype=np.int64)]
        sequences, num_values, num_sequences = [], 0, 0
        for part in parts:
            writer_starts.append(part.starts[1:] + num_values)
            sequences.append(part.sequences + np.int32(num_sequences))
            num_values += len(part.values)
            num_sequences += len(part.starts) - 1
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate(writer_starts),
            np.concatenate(sequences),
            np.concatenate([part.labels for part in parts]),
        )


class ExamplesWriter:
    """Collects examples one after another."""

    def __init__(self) -> None:
        self._values: list[np.ndarray] = []
        self._examples: list[list[int]] = []
        self._labels: list[int] = []

    def add_sequence(self, values: bytes | np.ndarray) -> int:
        """Keep a sequence and return its number."""
        array = np.frombuffer(values, dtype=np.uint8) if isinstance(values, bytes) else values.ravel()
        assert array.dtype == np.uint8
        self._values.append(array)
        return len(self._values) - 1

    def add_example(self, sequences: Iterable[int], label: int) -> None:
        """Add an example of sequences that were added before."""
        self._examples.append(list(sequences))
        self._labels.append(label)

    def add(self, parts: Iterable[bytes | np.ndarray], label: int) -> None:
        """Add an example with sequences of its own."""
        self.add_example([self.add_sequence(part) for part in parts], label)

    def examples(self) -> Examples:
        """All examples that were added."""
        lengths = np.array([0, *map(len, self._values)], dtype=np.int64)
        values = np.concatenate(self._values) if self._values else np.zeros(0, dtype=np.uint8)
        return Examples(
            values,
            lengths.cumsum(),
            np.array(self._examples, dtype=np.int32) if self._examples else np.zeros((0, 1), dtype=np.int32),
            np.array(self._labels, dtype=np.uint8),
        )
