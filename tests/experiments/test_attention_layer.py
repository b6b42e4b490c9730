from dataclasses import replace

import pytest
import torch
from rich.console import Console

from topk_attention.experiments import attention_layer
from topk_attention.experiments.attention_layer import (
    AttentionBenchmark,
    CheckFailedError,
    Point,
    bias_and_dropout,
    check,
    grid,
    run_attention_benchmark,
)
from topk_attention.experiments.records import append_json_line, environment, read_json_lines
from topk_attention.experiments.workers import WorkerError

SMALL = Point("topk", 48, k=5, num_heads=2, head_dim=4)


@pytest.mark.parametrize("projections", [True, False])
@pytest.mark.parametrize("bias", ["none", "learned"])
@pytest.mark.parametrize("implementation", ["topk", "query-chunks", "sdpa"])
def test_every_implementation_passes_the_check_against_the_dense_computation(implementation, bias, projections):
    point = replace(SMALL, implementation=implementation, bias=bias, projections=projections)
    assert check(point) < 1e-5


@pytest.mark.parametrize("bias", ["none", "learned"])
def test_the_check_notices_one_key_too_few(monkeypatch, bias):
    monkeypatch.setattr(attention_layer, "_k", lambda point: point.k - 1 if point.length == 48 else None)
    layer = attention_layer.new_layer(replace(SMALL, bias=bias))
    monkeypatch.undo()
    monkeypatch.setattr(attention_layer, "new_layer", lambda point: layer)
    with pytest.raises(CheckFailedError, match=r"differs from a dense computation by .* of its largest entry"):
        check(replace(SMALL, bias=bias))


def test_the_check_notices_a_gradient_that_is_wrong(monkeypatch):
    class DoubledGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * 2

    attend = attention_layer.topk_attention
    monkeypatch.setattr(
        attention_layer,
        "topk_attention",
        lambda query, *others, **options: attend(DoubledGradient.apply(query), *others, **options),
    )
    with pytest.raises(CheckFailedError, match="the gradient of input 0 differs"):
        check(replace(SMALL, projections=False))


def test_the_preset_compares_learned_bias_and_dropout_at_8192_with_4_heads():
    points = bias_and_dropout(threads=2)
    assert [(point.implementation, point.bias, point.dropout_p) for point in points] == [
        ("topk", "learned", 0.0),
        ("sdpa", "learned", 0.0),
        ("topk", "none", 0.1),
        ("sdpa", "none", 0.1),
    ]
    assert {(point.length, point.num_heads, point.projections, point.threads) for point in points} == {
        (8192, 4, False, 2)
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"implementation": "flash"}, "implementations must be among topk, query-chunks, sdpa, got 'flash'"),
        ({"k": 0}, r"k must be at least 1 and below 2\^31, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dropout_p": 1.0}, r"dropout_p must be at least 0 and below 1, got 1\.0"),
        ({"bias": "alibi"}, 'bias must be "none" or "learned", got \'alibi\''),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_a_point_that_cannot_be_measured_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_a_benchmark_without_points_is_refused():
    with pytest.raises(ValueError, match="there is no point to measure"):
        AttentionBenchmark(grid([], ["topk"]))


def test_settings_that_an_implementation_ignores_do_not_tell_its_points_apart():
    assert replace(SMALL, implementation="sdpa", k=3).as_record() == replace(SMALL, implementation="sdpa").as_record()
    assert replace(SMALL, k=3).as_record() != SMALL.as_record()


class Measurements:
    """Stands in for fresh processes; counts the points."""

    def __init__(self, error=None):
        self.points, self.error = [], error

    def __call__(self, function, request, **options):
        self.points.append(request["point"])
        if self.error is not None:
            raise self.error
        numbers = {"elapsed_s": 2.0, "fastest_s": 1.5, "slowest_s": 3.0, "repetitions": 3, "peak_mib": 512.0}
        return numbers | {"baseline_mib": 200.0, "total_peak_mib": 712.0}


