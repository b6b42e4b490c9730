import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.runs import steps
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


@pytest.fixture
def layers(tiny_model, text_file, tmp_path):
    options = {"layers": "0,1", "model": tiny_model, "text": text_file, "lengths": 96, "threads": 1, "repetitions": 1}
    options |= {"out": tmp_path / "out"}
    return [*(part for name, value in options.items() for part in (f"--{name}", value)), "--no-memory"]


def test_layers_of_a_model_are_measured_with_their_own_queries_and_keys(layers, tmp_path, one_fresh_process):
    one_fresh_process(steps)
    result = run(*layers)
    assert result.exit_code == 0, result.output
    records = read_json_lines(tmp_path / "out" / "layers.jsonl")
    assert [record["request"]["work"]["layer"] for record in records] == [0, 1]
    for record in records:
        work = record["request"]["work"]
        assert (work["model"], work["num_heads"], work["num_key_heads"]) == ("tiny-llama", 2, 2)
        assert work["is_causal"]
        assert record["methods"].keys() == {"topk-chunked", "sdpa"}
        assert record["methods"]["topk-chunked"]["largest_error_in_check"] < 1e-5
    assert str(tmp_path) not in (tmp_path / "out" / "layers.jsonl").read_text()
    table = (tmp_path / "out" / "layers.md").read_text()
    assert "layer 1 of tiny-llama, H = 2, L = 96, k = 64, D = 8, causal" in table

    again = run(*layers)
    assert "Reading" not in again.output
    assert again.output.count("on file, of") == 2
    assert read_json_lines(tmp_path / "out" / "layers.jsonl") == records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "2"], "error: layers must be below 2, the model's number of them, got 2"),
        (["--layers", "0,0"], "error: layers must not hold a number twice, got 0, 0"),
        (["--lengths", "96,96"], "error: lengths must not hold a number twice, got 96, 96"),
        (["--lengths", "1"], "error: lengths must be at least 2"),
        (["--lengths", "513"], "error: lengths must be at most 512, the longest input of tiny-llama, got 513"),
    ],
)
def test_a_layer_or_length_that_the_model_lacks_is_refused(layers, options, words):
    result = run(*layers, *options)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--works", "huge"], "error: works must be among plain, long"),
        (["--sweep", "k", "--lengths", "64"], 'error: lengths goes with sweep "length" alone, or with layers'),
        (["--layers", "0", "--works", "plain"], "error: layers are measured instead of a sweep or of works"),
        (["--text", "book.txt"], "error: model and text go with layers"),
    ],
)
def test_a_wrong_option_ends_with_one_line_and_status_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
