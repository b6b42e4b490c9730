import json

import pytest
import torch
from typer.testing import CliRunner

from topk_attention import convert
from topk_experiments.cli import app
from topk_experiments.models.generation import new_cache, read
from topk_experiments.models.pretrained import find_model, load_model, load_model_to_run
from topk_experiments.pretrained.demo_parts import DemoConfig, operations, reading, run, run_demo, training
from topk_experiments.pretrained.demo_parts.report import comparisons, draw, html_page, in_words, redraw, summary
from topk_experiments.runs.checks import CheckFailedError
from topk_experiments.runs.process import WorkerError
from topk_experiments.show.plots import png_of

runner = CliRunner()


@pytest.fixture
def config(tiny_model, text_file, tmp_path):
    def of(**changes):
        sizes = {"num_tokens": 100, "following_tokens": 20, "answer_tokens": 5, "num_keys": 300, "length": 96}
        sizes |= {"read_tokens": 90, "calibrate_tokens": 64, "train_tokens": 64, "loss_tokens": 8, "layers": 1}
        sizes |= {"ks": (4, 16), "k": 8, "rounds": 3, "train_steps": 2, "threads": 1}
        return DemoConfig(model=str(tiny_model), text=text_file, out=tmp_path / "out", **sizes | changes)

    return of


@pytest.mark.usefixtures("in_this_process")
def test_the_demo_runs_from_start_to_end_and_again_without_measuring_again(config, console, tmp_path):
    record = run_demo(config(), console)
    parts = record["parts"]
    assert list(parts) == ["reading", "operations", "quality", "training"]
    for name in ("full", "topk", "completed"):
        of = parts["reading"][name]
        assert of["prefill_s"] > 0 < of["token_s"]
        assert of["answer"]
    assert parts["reading"]["full"]["agreement"] == 1.0
    assert len(parts["operations"]["operations"]) == 4
    curves = parts["quality"]["curves"]
    assert list(curves["alone"]) == ["4", "16"]
    assert len({value for values in curves.values() for value in values.values()}) == 6
    assert abs(curves["completed"]["4"] - parts["quality"]["full"]) < abs(
        curves["alone"]["4"] - parts["quality"]["full"]
    )
    assert len(parts["training"]["full"]["losses"]) == 2
    assert parts["training"]["layers"] == 1
    out = console.export_text()
    for number in range(1, 5):
        assert f"[{number}/4] " in out
    assert "A GPU was not tried" in out
    assert str(tmp_path) not in json.dumps(record)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "What is this text about?" in (tmp_path / "out" / "demo.html").read_text()

    assert run_demo(config(), console) == record
    assert "All 4 parts are in" in console.export_text()


def test_a_part_runs_in_a_process_of_its_own(config, monkeypatch, console):
    """The rest of the tests runs them here, which is faster."""
    monkeypatch.setattr(run, "PARTS", {"reading": ("echoes", "topk_experiments.runs.process:echo")})
    monkeypatch.setattr(run, "in_words", lambda name, record: "said nothing")
    monkeypatch.setattr(run, "write_report", lambda record, out: [])
    monkeypatch.setattr(run, "table_rows", lambda record: [["what"]])
    monkeypatch.setattr(run, "summary", lambda record: [])
    config = config()
    record = run_demo(config, console)
    assert record["parts"]["reading"]["answer_tokens"] == 5
    assert len(record["parts"]["reading"]["document"]) == 100


def test_a_part_that_fails_is_named_and_the_parts_before_it_are_kept(config, console, tmp_path, monkeypatch):
    def measured(function, request, **options):
        if "operations" in function:
            raise WorkerError("out of memory", "cannot allocate memory")
        return {name: of_reading() for name in ("full", "topk", "completed")}

    monkeypatch.setattr(run, "run_in_fresh_process", measured)
    with pytest.raises(WorkerError, match=r"the part that times the operations failed \(out of memory\)"):
        run_demo(config(), console)
    assert list(json.loads((tmp_path / "out" / "demo.json").read_text())["parts"]) == ["reading"]


def of_reading(**changes):
    times = {"prefill_s": 30.0, "token_s": 0.12, "short_token_s": 0.05, "prefill_peak_mib": 100.0}
    return times | {"perplexity": 12.0, "agreement": 1.0, "answer": "<b>It tests.</b>"} | changes


@pytest.fixture
def record():
    theirs = {"median_s": 10.0, "fastest_s": 9.0, "slowest_s": 11.0, "peak_mib": 4000.0}
    ours = {"median_s": 0.5, "fastest_s": 0.4, "slowest_s": 0.6, "peak_mib": 50.0}
    losses = {"losses": [3.0, 2.5], "peak_mib": 900.0}
    return {
        "config": {
            "num_tokens": 7900,
            "k": 64,
            "question": "What?",
            "dtype": "float32",
            "threads": 2,
            "backend": "cpu",
        },
        "model": {"name": "<tiny>", "revision": "1"},
        "text": {"source": "a text", "sha256": "ab" * 32},
        "environment": {"topk_attention": "0.1.0", "commit": None, "cpu": "one", "num_cpus": 2},
        "parts": {
            "reading": {
                "full": of_reading(),
                "topk": of_reading(prefill_s=15.0, token_s=0.04, short_token_s=0.06, agreement=0.75, perplexity=13.0),
                "completed": of_reading(prefill_s=20.0, token_s=0.06),
            },
            "operations": {"operations": [{"name": "dropout", "form": "", "theirs": theirs, "ours": ours}]},
            "quality": {
                "full": 10.0,
                "num_tokens": 2048,
                "curves": {
                    "alone": {"16": 15.0, "64": 10.5},
                    "calibrated": {"16": 12.0, "64": 10.2},
                    "completed": {"16": 10.2, "64": 10.0},
                },
            },
            "training": {
                "layers": 4,
                "num_tokens": 2048,
                "full": losses | {"median_s": 4.0},
                "topk": losses | {"median_s": 1.0, "peak_mib": 300.0},
            },
        },
    }


