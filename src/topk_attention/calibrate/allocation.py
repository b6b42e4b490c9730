"""Chooses one k per head from measured curves, for a budget of keys or for a bound on a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..functional.completion import Completion
from .statistics import Curves

Allocation = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class MeanK:
    """A budget: keys (or neurons) per query, on average over all heads and layers.

    The heads whose keys matter most to the loss get the most.
    """

    mean_k: float

    def __post_init__(self) -> None:
        if not self.mean_k >= 1:
            raise ValueError(f"mean_k must be at least 1, got {self.mean_k:g}")
        if self.mean_k == math.inf:
            raise ValueError("mean_k must be finite, got inf")


@dataclass(frozen=True)
class LostMass:
    """A bound on the softmax weight that each head may lose, on average over queries, e.g. 0.05."""

    bound: float

    def __post_init__(self) -> None:
        if not 0 < self.bound < 1:
            raise ValueError(f"bound must be a share of the mass between 0 and 1, got {self.bound:g}")


@dataclass(frozen=True)
class LossIncrease:
    """A bound on the rise of the loss above that of full attention, in nats per token, e.g. 0.01 (about 1 % of
    perplexity).

    `calibrate` searches the smallest mean k that stays within the bound on the calibration text itself.
    """

    bound: float

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound must be above 0 nats per token, got {self.bound:g}")
        if self.bound == math.inf:
            raise ValueError("bound must be finite, got inf")


Target = MeanK | LostMass | LossIncrease


def with_mean_k(curves: Mapping[str, Curves], mean_k: float, *, smallest_k: int = 1) -> Allocation:
    """Spend a mean of mean_k keys a head so that the forecast of the loss, a sum over heads, is smallest.

    The forecast for a head is half its loss error (the curvature) plus the reliable part of its loss change. Dropped
    keys of some heads raise the loss on every text of a kind, those of other heads lower it. One more key saves equally
    much in every head (a Lagrange multiplier, found by bisection). Keys that would only raise the loss are not spent.

    Raises:
        ValueError: mean_k is below smallest_k, or above the largest k of the curves.
    """
    largest_k = max(c.ks[-1] for c in curves.values())
    if not smallest_k <= mean_k <= largest_k:
        raise ValueError(
            f"mean_k must be between {smallest_k} and {largest_k}, the largest k that was measured, got {mean_k:g}"
        )
    # The changes count as far as two halves of the text agree on them. With a larger weight results on other texts were
    # worse: heads that are chosen for their changes also add up in curvature, which a sum over heads does not show
    # (LOG.md).
    reliability = agreement(curves)
    rows = [
        _interpolated(np.array(c.ks), error.numpy(), reliability * change.numpy(), smallest_k)
        for c in curves.values()
        for error, change in zip(c.loss_error, c.loss_change.mean(0), strict=True)
    ]

    def choose(price: float) -> list[int]:
        return [int(ks[np.argmin(costs + price * ks)]) for ks, costs in rows]

    low, high = -60.0, 30.0  # natural logarithms of the price of a key
    for _ in range(60):
        middle = (low + high) / 2
        if np.mean(choose(np.exp(middle))) > mean_k:
            low = middle
        else:
            high = middle
    chosen = _spend_rest(rows, choose(np.exp(high)), mean_k)
    return _by_path(curves, chosen)


def agreement(curves: Mapping[str, Curves]) -> float:
    """How far two halves of the text agree on the signed changes of the loss, between 0 and 1.

    It is the product of the two changes divided by their mean square. Each change is in units of the curve's error at
    that k.
    """
    both = squares = 0.0
    for c in curves.values():
        earlier, later = (c.loss_change / c.loss_error.sqrt().clamp(min=1e-15)).numpy()
        both += float((earlier * later).sum())
        squares += float((earlier**2 + later**2).sum()) / 2
    return max(0.0, both / squares) if squares > 0 else 0.0


def within_lost_mass(curves: Mapping[str, Curves], bound: float) -> Allocation:
    """For each head the smallest k of its curve that loses no more than the bound.

    Raises:
        ValueError: the bound is not between 0 and 1.
    """
    if not 0 < bound < 1:
        raise ValueError(f"bound must be a share of the mass between 0 and 1, got {bound:g}")
    chosen = []
    for c in curves.values():
        for lost in c.lost_mass:
            enough = (lost <= bound).nonzero()
            chosen.append(c.ks[int(enough[0])] if len(enough) > 0 else c.ks[-1])
    return _by_path(curves, chosen)


def completion_at(curves: Mapping[str, Curves], allocation: Allocation) -> dict[str, Completion]:
    """The completion of each layer whose curves were measured with one: for each head the best scale at its k."""
    found = {path: c.completion_at(allocation[path]) for path, c in curves.items()}
    return {path: completion for path, completion in found.items() if completion is not None}


def mean_of(allocation: Allocation) -> float:
    """The mean k over all heads of all layers."""
    return float(np.mean([k for ks in allocation.values() for k in ks]))


def _interpolated(
    ks: np.ndarray, errors: np.ndarray, changes: np.ndarray, smallest_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidate k, in geometric steps, and the cost of each. Errors are interpolated by their logarithm."""
    candidates = np.unique(np.round(np.geomspace(smallest_k, ks[-1], 200)).astype(int))
    # Measured curves are noisy. A larger k never has a larger error.
    falling = np.minimum.accumulate(np.maximum(errors, 1e-30))
    at, known = np.log(candidates), np.log(ks)
    return candidates, np.exp(np.interp(at, known, np.log(falling))) / 2 + np.interp(at, known, changes)


def _spend_rest(rows: list[tuple[np.ndarray, np.ndarray]], chosen: list[int], mean_k: float) -> list[int]:
    """Spend the keys that remain where curves are not convex, on the heads that gain most for each further key."""
    rest = int(mean_k * len(rows)) - sum(chosen)
    while rest > 0:
        best = (0.0, 0, 0)  # gain per key, row, k
        for number, (ks, errors) in enumerate(rows):
            at = int(np.searchsorted(ks, chosen[number]))
            end = int(np.searchsorted(ks, chosen[number] + rest, side="right"))
            if end > at + 1:
                # Not only the next k: after a flat part the curve may fall again.
                gains = (errors[at] - errors[at + 1 : end]) / (ks[at + 1 : end] - ks[at])
                step = int(np.argmax(gains))
                best = max(best, (float(gains[step]), number, int(ks[at + 1 + step])))
        gain, number, k = best
        if gain <= 0:
            break
        rest -= k - chosen[number]
        chosen[number] = k
    return chosen


def _by_path(curves: Mapping[str, Curves], chosen: list[int]) -> Allocation:
    allocation, first = {}, 0
    for path, c in curves.items():
        allocation[path] = tuple(chosen[first : first + len(c.lost_mass)])
        first += len(c.lost_mass)
    return allocation
