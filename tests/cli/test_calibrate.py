"""`topk-attention calibrate`: the file that it writes, and what it refuses."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from topk_attention import Calibration, StandIns, convert
from topk_attention.calibrate import MeanK
from topk_attention.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    options = {
        "model": tiny_model,
        "text": text_file,
        "out": tmp_path / "new folder" / "k.json",
        "tokens": 64,
        "windows": 2,
        "mean-k": 8,
        "threads": 1,
    }
    return ["calibrate", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def test_it_writes_a_file_that_convert_takes(arguments, tiny_model, tmp_path):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "new folder" / "k.json"
    assert f"Written: {path}" in result.output
    assert "on 2 windows of 64 tokens" in result.output
    calibration = Calibration.load(path)
    assert list(calibration) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert 7 <= calibration.mean_k <= 8
    assert f"mean k = {calibration.mean_k:.1f}" in result.output
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    report = convert(model, attention_k=calibration)
    assert [entry.path for entry in report.replaced] == list(calibration)
    with torch.no_grad():
        assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()
    assert calibration.reallocated(MeanK(4)).mean_k <= 4  # the curves are in the file


@pytest.mark.filterwarnings("ignore:the target leaves no key out")
def test_heads_that_keep_every_token_of_a_window_are_named(arguments, tiny_encoder, tmp_path):
    result = runner.invoke(app, arguments)
    assert "full attention" not in result.output
    result = runner.invoke(app, [*arguments, "--mean-k", "64", "--model", str(tiny_encoder)])
    assert result.exit_code == 0, result.output
    heads = [k for ks in Calibration.load(tmp_path / "new folder" / "k.json").values() for k in ks]
    number = sum(k == 64 for k in heads)
    assert number > 0
    words = f"{number} of {len(heads)} heads: k = 64 is full attention here: no query has more than 64 keys"
    assert words in result.output


def test_neurons_are_chosen_too_where_asked(arguments, tmp_path):
    result = runner.invoke(app, [*arguments, "--feed-forward-mean-k", "12"])
    assert result.exit_code == 0, result.output
    neurons = Calibration.load(tmp_path / "new folder" / "k.json").feed_forward
    assert list(neurons) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert sum(neurons.values()) <= 2 * 12


@pytest.mark.parametrize("rank", [0, 3])
def test_stand_ins_for_the_other_neurons_get_a_file_of_their_own(arguments, tiny_model, tmp_path, rank):
    path = tmp_path / "other folder" / "stand-ins.safetensors"
    options = ["--feed-forward-mean-k", "12", "--stand-ins", str(path), "--stand-in-rank", str(rank)]
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert f"Written: {path}" in result.output
    stand_ins = StandIns.load(path)
    assert dict(stand_ins) == Calibration.load(tmp_path / "new folder" / "k.json").feed_forward
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert [entry.stand_in.rank for entry in convert(model, feed_forward_k=stand_ins).replaced] == [rank, rank]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["12", "--stand-in-rank", "1000"], "stand-in-rank must be at most 16, .* got 1000; give a smaller one"),
        (["12"], "stand-in-rank must be at most 16, .* got 64, its default; give a smaller one"),
        (["24", "--stand-in-rank", "0"], "feed-forward-mean-k must be below 24, .* got 24; leave out --stand-ins"),
    ],
)
def test_stand_ins_that_do_not_fit_the_model_are_refused_before_it_is_measured(arguments, tmp_path, options, words):
    path = tmp_path / "new folder" / "stand-ins.safetensors"
    result = runner.invoke(app, [*arguments, "--stand-ins", str(path), "--feed-forward-mean-k", *options])
    assert result.exit_code == 2
    assert re.search(f"error: {words}", result.output)
    assert not path.parent.exists()


def test_stand_ins_never_replace_the_calibration(arguments, tmp_path):
    path = tmp_path / "new folder" / "k.json"
    options = ["--feed-forward-mean-k", "12", "--stand-ins", str(path.parent / ".." / path.parent.name / path.name)]
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert "error: stand-ins must be another file than --out, got " in result.output
    assert not path.parent.exists()


@pytest.mark.parametrize("completion", ["on", "fit"])
def test_a_completion_is_in_the_file_and_in_the_words(arguments, tmp_path, completion):
    result = runner.invoke(app, [*arguments, "--completion", completion])
    assert result.exit_code == 0, result.output
    calibration = Calibration.load(tmp_path / "new folder" / "k.json")
    assert list(calibration.completion) == list(calibration)
    assert "completed; mass scale per head from " in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--windows", "7"], "has 390 tokens, 7 windows of 64 need 448; give a longer text, or fewer --windows"),
        (["--tokens", "513"], "tokens must be at most 512, the longest input of "),
        (["--tokens", "1"], "tokens must be at least 2, got 1"),
        (["--windows", "0"], "windows must be at least 1, got 0"),
        (["--lost-mass", "0.1"], "give one of --mean-k, --lost-mass and --loss-increase, got several"),
        (["--mean-k", "-1"], "mean_k must be at least 1, got -1"),
        (["--mean-k", "0"], "mean_k must be at least 1, got 0"),
        (["--mean-k", "1000"], "mean-k must be at most 64, the tokens of a window, where it is full attention"),
        (["--feed-forward-mean-k", "0"], "feed-forward-mean-k must be at least 1, got 0"),
        (["--stand-ins", "new.safetensors"], "and --feed-forward-mean-k is missing; give both"),
        (["--stand-in-rank", "-1"], "stand-in-rank must be at least 0, got -1"),
        (["--stand-in-rank", "4"], "stand-in-rank is that of stand-ins, and --stand-ins is missing; give both"),
        (["--completion", "yes"], 'completion must be "on" or "fit", got \'yes\''),
        (["--text", "/no/such/text.txt"], "text file not found: /no/such/text.txt"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_line_and_status_2(arguments, tmp_path, options, words):
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "new folder").exists()


def test_a_folder_that_is_not_a_model_is_refused_with_one_line_and_status_2(arguments, tmp_path):
    folder = tmp_path / "not a model"
    folder.mkdir()
    result = runner.invoke(app, [*arguments, "--model", str(folder)])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("error: ")
    assert "not a model" in line


def test_an_out_that_cannot_be_written_is_named_before_anything_is_measured(arguments, tmp_path, monkeypatch):
    from topk_attention.cli import calibration

    monkeypatch.setattr(calibration, "measure", None)
    result = runner.invoke(app, [*arguments, "--out", str(tmp_path)])
    assert (result.exit_code, f"error: out must be a file, got the folder {tmp_path}" in result.output) == (2, True)
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, [*arguments, "--out", str(tmp_path / "file" / "k.json")])
    assert (result.exit_code, "error: out cannot be written: " in result.output) == (2, True)
