import json
from dataclasses import asdict

import pytest
import torch.distributed as dist
from rich.console import Console

from topk_experiments.benchmarks.sequence_parallel import (
    SequenceParallelBenchmark,
    measure,
    report,
    run_sequence_parallel,
)
from topk_experiments.benchmarks.sequence_parallel.measure import Point, measure_point
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.steps import Limits

SMALL = {"tokens": 600, "layers": 1, "hidden": 32, "heads": 4, "key_heads": 2, "neurons": 16, "vocabulary": 50, "k": 8}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"hidden": 36}, "hidden must be an even multiple of heads, got 36 and 4"),
        ({"key_heads": 3}, "heads must be a multiple of key_heads, got 4 and 3"),
        ({"method": "ring"}, 'method must be "auto", "heads" or "keys", got \'ring\''),
        ({"method": "heads", "processes": 3}, 'method="heads" needs processes that divide heads, got 3 and 4'),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SequenceParallelBenchmark(points=[Point(**{**SMALL, **changes})])
    with pytest.raises(ValueError, match="there is no point to measure"):
        SequenceParallelBenchmark(points=[])


def test_two_processes_check_their_gradients_and_measure_themselves():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo, with which processes without a GPU talk to each other")
    result = measure_point(Point(processes=2, **SMALL), 1, Limits(200.0), lambda _: None)
    assert len(result["ranks"]) == 2
    for rank in result["ranks"]:
        assert 0 < rank["largest_gradient_error"] < 1e-4
        assert rank["losses"] == result["ranks"][0]["losses"]
        assert rank["losses"][1] < rank["losses"][0]
        assert rank["peak_mib"] > 0
        assert rank["attention_of_a_layer_on_paper"]["forward_bytes"] > 0
    assert result["elapsed_s"] == max(rank["elapsed_s"] for rank in result["ranks"])


def made_up(point, *_):
    rank = {"elapsed_s": 6.0 / point.processes, "repetitions": 1, "largest_gradient_error": 2e-7}
    paper = {"forward_bytes": 2**20, "backward_bytes": 2**20}
    ranks = [rank | {"attention_of_a_layer_on_paper": paper}] * point.processes
    peak = 1000.0 if point.processes == 1 else 550.0
    return {"ranks": ranks, "elapsed_s": 6.0 / point.processes, "cpu_s": 6.0, "peak_mib": peak, "loss": 3.0}


def test_points_are_recorded_once_and_set_against_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure_point", made_up)
    points = [Point(threads=1, **SMALL), Point(threads=2, **SMALL), Point(processes=2, **SMALL)]
    console = Console(record=True, width=200)
    for _ in range(2):
        run_sequence_parallel(SequenceParallelBenchmark(points=points, out=tmp_path), console)
    records = [json.loads(line) for line in (tmp_path / "sequence-parallel.jsonl").read_text().splitlines()]
    assert [record["point"] for record in records] == [asdict(point) for point in points]
    assert "on file" in console.export_text()
    assert report(tmp_path) == [tmp_path / "sequence-parallel.md"]
    text = (tmp_path / "sequence-parallel.md").read_text()
    assert "| 600 | 2 | 1 | 3.00 | 0.50 | 0.50 | 6.00 | 550 | 0.55 | 2.0 |" in text
    assert "within 2e-07 of those of one process" in text


def test_a_point_that_fails_leaves_no_record(tmp_path, monkeypatch):
    def died(*_):
        raise WorkerError("error", "gradients are off")

    monkeypatch.setattr(measure, "measure_point", died)
    with pytest.raises(WorkerError, match="600 tokens, 2 processes, 1 thread"):
        run_sequence_parallel(SequenceParallelBenchmark(points=[Point(processes=2, **SMALL)], out=tmp_path), Console())
    assert not (tmp_path / "sequence-parallel.jsonl").exists()
