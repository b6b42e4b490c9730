"""Words for a k that leaves nothing out, in one place for all reports and commands."""

from __future__ import annotations

from collections.abc import Iterable


def k_in_words(k: int, num_keys: int | None = None) -> str:
    """A k, and that it is full attention where no query has more keys than `num_keys`.

    >>> k_in_words(64, 4096), k_in_words(5000, 4096)
    ('k = 64', 'k = 5000 (every key: full attention)')
    """
    return f"k = {k} (every key: full attention)" if num_keys is not None and k >= num_keys else f"k = {k}"


def full_attention_note(k: int | Iterable[int | None] | None, num_keys: int | None) -> str | None:
    """A sentence about those k that are full attention where no query has more keys than `num_keys`; None without any.

    >>> full_attention_note([64, 5000], 4096)
    'k = 5000 is full attention here: no query has more than 4,096 keys'
    >>> full_attention_note(64, 4096)
    """
    ks = [k] if isinstance(k, int) or k is None else list(k)
    full = sorted({one for one in ks if one is not None and num_keys is not None and one >= num_keys})
    if not full:
        return None
    listed, verb = ", ".join(map(str, full)), "is" if len(full) == 1 else "are"
    keys = f"{num_keys:,} {'key' if num_keys == 1 else 'keys'}"
    return f"k = {listed} {verb} full attention here: no query has more than {keys}"
