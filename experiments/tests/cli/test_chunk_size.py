from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.runs import steps
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["benchmark", "chunk-size", *map(str, arguments)])


def test_the_benchmark_runs_from_start_to_end(tmp_path, one_fresh_process):
    one_fresh_process(steps)
    arguments = ["--chunk-sizes", "16", "--methods", "vanilla-chunks,topk", "--length", 64, "--k", 4, "--heads", 2]
    result = run(*arguments, "--head-dim", 8, "--threads", 1, "--repetitions", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    records = read_json_lines(tmp_path / "chunk-size.jsonl")
    assert [(record["point"]["method"], record["point"]["chunk_size"]) for record in records] == [
        ("vanilla-chunks", 16),
        ("topk", 16),
    ]
    assert all(record["largest_error_in_check"] < 1e-5 and record["repetitions"] == 2 for record in records)
    assert str(tmp_path) not in (tmp_path / "chunk-size.jsonl").read_text()


def test_a_wrong_option_ends_with_one_line_and_status_2():
    result = run("--methods", "flash")
    assert result.exit_code == 2
    assert "error: methods must be among vanilla-chunks, query-chunks" in result.output
