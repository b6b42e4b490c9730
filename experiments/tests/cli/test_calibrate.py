import importlib
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from topk_attention import Calibration, convert
from topk_experiments.cli import app
from topk_experiments.models.pretrained import find_model, load_model, load_tokenizer
from topk_experiments.pretrained import calibration as experiment
from topk_experiments.pretrained import calibration_workers, demo
from topk_experiments.runs.process import WorkerError, run_in_fresh_process

runner = CliRunner()


@pytest.fixture
def arguments(tiny_model, text_file, tmp_path):
    options = {
        "model": tiny_model,
        "text": text_file,
        "tokens": 64,
        "mean-k": 8,
        "evaluate-tokens": 48,
        "report": tmp_path / "out" / "page.html",
        "out": tmp_path / "k" / "tiny.json",
        "records": tmp_path / "records",
        "threads": 1,
    }
    return ["calibrate", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.fixture
def in_process(monkeypatch):
    """Run workers in this process, and remember them: "measure", or the attention's and the neurons' k."""
    calls = []

    def run(function, request, *, on_message, **_):
        module_name, _, name = function.partition(":")
        calls.append("measure" if name == "measure_calibration" else (request["k"], request["feed_forward_k"]))
        return getattr(importlib.import_module(module_name), name)(json.loads(json.dumps(request)), on_message)

    monkeypatch.setattr(experiment, "run_in_fresh_process", run)
    return calls


@pytest.fixture
def workers(in_process, monkeypatch):
    """The same without reading a text or drawing a page."""
    numbers = {"perplexity": 9.0, "elapsed_s": 1.0, "peak_mib": 1.0, "total_peak_mib": 2.0}
    monkeypatch.setattr(demo, "measure_run", lambda request, send: {"k": request["k"], "num_parameters": 1} | numbers)
    monkeypatch.setattr(experiment, "html_page", lambda *_: "page")
    return in_process


def run(arguments, *more):
    result = runner.invoke(app, [*arguments, *map(str, more)])
    assert result.exit_code == 0, result.output
    return result.output


def record_of(tmp_path):
    return json.loads((tmp_path / "records" / "tiny.record.json").read_text())


def test_calibrate_measures_in_a_fresh_process_what_convert_takes(arguments, tmp_path, tiny_model, monkeypatch):
    def run_here(function, request, *, on_message, **_):
        if function.endswith("measure_calibration"):
            return run_in_fresh_process(function, request, on_message=on_message)
        return demo.measure_run(request, on_message)

    monkeypatch.setattr(experiment, "run_in_fresh_process", run_here)
    output = run(arguments, "--also-mean-k", "", "--uniform", "")
    calibration = Calibration.load(tmp_path / "k" / "tiny.json")
    assert 7 <= calibration.mean_k <= 8
    assert list(calibration) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert calibration.about["model"] == "tiny-llama"
    record = record_of(tmp_path)
    assert [run["kind"] for run in record["runs"]] == ["full", "calibrated"]
    assert record["runs"][1]["mean_k"] == pytest.approx(calibration.mean_k)
    model = load_model(find_model(str(tiny_model)))
    convert(model, attention_k=calibration)
    for path in ("k/tiny.json", "records/tiny.record.json", "out/page.html"):
        assert str(tmp_path / path) in output
    for file in (
        tmp_path / "records" / "tiny.record.json",
        tmp_path / "out" / "page.html",
        tmp_path / "k" / "tiny.json",
    ):
        assert str(tmp_path) not in file.read_text()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("completion", ["on", "fit"])
def test_every_point_but_full_attention_is_completed_where_asked(arguments, tmp_path, completion, monkeypatch):
    requests = []

    def keep(model, request):
        requests.append(request)
        convert_as_asked(model, request)

    convert_as_asked = demo.convert_as_asked
    monkeypatch.setattr(demo, "convert_as_asked", keep)
    output = run(arguments, "--completion", completion)
    record = record_of(tmp_path)
    assert record["calibrated_on"]["completion"] == completion
    assert [(r["kind"] == "full") != r.get("completed", False) for r in record["runs"]] == [True] * len(record["runs"])
    assert re.search(r"calibrated, mean k = \d+\.?\d*, completed", output)
    calibration = Calibration.load(tmp_path / "k" / "tiny.json")
    assert list(calibration.completion) == list(calibration)
    assert all((request["completion"] is None) == (request["k"] is None) for request in requests)
    assert any(isinstance(request["k"], int) for request in requests)  # the uniform k too
    monkeypatch.setattr(experiment, "run_in_fresh_process", None)
    assert f"All {len(record['runs'])} runs are in " in run(arguments, "--completion", completion)


@pytest.mark.usefixtures("in_process")
def test_the_record_holds_every_point_and_the_page_shows_them(arguments, tmp_path):
    output = run(arguments, "--feed-forward-mean-k", 12)
    record = record_of(tmp_path)
    assert record["schema"] == "topk_attention/calibration/1"
    kinds = sorted((run["kind"], round(run["mean_k"] or 0), run["feed_forward_mean_k"] or 0) for run in record["runs"])
    attention = [kind for kind in kinds if kind[2] == 0]
    *within_budget, largest = [k for kind, k, _ in attention if kind == "calibrated"]
    assert within_budget == [4, 8]
    assert 8 < largest <= 16  # keys that would only raise the loss stay unspent
    assert attention[3:] == [
        ("full", 0, 0),
        ("uniform", 4, 0),
        ("uniform", 8, 0),
        ("uniform", 16, 0),
    ]
    assert len(kinds) == 10
    assert record["calibrated_on"]["num_tokens"] == 64
    assert record["evaluated_on"]["num_tokens"] == 48
    assert record["evaluated_on"]["start"] == "after the calibration windows"
    assert record["evaluated_on"]["overlaps_calibration"] is False
    assert record["measurement"]["peak_mib"] >= 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "://" not in page  # "http" alone may be part of a picture
    assert "story &lt;1&gt;.txt" in page
    assert page.count("<tr><td>") == 10
    for run_of_record in record["runs"]:
        assert f"<td>{run_of_record['perplexity']:.2f}</td>" in page
    assert "perplexity" in output


def test_again_nothing_is_measured_or_evaluated_again(arguments, workers, tmp_path):
    run(arguments)
    before, number = record_of(tmp_path), len(workers)
    (tmp_path / "out" / "page.html").unlink()
    output = run(arguments)
    assert "Measured already" in output
    assert "All 7 runs are in" in output
    assert len(workers) == number
    assert record_of(tmp_path) == before
    assert (tmp_path / "out" / "page.html").exists()


def test_an_interrupted_calibration_goes_on_where_it_stopped(arguments, workers, tmp_path, monkeypatch):
    in_this_process = experiment.run_in_fresh_process

    def stops_at_the_third(function, request, **options):
        if len(workers) == 3:
            raise KeyboardInterrupt
        return in_this_process(function, request, **options)

    monkeypatch.setattr(experiment, "run_in_fresh_process", stops_at_the_third)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 130
    assert "to continue: topk-experiments" in result.output
    assert (tmp_path / "k" / "tiny.json").exists()
    assert len(record_of(tmp_path)["runs"]) == 2
    first = list(workers)
    assert first[0] == "measure"
    monkeypatch.setattr(experiment, "run_in_fresh_process", in_this_process)
    run(arguments)
    assert "measure" not in workers[3:]
    assert len(workers) == 1 + 7
    assert not any(call in first for call in workers[3:])


def test_another_budget_is_spent_from_the_same_measurements(arguments, workers, tmp_path):
    run(arguments)
    workers.clear()
    run(arguments, "--mean-k", 16, "--also-mean-k", "4", "--uniform", "4")
    assert "measure" not in workers
    assert len(workers) == 0  # mean k = 4, 16 and k = 4 were there
    calibration = Calibration.load(tmp_path / "k" / "tiny.json")
    assert calibration.about["target"] == "MeanK(mean_k=16.0)"
    assert 8 < calibration.mean_k <= 16
    run(arguments, "--mean-k", 16, "--also-mean-k", "4", "--uniform", "4,5")
    assert workers == [(5, None)]


def test_another_evaluation_text_evaluates_anew_and_measures_nothing(arguments, workers):
    run(arguments)
    workers.clear()
    output = run(arguments, "--evaluate-start", 700)
    assert "Evaluating anew" in output
    assert "measure" not in workers
    assert len(workers) == 7


def test_another_text_measures_anew_and_keeps_runs_that_still_hold(arguments, workers, tmp_path):
    run(arguments, "--evaluate-start", 700)
    workers.clear()
    output = run(arguments, "--evaluate-start", 700, "--start", 10)
    assert "Measuring anew (calibrated_on start: 0 -> 10)" in output
    assert workers[0] == "measure"
    assert (None, None) not in workers  # full attention


def test_a_lost_calibration_file_is_measured_again(arguments, workers, tmp_path):
    run(arguments)
    workers.clear()
    (tmp_path / "k" / "tiny.json").write_text("{}")
    run(arguments)
    assert workers == ["measure"]


def test_fresh_does_everything_again(arguments, workers):
    run(arguments)
    number = len(workers)
    output = run(arguments, "--fresh")
    assert "Starting anew as asked" in output
    assert len(workers) == 2 * number


@pytest.mark.usefixtures("workers")
def test_evaluating_on_what_was_calibrated_on_is_told(arguments, tmp_path):
    run(arguments, "--evaluate-start", 30)
    assert record_of(tmp_path)["evaluated_on"]["overlaps_calibration"] is True


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("target", [["--lost-mass", "0.5"], ["--loss-increase", "0.01"]])
def test_other_targets(arguments, target, tmp_path):
    at = arguments.index("--mean-k")
    run(arguments[:at] + arguments[at + 2 :] + target, "--windows", 2)
    record = record_of(tmp_path)
    assert (record["measurement"]["search"] is not None) == (target[0] == "--loss-increase")
    assert record["calibrated_on"]["windows"] == 2
    calibration = Calibration.load(tmp_path / "k" / "tiny.json")
    assert calibration.about["tokens"] == 128


@pytest.mark.usefixtures("workers")
def test_every_run_gets_the_tokens_after_the_calibration_windows(arguments, text_file, tiny_model, monkeypatch):
    seen = []
    measure_run = demo.measure_run
    monkeypatch.setattr(demo, "measure_run", lambda request, send: seen.append(request) or measure_run(request, send))
    run(arguments)
    ids = load_tokenizer(find_model(str(tiny_model)))(text_file.read_text())["input_ids"]
    assert len(seen) == 7
    assert all(request["windows"] == [ids[64 : 64 + 48]] for request in seen)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lost-mass", "0.1"], "error: give one of --mean-k, --lost-mass and --loss-increase, got several"),
        (["--model", "/no/such/folder"], "error: model folder not found: /no/such/folder"),
        (["--text", "/no/such/text.txt"], "error: text file not found: /no/such/text.txt"),
        (["--evaluate-text", "/no/such/text.txt"], "error: text file not found: /no/such/text.txt"),
        (["--tokens", "1"], "error: tokens must be at least 2, got 1"),
        (["--tokens", "513"], "error: tokens must be at most 512, the longest input of tiny-llama, got 513"),
        (["--evaluate-tokens", "513"], "error: evaluate-tokens must be at most 512, the longest input of tiny-llama"),
        (["--windows", "6"], "is too short: 432 tokens needed, it has 390"),
        (["--windows", "0"], "error: windows must be at least 1, got 0"),
        (["--start", "100000"], "characters, so none from 100,000 on"),
        (["--mean-k", "0.5"], "error: mean_k must be at least 1, got 0.5"),
        (
            ["--mean-k", "65"],
            "error: mean-k must be at most 64, the tokens of a window, where it is full",
        ),
        (["--uniform", "0"], "error: uniform must be at least 1 and below 2^31, got 0"),
        (["--also-mean-k", "few"], "error: also-mean-k must be whole numbers separated by commas, got 'few'"),
        (["--backend", "gpu"], "error: backend must be one of"),
        (["--threads", "0"], "error: threads must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("workers")
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(arguments, options, words):
    result = runner.invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_run_that_fails_is_told_and_what_was_measured_is_kept(arguments, workers, tmp_path, monkeypatch):
    in_this_process = experiment.run_in_fresh_process

    def fails(function, request, **options):
        if request.get("k") == 4:
            raise WorkerError("out of memory", "cannot allocate memory")
        return in_this_process(function, request, **options)

    monkeypatch.setattr(experiment, "run_in_fresh_process", fails)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "error: k = 4 failed (out of memory): cannot allocate memory" in result.output
    assert record_of(tmp_path)["measurement"] is not None
    assert len(record_of(tmp_path)["runs"]) == 4


@pytest.mark.usefixtures("in_process")
def test_an_encoder_is_judged_by_its_embeddings(arguments, tiny_encoder, tmp_path):
    at = arguments.index("--tokens")
    arguments = arguments[:at] + arguments[at + 2 :]
    arguments[arguments.index("--model") + 1] = str(tiny_encoder)
    output = run(arguments, "--windows", 2, "--evaluate-windows", 3)
    record = record_of(tmp_path)
    assert record["measure"] == "embedding_error"
    assert record["calibrated_on"]["num_tokens"] == 64  # the longest input
    assert record["evaluated_on"]["windows"] == 3
    assert record["evaluated_on"]["overlaps_calibration"] is False
    errors = {(run["kind"], run["mean_k"] and round(run["mean_k"])): run["embedding_error"] for run in record["runs"]}
    assert errors["full", None] == 0
    assert errors["uniform", 4] > errors["uniform", 8] > errors["uniform", 16] > 0
    assert errors["calibrated", 16] > 0
    assert all((run["hidden_error"] > 0) == (run["embedding_error"] > 0) for run in record["runs"])
    assert all(0.5 < run["cosine"] <= 1 + 1e-6 for run in record["runs"])
    assert "embedding error" in output
    page = (tmp_path / "out" / "page.html").read_text()
    assert "cosine to full" in page
    assert "perplexity" not in page.lower()


@pytest.mark.usefixtures("workers")
def test_encoder_windows_are_read_one_after_the_other(arguments, tiny_encoder, text_file, monkeypatch):
    seen = []
    numbers = {"embedding_error": 0.1, "cosine": 0.9, "elapsed_s": 1.0, "peak_mib": 1.0}
    monkeypatch.setattr(
        calibration_workers, "measure_embeddings", lambda request, send: seen.append(request) or numbers
    )
    arguments[arguments.index("--model") + 1] = str(tiny_encoder)
    run(arguments, "--windows", 2, "--evaluate-windows", 1)
    ids = load_tokenizer(find_model(str(tiny_encoder)))(text_file.read_text(), add_special_tokens=False)["input_ids"]
    assert len(seen) == 7
    inside = [request["windows"][0][1:-1] for request in seen]
    assert all(window == ids[2 * 62 :][: 48 - 2] for window in inside)


@pytest.fixture(autouse=True)
def _threads_stay_as_they_are():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
