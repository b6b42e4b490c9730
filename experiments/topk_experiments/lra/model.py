"""The Long Range Arena's model: a Transformer encoder over tokens and a small classifier of its pooled output.

As published: blocks that normalise their input, GELU, attention projections without bias, and two hidden layers in the
classifier of pairs instead of one. All methods of attention share every parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runs.checks import check_at_least, check_one_of
from .tasks import Task

POOLINGS = ("cls", "mean")
POSITIONS = ("learned", "sinusoidal", "rows-and-columns")
# Makes the attention of a layer, a module called with queries, keys and values [B, H, L, D], key_mask [B, L] and
# dropout_p.
NewAttention = Callable[[], nn.Module]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the encoder.

    d_model           size of a token's vector
    d_attention       size of all heads together
    d_ff              hidden units of the feed-forward layers and of the classifier
    pooling           "cls" reads a vector before the tokens, "mean" averages over the tokens
    positions         "learned", "sinusoidal", or "rows-and-columns": sinusoidal in both directions of a square image
    compare_products  whether the classifier of pairs also gets products and differences of the two vectors
    """

    num_layers: int
    d_model: int
    num_heads: int
    d_attention: int
    d_ff: int
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pooling: str = "cls"
    positions: str = "sinusoidal"
    compare_products: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_layers", "d_model", "num_heads", "d_attention", "d_ff")
        if self.d_attention % self.num_heads:
            raise ValueError(f"d_attention must be a multiple of its {self.num_heads} heads, got {self.d_attention}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        check_one_of(POOLINGS, self, "pooling")
        check_one_of(POSITIONS, self, "positions")

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.d_attention // self.num_heads


class Classifier(nn.Module):
    """Tokens [B, P, L] and their mask -> logits [B, classes]; one encoder reads each of the P sequences."""

    def __init__(self, config: ModelConfig, task: Task, new_attention: NewAttention) -> None:
        super().__init__()
        self.encoder = Encoder(config, task.vocabulary + 1, task.max_length, new_attention)
        size = config.d_model * task.parts
        if task.parts == 2 and config.compare_products:
            size += 2 * config.d_model
        self._with_products = config.compare_products
        hidden = [size, config.d_ff] if task.parts == 1 else [size, config.d_ff, config.d_ff // 2]
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(hidden):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(hidden[-1], task.num_classes))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = tokens.shape[1]
        pooled = self.encoder(tokens.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
        vectors = pooled.unflatten(0, (-1, parts))  # [B, P, d_model]
        seen = [vectors.flatten(1)]
        if parts == 2 and self._with_products:
            first, second = vectors.unbind(1)
            seen += [first * second, first - second]
        return self.head(torch.cat(seen, dim=1))


class Encoder(nn.Module):
    """Tokens [B, L], 0 for padding -> one vector a sequence [B, d_model]."""

    def __init__(self, config: ModelConfig, num_tokens: int, max_length: int, new_attention: NewAttention) -> None:
        super().__init__()
        self._pooling = config.pooling
        self.tokens = nn.Embedding(num_tokens, config.d_model)
        self.positions = _positions(config, max_length)
        if config.pooling == "cls":
            self.cls = nn.Parameter(torch.zeros(config.d_model))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, new_attention()) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x = self.positions(self.tokens(tokens))
        if self._pooling == "cls":
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
            if mask is not None:
                mask = F.pad(mask, (1, 0), value=True)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if self._pooling == "cls":
            return x[:, 0]
        if mask is None:
            return x.mean(1)
        weights = mask.to(x.dtype) / mask.sum(1, keepdim=True)
        return (weights[:, None] @ x).squeeze(1)


class Block(nn.Module):
    """Attention and feed-forward layer, each with a normalised input and added to that input."""

    def __init__(self, config: ModelConfig, attention: nn.Module) -> None:
        super().__init__()
        self._num_heads = config.num_heads
        # Performer and RFA never form attention weights, so there is nothing to drop.
        self._attention_dropout = config.attention_dropout if getattr(attention, "can_drop", True) else 0.0
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.to_qkv = nn.Linear(config.d_model, 3 * config.d_attention, bias=False)
        self.attention = attention
        self.to_output = nn.Linear(config.d_attention, config.d_model, bias=False)
        self.attention_out_dropout = nn.Dropout(config.dropout)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_ff, config.d_model),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self._num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()  # [B, H, L, D]
        dropout_p = self._attention_dropout if self.training else 0.0
        heads = self.attention(query, key, value, key_mask=mask, dropout_p=dropout_p)
        x = x + self.attention_out_dropout(self.to_output(heads.transpose(1, 2).flatten(2)))
        return x + self.feed_forward(self.feed_forward_norm(x))


class LearnedPositions(nn.Module):
    """Add a learned vector for each position."""

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(max_length, d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.vectors[: x.shape[1]]


class RowsAndColumns(nn.Module):
    """Add sines and cosines of the row and of the column of each pixel of a square image, each in half the vector.

    Wavelengths go from 2 pi pixels to 100 times that: most of them differ between the pixels of a small image.
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        side = math.isqrt(max_length)
        if side * side != max_length:
            raise ValueError(f'positions="rows-and-columns" needs square images, got {max_length} tokens')
        if d_model % 2:
            raise ValueError(f'd_model must be even for positions="rows-and-columns", got {d_model}')
        places = sines_and_cosines(side, d_model // 2, longest=100.0)
        rows, columns = places[:, None].expand(-1, side, -1), places[None].expand(side, -1, -1)
        self.register_buffer("vectors", torch.cat([rows, columns], dim=-1).flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.vectors  # type: ignore[assignment]
        return x + vectors


class SinusoidalPositions(nn.Module):
    """Add sines and cosines of the position, with wavelengths from 2 pi to 10,000 times that."""

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.register_buffer("vectors", sines_and_cosines(max_length, d_model, longest=10_000.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.vectors  # type: ignore[assignment]
        return x + vectors[: x.shape[1]]


def sines_and_cosines(length: int, size: int, *, longest: float) -> Tensor:
    """Alternating sines and cosines of 0 to length - 1, [length, size]; wavelengths from 2 pi to 2 pi x longest."""
    rates = torch.exp(-math.log(longest) / size * torch.arange(0, size, 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]


def _positions(config: ModelConfig, max_length: int) -> nn.Module:
    match config.positions:
        case "learned":
            return LearnedPositions(max_length, config.d_model)
        case "rows-and-columns":
            return RowsAndColumns(max_length, config.d_model)
        case _:
            return SinusoidalPositions(max_length, config.d_model)
