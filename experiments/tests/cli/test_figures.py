import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


def test_the_feed_forward_benchmark_runs_from_start_to_end_and_ends_up_on_the_page(tmp_path):
    options = {"d-ff": "32,64", "methods": "topk-chunked,vanilla", "k": "8", "tokens": 32, "d-model": 16, "threads": 1}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    out = tmp_path / "feed-forward"
    result = runner.invoke(app, ["benchmark", "feed-forward", *arguments, "--repetitions", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    records = read_json_lines(out / "feed-forward.jsonl")
    assert [(record["point"]["method"], record["point"]["d_ff"]) for record in records] == [
        ("topk-chunked", 32),
        ("vanilla", 32),
        ("topk-chunked", 64),
        ("vanilla", 64),
    ]
    for record in records:
        assert record["outcome"] == "finished"
        assert record["elapsed_s"] > 0
        assert record["largest_error_in_check"] < 1e-4
    result = runner.invoke(app, ["report", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "data:image/png" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["benchmark", "figures", "--only", "model"], "error: only must be among attention, feed-forward, chunk-size"),
        (["benchmark", "figures", "--memory-limit", "0"], "error: memory-limit must be above 0, got 0"),
        (["benchmark", "feed-forward", "--methods", "moe"], "error: methods must be topk-BACKEND or among vanilla"),
        (["report", "--out", "nowhere"], "error: out must be a folder with results, got nowhere"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert list(tmp_path.iterdir()) == []
