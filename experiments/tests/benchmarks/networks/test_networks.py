import json

import pytest
from typer.testing import CliRunner

from topk_experiments.benchmarks.networks import measure
from topk_experiments.benchmarks.networks.report import SCHEMA, report
from topk_experiments.benchmarks.networks.works import NETWORKS, Work
from topk_experiments.cli import app
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.records import read_json_lines

pytest.importorskip("transformers")
runner = CliRunner()


def run(out, *options):
    return runner.invoke(app, ["benchmark", "networks", "--out", str(out), "--threads", "1", *options])


@pytest.mark.parametrize("method", ["topk-all", "grouped_mm", "topk-12", "topk-4"])
@pytest.mark.parametrize("network", ["mixtral-8x7b", "gpt-oss-20b"])
def test_every_method_passes_the_check(network, method):
    assert measure.check_small(method, Work(network)) < 1e-6


def test_the_check_refuses_another_number_of_neurons(monkeypatch):
    prepared = measure.prepared

    def with_another_k(model, work, method, *, backend="auto", **options):
        return prepared(model, work, method if backend == "reference" else "topk-4", backend=backend, **options)

    monkeypatch.setattr(measure, "prepared", with_another_k)
    with pytest.raises(CheckFailedError, match=r"topk-12, Phi-3-mini: .* the output differs from the right one by"):
        measure.check_small("topk-12", Work("phi3-mini"))


def test_the_sizes_are_those_of_the_models():
    sizes = {name: (Work(name).d_model, Work(name).d_ff, Work(name).num_experts) for name in NETWORKS}
    assert sizes == {
        "mixtral-8x7b": (4096, 14336, 8),
        "qwen3-30b-a3b": (2048, 768, 128),
        "gpt-oss-20b": (2880, 2880, 32),
        "olmoe-1b-7b": (2048, 1024, 64),
        "phi3-mini": (3072, 8192, 1),
        "glm4-9b": (4096, 13696, 1),
        "modernbert-base": (768, 1152, 1),
    }


def test_what_would_copy_or_write_too_much_is_left_out_with_its_size():
    work = Work("qwen3-30b-a3b")
    assert work.why_not("batched_mm", 1, "forward") is None
    assert work.why_not("batched_mm", 1024, "forward").endswith("copy the weights of every token's experts, 144 GiB")
    assert work.why_not("eager", 1024, "forward") is None
    assert work.why_not("eager", 1024, "forward_backward").endswith("of all weights for every expert, 288 GiB")
    assert work.why_not("topk-4", 1024, "forward_backward") is None


def test_the_benchmark_runs_from_start_to_end_and_again_without_measuring_again(tmp_path):
    options = ["--networks", "olmoe-1b-7b", "--shrink", "64", "--tokens", "1,9", "--repetitions", "1"]
    result = run(tmp_path, *options)
    assert result.exit_code == 0, result.output
    (record,) = read_json_lines(tmp_path / "networks.jsonl")
    assert [(one["tokens"], one["mode"]) for one in record["runs"]] == [
        (1, "forward"),
        (9, "forward"),
        (9, "forward_backward"),
    ]
    assert 1.0 <= record["busiest_expert"] <= 64
    for one in record["runs"]:
        assert list(one["methods"]) == ["eager", "batched_mm", "grouped_mm", "topk-12", "topk-4"]
        for of in one["methods"].values():
            assert of["outcome"] == "finished"
            assert 0 < of["fastest_s"] <= of["median_s"] <= of["slowest_s"]
    table = (tmp_path / "networks.md").read_text()
    assert "**OLMoE-1B-7B: d_model = 48, d_ff = 48, 64 experts, 8 a token, shrunk by 64" in table
    assert "| 9 | forward and backward | top-k, k = 12 |" in table
    assert "Weights are random" in table
    assert "(on file, of " in run(tmp_path, *options).output
    assert read_json_lines(tmp_path / "networks.jsonl") == [record]


def test_top_k_is_compared_with_the_fastest_dense_way_and_what_is_left_out_is_named(tmp_path):
    times = {"outcome": "finished", "fastest_s": 0.1, "slowest_s": 9.0}
    methods = {
        "eager": times | {"median_s": 3.0},
        "batched_mm": {"outcome": "left out", "message": "it would copy 144 GiB"},
        "grouped_mm": times | {"median_s": 2.0},
        "topk-12": times | {"median_s": 1.0},
        "topk-4": times | {"median_s": 4.0},
    }
    record = {
        "schema": SCHEMA,
        "outcome": "finished",
        "request": {"work": Work("olmoe-1b-7b").as_record(), "threads": 2, "seed": 0},
        "runs": [{"tokens": 1024, "mode": "forward", "methods": methods}],
        "busiest_expert": 1.5,
        "environment": {"cpu": "a", "torch": "2", "date": "2026-11-30", "commit": None, "num_cpus": 2},
    }
    (tmp_path / "networks.jsonl").write_text(json.dumps(record))
    table = report(tmp_path)[0].read_text()
    assert "| 1,024 | forward | top-k, k = 85 | 1e+03 | 100 to 9e+03 | 2.00 |" in table
    assert "| 1,024 | forward | top-k, k = 256 | 4e+03 | 100 to 9e+03 | 0.50 |" in table
    assert "| 1,024 | forward | batched_mm | left out: it would copy 144 GiB |" in table
    assert "1.50 times the mean number of tokens" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--networks", "gpt"], "error: networks must be among mixtral-8x7b, qwen3-30b-a3b"),
        (["--networks", "phi3-mini,phi3-mini"], "error: networks must not hold a network twice"),
        (["--shrink", "0"], "error: shrink must be at least 1, got 0"),
        (["--repetitions", "0"], "error: repetitions must be at least 1, got 0"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(tmp_path, options, words):
    result = run(tmp_path, *options)
    assert result.exit_code == 2
    assert words in result.output
