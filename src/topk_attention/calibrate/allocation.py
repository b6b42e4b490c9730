"""From curves to one k per head: what a budget buys, and what a bound costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .statistics import Curves

Allocation = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class MeanK:
    """Keys (or neurons) per query on average over all heads and layers; spent where the loss feels them most."""

    mean_k: float


@dataclass(frozen=True)
class LostMass:
    """The softmax weight that a head may lose, on average over queries, e.g. 0.05."""

    bound: float


@dataclass(frozen=True)
class LossIncrease:
    """How much the loss may rise over full attention's, in nats per token, e.g. 0.01 (about 1 % of perplexity).

    Searched: the smallest mean k that stays within it on the calibration text itself.
    """

    bound: float


Target = MeanK | LostMass | LossIncrease


def with_mean_k(curves: Mapping[str, Curves], mean_k: float, *, smallest_k: int = 1) -> Allocation:
    """Spend mean_k keys a head so that the loss, as far as it can be told head by head, is least.

    A head's share is half its loss error (the curvature) and what can be believed of its loss change: dropping keys of
    some heads raises the loss on any text of a kind, of others lowers it. Every head stops where one more key would
    save the same everywhere (a Lagrange multiplier, found by bisection). Keys by which the loss would only rise stay
    unspent.

    Raises:
        ValueError: mean_k is below smallest_k, or above the largest k of the curves.
    """
    largest_k = max(c.ks[-1] for c in curves.values())
    if not smallest_k <= mean_k <= largest_k:
        raise ValueError(
            f"mean_k must be between {smallest_k} and {largest_k}, the largest k that was measured, got {mean_k:g}"
        )
    # As much as two halves of the text agree: more was worse on other texts, as heads that are chosen for their changes
    # add up in curvature too, which a sum over heads does not see (LOG.md).
    believed = agreement(curves)
    rows = [
        _interpolated(np.array(c.ks), error.numpy(), believed * change.numpy(), smallest_k)
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
    """How far the signed changes of the loss in two halves of the text are the same, between 0 and 1.

    Their product over their mean square, each change measured in units of the curve's error at that k.
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


def mean_of(allocation: Allocation) -> float:
    return float(np.mean([k for ks in allocation.values() for k in ks]))


def _interpolated(
    ks: np.ndarray, errors: np.ndarray, changes: np.ndarray, smallest_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every candidate k, ever further apart, and the cost there: of errors the logarithm is interpolated."""
    candidates = np.unique(np.round(np.geomspace(smallest_k, ks[-1], 200)).astype(int))
    # Measured curves wobble; a larger k never does worse.
    falling = np.minimum.accumulate(np.maximum(errors, 1e-30))
    at, known = np.log(candidates), np.log(ks)
    return candidates, np.exp(np.interp(at, known, np.log(falling))) / 2 + np.interp(at, known, changes)


def _spend_rest(rows: list[tuple[np.ndarray, np.ndarray]], chosen: list[int], mean_k: float) -> list[int]:
    """Where curves are not convex the price leaves a rest; it goes to the heads that gain most for each key of it."""
    rest = int(mean_k * len(rows)) - sum(chosen)
    while rest > 0:
        best = (0.0, 0, 0)  # gain per key, row, k
        for number, (ks, errors) in enumerate(rows):
            at = int(np.searchsorted(ks, chosen[number]))
            end = int(np.searchsorted(ks, chosen[number] + rest, side="right"))
            if end > at + 1:
                # Not only the next k: beyond a flat stretch there may be gains again.
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
