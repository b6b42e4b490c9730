"""The differences between measuring on the CPU and on a GPU."""

from __future__ import annotations

import torch

from topk_attention.environment import cpu_model

from .memory import CudaPeakMeter, PeakMeter, limit_memory_to

DEVICES = ("cpu", "cuda")


def check_device(device: str) -> None:
    """Check that a device exists.

    Raises:
        ValueError: the kind is unknown, or torch finds no such device.
    """
    if device not in DEVICES:
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda" cannot be used here: torch finds no CUDA device; use "cpu"')


def device_name(device: str) -> str:
    """The name of the processor or GPU."""
    if device == "cpu":
        return cpu_model()
    return torch.cuda.get_device_name()


def synchronize(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_meter(device: str) -> PeakMeter | CudaPeakMeter:
    """A meter for the peak of memory in a `with` block: resident memory on the CPU, memory of tensors on a GPU."""
    return PeakMeter() if device == "cpu" else CudaPeakMeter()


def limit_memory_on(device: str, mib: float) -> None:
    """Limit the memory of this process in MiB: all its memory on the CPU, the GPU's memory on a GPU."""
    if device != "cuda":
        limit_memory_to(mib)
        return
    total_mib = torch.cuda.get_device_properties(0).total_memory / 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, mib / total_mib))
