import json

import pytest
from typer.testing import CliRunner

from topk_experiments.cli import app

runner = CliRunner()


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"text": "a query keeps the keys that score", "answers": ["best"], "choices": ["best", "all others"]},
        {"text": "others", "answers": ["out"], "choices": ["best", "out"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_questions_are_answered_and_the_table_is_written_from_start_to_end(tiny_model, questions, tmp_path):
    arguments = ["--model", str(tiny_model), "--dataset", str(questions), "--attention-k", "2", "--threads", "1"]
    arguments += ["--completed-k", "2"]
    result = runner.invoke(app, ["qa", "evaluate", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["setting"]["attention_k"] for line in lines] == [None, 2, 2]
    assert [json.loads(line)["setting"].get("completed") for line in lines] == [None, None, True]
    result = runner.invoke(app, ["qa", "table", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "| attention k = 2 |" in (tmp_path / "out" / "qa.md").read_text()
    assert "| attention k = 2, completed |" in (tmp_path / "out" / "qa.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "--dataset", "nowhere.jsonl"], "question file not found: nowhere.jsonl"),
        (["evaluate", "--dataset", "x", "--attention-k", "0"], "attention-k must be at least 1 and below"),
        (["evaluate", "--dataset", "x", "--completed-k", "no"], "completed-k must be numbers and calibration files"),
        (["evaluate", "--dataset", "x", "--limit", "0"], "limit must be at least 1, got 0"),
        (["finetune", "--model", "x", "--train", "y", "--steps", "0"], "steps must be at least 1, got 0"),
        (["finetune", "--model", "x", "--train", "y", "--beta2", "1"], "beta2 must be at least 0 and below 1, got 1.0"),
        (["reading-task", "--words", "0"], "words must be at least 1, got 0"),
        (["table", "--out", "nowhere"], "nowhere holds neither evaluations.jsonl nor finetuning.jsonl"),
    ],
)
def test_a_wrong_option_ends_with_one_line_and_status_2(arguments, said, tiny_model):
    if "evaluate" in arguments:
        arguments = [*arguments, "--model", str(tiny_model)]
    result = runner.invoke(app, ["qa", *arguments])
    assert result.exit_code == 2
    assert f"error: {said}" in result.output


def test_a_reading_task_is_written_with_an_untrained_t5_of_the_asked_size(text_file, tmp_path):
    sizes = {"layers": 1, "d-model": 8, "heads": 2, "d-ff": 24}
    counts = {"words": 2, "fewest-facts": 1, "most-facts": 2, "forms": 3, "training-questions": 4, "test-questions": 2}
    arguments = [str(part) for name, size in (sizes | counts).items() for part in (f"--{name}", size)]
    result = runner.invoke(app, ["qa", "reading-task", *arguments, "--text", str(text_file), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "small-t5" / "config.json").read_text())
    assert [config[name] for name in ("num_layers", "d_model", "num_heads", "d_ff")] == [1, 8, 2, 24]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "about.json").read_text())["forms"] == 3


def test_a_small_t5_is_trained_saved_asked_and_set_in_the_table_from_start_to_end(text_file, tmp_path):
    def run(command, *switches, **options):
        named = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        result = runner.invoke(app, ["qa", command, *named, *switches])
        assert result.exit_code == 0, result.output
        return result.output

    task, out, models = tmp_path / "task", tmp_path / "out", tmp_path / "models"
    sizes = {"words": 2, "fewest_facts": 2, "most_facts": 2, "layers": 1, "d_model": 8, "heads": 2, "d_ff": 16}
    run("reading-task", text=text_file, training_questions=20, test_questions=4, **sizes, out=task)
    files = {"train": task / "train.jsonl", "dataset": task / "test.jsonl"}
    training = {"steps": 3, "batch": 4, "learning_rate": 0.002, "beta2": 0.5, "position_bias_rate": 3, "seed": 5}
    run(
        "finetune", "--from-scratch", "--constant", model=task / "small-t5", **files, attention_k=3, **training,
        completed_k=3, evaluate_every=2, curve_questions=2, save=models, out=out, threads=1,
    )  # fmt: skip
    full, topk, completed = map(json.loads, (out / "finetuning.jsonl").read_text().splitlines())
    assert [record["setting"]["attention_k"] for record in (full, topk, completed)] == [None, 3, 3]
    assert completed["setting"]["completed"] is True
    assert completed["curve"][-1]["training_loss"] != topk["curve"][-1]["training_loss"]
    assert (models / "small-t5-attention-k-3-completed").is_dir()
    asked_for = training | {"from_scratch": True, "falls": False}
    for record in (full, topk, completed):
        assert {name: record["training"][name] for name in asked_for} == asked_for
        assert [point["step"] for point in record["curve"]] == [2, 3]
    saved = models / "small-t5-attention-k-3"
    run("evaluate", "--no-full", model=saved, dataset=files["dataset"], attention_k=3, out=out, threads=1)
    (asked,) = map(json.loads, (out / "evaluations.jsonl").read_text().splitlines())
    assert asked["model"]["name"] == saved.name
    assert asked["setting"] == topk["setting"]
    assert len(asked["outcomes"]["f1"]) == 4
    run("table", out=out)
    sections = (out / "qa.md").read_text().split("\n### ")
    (trained,) = [section for section in sections if "trained from scratch" in section]
    for arm in ("full", "attention k = 3", "attention k = 3, completed"):
        assert f"\n| {arm} | " in trained
    assert any(section.startswith(saved.name) for section in sections)


def test_a_small_language_model_is_trained_from_start_to_end(text_file, tmp_path):
    sizes = {"layers": 1, "d-model": 8, "heads": 2, "d-ff": 16, "context": 8, "batch": 2, "steps": 2}
    arguments = [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]
    arguments += ["--text", str(text_file), "--attention-k", "2", "--threads", "1", "--out", str(tmp_path / "out")]
    arguments += ["--completed-k", "2"]
    result = runner.invoke(app, ["train", "language-model", *arguments])
    assert result.exit_code == 0, result.output
    (record,) = (tmp_path / "out").glob("*.json")
    arms = [arm["name"] for arm in json.loads(record.read_text())["arms"]]
    assert arms == ["full", "attention k = 2", "attention k = 2, completed"]
