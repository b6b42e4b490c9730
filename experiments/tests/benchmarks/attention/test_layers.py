from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from topk_attention.backends import choose_backend
from topk_attention.environment import environment
from topk_experiments.benchmarks.attention import LAYERS, methods
from topk_experiments.benchmarks.attention.methods import OPERATION, new_method
from topk_experiments.benchmarks.attention.works import Point, able_to, bias_and_dropout, grid
from topk_experiments.benchmarks.rounds import PointBenchmark, run_points
from topk_experiments.rivals.names import METHODS, on_backend
from topk_experiments.runs import steps
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.records import append_json_line, read_json_lines
from topk_experiments.runs.steps import Limits
from topk_experiments.runs.turns import check
from topk_experiments.show import plots

AUTO = on_backend("topk", "auto")
SMALL = Point(method=AUTO, length=48, k=5, num_heads=2, head_dim=4, num_features=16, is_causal=True, projections=True)


@pytest.mark.parametrize("projections", [True, False])
@pytest.mark.parametrize(
    ("implementation", "bias"),
    [(name, bias) for bias in ("none", "learned") for name in able_to(bias, 0.0) if name in METHODS],
)
def test_every_implementation_passes_the_check_against_the_dense_computation(implementation, bias, projections):
    point = replace(SMALL, method=on_backend(implementation, "auto"), bias=bias, projections=projections)
    assert check(OPERATION, point.method, point) < 1e-5


def test_random_features_that_differ_from_those_of_the_check_are_noticed(monkeypatch):
    attend = methods.PerformerAttention.attend

    def attend_with_others(baseline, *arguments):
        kept = baseline.directions.clone()
        baseline.directions.mul_(1.01)
        output = attend(baseline, *arguments)
        baseline.directions.copy_(kept)
        return output

    monkeypatch.setattr(methods.PerformerAttention, "attend", attend_with_others)
    with pytest.raises(CheckFailedError, match="differs from the float64 reference"):
        check(OPERATION, "performer", SMALL)


@pytest.mark.parametrize("bias", ["none", "learned"])
def test_the_check_notices_one_key_too_few(monkeypatch, bias):
    wrong = OPERATION._replace(new_method=lambda method, work: new_method(method, replace(work, k=work.k - 1)))
    with pytest.raises(CheckFailedError, match=r"differs from the float64 reference by .* of its largest entry"):
        check(wrong, AUTO, replace(SMALL, bias=bias))


def test_the_check_notices_a_gradient_that_is_wrong(monkeypatch):
    class DoubledGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * 2

    attend = methods.topk_attention

    def attend_with_doubled_gradient(query, *others, backend, **options):
        query = query if backend == "reference" else DoubledGradient.apply(query)
        return attend(query, *others, backend=backend, **options)

    monkeypatch.setattr(methods, "topk_attention", attend_with_doubled_gradient)
    with pytest.raises(CheckFailedError, match="the gradient of query differs"):
        check(OPERATION, AUTO, replace(SMALL, projections=False))


def test_the_preset_compares_learned_bias_and_dropout_at_8192_with_4_heads():
    points = bias_and_dropout(threads=2)
    assert [(point.method, point.bias, point.dropout_p) for point in points] == [
        (AUTO, "learned", 0.0),
        ("sdpa", "learned", 0.0),
        (AUTO, "none", 0.1),
        ("sdpa", "none", 0.1),
    ]
    assert {(point.length, point.num_heads, point.projections, point.threads) for point in points} == {
        (8192, 4, False, 2)
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "flash"}, "methods must be topk-BACKEND or among topk-completed, query-chunks, .*, got 'flash'"),
        ({"method": "performer", "dropout_p": 0.1}, "dropout must be 0 for performer, which forms no weights"),
        ({"method": "vanilla", "bias": "learned"}, "bias must be \"none\" for vanilla, got 'learned'"),
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"device": "tpu"}, 'device must be "cpu" or "cuda", got \'tpu\''),
        ({"k": 0}, r"k must be at least 1 and below 2\^31, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dropout_p": 1.0}, r"dropout_p must be at least 0 and below 1, got 1\.0"),
        ({"bias": "alibi"}, "bias must be one of none, learned, got 'alibi'"),
        ({"method": "topk-gpu"}, "backend must be one of"),
    ],
)
def test_a_point_that_cannot_be_measured_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_a_benchmark_without_points_is_refused():
    with pytest.raises(ValueError, match="there is no point to measure"):
        PointBenchmark(grid([], ["topk"]), out=Path())


def test_an_unknown_method_is_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match=r"implementations must be topk-BACKEND or among topk, .*, got 'flash'"):
        grid([64], ["sdpa", "flash"])


