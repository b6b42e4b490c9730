"""Peak memory of a block of code: resident memory of this process, or on a GPU what torch has allocated."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MIB = 2**20


class PeakMemory(NamedTuple):
    """Memory in MiB; `method` says in words how the peak was read."""

    peak_mib: float  # above the baseline
    baseline_mib: float
    total_peak_mib: float
    method: str

    def as_record(self) -> dict[str, Any]:
        """Its fields, as records hold them."""
        return {
            "peak_mib": self.peak_mib,
            "baseline_mib": self.baseline_mib,
            "total_peak_mib": self.total_peak_mib,
            "memory_method": self.method,
        }


class PeakMeter:
    """Measure the peak of resident memory inside a `with` block, and its height above the memory at the start.

    Everything that is to count must be created inside the block. At the start, freed memory that the C library keeps is
    returned to the system, so that it cannot hide a part of the peak. Memory that is freed inside the block and kept by
    the C library counts, unless the process returns it too (`run_in_fresh_process(memory_in_use=True)`).

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
        """MiB in use now, above the baseline."""
        return max(resident_mib() - self._baseline_mib, 0.0)

    def read(self) -> PeakMemory:
        """The peak so far; after the block, the peak of the block."""
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
    """The same for tensors on the current GPU, counted by torch's allocator."""

    def __enter__(self) -> CudaPeakMeter:
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
        """MiB in use now, above the baseline."""
        return torch.cuda.memory_allocated() / _MIB - self._baseline_mib

    def read(self) -> PeakMemory:
        """The peak so far; after the block, the peak of the block."""
        if self._result is not None:
            return self._result
        torch.cuda.synchronize()
        peak_mib = torch.cuda.max_memory_allocated() / _MIB
        return PeakMemory(peak_mib - self._baseline_mib, self._baseline_mib, peak_mib, "allocated by torch on the GPU")


def resident_mib() -> float:
    """Resident memory of this process now, in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / _MIB


def limit_memory(fraction_of_available: float, at_most_gib: float | None = None) -> None:
    """Make allocations fail beyond a share of the memory that is available now, and beyond a size; on Linux only.

    Without a limit, a point that does not fit makes the kernel kill a process, perhaps another one.
    """
    mib = available_mib() * fraction_of_available
    limit_memory_to(mib if at_most_gib is None else min(mib, at_most_gib * 1024))


def limit_memory_to(mib: float) -> None:
    """Make allocations of this process fail beyond this much memory in all; on Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    limit = int(mib * _MIB)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    if hard_limit == resource.RLIM_INFINITY or limit < hard_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    Path("/proc/self/oom_score_adj").write_text("1000")


def available_mib() -> float:
    """Memory in MiB that is still available without killing a process."""
    import psutil

    return psutil.virtual_memory().available / _MIB


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a failed allocation; torch and C++ have no exception type of their own for that."""
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
