import json

import pytest
import torch
from rich.console import Console

from topk_attention.backends.cpu.key_index import index_obstacle
from topk_attention.storage import StoredCache
from topk_experiments.benchmarks.long_cache import LongCacheBenchmark, measure, report, run_long_cache
from topk_experiments.benchmarks.long_cache.measure import Point, measure_point
from topk_experiments.benchmarks.long_cache.states import BLOCK, States
from topk_experiments.runs import steps
from topk_experiments.runs.process import WorkerError

SMALL = {"layers": 2, "heads": 4, "key_heads": 2, "head_dim": 16, "k": 8, "steps": 4}


@pytest.fixture
def in_this_process(monkeypatch):
    """Points are measured here, without their limits."""
    if obstacle := index_obstacle(torch.randn(1, 1, 64, 16)):
        pytest.skip(obstacle)
    monkeypatch.setattr(measure, "start_point", lambda _: None)
    monkeypatch.setattr(
        steps, "run_in_fresh_process", lambda _, request, **how: measure_point(request, how["on_message"])
    )


def request_of(folder, keep=False, **changes):
    return {"point": {"tokens": 600, **SMALL, **changes}, "folder": str(folder), "keep": keep}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, got 'int8'"),
        ({"heads": 5}, "heads must be a multiple of key_heads, got 5 and 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        LongCacheBenchmark(points=[Point(**{**SMALL, **changes})])
    with pytest.raises(ValueError, match="there is no point to measure"):
        LongCacheBenchmark(points=[])


def test_states_are_the_same_in_whatever_parts_they_are_made():
    states = States(1, 4, 2, 8, torch.float32, 0)
    key, value = states.keys_and_values(0, BLOCK + 50)
    for start, stop in ((0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, BLOCK + 50)):
        part = states.keys_and_values(start, stop)
        assert torch.equal(part[0], key[:, :, start:stop])
        assert torch.equal(part[1], value[:, :, start:stop])
    other = States(0, 4, 2, 8, torch.float32, 0).keys_and_values(0, 5)
    assert not torch.equal(other[0], key[:, :, :5])


def test_the_tokens_of_a_querys_topic_score_above_the_others():
    states = States(0, 4, 2, 64, torch.float32, 0)
    key, _ = states.keys_and_values(0, 4 * BLOCK)
    scores = torch.einsum("hd,hmd->hm", states.query(4 * BLOCK)[0, :, 0], key[0].repeat_interleave(2, 0)) / 8
    of_segments = scores.view(4, -1, 32).mean(-1)
    assert (of_segments.amax(-1) - of_segments.median(-1).values > 3).all()


def test_a_point_is_checked_timed_and_taken_away(tmp_path, in_this_process):
    doing = []
    result = measure_point(request_of(tmp_path / "files"), lambda message: doing.append(message["doing"]))
    assert not (tmp_path / "files").exists()
    assert len(result["steps"]) == 4
    assert result["checked"]["bits_equal"]
    assert 0 < result["checked"]["largest_error"] < 0.02
    assert result["file_bytes"] == 600 * 2 * 2 * 2 * 16 * 2
    assert doing[0] == "writing token 0 of 600"


def test_files_that_were_begun_are_continued(tmp_path, in_this_process):
    point = Point(tokens=600, **SMALL)
    result = measure_point(request_of(tmp_path / "files", keep=True), lambda _: None)
    assert result["filled"]["tokens"] == 600
    result = measure_point(request_of(tmp_path / "files", keep=True, tokens=700), lambda _: None)
    assert result["filled"]["tokens"] == 700 - 604  # the tokens of the steps are those that follow
    with StoredCache(tmp_path / "files", layers=range(2), about=measure.about(point)) as cache:
        assert cache.num_tokens == 704
        for layer in range(2):
            for came, made in zip(cache.tensors(layer), point.states(layer).keys_and_values(0, 704), strict=True):
                assert torch.equal(came, made)
    result = measure_point(request_of(tmp_path / "files", tokens=500), lambda _: None)
    assert result["filled"]["tokens"] == 0


def test_a_wrong_answer_is_an_error(tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(measure, "_dense", lambda query, key, value, k: value[0].double())
    with pytest.raises(AssertionError, match="layer 0, head 0 is off from a dense computation"):
        measure_point(request_of(tmp_path / "files"), lambda _: None)


def test_keys_without_an_index_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "start_point", lambda _: None)
    monkeypatch.setattr(measure, "index_obstacle", lambda _: "no kernels")
    with pytest.raises(RuntimeError, match="keys must have an index here, got none: no kernels"):
        measure_point(request_of(tmp_path / "files"), lambda _: None)


def test_points_are_recorded_once_and_shown(tmp_path, in_this_process):
    console = Console(record=True, width=200)
    for _ in range(2):
        run_long_cache(LongCacheBenchmark(points=[Point(tokens=600, **SMALL)], out=tmp_path), console)
    records = [json.loads(line) for line in (tmp_path / "long-cache.jsonl").read_text().splitlines()]
    assert len(records) == 1
    assert "on file" in console.export_text()
    assert report(tmp_path) == [tmp_path / "long-cache.md"]
    assert "| 600 |" in (tmp_path / "long-cache.md").read_text()


def test_a_point_that_fails_leaves_no_record(tmp_path, monkeypatch):
    def died(*_, **__):
        raise WorkerError("error", "No space left on device")

    monkeypatch.setattr(steps, "run_in_fresh_process", died)
    with pytest.raises(WorkerError, match="No space left on device"):
        run_long_cache(LongCacheBenchmark(points=[Point(**SMALL)], out=tmp_path), Console())
    assert not (tmp_path / "long-cache.jsonl").exists()
