import os
import platform

import pytest
import torch

from support_folder import SUPPORT
from topk_experiments.runs import memory
from topk_experiments.runs.memory import PeakMeter, resident_mib
from topk_experiments.runs.process import run_in_fresh_process


def test_memory_that_was_freed_again_still_counts():
    with PeakMeter() as meter:
        torch.ones(16 * 2**20)  # 64 MiB
    assert 60 < meter.read().peak_mib < 90


def test_memory_from_before_does_not_count():
    block = torch.ones(32 * 2**20)
    with PeakMeter() as meter:
        block.add_(1)
    assert meter.read().peak_mib < 30
    assert meter.read().baseline_mib > 128


def test_an_earlier_peak_does_not_count_where_the_system_can_forget_it():
    torch.ones(64 * 2**20)
    with PeakMeter() as meter:
        torch.ones(8 * 2**20)
    result = meter.read()
    if result.method.startswith("VmHWM, reset just before"):
        assert 30 < result.peak_mib < 60
    assert result.total_peak_mib == pytest.approx(result.baseline_mib + result.peak_mib)


def test_the_peak_can_be_read_before_the_end():
    with PeakMeter() as meter:
        torch.ones(16 * 2**20)
        so_far = meter.read().peak_mib
        torch.ones(32 * 2**20)
    assert so_far < 100 < meter.read().peak_mib


def test_without_a_way_to_reset_the_peak_the_record_says_so(monkeypatch):
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    with PeakMeter() as meter:
        torch.ones(16 * 2**20)
    result = meter.read()
    assert result.method == "peak of the whole process: an upper bound"
    # Linux counts resident pages for each processor and adds them up later: two readings differ by a few dozen pages.
    assert result.total_peak_mib >= resident_mib() - 1
    assert result.total_peak_mib >= 64  # the tensor


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_blocks_that_were_freed_count_unless_the_process_hands_them_back(monkeypatch):
    """16 blocks of 4 MiB with something small between them."""
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([SUPPORT, *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    result = run_in_fresh_process("worker_functions:leave_holes", {})
    assert result["held_mib"] > 56
    assert "freed memory" not in result["method"]
    result = run_in_fresh_process("worker_functions:leave_holes", {}, memory_in_use=True)
    assert result["held_mib"] < 16
    assert result["method"].endswith("freed memory goes back to the system at once")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert run_in_fresh_process("worker_functions:leave_holes", {}, memory_in_use=True)["held_mib"] > 56
