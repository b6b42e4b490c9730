"""Peak memory of a stretch of code: as the operating system counts it for this process, or as torch does on a GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MIB = 2**20


class PeakMemory(NamedTuple):
    """Resident memory of this process in MiB; `method` says in words how the peak was read."""

    peak_mib: float  # above the baseline
    baseline_mib: float
    total_peak_mib: float
    method: str


class PeakMeter:
    """Measures the peak of resident memory inside a `with` block and how far it lies above that at its start.

    What has to count is created inside the block. Freed memory that the C library keeps is handed back to the system
    first, so that it cannot hide a part of the peak. What it keeps of memory freed inside the block counts, unless the
    process hands that back too (`run_in_fresh_process(memory_in_use=True)`).

    >>> with PeakMeter() as meter:
    ...     block = bytearray(32 * 2**20)
    >>> 31 < meter.read().peak_mib < 48
    True
    """

    def __enter__(self) -> PeakMeter:
        gc.collect()
        _return_freed_memory()
        self._can_reset = _reset_peak()
        self._baseline_mib = resident_mib()
        self._result: PeakMemory | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._result = self.read()

    def held_mib(self) -> float:
        """What is held now, above the baseline."""
        return max(resident_mib() - self._baseline_mib, 0.0)

    def read(self) -> PeakMemory:
        """The peak so far; after the block that of the block."""
        if self._result is not None:
            return self._result
        if self._can_reset:
            peak_mib, method = _peak_since_reset_mib(), "VmHWM, reset just before"
            if "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
                method += "; freed memory goes back to the system at once"
        else:
            peak_mib, method = _peak_of_process_mib(), "peak of the whole process: an upper bound"
        # The kernel counts pages in batches per thread; a peak may read a few pages below the baseline.
        peak_mib = max(peak_mib, self._baseline_mib)
        return PeakMemory(peak_mib - self._baseline_mib, self._baseline_mib, peak_mib, method)


class CudaPeakMeter:
    """The same for tensors on the current GPU, as torch's allocator counts them."""

    def __enter__(self) -> CudaPeakMeter:
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._baseline_mib = torch.cuda.memory_allocated() / _MIB
        self._result: PeakMemory | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._result = self.read()

    def held_mib(self) -> float:
        """What is held now, above the baseline."""
        import torch

        return torch.cuda.memory_allocated() / _MIB - self._baseline_mib

    def read(self) -> PeakMemory:
        """The peak so far; after the block that of the block."""
        import torch

        if self._result is not None:
            return self._result
        torch.cuda.synchronize()
        peak_mib = torch.cuda.max_memory_allocated() / _MIB
        return PeakMemory(peak_mib - self._baseline_mib, self._baseline_mib, peak_mib, "allocated by torch on the GPU")


def resident_mib() -> float:
    """Resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss / _MIB


def limit_memory(fraction_of_available: float, at_most_gib: float | None = None) -> None:
    """Let allocations fail beyond a part of what is available now and beyond a size, where the system can do that.

    Without it a point that does not fit would make the kernel end some process, perhaps another one.
    """
    mib = available_mib() * fraction_of_available
    limit_memory_to(mib if at_most_gib is None else min(mib, at_most_gib * 1024))


def limit_memory_to(mib: float) -> None:
    """Let allocations of this process fail beyond this much memory in all, where the system can do that."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    limit = int(mib * _MIB)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    if hard_limit == resource.RLIM_INFINITY or limit < hard_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    Path("/proc/self/oom_score_adj").write_text("1000")


def available_mib() -> float:
    """Memory that processes could still take without another being ended."""
    import psutil

    return psutil.virtual_memory().available / _MIB


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; torch and C++ have no type of their own for that."""
    words = ("allocate memory", "bad_alloc", "out of memory", "found no memory")  # torch's, C++'s, CUDA's, our kernels'
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _return_freed_memory() -> None:
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _peak_since_reset_mib() -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{_STATUS} has no VmHWM")


def _peak_of_process_mib() -> float:
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / _MIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB
