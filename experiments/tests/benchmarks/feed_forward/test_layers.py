from dataclasses import replace

import pytest
import torch
from rich.console import Console

from topk_experiments.benchmarks.feed_forward import LAYERS
from topk_experiments.benchmarks.feed_forward.methods import OPERATION, why_not
from topk_experiments.benchmarks.feed_forward.works import LAYER_METHODS, Point, grid
from topk_experiments.benchmarks.rounds import PointBenchmark, run_points
from topk_experiments.rivals.names import on_backend
from topk_experiments.runs import steps
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.turns import check
from topk_experiments.show import plots

SMALL = Point(method="topk-chunked", d_ff=24, k=5, tokens=33, d_model=8)


@pytest.mark.parametrize("method", [*LAYER_METHODS, on_backend("topk", "auto"), "topk-chunked", "topk-reference"])
def test_every_method_passes_the_check_against_the_reference(method):
    point = replace(SMALL, method=method)
    assert check(OPERATION, point.method, point) < 1e-5


@pytest.mark.parametrize("method", ["vanilla-chunks", "topk-torch-sparse"])
def test_the_papers_own_forms_are_for_layers_without_a_gate(method):
    point = replace(SMALL, method=method)
    assert why_not(point.method, point) is None
    assert why_not(point.method, replace(point, is_gated=True)) == "it is written for layers without a gate"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "moe"}, "methods must be topk-BACKEND or among vanilla, .*, got 'moe'"),
        ({"method": "topk-gpu"}, "backend must be one of"),
        ({"k": 0}, "k must be at least 1"),
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"device": "tpu"}, 'device must be "cpu" or "cuda", got \'tpu\''),
    ],
)
def test_a_point_that_cannot_be_measured_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_compiled_kernels_are_not_for_a_gpu(monkeypatch, kernels):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (point,) = grid([24], ["topk"], device="cuda")
    assert point.method == "topk-chunked"
    with pytest.raises(ValueError, match="device must be \"cpu\" for topk-cpu, got 'cuda'; leave that method out"):
        replace(SMALL, method="topk-cpu", device="cuda")


def test_settings_that_a_method_ignores_do_not_tell_its_points_apart():
    assert replace(SMALL, k=6).as_record() != SMALL.as_record()
    vanilla = replace(SMALL, method="vanilla")
    assert replace(vanilla, k=6).as_record() == vanilla.as_record()
    sparse = replace(SMALL, method="topk-torch-sparse")
    assert replace(sparse, k=6).as_record() != sparse.as_record()


class Measurements:
    """Stands in for fresh processes: 16,384 neurons are too many for the plain layer."""

    def __init__(self):
        self.points = []

    def __call__(self, function, request, **options):
        point = request["point"]
        self.points.append(point)
        if point["method"] == "vanilla" and point["d_ff"] == 16384:
            raise WorkerError("out of memory", "cannot allocate memory")
        numbers = {"elapsed_s": 2.0, "fastest_s": 1.5, "slowest_s": 3.0, "repetitions": 3, "peak_mib": 512.0}
        return numbers | {"baseline_mib": 200.0, "total_peak_mib": 712.0, "other_cores": None}


@pytest.fixture
def measurements(monkeypatch):
    stand_in = Measurements()
    monkeypatch.setattr(steps, "run_in_fresh_process", stand_in)
    return stand_in


def test_points_are_measured_once_and_shown_with_the_papers(measurements, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.update({path.name: figure}))
    wanted = grid([2048, 6144, 16384], ["topk-chunked", "vanilla", "topk-torch-sparse"])
    wanted += grid([6144], ["topk-chunked"], [64, 128])
    benchmark = PointBenchmark(wanted, out=tmp_path)
    records = run_points(LAYERS, benchmark, Console(width=160))
    assert run_points(LAYERS, benchmark, Console(width=160)) == records
    assert len(measurements.points) == 11
    written = LAYERS.report(tmp_path)
    assert [path.name for path in written] == ["feed-forward.md", "feed-forward.png", "feed-forward-k.png"]
    page = written[0].read_text()
    assert "| vanilla (linear, ReLU, linear) | 16,384 | out of memory |  |  |" in page
    assert "| top-k (chunked), k = 64 | 6,144 | 0.500 | 2.00 | 1.50 to 3.00 (of 3) |" in page
    assert "| paper, top-k, torch.sparse, 262,144 tokens, quoted | 65,536 | 14.04 | 11.30 |  |" in page
    lines = {line.get_label(): line for line in figures["feed-forward.png"].axes[0].lines}
    assert "top-k (chunked), k = 64" not in lines
    assert list(lines["top-k (chunked), k = 512"].get_xdata()) == [2048, 6144, 16384]
    quoted = lines["top-k, Gupta et al. 2021 (quoted, GPU, 262,144 tokens)"]
    assert list(quoted.get_ydata()) == [7.78, 8.04, 9.72]
    assert quoted.get_color() == lines["top-k (chunked), k = 512"].get_color()
    lines = {line.get_label(): line for line in figures["feed-forward-k.png"].axes[0].lines}
    assert list(lines["top-k (chunked)"].get_xdata()) == [64, 128, 512]
    assert "vanilla (linear, ReLU, linear)" in lines


def test_without_records_nothing_is_written(tmp_path):
    assert LAYERS.report(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
