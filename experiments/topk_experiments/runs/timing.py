"""Time of a block of code, how busy other processes were meanwhile, and what larger sizes are expected to take."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

# Cores that others may use before a table carries a note about them.
_BUSY = 0.2


class Stopwatch:
    """Measures a `with` block.

    elapsed_s    wall-clock time
    other_cores  how many cores other processes kept busy on average meanwhile; None for a time too short to tell
    """

    elapsed_s: float
    other_cores: float | None

    def __enter__(self) -> Stopwatch:
        self._others_before = _cpu_seconds_of_others()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.elapsed_s = time.perf_counter() - self._start
        others_s = _cpu_seconds_of_others() - self._others_before
        # The system counts in hundredths of a second, which says nothing about a shorter time.
        self.other_cores = max(0.0, others_s / self.elapsed_s) if self.elapsed_s > 0.1 else None


def busy_note(other_cores: list[float | None], num_cpus: int | None) -> str | None:
    """A note for a table whose times were taken while other processes were busy; None where they were not."""
    most = max((cores for cores in other_cores if cores is not None), default=0.0)
    if most <= _BUSY:
        return None
    return (
        f"Other processes kept up to {most:.1f} of {num_cpus} cores busy meanwhile: on a quiet machine these times are "
        "shorter."
    )


def expected_s(measured: Mapping[int, float], size: int, power: float = 2.0) -> float | None:
    """Seconds at a size, from those at smaller ones; None where there are none.

    The time goes on growing as it did between the last two sizes, or with the given power of the size where only one
    was measured.
    """
    sizes = sorted(smaller for smaller in measured if smaller < size)
    if not sizes:
        return None
    last = sizes[-1]
    if len(sizes) > 1:
        before = sizes[-2]
        power = math.log(measured[last] / measured[before]) / math.log(last / before)
    return measured[last] * (size / last) ** power


def _cpu_seconds_of_others() -> float:
    import psutil

    everything = psutil.cpu_times()
    own = psutil.Process().cpu_times()
    busy = sum(getattr(everything, field, 0.0) for field in ("user", "nice", "system", "irq", "softirq", "steal"))
    return busy - own.user - own.system
