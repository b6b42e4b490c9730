import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.runs import steps
from topk_experiments.runs.records import read_json_lines

runner = CliRunner()


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    options = {"model": tiny_model, "text": text_file, "out": tmp_path / "out", "lengths": "96", "threads": 1}
    options |= {"k": "4,96", "features": "16", "methods": "topk,rfa", "draws": 2, "repetitions": 1}
    return ["benchmark", "error", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def test_the_benchmark_runs_from_start_to_end_and_again_without_measuring_again(arguments, tmp_path, one_fresh_process):
    one_fresh_process(steps)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = read_json_lines(tmp_path / "out" / "error.jsonl")
    assert [(record["point"]["method"], record["point"]["size"]) for record in records] == [
        ("topk", 4),
        ("topk", 96),
        ("rfa", 16),
    ]
    assert "k = 96 is full attention here: no query has more than 96 keys" in result.output
    few, every, random = records
    assert every["relative_error"] < 1e-5 < 1e-3 < few["relative_error"]
    assert few["relative_error"] == pytest.approx(sum(layer["relative_error"] for layer in few["layers"]) / 2)
    assert few["worst_relative_error"] >= few["relative_error"]
    assert [layer["layer"] for layer in few["layers"]] == [0, 1]
    assert [len(layer["relative_error_of_draws"]) for layer in random["layers"]] == [2, 2]
    for record in records:
        assert record["point"]["model"][0] == "tiny-llama"
        assert record["forward"]["elapsed_s"] > 0
        assert record["forward_backward_peak_mib"] >= 0
    assert str(tmp_path) not in (tmp_path / "out" / "error.jsonl").read_text()
    assert (tmp_path / "out" / "error.png").read_bytes().startswith(b"\x89PNG")
    assert "| top-k attention | 96 |" in (tmp_path / "out" / "error.md").read_text()

    again = runner.invoke(app, arguments)
    assert again.output.count("on file, of") == 3
    assert "Reading" not in again.output
    assert read_json_lines(tmp_path / "out" / "error.jsonl") == records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "513"], "error: lengths must be at most 512, the longest input of tiny-llama, got 513"),
        (["--layers", "2"], "error: layers must be below 2, the model's number of them, got 2"),
        (["--features", "15"], "error: features must be even"),
        (["--device", "cuda"], 'error: device="cuda" cannot be used here: torch finds no CUDA device; use "cpu"'),
        (["--time-limit", "0"], "error: time-limit must be above 0, got 0"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, options, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
