from pathlib import Path

import pytest
import torch

from support_folder import SUPPORT
from topk_experiments.benchmarks.rounds import PointBenchmark
from topk_experiments.runs import devices, steps
from topk_experiments.runs.devices import check_device, device_name, peak_meter
from topk_experiments.runs.memory import ran_out_of_memory
from topk_experiments.runs.process import WorkerError, run_in_fresh_process
from topk_experiments.runs.steps import Limits, Times, measure_step


def test_a_step_is_timed_as_often_as_asked_for_and_its_memory_is_that_of_making_and_doing_it():
    done, sent = [], []

    def new_step():
        kept = torch.ones(16 * 2**20)  # 64 MiB
        return lambda: done.append(kept.sum())

    record = measure_step(new_step, "cpu", {"repetitions": 3, "enough_s": 60.0}, sent.append)
    assert record["repetitions"] == len(done) == 3
    assert 60 < record["peak_mib"] < 100
    assert 0 < record["fastest_s"] <= record["elapsed_s"] <= record["slowest_s"]
    assert sent == [{"doing": "steps after the first"}]


def test_steps_that_would_take_too_long_are_left_out(monkeypatch):
    times = Times("cpu")
    times.take(lambda: None)
    monkeypatch.setattr(times, "_elapsed_s", [2.0])
    times.take_more(lambda: pytest.fail("another one"), 5, enough_s=1.9)
    assert times.as_record()["repetitions"] == 1


@pytest.mark.parametrize(
    ("record", "limits", "more"),
    [
        ({"outcome": "time limit", "time_limit_s": 5}, Limits(6), True),
        ({"outcome": "time limit", "time_limit_s": 5}, Limits(5), False),
        ({"outcome": "out of memory", "memory_limit_gib": 2}, Limits(memory_gib=3), True),
        ({"outcome": "out of memory", "memory_limit_gib": 2}, Limits(memory_gib=2), False),
        ({"outcome": "out of memory", "memory_limit_gib": 2}, Limits(), True),
        ({"outcome": "out of memory", "memory_limit_gib": None}, Limits(), False),
        ({"outcome": "out of memory", "memory_limit_gib": None}, Limits(memory_gib=2), False),
    ],
)
def test_a_point_that_was_given_up_is_tried_again_where_more_is_allowed(record, limits, more):
    assert limits.spare(record) is not more


def test_limits_and_repetitions_that_allow_nothing_are_refused():
    with pytest.raises(ValueError, match="memory-limit must be above 0, got 0"):
        Limits(memory_gib=0)
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        PointBenchmark([1], out=Path(), repetitions=0)


def test_a_process_beyond_its_memory_limit_is_out_of_memory():
    """In a process of its own, as the limit outlives the test."""
    request = {"point": {"threads": 1, "seed": 0}, "memory_limit_gib": 2.0}
    run = "worker_functions:ask_for_three_gib"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SUPPORT, prepend=":")
        with pytest.raises(WorkerError) as caught:
            run_in_fresh_process(run, request)
        assert caught.value.outcome == "out of memory"
        assert run_in_fresh_process(run, request | {"memory_limit_gib": 6.0}) == {"bytes": 3 * 2**30}


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='device="cuda" cannot be used here: torch finds no CUDA device; use "cpu"'):
        check_device("cuda")
    check_device("cpu")
    assert device_name("cpu") == devices.cpu_model()


def test_memory_of_a_gpu_is_what_its_tensors_take(monkeypatch):
    """The counters of torch.cuda are stand-ins: there may be no GPU."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 * 2**20)
    with peak_meter("cuda") as meter:
        pass
    assert meter.read()[:3] == (7.0, 3.0, 10.0)
    steps.Times("cuda").take(lambda: None)
    assert len(waited) == 4  # before and after the block, before and after the call


def test_on_a_gpu_its_own_memory_is_limited_and_not_that_of_the_process(monkeypatch):
    fractions = []
    total = type("Properties", (), {"total_memory": 16 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(steps, "limit_memory", lambda *_: pytest.fail("the process was limited"))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for limit_gib in (4.0, None, 64.0):
        steps.start_point({"point": {"threads": 1, "seed": 0, "device": "cuda"}, "memory_limit_gib": limit_gib})
    assert fractions == [0.25, 1.0]


def test_a_full_gpu_is_out_of_memory():
    assert ran_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert not ran_out_of_memory(RuntimeError("an illegal memory access was encountered"))
