import pytest
from typer.testing import CliRunner

from convert_models import tiny_bert
from topk_experiments.cli import app
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["benchmark", "model", *map(str, arguments)])


def test_the_benchmark_runs_from_start_to_end_and_running_out_of_memory_is_a_point(tmp_path):
    tiny_bert(num_hidden_layers=1).config.save_pretrained(tmp_path / "tiny")
    # Scores of 4 heads at 12,000 tokens are 2.1 GiB; top-k attention needs some tens of MiB, the process half a GiB.
    options = ["--lengths", 12000, "--methods", "topk,vanilla", "--k", 8, "--dropout", 0, "--backend", "chunked"]
    limits = ["--memory-limit", 2, "--repetitions", 1, "--threads", 1]
    result = run("--config", tmp_path / "tiny", *options, *limits, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    topk, vanilla = read_json_lines(tmp_path / "out" / "tiny.jsonl")
    assert topk["outcome"] == "finished"
    assert topk["check"]["gradient_error"] < 1e-4
    assert topk["peak_mib"] < 400
    assert vanilla["outcome"] == "out of memory"
    page = (tmp_path / "out" / "tiny.md").read_text()
    assert "| 12,000 | vanilla (eager) | out of memory |" in page
    assert (tmp_path / "out" / "tiny.png").exists()
    assert str(tmp_path) not in page + (tmp_path / "out" / "tiny.jsonl").read_text()


def test_points_that_keep_every_key_are_named(tmp_path, monkeypatch):
    from topk_experiments.cli import benchmarks

    monkeypatch.setattr(benchmarks.benchmarks.model, "run_and_report", lambda *_: None)
    result = run("--lengths", "32,128", "--methods", "topk,sdpa", "--k", 32, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output == "k = 32 is full attention here: no query has more than 32 keys\n"


def test_random_features_run_from_start_to_end(tmp_path):
    tiny_bert(num_hidden_layers=1).config.save_pretrained(tmp_path / "tiny")
    options = ["--lengths", 300, "--methods", "performer,rfa", "--features", 64, "--repetitions", 1, "--threads", 1]
    result = run("--config", tmp_path / "tiny", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    records = read_json_lines(tmp_path / "out" / "tiny.jsonl")
    assert [record["point"]["method"] for record in records] == ["performer", "rfa"]
    assert all(record["point"]["num_features"] == 64 and record["outcome"] == "finished" for record in records)
    assert all(record["check"]["gradient_error"] < 1e-3 for record in records)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "bert-huge"], "error: shape must be among bert-base, t5-base"),
        (["--feed-forward-k", "most"], "error: feed_forward_k must be a number of neurons or \"all\", got 'most'"),
        (
            ["--shape", "t5-base", "--methods", "performer"],
            "error: method performer is for encoders such as BERT, and t5 ",
        ),
        (["--methods", "magic"], "error: methods must be among vanilla"),
        (["--memory-limit", "0"], "error: memory-limit must be above 0, got 0"),
    ],
)
def test_a_wrong_option_ends_with_one_line_and_status_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
