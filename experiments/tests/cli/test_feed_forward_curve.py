import json

from typer.testing import CliRunner

from topk_experiments.cli import app

runner = CliRunner()


def test_the_curves_are_made_from_start_to_end(text_file, tmp_path):
    sizes = {"layers": 1, "d-model": 8, "heads": 2, "d-ff": 16, "context": 8, "batch": 2, "steps": 4, "k": 3}
    arguments = [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]
    arguments += ["--text", str(text_file), "--threads", "1", "--evaluate-every", "2", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, ["train", "feed-forward-curve", *arguments])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "feed-forward-curve.json").read_text())
    assert [[point["step"] for point in arm["curve"]] for arm in record["arms"]] == [[2, 4], [2, 4]]


def test_a_wrong_option_ends_with_one_line_and_status_2():
    result = runner.invoke(app, ["train", "feed-forward-curve", "--steps", "0"])
    assert result.exit_code == 2
    assert "error: steps must be at least 1, got 0" in result.output
