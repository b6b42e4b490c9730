"""Peak memory of a stretch of code, as the operating system counts it for this process."""

from __future__ import annotations

import ctypes
import gc
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
    first, so that it cannot hide a part of the peak.

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

    def read(self) -> PeakMemory:
        """The peak so far; after the block that of the block."""
        if self._result is not None:
            return self._result
        if self._can_reset:
            peak_mib, method = _peak_since_reset_mib(), "VmHWM, reset just before"
        else:
            peak_mib, method = _peak_of_process_mib(), "peak of the whole process: an upper bound"
        # The kernel counts pages in batches per thread; a peak may read a few pages below the baseline.
        peak_mib = max(peak_mib, self._baseline_mib)
        return PeakMemory(peak_mib - self._baseline_mib, self._baseline_mib, peak_mib, method)


def resident_mib() -> float:
    """Resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss / _MIB


def limit_memory(fraction_of_available: float, at_most_gib: float | None = None) -> None:
    """Let allocations fail beyond a part of what is available now and beyond a size, where the system can do that.

    Without it a point that does not fit would make the kernel end some process, perhaps another one.
    """
    if not sys.platform.startswith("linux"):
        return
    import resource

    import psutil

    limit = int(psutil.virtual_memory().available * fraction_of_available)
    if at_most_gib is not None:
        limit = min(limit, int(at_most_gib * 2**30))
    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    if hard_limit == resource.RLIM_INFINITY or limit < hard_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    Path("/proc/self/oom_score_adj").write_text("1000")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; torch and C++ have no type of their own for that."""
    words = ("allocate memory", "bad_alloc", "CUDA out of memory")
    return isinstance(error, MemoryError) or any(said in str(error) for said in words)


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