def test_query_chunks_are_the_librarys_own_and_not_what_it_hands_to_pytorch(monkeypatch):
    """Without a bias "auto" takes PyTorch's attention for k = None."""
    chosen = []
    attend = methods.topk_attention
    monkeypatch.setattr(
        methods,
        "topk_attention",
        lambda *tensors, **options: chosen.append(options["backend"]) or attend(*tensors, **options),
    )
    point = replace(SMALL, method="query-chunks", projections=False)
    check(OPERATION, point.method, point)
    assert set(chosen) == {"chunked", "reference"}  # the method and the truth
    assert point.as_record()["backend"] == "chunked"
    assert SMALL.as_record()["backend"] == choose_backend("auto").name
    assert replace(SMALL, method="topk-reference").as_record()["backend"] == "reference"


def test_completed_attention_is_checked_against_completed_attention_and_no_other():
    assert replace(SMALL, method="topk-completed").as_record() == SMALL.as_record() | {
        "implementation": "topk-completed"
    }
    alone = OPERATION._replace(new_method=lambda method, work: new_method(AUTO, work))
    with pytest.raises(CheckFailedError, match=r"differs from the float64 reference by .* of its largest entry"):
        check(alone, "topk-completed", SMALL)


def test_by_default_everything_is_measured_that_can_do_the_setting():
    assert set(able_to("none", 0.0)) == {*METHODS, "topk-chunked"}
    assert set(able_to("none", 0.1)) == {*METHODS, "topk-chunked"} - {"performer", "rfa"}
    assert able_to("learned", 0.0) == ["topk", "topk-chunked", "topk-completed", "query-chunks", "sdpa"]


def test_settings_that_a_method_ignores_do_not_tell_its_points_apart():
    performer = replace(SMALL, method="performer")
    assert replace(performer, num_features=32).as_record() != performer.as_record()
    assert replace(performer, k=32).as_record() == performer.as_record()
    assert replace(SMALL, num_features=32).as_record() == SMALL.as_record()
    assert replace(SMALL, method="sdpa", k=3).as_record() == replace(SMALL, method="sdpa").as_record()
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
    monkeypatch.setattr(steps, "run_in_fresh_process", stand_in)
    return stand_in


@pytest.fixture
def console():
    return Console(width=120, record=True)


def test_finished_points_are_not_measured_again(measurements, console, tmp_path):
    points = grid([32, 64], ["topk", "sdpa"], num_heads=2)
    run_points(LAYERS, PointBenchmark(points[:3], out=tmp_path), console)
    assert len(measurements.points) == 3
    records = run_points(LAYERS, PointBenchmark(points, out=tmp_path), console)
    assert len(measurements.points) == 4
    assert [record["point"]["length"] for record in records] == [32, 32, 64, 64]
    assert len(read_json_lines(tmp_path / "attention.jsonl")) == 4
    assert "on file, of" in console.export_text()
    run_points(LAYERS, PointBenchmark(points, out=tmp_path, fresh=True), console)
    assert len(measurements.points) == 8


def test_points_from_another_processor_are_measured_here(measurements, console, tmp_path):
    elsewhere = environment() | {"cpu": "another one"}
    append_json_line(
        tmp_path / "attention.jsonl",
        {
            "schema": LAYERS.schema,
            "point": SMALL.as_record(),
            "environment": elsewhere,
            "outcome": "finished",
            "peak_mib": 1.0,
            "elapsed_s": 1.0,
        },
    )
    run_points(LAYERS, PointBenchmark([SMALL], out=tmp_path), console)
    assert len(measurements.points) == 1


@pytest.mark.parametrize("outcome", ["out of memory", "time limit"])
def test_running_out_of_memory_or_time_is_a_data_point(measurements, console, tmp_path, outcome):
    measurements.error = WorkerError(outcome, "cannot allocate memory")
    benchmark = PointBenchmark(grid([32, 64], ["topk"]), out=tmp_path)
    records = run_points(LAYERS, benchmark, console)
    assert [record["outcome"] for record in records] == [outcome, outcome]
    assert outcome in console.export_text()
    run_points(LAYERS, benchmark, console)
    assert len(measurements.points) == 2


def test_a_point_that_was_given_up_is_tried_again_with_more_time(measurements, console, tmp_path):
    measurements.error = WorkerError("time limit", "not finished after 5 s")
    run_points(LAYERS, PointBenchmark([SMALL], out=tmp_path, limits=Limits(5)), console)
    measurements.error = None
    (record,) = run_points(LAYERS, PointBenchmark([SMALL], out=tmp_path, limits=Limits(6)), console)
    assert record["outcome"] == "finished"


def test_a_point_that_ran_out_of_memory_is_tried_again_with_more_memory(measurements, console, tmp_path):
    measurements.error = WorkerError("out of memory", "cannot allocate memory")
    for memory_gib in (1, 0.5, 1):
        run_points(LAYERS, PointBenchmark([SMALL], out=tmp_path, limits=Limits(5, memory_gib)), console)
    assert len(measurements.points) == 1
    measurements.error = None
    (record,) = run_points(LAYERS, PointBenchmark([SMALL], out=tmp_path, limits=Limits(5)), console)
    assert record["outcome"] == "finished"


