from dataclasses import replace

import pytest
import torch
from rich.console import Console

from topk_experiments.benchmarks.attention import CHUNKS
from topk_experiments.benchmarks.attention.methods import OPERATION, new_method
from topk_experiments.benchmarks.attention.works import CHUNK_METHODS, Point, chunk_grid
from topk_experiments.benchmarks.rounds import PointBenchmark, run_points
from topk_experiments.runs import steps
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.turns import check
from topk_experiments.show import plots

SMALL = Point(method="topk-chunked", chunk_size=7, length=48, k=5, num_heads=2, head_dim=4, mode="forward")
WITHOUT_CHUNKS = ("topk-cpu", "sdpa")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("method", [method for method in CHUNK_METHODS if method != "topk-cpu"])
def test_every_method_passes_the_check_against_the_dense_computation(method, is_causal):
    (point,) = chunk_grid([method], [7], length=48, k=5, num_heads=2, head_dim=4, is_causal=is_causal)
    assert point.chunk_size == (None if method in WITHOUT_CHUNKS else 7)
    assert check(OPERATION, point.method, point) < 1e-5


def test_the_compiled_kernels_pass_the_check(kernels):
    assert check(OPERATION, "topk-cpu", replace(SMALL, method="topk-cpu", chunk_size=None)) < 1e-5


def test_the_check_notices_one_key_too_few(monkeypatch):
    wrong = OPERATION._replace(new_method=lambda method, work: new_method(method, replace(work, k=work.k - 1)))
    with pytest.raises(CheckFailedError, match="the output differs from the float64 reference by"):
        check(wrong, SMALL.method, SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "flash"}, "methods must be topk-BACKEND or among topk-completed, .*, got 'flash'"),
        ({"chunk_size": 0}, "chunk-sizes must be at least 1"),
        ({"k": 0}, "k must be at least 1"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"device": "tpu"}, 'device must be "cpu" or "cuda", got \'tpu\''),
    ],
)
def test_a_point_that_cannot_be_measured_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_compiled_kernels_are_not_for_a_gpu(monkeypatch, kernels):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device must be \"cpu\" for topk-cpu, got 'cuda'; leave that method out"):
        replace(SMALL, method="topk-cpu", chunk_size=None, device="cuda")


class Measurements:
    """Stands in for fresh processes: memory grows with the chunk, from 4,096 on there is not enough."""

    def __init__(self):
        self.points = []

    def __call__(self, function, request, **options):
        point = request["point"]
        self.points.append(point)
        size = point["chunk_size"] or 64
        if size >= 4096:
            raise WorkerError("out of memory", "cannot allocate memory")
        numbers = {"elapsed_s": 2.0, "fastest_s": 1.5, "slowest_s": 3.0, "repetitions": 3, "peak_mib": float(size)}
        return numbers | {"baseline_mib": 200.0, "total_peak_mib": 200.0 + size, "other_cores": None}


@pytest.fixture
def measurements(monkeypatch):
    stand_in = Measurements()
    monkeypatch.setattr(steps, "run_in_fresh_process", stand_in)
    return stand_in


def test_points_are_measured_once_and_shown_with_the_papers(measurements, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    console = Console(width=160, record=True)
    benchmark = PointBenchmark(chunk_grid(["vanilla-chunks", "topk", "sdpa"], [256, 1024, 4096]), out=tmp_path)
    records = run_points(CHUNKS, benchmark, console)
    assert [record["outcome"] for record in records] == ["finished", "finished", "out of memory"] * 2 + ["finished"]
    assert run_points(CHUNKS, benchmark, console) == records
    assert len(measurements.points) == 7
    assert "out of memory (cannot allocate memory)" in console.export_text()
    CHUNKS.report(tmp_path)
    page = (tmp_path / "chunk-size.md").read_text()
    assert "| vanilla, a chunk of queries at a time | 4,096 | out of memory |  |  |" in page
    assert "| top-k (chunked), k = 128 | 256 | 0.250 | 2.00 | 1.50 to 3.00 (of 3) |" in page
    assert "| paper, L = 65,536, quoted | 1,024 | 10.90 | 2.73 |  |" in page
    memory, _ = figures[-1].axes
    lines = {line.get_label(): line for line in memory.lines}
    quoted = lines["query chunks, L = 65,536, Gupta et al. 2021 (quoted, GPU)"]
    assert list(quoted.get_xdata()) == [256, 512, 1024, 2048]
    assert list(quoted.get_ydata()) == [3.40, 6.02, 10.90, 20.65]
    assert quoted.get_color() == lines["vanilla, a chunk of queries at a time"].get_color()
    assert set(lines["PyTorch's scaled_dot_product_attention"].get_ydata()) == {64 / 1024}
    assert len([line for line in memory.lines if line.get_marker() == "x"]) == 3  # two curves and the legend


def test_the_paper_is_quoted_beside_its_own_setting_alone(measurements, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    benchmark = PointBenchmark(chunk_grid(["vanilla-chunks"], [256, 512], is_causal=True), out=tmp_path)
    run_points(CHUNKS, benchmark, Console(width=160, record=True))
    CHUNKS.report(tmp_path)
    assert not [line for line in figures[0].axes[0].lines if "quoted" in line.get_label()]


def test_one_chunk_size_makes_no_picture(measurements, tmp_path):
    run_points(CHUNKS, PointBenchmark(chunk_grid(["topk"], [256]), out=tmp_path), Console(width=160, record=True))
    assert [path.name for path in CHUNKS.report(tmp_path)] == ["chunk-size.md"]
    assert CHUNKS.schema in (tmp_path / "chunk-size.jsonl").read_text()
