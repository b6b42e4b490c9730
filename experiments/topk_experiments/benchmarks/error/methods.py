"""The methods whose error is measured, with their sizes, and the errors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...rivals import METHODS as EVERY_METHOD
from ...rivals import new_attention
from .capture import Layer

_NUM_FEATURES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Method(NamedTuple):
    """
    description  its name in tables and pictures
    size         the name of its size; None where it has none
    sizes        those measured by default
    sharpness    factors on the scores; each head uses the best of them
    is_random    its error depends on random directions
    """

    description: str
    size: str | None = None
    sizes: tuple[int, ...] = ()
    sharpness: tuple[float, ...] = ()
    is_random: bool = False


METHODS = {
    "topk": Method(EVERY_METHOD["topk"].description, "k", (4, 8, 16, 32, 64, 128, 256, 512, 1024)),
    "performer": Method(EVERY_METHOD["performer"].description, "features", _NUM_FEATURES, is_random=True),
    "performer-tuned": Method(
        "Performer, each head with its best sharpness",
        "features",
        _NUM_FEATURES,
        sharpness=(1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        is_random=True,
    ),
    "rfa": Method(
        "RFA, each head with its best sigma",
        "features",
        _NUM_FEATURES,
        sharpness=(1 / 16, 1 / 4, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),  # of unit vectors: sigma squared
        is_random=True,
    ),
    "uniform": Method("mean of the visible values"),
    "sdpa": Method(EVERY_METHOD["sdpa"].description),
}


def sizes_of(method: str, sizes: Sequence[int] | None) -> tuple[int | None, ...]:
    """The sizes of a method to measure: those given, otherwise its own."""
    if METHODS[method].size is None:
        return (None,)
    return METHODS[method].sizes if sizes is None else tuple(dict.fromkeys(sizes))


class Attention:
    """Causal attention by a method, for the heads of one layer. Each object draws random features of its own.

    sharpness  [H]  factor on the scores of each head, initially 1
    """

    def __init__(self, method: str, size: int | None, num_heads: int, head_dim: int, device: str) -> None:
        self._candidates = METHODS[method].sharpness
        self.sharpness = torch.ones(num_heads, device=device)
        self._is_uniform, self._is_rfa = method == "uniform", method == "rfa"
        if not self._is_uniform:
            options = {"num_heads": num_heads} if self._is_rfa else {}
            name = method.removesuffix("-tuned")
            attention = new_attention(name, head_dim=head_dim, k=size, num_features=size or 1, **options)
            self._attention = attention.to(device).requires_grad_(False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[1, H, N, D], ... -> [1, H, N, E], of the tensors that `prepare` returned."""
        if self._is_uniform:
            count = torch.arange(1, value.shape[2] + 1, device=value.device, dtype=value.dtype)
            return value.cumsum(2) / count[:, None]
        return self._attention(query, key, value, is_causal=True)

    @torch.no_grad()
    def prepare(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value scaled by each head's sharpness, which a model would have in its weights."""
        root = self.sharpness.sqrt()[:, None]  # [H, 1]
        if self._is_rfa:
            sigma = cast(Tensor, self._attention.sigma)  # [H, D]
            sigma.copy_(root.expand_as(sigma))
        elif self._candidates:
            query, key = query * root[..., None], key * root[..., None]
        return query, key, value

    @torch.no_grad()
    def tune(self, layer: Layer) -> None:
        """Set the sharpness of each head to the candidate with the lowest error on these very tensors."""
        if not self._candidates:
            return
        errors = []
        for candidate in self._candidates:
            self.sharpness.fill_(candidate)
            errors.append(relative_errors(self(*self.prepare(*layer[:3])), layer.output))
        best = torch.stack(errors).nan_to_num(torch.inf).argmin(0)
        self.sharpness = torch.tensor(self._candidates, device=best.device)[best]


def relative_errors(output: Tensor, exact: Tensor) -> Tensor:
    """|output - exact| / |exact| of each head, Euclidean norms over queries and dimensions: [1, H, N, E] -> [H]."""
    difference, whole = (
        torch.linalg.vector_norm(tensor, dim=(0, 2, 3), dtype=torch.float64) for tensor in (output - exact, exact)
    )
    return difference / whole


def largest_errors(output: Tensor, exact: Tensor) -> Tensor:
    """The largest difference of each head, as a fraction of its largest entry: [1, H, N, E] -> [H]."""
    return (output - exact).abs().amax((0, 2, 3)).double() / exact.abs().amax((0, 2, 3))
