"""Loads the compiled kernels and says what they can do on this processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_FOLDER = Path(__file__).parents[2]
# What the operators are promised and promise, as in csrc/bindings.cpp: raised there and here where either changes.
INTERFACE = 8
# The targets that screen the keys of attention by 8-bit products, and those of the same vectors that score all keys.
# Both give the same bits.
SCREENING = {
    "avx512vnni": "avx512",
    "avx512screen": "avx512",
    "avxvnni": "avx2",
    "avx2screen": "avx2",
    "neondot": "neon",
}


def _load() -> str | None:
    """Why there are no kernels, None where they are loaded."""
    files = sorted(_FOLDER.glob("_kernels*.so"))
    if not files:
        return "the package was installed without its compiled kernels, which need a C++ compiler and torch to build"
    try:
        torch.ops.load_library(files[0])
    except OSError as error:
        return f"the compiled kernels do not load: {error.__cause__ or error}"
    if _interface() != INTERFACE:
        return "the compiled kernels are of another version of the package: rebuild them"
    return None


def _interface() -> int | None:
    """The number that the loaded kernels were built with; None for those from before there was one."""
    operators = torch.ops.topk_attention
    return int(operators.kernel_interface()) if hasattr(operators, "kernel_interface") else None


_PROBLEM = _load()
_TARGETS = tuple(torch.ops.topk_attention.cpu_targets().split()) if _PROBLEM is None else ()
_forced: str | None = None


def problem() -> str | None:
    """Why the kernels cannot run in this process, None where they can."""
    return _PROBLEM


def cpu_targets() -> tuple[str, ...]:
    """The instruction sets for which there are kernels and which this processor can run, best first."""
    return _TARGETS


def cpu_target() -> str:
    """The instruction set in use: the best, unless `forced_cpu_target` is in force."""
    return _forced or _TARGETS[0]


@contextmanager
def forced_cpu_target(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set in the whole process: one of `cpu_targets()`.

    "avx512vnni", "avx512screen", "avx512", "avxvnni", "avx2screen", "avx2" and "baseline" on x86, "neondot" and
    "neon" on Arm. avx512, avx2, baseline and neon score all keys in attention, the others screen them first.

    Raises:
        ValueError: this processor, or this build, has no such kernels.
    """
    if name not in cpu_targets():
        raise ValueError(f"name must be one of {', '.join(cpu_targets())} on this processor, got {name!r}")
    global _forced
    before = _forced
    torch.ops.topk_attention.force_cpu_target(name)
    _forced = name
    try:
        yield
    finally:
        torch.ops.topk_attention.force_cpu_target(before or "")
        _forced = before