def test_a_wrong_answer_stops_the_benchmark_and_is_not_recorded(measurements, console, tmp_path):
    measurements.error = WorkerError("error", "the output differs")
    with pytest.raises(
        WorkerError, match=r"topk-.*, L = 48, k = 5, D = 4, causal failed \(error\): the output differs"
    ):
        run_points(LAYERS, PointBenchmark([SMALL], out=tmp_path), console)
    assert read_json_lines(tmp_path / "attention.jsonl") == []


def test_the_papers_numbers_stand_beside_the_papers_setting_alone(measurements, console, tmp_path):
    def table(points):
        records = run_points(LAYERS, PointBenchmark(points, out=tmp_path), console)
        (page,) = LAYERS.pages(records)
        return page.as_markdown()

    text = table(grid([2048, 32768], ["topk"]))
    assert "paper [GiB], quoted" in text
    assert "| 0.24 | 0.18 |" in text
    assert "| 5.15 | 2.01 |" in text
    assert "0.24" not in table(grid([2048], ["topk"], [64]))
    text = table(grid([2048], ["vanilla-chunks", "sdpa"]))
    assert "| 0.86 | 0.20 |" in text
    assert "1.07" not in text  # the paper's vanilla attention is not PyTorch's


def test_the_papers_points_and_points_that_ran_out_of_memory_are_in_the_picture(
    measurements, console, tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    benchmark = PointBenchmark(grid([2048, 8192], ["topk", "performer", "rfa"]), out=tmp_path)
    run_points(LAYERS, benchmark, console)
    measurements.error = WorkerError("out of memory", "cannot allocate memory")
    benchmark = PointBenchmark(grid([2048, 8192], ["vanilla", "topk"]), out=tmp_path)
    run_points(LAYERS, benchmark, console)
    LAYERS.report(tmp_path)
    memory, time = figures[-1].axes
    lines = {line.get_label(): line for line in memory.lines}
    vanilla = lines["vanilla (matmul, softmax, matmul), Gupta et al. 2021 (quoted, GPU)"]
    assert list(vanilla.get_xdata()) == [2048, 4096, 6144, 8192]
    assert list(vanilla.get_ydata()) == [1.07, 4.82, 10.74, 19.02]
    assert "Performer, Gupta et al. 2021 (quoted, GPU)" in lines
    assert vanilla.get_alpha() < 0.5
    assert "out of memory" in lines
    (signs,) = (line for line in memory.lines if line.get_marker() == "x" and len(line.get_xdata()) == 2)
    assert list(signs.get_xdata()) == [2048, 8192]
    assert signs.get_color() == vanilla.get_color()
    assert [line.get_label() for line in time.lines] == [line.get_label() for line in memory.lines]


def test_a_picture_needs_two_lengths(measurements, console, tmp_path):
    run_points(LAYERS, PointBenchmark(grid([64], ["topk"]), out=tmp_path), console)
    assert [path.name for path in LAYERS.report(tmp_path)] == ["attention.md"]
    run_points(LAYERS, PointBenchmark(grid([64, 128], ["topk"]), out=tmp_path), console)
    assert [path.name for path in LAYERS.report(tmp_path)] == ["attention.md", "attention.png"]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_over_k_makes_a_picture_of_its_own_with_the_others_as_levels(
    measurements, console, tmp_path, monkeypatch
):
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    run_points(
        LAYERS, PointBenchmark(grid([64, 128], ["topk", "topk-reference", "sdpa", "vanilla"]), out=tmp_path), console
    )
    run_points(LAYERS, PointBenchmark(grid([128], ["topk"], [16, 32]), out=tmp_path), console)
    written = LAYERS.report(tmp_path)
    assert [path.name for path in written] == ["attention.md", "attention.png", "attention-k.png"]
    lines = {line.get_label(): line for line in figures["attention-k.png"].axes[0].lines}
    assert list(lines[f"top-k ({choose_backend('auto').name})"].get_xdata()) == [16, 32, 128]
    assert list(lines["top-k (reference)"].get_xdata()) == [128]
    assert "PyTorch's scaled_dot_product_attention" in lines
    assert "vanilla (matmul, softmax, matmul)" not in lines
    lines = [line.get_label() for line in figures["attention.png"].axes[0].lines]
    assert "top-k attention, k = 128 (reference)" in lines
    assert not [label for label in lines if "k = 16" in label]


def test_every_curve_has_a_look_of_its_own_and_a_name_even_where_no_point_finished(
    measurements, console, tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    names = [*able_to("none", 0.0), "topk-reference"]
    run_points(LAYERS, PointBenchmark(grid([64, 128], names[:-1]), out=tmp_path), console)
    measurements.error = WorkerError("out of memory", "cannot allocate memory")
    run_points(LAYERS, PointBenchmark(grid([64, 128], names[-1:]), out=tmp_path), console)
    LAYERS.report(tmp_path)
    lines = {line.get_label(): line for line in figures[-1].axes[0].lines if not line.get_label().startswith("_")}
    lines.pop("out of memory")
    curves = [line for label, line in lines.items() if "quoted" not in label]
    assert len(curves) == len(names)
    assert len({line.get_color() for line in curves}) == len(names)
    assert "top-k attention, k = 128 (reference)" in lines
