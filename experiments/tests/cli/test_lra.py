import json

import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app

runner = CliRunner()

CONFIG = """
[data]
task = "same-document"
num_train = 8
num_validation = 4
num_test = 4
max_length = 12
shortest = 24

[model]
num_layers = 1
d_model = 8
num_heads = 2
d_attention = 8
d_ff = 8

[training]
batch = 4
steps = 2
learning_rate = 0.001
warmup = 1
evaluate_every = 1

[attention]
k = 3
num_features = 8
"""


@pytest.fixture
def folder(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(9):
        (texts / f"{number}.txt").write_text(f"text number {number}, and more of it")
    (tmp_path / "tiny.toml").write_text(CONFIG)
    return tmp_path


def run(*arguments):
    return runner.invoke(app, ["lra", *map(str, arguments)])


def test_data_training_evaluation_and_table_from_start_to_end(folder):
    data = ["--data", folder / "data"]
    source, out = ["--source", folder / "texts"], ["--out", folder / "out"]
    quick = ["--threads", 1, "--device", "cpu"]
    config = folder / "tiny.toml"
    result = run("data", config, *source, *data)
    assert result.exit_code == 0, result.output
    assert "train: 8 examples" in result.output
    result = run("train", config, "--methods", "vanilla,topk", "--seeds", "0,1", *source, *data, *out, *quick)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]
    assert [(record["method"], record["seed"]) for record in records] == [
        ("vanilla", 0),
        ("vanilla", 1),
        ("topk", 0),
        ("topk", 1),
    ]
    result = run("evaluate", config, "--method", "topk", "--seed", 1, *source, *data, *out, *quick)
    assert result.exit_code == 0, result.output
    assert f"accuracy {records[3]['best']['test_accuracy']:.2%}" in result.output
    result = run("table", *out)
    assert result.exit_code == 0, result.output
    assert "| vanilla | 0, 1 |" in (folder / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "chess"], "error: there is no configuration 'chess'"),
        (["train", "text"], "error: text reads files: give --source"),
        (["data", "text", "--source", "./gone"], "error: source folder not found: ./gone"),
        (["train", "listops", "--methods", "magic"], "error: method must be one of"),
        (["train", "listops", "--methods", "topk,topk"], "error: methods must not hold a method twice, got topk, topk"),
        (["train", "listops", "--seeds", "1,0,1"], "error: seeds must not hold a number twice, got 1, 0, 1"),
        (["train", "listops", "--seeds", "a"], "error: seeds must be whole numbers"),
        (["table", "--out", "gone"], "error: no finished runs in gone"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