def test_the_comparisons_are_of_every_time_that_was_measured(record):
    ratios = {one.name: one.times_faster for one in comparisons(record)}
    assert ratios == {
        "reading 7,900 tokens": 2.0,
        "reading 7,900 tokens, completed": 1.5,
        "a token after 7,900": pytest.approx(3.0),
        "a token after 7,900, completed": 2.0,
        "a token after 64": pytest.approx(5 / 6),
        "a token after 64, completed": 1.0,
        "attention alone, dropout": 20.0,
        "fine-tuning step of 4 layers with dropout, 2,048 tokens": 4.0,
    }


def test_the_summary_says_where_it_does_not_help(record):
    words = "\n".join(summary(record))
    assert "attention alone, dropout 20.0" in words
    assert "No help: a token after 64 (0.83 times as fast), a token after 64, completed (1.00 times as fast)." in words
    assert "No memory saved: reading 7,900 tokens (100 against 100 MiB)" in words
    assert "one k, completed: +2.0 % at k = 16, +0.0 % at k = 64." in words
    assert "A small k alone costs quality: perplexity 15.00 against 10.00 at k = 16." in words
    record["parts"]["quality"]["curves"]["alone"]["16"] = 10.1
    assert "costs quality" not in "\n".join(summary(record))


def test_each_part_has_a_line(record):
    assert "top-k 15.0 s, then 25.0 tokens/s" in in_words("reading", record)
    assert "same next token in 75 %" in in_words("reading", record)
    assert in_words("operations", record) == "Operations against PyTorch's best: dropout 20.0 times as fast."
    assert "full 10.00; one k for all heads 15.00 (k = 16), 10.50 (k = 64);" in in_words("quality", record)
    assert "losses 3.00, 2.50 and 3.00, 2.50" in in_words("training", record)


def test_the_page_escapes_answers_and_needs_no_other_file(record):
    page = html_page(record)
    assert "<b>It tests." not in page
    assert "&lt;b&gt;It tests.&lt;/b&gt;" in page
    assert "&lt;tiny&gt;" in page
    assert "://" not in page


@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_the_picture_can_be_drawn_after_any_part(record, num_parts, tmp_path):
    record["parts"] = dict(list(record["parts"].items())[:num_parts])
    assert png_of(draw(record)).startswith(b"\x89PNG")
    (tmp_path / "demonstration").mkdir()
    (tmp_path / "demonstration" / "demo.json").write_text(json.dumps(record))
    assert len(redraw(tmp_path)) == 2


def test_the_operations_are_checked_and_a_wrong_one_is_refused(monkeypatch):
    operations.check(8, "chunked")
    attend = operations.attend
    monkeypatch.setattr(operations, "attend", lambda *tensors, **options: 1.01 * attend(*tensors, **options))
    with pytest.raises(CheckFailedError, match="decoding, 300 keys: ours differs from PyTorch's by"):
        operations.check(8, "chunked")


def test_a_copy_that_shares_weights_is_converted_alone(tiny_model):
    model = load_model_to_run(find_model(str(tiny_model)))
    before = read(model, range(1, 12), new_cache("dynamic", model, 12))
    twin = reading.sharing_weights(model)
    convert(twin, attention_k=2)
    pointers = [[parameter.data_ptr() for parameter in of.parameters()] for of in (model, twin)]
    assert pointers[0] == pointers[1]
    torch.testing.assert_close(read(model, range(1, 12), new_cache("dynamic", model, 12)), before)
    assert not torch.allclose(read(twin, range(1, 12), new_cache("topk", twin, 12)), before, rtol=1e-3, atol=1e-3)


def test_a_cut_model_has_its_first_layers_and_dropout(tiny_model):
    whole = load_model(find_model(str(tiny_model)))
    model = training.cut(load_model(find_model(str(tiny_model))), 1)
    assert len(model.model.layers) == model.config.num_hidden_layers == 1
    assert model.model.layers[0].self_attn.attention_dropout == training.DROPOUT
    expected = whole.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, expected)
    ids = torch.arange(1, 13)[None]
    losses = set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.add(round(torch.nn.functional.cross_entropy(model.train()(ids).logits[0], ids[0]).item(), 6))
    assert len(losses) == 2  # dropout acts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "2"], "error: rounds goes with --perplexity; give that too, or leave it out"),
        (["--completed-k", "2"], "error: completed-k goes with --perplexity"),
        (["--k", "2,4"], "error: k must be one number, got 2,4; several go with --perplexity"),
        (["--k", "0"], "error: k must be at least 1 and below 2^31, got 0"),
        (["--tokens", "64"], "error: tokens must be above 64, got 64"),
        (["--tokens", "500"], "error: tokens must be at most"),
        (["--perplexity", "--question", "why"], "error: question cannot go with --perplexity"),
        (["--backend", "gpu"], "error: backend must be one of"),
    ],
)
def test_what_a_user_can_put_right_ends_with_one_line_and_status_2(options, words, tiny_model, text_file, tmp_path):
    arguments = ["demo", "--model", tiny_model, "--text", text_file, "--out", tmp_path / "out", *options]
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
