from dataclasses import replace

import pytest

from topk_attention.environment import environment
from topk_experiments.benchmarks.model import ModelBenchmark, grid, report, run_model_benchmark
from topk_experiments.benchmarks.model import benchmark as benchmarking
from topk_experiments.runs import ledger, steps
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.records import append_json_line, read_json_lines
from topk_experiments.runs.steps import Limits

LENGTHS, METHODS = (64, 128), ("topk", "vanilla")


def finished(point, seconds):
    compared = None if point["method"] == "vanilla" else "eager attention: loss and all gradients"
    errors = {"loss_error": 1e-6, "gradient_error": 2e-5, "loss_error_below_length": 3e-7, "k": 24}
    return {
        "elapsed_s": seconds,
        "fastest_s": 0.9 * seconds,
        "slowest_s": 1.2 * seconds,
        "forward_s": 0.25 * seconds,
        "backward_s": 0.75 * seconds,
        "repetitions": 3,
        "other_cores": 0.0,
        "peak_mib": 20.48 * point["length"],
        "held_after_forward_mib": 10.24 * point["length"],
        "weights_mib": 512.0,
        "check": {"length": 96, "compared_with": compared, "compared_with_below_length": "the reference backend"}
        | errors,
    }


@pytest.fixture
def points_measured(monkeypatch, unpainted_pictures):
    """Stands in for fresh processes: method -> what happens, by default a step of (length / 64)^2 seconds."""
    measured, errors = [], {}

    def run(function, request, **options):
        assert function.endswith("model.measure:measure_step")
        point = request["point"]
        measured.append((point["method"], point["length"], request["memory_limit_mib"]))
        options["on_message"]({"doing": "step 1"})
        if point["method"] in errors:
            raise errors[point["method"]]
        return finished(point, (point["length"] / 64) ** 2)

    run.errors, run.measured = errors, measured
    monkeypatch.setattr(steps, "run_in_fresh_process", run)
    return run


@pytest.fixture
def benchmark(tmp_path):
    points = grid(LENGTHS, METHODS, shape="bert-base", backend="chunked", k=8)
    return ModelBenchmark(points, out=tmp_path, name="bert-base", limits=Limits(3600.0, 2.0))


def outcomes(records):
    return [record["outcome"] for record in records]


def test_each_point_has_a_process_of_its_own_with_the_limit(benchmark, points_measured, console):
    records = run_model_benchmark(benchmark, console)
    assert points_measured.measured == [(method, length, 2048.0) for length in LENGTHS for method in METHODS]
    assert outcomes(records) == ["finished"] * 4
    assert read_json_lines(benchmark.lines) == records


def test_finished_points_are_not_measured_again_unless_more_is_asked(benchmark, points_measured, console):
    for again, count in ((benchmark, 4), (benchmark, 4), (replace(benchmark, repetitions=5), 8)):
        run_model_benchmark(again, console)
        assert len(points_measured.measured) == count
    run_model_benchmark(replace(benchmark, fresh=True), console)
    assert len(points_measured.measured) == 12


def test_records_from_before_there_were_random_features_still_count(benchmark, points_measured, console):
    names = ("shape", "method", "length", "k", "feed_forward_k", "decoder_length", "dropout_p", "checkpointing")
    names += ("dtype", "device", "backend", "threads", "seed", "source")
    run_model_benchmark(benchmark, console)
    old = [
        record | {"point": {name: record["point"][name] for name in names}}
        for record in read_json_lines(benchmark.lines)
    ]
    benchmark.lines.write_text("")
    for record in old:
        append_json_line(benchmark.lines, record)
    assert run_model_benchmark(benchmark, console) == old
    assert len(points_measured.measured) == 4
    performer = replace(benchmark, points=grid([64], ["performer"], shape="bert-base"))
    assert run_model_benchmark(performer, console)[0]["point"]["num_features"] == 256
    assert len(points_measured.measured) == 5
    assert len(report(performer.lines)) == 2
    page = (benchmark.out / "bert-base.md").read_text()
    assert page.count("| 64 | ") == 3


@pytest.mark.parametrize("what", ["cpu", "torch", "transformers", "python", "product_sha256"])
def test_all_methods_are_measured_again_with_other_software_or_code(
    benchmark, points_measured, console, monkeypatch, what
):
    run_model_benchmark(benchmark, console)
    monkeypatch.setattr(ledger, "environment", lambda: environment() | {what: "another"})
    run_model_benchmark(benchmark, console)
    assert len(points_measured.measured) == 8


@pytest.mark.parametrize(
    ("outcome", "more"), [("out of memory", Limits(3600.0, 3.0)), ("time limit", Limits(7200.0, 2.0))]
)
def test_a_point_that_runs_out_is_a_record_and_gets_another_chance_with_more(
    benchmark, points_measured, console, outcome, more
):
    points_measured.errors["vanilla"] = WorkerError(outcome, "not enough")
    for _ in range(2):
        records = run_model_benchmark(benchmark, console)
        assert outcomes(records) == ["finished", outcome] * 2
        assert len(points_measured.measured) == 4
    assert records[1]["memory_limit_mib"] == 2048.0
    assert f"vanilla (eager): {outcome} (not enough)" in console.export_text()
    run_model_benchmark(replace(benchmark, limits=more), console)
    assert len(points_measured.measured) == 6


def test_a_step_that_would_take_too_long_is_left_out_with_the_reason(benchmark, points_measured, console):
    for _ in range(2):
        records = run_model_benchmark(replace(benchmark, step_limit_s=2.0), console)
        assert outcomes(records) == ["finished", "finished", "left out", "left out"]
        assert records[2]["message"] == "a step would take about 4 s, more than 2 s"
    assert len(points_measured.measured) == 2
    assert len(read_json_lines(benchmark.lines)) == 4  # the reason is written down once
    run_model_benchmark(benchmark, console)
    assert len(points_measured.measured) == 4


def test_a_wrong_answer_ends_the_run_and_names_the_point(benchmark, points_measured, console):
    points_measured.errors["vanilla"] = WorkerError("error", "loss_error is 1.0e+00")
    with pytest.raises(WorkerError, match=r"L = 64, vanilla \(eager\) failed \(error\): loss_error is"):
        run_model_benchmark(benchmark, console)
    assert outcomes(read_json_lines(benchmark.lines)) == ["finished"]


def test_without_a_limit_most_of_what_is_free_is_the_limit(benchmark, points_measured, console, monkeypatch):
    monkeypatch.setattr(benchmarking, "available_mib", lambda: 1000.0)
    run_model_benchmark(replace(benchmark, limits=Limits()), console)
    assert {limit for *_, limit in points_measured.measured} == {900.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"points": []}, "there is no point to measure"),
    ],
)
def test_what_does_not_fit_is_named(benchmark, changes, words):
    with pytest.raises(ValueError, match=words):
        replace(benchmark, **changes)
