import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["benchmark", "attention-kernel", "--backend", "chunked", *map(str, arguments)])


def test_the_benchmark_runs_from_start_to_end(tmp_path):
    arguments = ["--sweep", "length", "--lengths", 48, "--rivals", "sdpa", "--threads", 1, "--repetitions", 1]
    result = run(*arguments, "--no-memory", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "k = 64 is full attention here: no query has more than 48 keys" in result.output
    (record,) = read_json_lines(tmp_path / "length.jsonl")
    assert record["methods"].keys() == {"topk-chunked", "sdpa"}
    assert record["methods"]["topk-chunked"]["largest_error_in_check"] < 1e-5
    assert str(tmp_path) not in (tmp_path / "length.jsonl").read_text()
    assert "of topk-chunked's forward pass" in (tmp_path / "length.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--works", "huge"], "error: works must be among plain, long"),
        (["--sweep", "k", "--lengths", "64"], 'error: lengths goes with sweep "length" alone'),
    ],
)
def test_a_wrong_option_ends_with_one_line_and_status_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
