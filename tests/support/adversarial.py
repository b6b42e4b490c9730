"""Queries, keys and additions to scores that mislead the screening of keys, and a check that it misses none.

    python tests/support/adversarial.py [SEEDS]    every family with SEEDS shapes, as make check-exact does

The kernels of some targets screen keys; those of another with the same vectors score all. Both must give the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from topk_attention import ALiBi, RelativeBias, topk_attention
from topk_attention.backends import cpu

_SHAPES = ((150, 1100), (97, 1500), (70, 3001), (1024, 1024), (130, 2048), (65, 5000))  # queries, keys
_HEADS = ((2, 1), (2, 2), (4, 2))  # of queries, of keys
Tensors = tuple[torch.Tensor, torch.Tensor]


def screening_targets() -> list[str]:
    """Those that this processor can run."""
    return [name for name in cpu.cpu_targets() if name in cpu.SCREENING]


def _rows(key: torch.Tensor, share: float, factor: float) -> torch.Tensor:
    """The keys, this share of them times a factor."""
    return torch.where(torch.rand(key.shape[:-1])[..., None] < share, factor, 1.0) * key


def _with(x: torch.Tensor, share: float, value: float) -> torch.Tensor:
    return torch.where(torch.rand(x.shape) < share, value, x)


def _channels(x: torch.Tensor) -> torch.Tensor:
    weights = torch.ones(x.shape[-1])
    weights[torch.randint(x.shape[-1], (3,))] = torch.tensor([30.0, 100.0, 1000.0])
    return x * weights


def _slope(key: torch.Tensor, low: float) -> torch.Tensor:
    return torch.linspace(low, 3, key.shape[-2])[:, None]


def _repeat(key: torch.Tensor) -> torch.Tensor:
    return key[..., torch.randint(max(key.shape[-2] // 8, 1), key.shape[-2:-1]), :]


def _one_sign(x: torch.Tensor) -> torch.Tensor:
    """Elements alike in size and, within a row, of one sign: products add up to the most that there can be."""
    return x[..., :1].sign() * (1 + 0.02 * x)


FAMILIES: dict[str, Callable[[torch.Tensor, torch.Tensor], Tensors]] = {
    "normal": lambda q, k: (q, k),
    "channels far larger in keys": lambda q, k: (q, _channels(k)),
    "channels far larger in queries": lambda q, k: (_channels(q), k),
    "large mean": lambda q, k: (q, k + 100 * torch.randn(k.shape[-1])),
    "huge mean": lambda q, k: (q, k + 1e5 * torch.randn(k.shape[-1])),
    "norms over 12 decades": lambda q, k: (q, k * 10 ** (12 * torch.rand(k.shape[:-1])[..., None] - 6)),
    "few huge keys": lambda q, k: (q, _rows(k, 0.01, 1e6)),
    "few keys without a bound": lambda q, k: (q, _rows(k, 0.02, 1e17)),
    "no key with a bound": lambda q, k: (q, k * 1e18),
    "overflowing scores": lambda q, k: (q * 1e20, k * 1e20),
    "all equal": lambda q, k: (q, k[..., :1, :].expand_as(k)),
    "all equal but the last": lambda q, k: (q, torch.cat([k[..., :1, :].expand_as(k)[..., 1:, :], k[..., -1:, :]], -2)),
    "each key many times": lambda q, k: (q, _repeat(k)),
    "nearly equal": lambda q, k: (q, k[..., :1, :] * (1 + 1e-7 * torch.randn(k.shape[:-1])[..., None])),
    "-1, 0 and 1": lambda q, k: (q.round().clamp(-1, 1), k.round().clamp(-1, 1)),
    "zero keys": lambda q, k: (q, torch.zeros_like(k)),
    "some queries zero": lambda q, k: (_rows(q, 0.5, 0), k),
    "some keys zero": lambda q, k: (q, _rows(k, 0.5, 0)),
    "subnormal keys": lambda q, k: (q, k * 1e-40),
    "subnormal queries": lambda q, k: (q * 1e-41, k),
    "tiny queries and keys": lambda q, k: (q * 1e-14, k * 1e-14),
    "tiny keys": lambda q, k: (q, k * 1e-21),
    "NaN keys": lambda q, k: (q, _rows(k, 0.01, torch.nan)),
    "inf in keys": lambda q, k: (q, _with(k, 0.0003, torch.inf)),
    "NaN queries": lambda q, k: (_rows(q, 0.1, torch.nan), k),
    "inf in queries": lambda q, k: (_with(q, 0.002, -torch.inf), k),
    "one-hot": lambda q, k: (3.0 * (torch.rand(q.shape) < 1 / q.shape[-1]), (torch.rand(k.shape) < 0.03).float()),
    "longer from key to key": lambda q, k: (q, k * _slope(k, 0)),
    "better from key to key": lambda q, k: (q.abs(), k.abs() * _slope(k, 0.01)),
    "every eighth key best": lambda q, k: (
        q.abs(),
        k.abs() * torch.where(torch.arange(k.shape[-2]) % 8 == 5, 3, 0.1)[:, None],
    ),
    "signs": lambda q, k: (q.sign(), k.sign()),
    "all of one sign": lambda q, k: (_one_sign(q), _one_sign(k)),
}


def _additions(num_heads: int, queries: int, keys: int) -> Iterator[dict[str, Any]]:
    """Masks and biases of every kind; each call of the check takes the next."""
    full = (1, num_heads, queries, keys)
    while True:
        yield {}
        yield {"attn_mask": torch.rand(1, 1, 1, keys) < 0.7}
        yield {"attn_mask": torch.rand(1, 1, queries, keys) < 0.02}
        yield {"attn_mask": torch.rand(1, 1, queries, keys) < 0.9}
        yield {"attn_mask": _with(30 * torch.randn(full), 0.2, -torch.inf)}
        yield {"bias": ALiBi(2.0 ** -torch.arange(1, num_heads + 1))}
        relative = RelativeBias(torch.randn(1, queries + keys - 1).expand(num_heads, -1))
        yield {"bias": relative, "attn_mask": torch.arange(keys)[None] < keys - 5}
        yield {"attn_mask": torch.where(torch.rand(1, 1, 1, keys) < 0.3, torch.finfo(torch.float32).min, 0)}
        yield {"bias": torch.randn(full), "attn_mask": torch.rand(1, 1, 1, keys) < 0.9}
        broken = _with(_with(torch.randn(1, 1, queries, keys), 0.001, torch.nan), 0.001, torch.inf)
        broken[..., ::7, :] *= 1e30
        yield {"bias": broken}


def differing_rows(target: str, seed: int, families: list[str] | None = None) -> tuple[int, list[str]]:
    """The number of rows compared, and a line for each call that gave other bits where the target screened keys."""
    torch.manual_seed(seed)
    heads, key_heads = _HEADS[seed % len(_HEADS)]
    queries, keys = _SHAPES[seed % len(_SHAPES)]
    dim = [64, 16, 37, 128, 20, 80, 64][seed % 7]
    dtype = [torch.float32, torch.bfloat16, torch.float32, torch.float16][seed % 4]
    additions = _additions(heads, queries, keys)
    for _ in range(seed % 10):
        next(additions)
    rows, found = 0, []
    for family in families or FAMILIES:
        query, key = FAMILIES[family](torch.randn(1, heads, queries, dim), torch.randn(1, key_heads, keys, dim))
        value = torch.randn(1, key_heads, keys, 24)
        k = [[1, 4, 16, 64, 100][n] for n in torch.randint(5, (heads,)).tolist()]
        options = {"k": k, "is_causal": bool(torch.rand(()) < 0.5), "enable_gqa": heads != key_heads} | next(additions)
        if seed % 5 == 3:
            options["scale"] = 1.0
        tensors = [x.to(dtype) for x in (query, key, value)]
        if "bias" in options and isinstance(options["bias"], torch.Tensor):
            options["bias"] = options["bias"].to(dtype)
        if "attn_mask" in options and options["attn_mask"].is_floating_point():
            options["attn_mask"] = options["attn_mask"].to(dtype)
        results = []
        for name in (cpu.SCREENING[target], target):
            with cpu.forced_cpu_target(name):
                output, selection = topk_attention(*tensors, backend="cpu", return_selection=True, **options)
            results.append((output, selection.indices, selection.weights))
        rows += heads * queries
        if not all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*results, strict=True)):
            sizes = f"{heads} heads on {key_heads}, {queries} x {keys} x {dim}"
            found.append(f"{target}, {family}: seed {seed}, {dtype}, {sizes}, {options}")
    return rows, found


def main() -> None:
    targets = screening_targets()
    if not targets:
        print(f"skipped: this processor or build has no kernels that screen keys: {', '.join(cpu.SCREENING)}")
    all_found = []
    for target in targets:
        rows, found = 0, []
        for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 12):
            more, differing = differing_rows(target, seed)
            rows += more
            found += differing
        print(
            *found, f"{target}: {rows} rows compared with {cpu.SCREENING[target]}, {len(found)} calls differ", sep="\n"
        )
        all_found += found
    if all_found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
