"""Numbers that are not finite, kept out of dense products."""

from __future__ import annotations

from torch import Tensor


def finite_values(table: Tensor) -> tuple[Tensor, Tensor | None]:
    """The table with 0 in place of NaN and inf, and a bool mask of their places, None if there are none.

    In a dense product a hidden NaN would reach every row (0 * NaN), so rows that see one are marked separately.
    """
    if table.sum().isfinite():
        return table, None
    broken = ~table.isfinite()
    return table.masked_fill(broken, 0), broken
