from dataclasses import replace

import pytest

from topk_experiments.benchmarks.attention import ROUNDS
from topk_experiments.benchmarks.attention.works import Work
from topk_experiments.benchmarks.rounds import RoundBenchmark, run_rounds
from topk_experiments.runs import ledger
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.records import read_json_lines
from topk_experiments.runs.steps import Limits
from topk_experiments.runs.timing import expected_s

WORK = Work(num_heads=2, length=64, k=5, head_dim=4)
METHODS = ("topk-chunked", "sdpa")


@pytest.fixture
def benchmark(tmp_path, unpainted_pictures):
    return RoundBenchmark(ROUNDS, "table", {WORK: METHODS}, out=tmp_path, threads=1)


def test_a_work_has_one_process_for_times_and_one_for_each_methods_memory(benchmark, measurements, console):
    (result,) = run_rounds(benchmark, console)
    asked = [(function, request.get("methods", request.get("method"))) for function, request in measurements.requests]
    assert asked == [("time_methods", list(METHODS)), ("measure_memory", "topk-chunked"), ("measure_memory", "sdpa")]
    assert result.seconds("sdpa", "forward_backward") == 2.0
    assert result.peak_mib("topk-chunked") == 12.0


def test_finished_points_are_not_measured_again(benchmark, measurements, console):
    run_rounds(benchmark, console)
    run_rounds(benchmark, console)
    assert len(measurements.requests) == 3
    run_rounds(replace(benchmark, threads=2), console)
    assert len(measurements.requests) == 6
    run_rounds(replace(benchmark, fresh=True), console)
    assert len(measurements.requests) == 9
    assert len(read_json_lines(benchmark.out / "table.jsonl")) == 9


@pytest.mark.parametrize("what", ["cpu", "torch", "product_sha256"])
def test_points_of_another_processor_torch_or_source_are_measured_again(
    benchmark, measurements, console, monkeypatch, what
):
    run_rounds(benchmark, console)
    here = ledger.environment()
    monkeypatch.setattr(ledger, "environment", lambda: here | {what: "another"})
    run_rounds(benchmark, console)
    assert len(measurements.requests) == 6


def test_memory_of_methods_that_keep_every_key_is_measured_once_for_all_k(benchmark, measurements, console):
    run_rounds(replace(benchmark, plan={WORK: METHODS, replace(WORK, k=6): METHODS}), console)
    measured = [request["method"] for function, request in measurements.requests if function == "measure_memory"]
    assert measured == ["topk-chunked", "sdpa", "topk-chunked"]


def test_memory_can_be_left_out(benchmark, measurements, console):
    (result,) = run_rounds(replace(benchmark, with_memory=False), console)
    assert [function for function, _ in measurements.requests] == ["time_methods"]
    assert result.peak_mib("sdpa") is None


def test_running_out_of_memory_is_a_data_point(benchmark, measurements, console):
    measurements.failed = {"sdpa"}
    measurements.errors["measure_memory"] = WorkerError("out of memory", "cannot allocate memory")
    (result,) = run_rounds(benchmark, console)
    assert result.seconds("sdpa", "forward") is None
    assert result.seconds("topk-chunked", "forward") == 1.0
    assert result.memory["sdpa"]["outcome"] == "out of memory"
    assert "sdpa: out of memory" in console.export_text()
    run_rounds(benchmark, console)
    assert len(measurements.requests) == 3


def test_a_work_that_was_given_up_is_tried_again_with_more_time(benchmark, measurements, console):
    benchmark = replace(benchmark, limits=Limits(5), with_memory=False)
    measurements.errors["time_methods"] = WorkerError("time limit", "not finished after 5 s")
    for _ in range(2):
        (result,) = run_rounds(benchmark, console)
        assert result.time_of("sdpa")["outcome"] == "time limit"
    assert len(measurements.requests) == 1
    measurements.errors.clear()
    (result,) = run_rounds(replace(benchmark, limits=Limits(6)), console)
    assert result.time["outcome"] == "finished"


def test_a_wrong_answer_stops_the_benchmark_and_is_not_recorded(benchmark, measurements, console):
    measurements.errors["time_methods"] = WorkerError("error", "the output differs")
    with pytest.raises(WorkerError, match=r"time methods, H = 2, .* failed \(error\): the output differs"):
        run_rounds(benchmark, console)
    assert read_json_lines(benchmark.out / "table.jsonl") == []


def test_a_method_that_would_take_too_long_is_left_out_and_said_so(benchmark, measurements, console):
    measurements.seconds = {"sdpa": 5.0}  # 10 s at 64, 40 s at 128, 160 s at 256
    plan = {replace(WORK, length=length): METHODS for length in (64, 128, 256)}
    results = run_rounds(replace(benchmark, plan=plan), console)
    assert [list(result.left_out) for result in results] == [[], [], ["sdpa"]]
    assert "a forward and backward pass would take about 160 s, more than 120 s" in console.export_text()


def test_only_works_that_differ_in_length_alone_foretell_a_time(benchmark, measurements, console):
    measurements.seconds = {"sdpa": 50.0}
    plan = {WORK: METHODS, replace(WORK, length=128, is_causal=True): METHODS}
    results = run_rounds(replace(benchmark, plan=plan), console)
    assert [list(result.left_out) for result in results] == [[], []]


def test_times_go_on_as_they_grew_and_at_first_with_the_square_of_the_length():
    assert expected_s({}, 64) is None
    assert expected_s({128: 1.0}, 64) is None
    assert expected_s({64: 1.0}, 128) == 4.0
    assert expected_s({64: 1.0}, 128, power=1.0) == 2.0
    assert expected_s({64: 1.0, 128: 2.0, 1024: 5.0}, 512) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": {}}, "there is nothing to measure"),
        ({"plan": {WORK: ()}}, "there is nothing to measure"),
        ({"plan": {WORK: ("flash",)}}, "methods must be"),
        ({"repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_a_benchmark_that_cannot_run_is_refused(benchmark, change, words):
    with pytest.raises(ValueError, match=words):
        replace(benchmark, **change)