@pytest.fixture
def measurements(monkeypatch):
    stand_in = Measurements()
    monkeypatch.setattr(attention_layer, "run_in_fresh_process", stand_in)
    return stand_in


@pytest.fixture
def console():
    return Console(width=120, record=True)


def test_finished_points_are_not_measured_again(measurements, console, tmp_path):
    points = grid([32, 64], ["topk", "sdpa"], num_heads=2)
    run_attention_benchmark(AttentionBenchmark(points[:3], out=tmp_path), console)
    assert len(measurements.points) == 3
    records = run_attention_benchmark(AttentionBenchmark(points, out=tmp_path), console)
    assert len(measurements.points) == 4
    assert [record["point"]["length"] for record in records] == [32, 32, 64, 64]
    assert len(read_json_lines(tmp_path / "attention.jsonl")) == 4
    assert "there already" in console.export_text()
    run_attention_benchmark(AttentionBenchmark(points, out=tmp_path, fresh=True), console)
    assert len(measurements.points) == 8


def test_points_from_another_processor_are_measured_here(measurements, console, tmp_path):
    elsewhere = environment() | {"cpu": "another one"}
    append_json_line(
        tmp_path / "attention.jsonl",
        {
            "point": SMALL.as_record(),
            "environment": elsewhere,
            "outcome": "finished",
            "peak_mib": 1.0,
            "elapsed_s": 1.0,
        },
    )
    run_attention_benchmark(AttentionBenchmark([SMALL], out=tmp_path), console)
    assert len(measurements.points) == 1


@pytest.mark.parametrize("outcome", ["out of memory", "time limit"])
def test_running_out_of_memory_or_time_is_a_data_point(measurements, console, tmp_path, outcome):
    measurements.error = WorkerError(outcome, "cannot allocate memory")
    benchmark = AttentionBenchmark(grid([32, 64], ["topk"]), out=tmp_path)
    records = run_attention_benchmark(benchmark, console)
    assert [record["outcome"] for record in records] == [outcome, outcome]
    assert outcome in console.export_text()
    run_attention_benchmark(benchmark, console)
    assert len(measurements.points) == 2


def test_a_point_that_was_given_up_is_tried_again_with_more_time(measurements, console, tmp_path):
    measurements.error = WorkerError("time limit", "not finished after 5 s")
    run_attention_benchmark(AttentionBenchmark([SMALL], out=tmp_path, time_limit_s=5), console)
    measurements.error = None
    (record,) = run_attention_benchmark(AttentionBenchmark([SMALL], out=tmp_path, time_limit_s=6), console)
    assert record["outcome"] == "finished"


def test_a_wrong_answer_stops_the_benchmark_and_is_not_recorded(measurements, console, tmp_path):
    measurements.error = WorkerError("error", "the output differs")
    with pytest.raises(WorkerError, match=r"L = 48, topk k = 5 failed \(error\): the output differs"):
        run_attention_benchmark(AttentionBenchmark([SMALL], out=tmp_path), console)
    assert read_json_lines(tmp_path / "attention.jsonl") == []


def test_the_papers_numbers_stand_beside_the_papers_setting_alone(measurements, console, tmp_path):
    run_attention_benchmark(AttentionBenchmark(grid([2048, 32768], ["topk"]), out=tmp_path), console)
    text = console.export_text()
    assert "paper [GiB], quoted" in text
    assert "0.24" in text
    assert "5.15" in text
    run_attention_benchmark(AttentionBenchmark(grid([2048], ["topk"], k=64), out=tmp_path), console)
    assert "0.24" not in console.export_text()


def test_a_picture_needs_two_lengths(measurements, console, tmp_path):
    run_attention_benchmark(AttentionBenchmark(grid([64], ["topk"]), out=tmp_path), console)
    assert not (tmp_path / "attention.png").exists()
    run_attention_benchmark(AttentionBenchmark(grid([64, 128], ["topk"]), out=tmp_path), console)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
