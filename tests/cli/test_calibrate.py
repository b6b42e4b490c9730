"""`topk-attention calibrate`: what a user can put right is said in one line, before the model is loaded or measured."""

import pytest
from typer.testing import CliRunner

from topk_attention import Calibration
from topk_attention.cli import app

runner = CliRunner()


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    return [
        *("calibrate", "--model", tiny_model, "--text", text_file, "--out", tmp_path / "k.json"),
        *("--tokens", "32", "--windows", "2", "--mean-k", "8"),
    ]


def run(arguments, *more):
    return runner.invoke(app, [str(argument) for argument in (*arguments, *more)])


def test_it_writes_a_calibration(arguments, tmp_path):
    result = run(arguments)
    assert result.exit_code == 0, result.output
    assert 1 < Calibration.load(tmp_path / "k.json").mean_k <= 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mean-k", "-1"], "error: mean_k must be at least 1, got -1"),
        (["--mean-k", "0"], "error: mean_k must be at least 1, got 0"),
        (["--mean-k", "1000"], "error: mean-k must be at most 32, the tokens of a window, where it is full attention"),
        (["--feed-forward-mean-k", "0"], "error: mean_k must be at least 1, got 0"),
        (["--tokens", "100000"], "error: tokens must be at most 512, the longest input of"),
        (["--windows", "1000"], "1000 windows of 32 need 32,000; give a longer text"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_anything_is_measured(arguments, options, words, monkeypatch):
    from topk_attention.cli import calibration

    monkeypatch.setattr(calibration, "measure", None)
    result = run(arguments, *options)
    assert (result.exit_code, words in result.output) == (2, True), result.output


def test_an_out_that_cannot_be_written_is_named_before_anything_is_measured(arguments, tmp_path, monkeypatch):
    from topk_attention.cli import calibration

    monkeypatch.setattr(calibration, "measure", None)
    result = run(arguments, "--out", tmp_path)
    assert (result.exit_code, f"error: out must be a file, got the folder {tmp_path}" in result.output) == (2, True)
    (tmp_path / "file").write_text("")
    result = run(arguments, "--out", tmp_path / "file" / "k.json")
    assert (result.exit_code, "error: out cannot be written: " in result.output) == (2, True)
