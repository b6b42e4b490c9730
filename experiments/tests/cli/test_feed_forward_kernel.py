from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["benchmark", "feed-forward-kernel", "--backend", "chunked", *map(str, arguments)])


def test_the_benchmark_runs_from_start_to_end_and_again_without_measuring_again(tmp_path):
    arguments = ["--sweep", "d-ff", "--d-ff", 48, "--tokens", 20, "--rivals", "dense", "--threads", 1]
    arguments += ["--repetitions", 1, "--out", tmp_path]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    times, *memory = read_json_lines(tmp_path / "d_ff.jsonl")
    assert times["methods"].keys() == {"topk-chunked", "dense"}
    assert times["methods"]["topk-chunked"]["largest_error_in_check"] < 1e-5
    assert [record["request"]["method"] for record in memory] == ["topk-chunked", "dense"]
    assert str(tmp_path) not in (tmp_path / "d_ff.jsonl").read_text()
    assert "of topk-chunked's forward pass" in (tmp_path / "d_ff.md").read_text()
    assert run(*arguments).exit_code == 0
    assert len(read_json_lines(tmp_path / "d_ff.jsonl")) == 3


def test_a_wrong_option_ends_with_one_line_and_status_2():
    result = run("--works", "huge")
    assert result.exit_code == 2
    assert "error: works must be among t5-11b, t5-base" in result.output
