"""What differs between measuring on the CPU and on a GPU."""

from __future__ import annotations

from topk_attention.environment import cpu_model

from .memory import CudaPeakMeter, PeakMeter, limit_memory_to

DEVICES = ("cpu", "cuda")


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


def limit_memory_on(device: str, mib: float) -> None:
    """Let this process run out of memory beyond so much: of all its memory on the CPU, of the GPU's there."""
    if device != "cuda":
        limit_memory_to(mib)
        return
    import torch

    total_mib = torch.cuda.get_device_properties(0).total_memory / 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, mib / total_mib))
