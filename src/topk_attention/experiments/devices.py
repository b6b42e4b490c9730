"""What differs between measuring on the CPU and on a GPU."""

from __future__ import annotations

from types import TracebackType

from .memory import PeakMemory, PeakMeter
from .records import cpu_model

DEVICES = ("cpu", "cuda")
_MIB = 2**20


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: there is no such kind of device, or none of it here.
    """
    if device not in DEVICES:
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError('device="cuda" cannot be used here: torch finds no CUDA device; use "cpu"')


def device_name(device: str) -> str:
    """The name of the processor that computes."""
    if device == "cpu":
        return cpu_model()
    import torch

    return torch.cuda.get_device_name()


def synchronize(device: str) -> None:
    """Wait until everything that was asked of the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_meter(device: str) -> PeakMeter | CudaPeakMeter:
    """Measures the peak of memory in a `with` block: resident memory of the process, or what tensors take on a GPU."""
    return PeakMeter() if device == "cpu" else CudaPeakMeter()


class CudaPeakMeter:
    """`PeakMeter` for the current CUDA device: bytes that torch's allocator has handed out."""

    def __enter__(self) -> CudaPeakMeter:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._baseline_mib = torch.cuda.memory_allocated() / _MIB
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
        import torch

        peak_mib = torch.cuda.max_memory_allocated() / _MIB
        return PeakMemory(peak_mib - self._baseline_mib, self._baseline_mib, peak_mib, "allocated on the CUDA device")
