import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from topk_attention.backends import choose_backend
from topk_experiments.cli import app
from topk_experiments.pretrained import demo
from topk_experiments.runs import steps
from topk_experiments.runs.process import WorkerError

runner = CliRunner()
RUN_FIELDS = {
    "k",
    "completed",
    "perplexity",
    "elapsed_s",
    "peak_mib",
    "baseline_mib",
    "total_peak_mib",
    "memory_method",
    "attn_implementation",
    "date",
}

# A shell ignores Ctrl-C on behalf of what it starts in the background; the tests may run there.
_WITH_INTERRUPTS = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from topk_experiments.cli import app; app()"
)


@pytest.fixture
def demo_arguments(tiny_model, text_file, tmp_path):
    arguments = [
        "demo",
        "--perplexity",
        "--model",
        tiny_model,
        "--text",
        text_file,
        "--out",
        tmp_path / "out",
        "--threads",
        1,
    ]
    arguments += ["--tokens", 96, "--k", "4,96", "--completed-k", "4", "--rounds", 2]
    return [str(argument) for argument in arguments]


def test_the_demo_runs_from_start_to_end_and_again_without_measuring_again(demo_arguments, tmp_path, one_fresh_process):
    one_fresh_process(demo)
    result = runner.invoke(app, demo_arguments)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    record = json.loads((out / "demo.json").read_text())
    full, few, all_keys, completed = record["runs"][:4]
    assert [(run["round"], run["k"], run["completed"]) for run in record["runs"]] == [
        (number, *setting) for number in (1, 2) for setting in ((None, False), (4, False), (96, False), (4, True))
    ]
    assert set(full) >= RUN_FIELDS
    assert all_keys["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)
    assert few["perplexity"] != pytest.approx(full["perplexity"], rel=1e-4)
    assert abs(completed["perplexity"] - full["perplexity"]) < abs(few["perplexity"] - full["perplexity"]) / 10
    assert (full["attn_implementation"], few["attn_implementation"]) == ("sdpa", "topk")
    assert all(run["elapsed_s"] > 0 and run["total_peak_mib"] >= run["baseline_mib"] > 0 for run in record["runs"])
    assert record["schema"] == "topk_attention/demo/3"
    assert record["config"] == {
        "num_tokens": 96,
        "k": [4, 96],
        "completed_k": [4],
        "rounds": 2,
        "seed": 0,
        "threads": 1,
        "backend": choose_backend("auto").name,
        "dtype": "float32",
    }
    assert record["model"]["name"] == "tiny-llama"
    assert record["model"]["num_parameters"] > 1000
    assert record["text"]["source"] == "story <1>.txt"
    assert len(record["text"]["sha256"]) == 64
    assert {"topk_attention", "torch", "transformers", "python", "cpu", "commit", "date"} <= set(record["environment"])
    assert str(tmp_path) not in json.dumps(record)

    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "demo.html").read_text()
    assert "story &lt;1&gt;.txt" in page
    assert "<1>" not in page
    for name in ("demo.json", "demo.png", "demo.html"):
        assert str(out / name) in result.output
    assert "k = 4, completed" in result.output
    for run in (few, completed):
        assert f"{run['perplexity']:.2f}" in result.output

    (out / "demo.html").unlink()
    again = runner.invoke(app, demo_arguments)
    assert again.exit_code == 0, again.output
    assert "All 8 runs are in" in again.output
    assert json.loads((out / "demo.json").read_text()) == record
    assert (out / "demo.html").exists()


