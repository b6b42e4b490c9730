"""The command that tries stand-ins for dropped neurons, on a random Llama of a dozen words."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app
from topk_experiments.pretrained.stand_ins_report import as_markdown

runner = CliRunner()
WORDS = ["a", "query", "keeps", "the", "keys", "that", "score", "best", "and", "leaves", "all", "others", "out"]


@pytest.fixture
def arguments(tiny_model, tmp_path):
    text = tmp_path / "story.txt"
    text.write_text(" ".join(WORDS * 40))
    options = {"model": tiny_model, "text": text, "out": tmp_path / "out", "threads": 1, "tokens": 48, "windows": 2}
    options |= {"evaluate-start": 1000, "evaluate-tokens": 64, "k": 3, "rank": "0,2"}
    return ["stand-ins", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def test_each_k_is_read_alone_and_with_each_stand_in_and_never_again(arguments, tmp_path):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "out" / "stand-ins.json"
    record = json.loads(path.read_text())
    assert [(run["k"], run["rank"]) for run in record["runs"]] == [
        (None, None),
        *((3, rank) for rank in (None, 0, 2)),
    ]
    assert len({run["perplexity"] for run in record["runs"]}) == 4
    assert all(set(run["layer_s"]) == {"64"} for run in record["runs"][1:])
    assert str(tmp_path) not in json.dumps(record)
    page = (tmp_path / "out" / "stand-ins.md").read_text()
    assert page == as_markdown(record)
    assert f"| 3 | rank 2 | {record['runs'][3]['perplexity']:.2f} |" in page
    assert "fitted on 96 tokens from character 0 (2 windows)" in page
    kept = record["runs"].pop(0) | {"perplexity": 7.0}
    path.write_text(json.dumps(record | {"runs": [kept]}))
    assert runner.invoke(app, arguments).exit_code == 0
    again = json.loads(path.read_text())["runs"]
    assert again[0] == kept
    assert [run["perplexity"] for run in again[1:]] == [run["perplexity"] for run in record["runs"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--rank", "-1"], "rank must be at least 0 and below 2^31, got -1"),
        (["--k", "3,3"], "k must not hold a number twice, got 3, 3"),
        (["--rank", "2,2"], "rank must not hold a number twice, got 2, 2"),
        (["--k", "3,24"], "k must be below 24, the neurons of a layer of tiny-llama, to leave some out, got 24"),
        (["--rank", "0,17"], "rank must be at most 16, the width of a layer of tiny-llama, got 17"),
        (["--windows", "0"], "windows must be at least 1, got 0"),
        (["--start", "-1"], "start must be at least 0, got -1"),
        (["--evaluate-start", "100"], "evaluate-start must leave out what is fitted on, characters 0 to"),
        (["--evaluate-start", "100000"], "has 2,"),
    ],
)
def test_a_wrong_option_ends_with_one_line_and_status_2_before_any_run(arguments, changes, words, tmp_path):
    result = runner.invoke(app, [*arguments, *changes])
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "out" / "stand-ins.json").exists()
