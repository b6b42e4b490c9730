import json

import pytest
from typer.testing import CliRunner

from topk_attention import convert
from topk_experiments.benchmarks.paths import measure
from topk_experiments.benchmarks.paths.report import SCHEMA, report
from topk_experiments.benchmarks.paths.works import PATHS
from topk_experiments.cli import app
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.records import read_json_lines

pytest.importorskip("transformers")
runner = CliRunner()


def run(out, *options):
    return runner.invoke(app, ["benchmark", "paths", "--out", str(out), "--threads", "1", *options])


@pytest.mark.parametrize("path", PATHS)
def test_with_everything_kept_every_way_gives_the_models_own_output_and_gradients(path):
    assert measure.check(PATHS[path], 64) < 1e-5


def test_the_check_refuses_fewer_keys(monkeypatch):
    def with_few_keys(model, path, method, *, everything):
        if method == "top-k":
            convert(model, attention_k=4)
        return model

    monkeypatch.setattr(measure, "prepared", with_few_keys)
    with pytest.raises(CheckFailedError, match="BLOOM: with all keys the output is off by"):
        measure.check(PATHS["bloom"], 64)


def test_the_benchmark_runs_from_start_to_end_and_again_without_measuring_again(tmp_path):
    options = ["--paths", "falcon", "--lengths", "256,512"]
    result = run(tmp_path, *options)
    assert result.exit_code == 0, result.output
    records = read_json_lines(tmp_path / "paths.jsonl")
    assert [record["request"]["method"] for record in records] == ["top-k", "dense"]
    for record in records:
        assert [(point["mode"], point["length"]) for point in record["points"]] == [
            ("forward", 256),
            ("forward", 512),
            ("training", 256),
            ("training", 512),
        ]
        assert all(point["outcome"] == "finished" and point["peak_mib"] > 0 for point in record["points"])
    table = (tmp_path / "paths.md").read_text()
    assert "| Falcon | training | eager |" in table
    assert run(tmp_path, *options).output.count("(on file, of ") == 2
    assert read_json_lines(tmp_path / "paths.jsonl") == records


def test_the_table_says_how_memory_grows_and_what_did_not_fit(tmp_path):
    def points(mode, *mib):
        outcomes = [{"outcome": "finished", "peak_mib": one} if one else {"outcome": "out of memory"} for one in mib]
        return [{"mode": mode, "length": 1024 * 2**at, **one} for at, one in enumerate(outcomes)]

    record = {
        "schema": SCHEMA,
        "outcome": "finished",
        "request": {"path": "bloom", "method": "dense", "lengths": [1024, 2048, 4096], "threads": 1, "seed": 0},
        "points": [*points("forward", 10.0, 20.0, 80.0), *points("training", 30.0, 60.0, None)],
        "environment": {"cpu": "a", "torch": "2", "date": "2026-11-30", "commit": None, "num_cpus": 2},
    }
    (tmp_path / "paths.jsonl").write_text(json.dumps(record))
    table = report(tmp_path)[0].read_text()
    assert "| BLOOM | forward | eager | 10 | 20 | 80 | 2.00 |" in table
    assert "| BLOOM | training | eager | 30 | 60 | out of memory | 1.00 |" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--paths", "gpt"], "error: paths must be among sinks, soft-cap, fused"),
        (["--methods", "flash"], "error: methods must be among top-k, dense, got 'flash'"),
        (["--lengths", "8,8"], "error: lengths must not hold a number twice, got 8, 8"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(tmp_path, options, words):
    result = run(tmp_path, *options)
    assert result.exit_code == 2
    assert words in result.output