def test_an_interrupted_demo_says_how_to_go_on_and_keeps_its_finished_runs(demo_arguments, tmp_path, one_fresh_process):
    record_path = tmp_path / "out" / "demo.json"
    process = subprocess.Popen(
        [sys.executable, "-c", _WITH_INTERRUPTS, *demo_arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not record_path.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert f"interrupted; finished runs are in {record_path}" in output
    assert "to continue: topk-experiments demo --perplexity --model" in output
    finished = json.loads(record_path.read_text())["runs"]
    assert [run["k"] for run in finished] == [None]

    one_fresh_process(demo)
    result = runner.invoke(app, demo_arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 8 runs are on file" in result.output
    assert "tiny-llama now reads 96 tokens of story <1>.txt, with full attention, with k = 4, 96 and with k = 4 " in (
        " ".join(result.output.split())
    )
    runs = json.loads(record_path.read_text())["runs"]
    assert runs[0] == finished[0]
    assert [run["k"] for run in runs] == [None, 4, 96, 4] * 2


def test_another_configuration_starts_anew_and_says_what_differs(demo_arguments, tmp_path, monkeypatch):
    def measured(function, request, **options):
        numbers = {"k": request["k"], "perplexity": 9.0, "elapsed_s": 1.0, "peak_mib": 1.0, "total_peak_mib": 2.0}
        return numbers | {"num_parameters": len(request["windows"][0])}

    monkeypatch.setattr(demo, "run_in_fresh_process", measured)
    assert runner.invoke(app, demo_arguments).exit_code == 0
    result = runner.invoke(app, [*demo_arguments, "--tokens", "64"])
    assert result.exit_code == 0, result.output
    assert (
        "was made with another configuration, environment or code and is replaced (config num_tokens: 96 -> 64)"
        in result.output
    )
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert record["config"]["num_tokens"] == record["model"]["num_parameters"] == 64
    refused = runner.invoke(app, [*demo_arguments, "--tokens", "513"])
    assert refused.exit_code == 2
    assert "is replaced" not in refused.output
    again = runner.invoke(app, [*demo_arguments, "--tokens", "64", "--fresh"])
    assert "Starting anew as asked" in again.output


def test_a_run_that_fails_is_named_and_the_runs_before_it_are_kept(demo_arguments, tmp_path, monkeypatch):
    def measured(function, request, **options):
        if request["k"] == 96:
            raise WorkerError("out of memory", "cannot allocate memory")
        numbers = {"k": request["k"], "perplexity": 9.0, "elapsed_s": 1.0, "peak_mib": 1.0, "total_peak_mib": 2.0}
        return numbers | {"num_parameters": 1}

    monkeypatch.setattr(demo, "run_in_fresh_process", measured)
    result = runner.invoke(app, demo_arguments)
    assert result.exit_code == 2
    assert "error: k = 96 (every key: full attention) failed (out of memory): cannot allocate memory" in result.output
    assert [run["k"] for run in json.loads((tmp_path / "out" / "demo.json").read_text())["runs"]] == [None, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/no/such/folder"], "error: model folder not found: /no/such/folder"),
        (["--text", "/no/such/text.txt"], "error: text file not found: /no/such/text.txt"),
        (["--k", "16,0"], "error: k must be at least 1 and below 2^31, got 0"),
        (["--k", "16,16"], "error: k must not hold a number twice, got 16, 16"),
        (["--completed-k", "16,0"], "error: completed-k must be at least 1 and below 2^31, got 0"),
        (["--completed-k", "16,16"], "error: completed-k must not hold a number twice, got 16, 16"),
        (["--k", "few"], "error: k must be whole numbers separated by commas, got 'few'"),
        (["--tokens", "1"], "error: tokens must be at least 2"),
        (["--tokens", "500"], "is too short: 500 tokens needed, it has 390; give a longer text or ask for at most 390"),
        (["--tokens", "513"], "error: tokens must be at most 512, the longest input of tiny-llama, got 513"),
        (["--k", ""], "error: k must be whole numbers separated by commas, got ''"),
        (["--out", "/dev/null/results"], "error: out cannot be written: /dev/null/results"),
        (["--threads", "0"], "error: threads must be at least 1, got 0"),
        (["--rounds", "0"], "error: rounds must be at least 1, got 0"),
        (["--backend", "gpu"], "error: backend must be one of"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(demo_arguments, options, words):
    result = runner.invoke(app, [*demo_arguments, *options])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_the_attention_benchmark_runs_from_start_to_end_and_again_without_measuring_again(tmp_path, one_fresh_process):
    one_fresh_process(steps)
    arguments = ["benchmark", "attention", "--lengths", "64,128", "--implementations", "topk,sdpa", "--k", "8"]
    arguments += ["--heads", "2", "--head-dim", "8", "--threads", "1", "--out", str(tmp_path)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert [(record["point"]["length"], record["point"]["implementation"]) for record in records] == [
        (64, "topk"),
        (64, "sdpa"),
        (128, "topk"),
        (128, "sdpa"),
    ]
    for record in records:
        assert record["outcome"] == "finished"
        assert record["largest_error_in_check"] < 1e-5
        assert 0 < record["fastest_s"] <= record["elapsed_s"] <= record["slowest_s"]
        assert record["repetitions"] == 3
        assert record["total_peak_mib"] == pytest.approx(record["baseline_mib"] + record["peak_mib"])
    assert (tmp_path / "attention.png").exists()
    before = (tmp_path / "attention.jsonl").read_text()
    again = runner.invoke(app, arguments)
    assert again.output.count("(on file, of ") == 4
    assert (tmp_path / "attention.jsonl").read_text() == before


def test_a_point_that_takes_too_long_is_a_data_point(tmp_path):
    arguments = ["benchmark", "attention", "--lengths", "64", "--implementations", "topk", "--time-limit", "0.01"]
    result = runner.invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "attention.jsonl").read_text())["outcome"] == "time limit"
    assert "time limit (not finished after 0.01 s)" in result.output
