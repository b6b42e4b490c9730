"""Keys, values and queries of a context of any length, in blocks that can be made again one by one.

Keys are the mean of their head (2 in each channel, by size), the topic of their segment (1) and noise (1). Segments
have 32 tokens, and each takes one of 4,096 topics, so that a topic comes back about every 131,072 tokens. A query is
half the topic of some segment before it, another one every 4 tokens and for each head, and noise (0.5): the tokens of
its topic score 4 +- 1 with the usual scale, all others 0 +- 1. Values are noise.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096
_SEGMENT = 32
_NUM_TOPICS = 4096
_SAME_QUERY = 4


@dataclass(frozen=True)
class States:
    """The states of one layer: G key heads of size D, H query heads."""

    layer: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int

    def keys_and_values(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of tokens start to stop - 1: [1, G, N, D], twice."""
        parts = []
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            rows = slice(max(start - first, 0), min(stop - first, BLOCK))
            parts.append([tensor[:, :, rows].to(self.dtype) for tensor in self._block(block)])
        key, value = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return key, value

    def query(self, token: int) -> Tensor:
        """[1, H, 1, D]."""
        generator = self._generator(3, token // _SAME_QUERY)
        segments = torch.randint(0, max(1, token // _SEGMENT), (self.heads,), generator=generator)
        _, topics = self._heads()
        groups = torch.arange(self.heads) // (self.heads // self.key_heads)
        topic = topics[groups, [self._topic(int(segment)) for segment in segments]]  # [H, D]
        noise = torch.randn(self.heads, self.head_dim, generator=self._generator(4, token))
        return ((topic + noise) / 2)[None, :, None].to(self.dtype)

    def _block(self, block: int) -> tuple[Tensor, Tensor]:
        mean, topics = self._heads()
        first = block * (BLOCK // _SEGMENT)
        segments = [self._topic(segment) for segment in range(first, first + BLOCK // _SEGMENT)]
        generator = self._generator(2, block)
        key, value = torch.randn(2, self.key_heads, BLOCK, self.head_dim, generator=generator)
        key.view(self.key_heads, -1, _SEGMENT, self.head_dim).add_(topics[:, segments, None]).add_(mean[:, None, None])
        return key[None], value[None]

    def _heads(self) -> tuple[Tensor, Tensor]:
        """The mean of each key head [G, D], and its topics [G, T, D]."""
        generator = self._generator(1, 0)
        mean = 2 * torch.randn(self.key_heads, self.head_dim, generator=generator)
        return mean, torch.randn(self.key_heads, _NUM_TOPICS, self.head_dim, generator=generator)

    def _topic(self, segment: int) -> int:
        """Of a segment: as good as random, and the same for each of its tokens."""
        return (segment * 2654435761 + self.layer * 40503) % 2**32 // (2**32 // _NUM_TOPICS)

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        # torch's generator takes 32 bits of its seed.
        seed = zlib.crc32(f"{self.seed} {self.layer} {purpose} {number}".encode())
        return torch.Generator().manual_seed(seed)
