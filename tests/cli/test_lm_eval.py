"""lm_eval with top-k attention: what we hand on and record (with a stand-in), and the real harness where installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topk_attention.cli import app
from topk_attention.cli import lm_eval as harness

runner = CliRunner()
EXAMPLES = Path(__file__).parents[2] / "examples" / "lm_eval"


@pytest.fixture
def stand_in(monkeypatch):
    """An lm_eval that loads a model as its "hf" does and writes results as it does."""
    seen = types.SimpleNamespace(arguments=[], models={}, writes=True)
    modules = {
        name: types.ModuleType(name)
        for name in (
            "lm_eval",
            "lm_eval.__main__",
            "lm_eval.api",
            "lm_eval.api.registry",
            "lm_eval.models",
            "lm_eval.models.huggingface",
        )
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    class HFLM:
        def __init__(self, pretrained, device="cuda"):
            from transformers import AutoModelForCausalLM

            self.device = device
            self.model = AutoModelForCausalLM.from_pretrained(pretrained)

        def _model_call(self, inps, attn_mask=None):
            return self.model(input_ids=inps).logits

        def _model_generate(self, context, max_length, stop):
            return self.model.generate(input_ids=context, max_length=max_length)

    def register_model(name):
        return lambda model_class: seen.models.setdefault(name, model_class)

    def cli_evaluate():
        seen.arguments.append(sys.argv)
        if seen.writes and "--output_path" in sys.argv:
            folder = Path(sys.argv[sys.argv.index("--output_path") + 1]) / "some__model"
            folder.mkdir()
            (folder / "results_2026-11-24T00-00-00.json").write_text(json.dumps(RESULTS))

    modules["lm_eval.__main__"].cli_evaluate = cli_evaluate
    modules["lm_eval.api.registry"].register_model = register_model
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    harness.register.cache_clear()
    yield seen
    harness.register.cache_clear()


RESULTS = {
    "results": {
        "questions": {"alias": "questions", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "a group": {"alias": "a group", "acc,none": 0.5},  # the harness counts no samples of a group
    },
    "n-shot": {"questions": 2},
    "n-samples": {"questions": {"original": 9, "effective": 4}},
    "config": {
        "model": "hf",
        "model_args": {"pretrained": "/home/somebody/SmolLM2", "attn_implementation": "topk", "tokenizer": "org/name"},
        "limit": 4.0,
    },
    "pretty_env_info": "OS: ...",
}


def test_arguments_go_to_the_harness_as_they_are(stand_in):
    arguments = ["--model", "hf-topk", "--tasks", "a,b", "--limit", "4", "--help", "-s"]
    result = runner.invoke(app, ["lm-eval", *arguments])
    assert result.exit_code == 0, result.output
    assert stand_in.arguments == [["lm_eval", *arguments]]


def test_a_record_holds_the_results_and_no_folder(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("TOPK_ATTENTION_K", "16")
    path = tmp_path / "records.jsonl"
    for _ in range(2):
        result = runner.invoke(app, ["lm-eval", "--tasks", "questions", "--record", str(path)])
        assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["tasks"] == {
        "questions": {"num_fewshot": 2, "num_samples": 4, "metrics": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "a group": {"num_fewshot": None, "num_samples": None, "metrics": {"acc,none": 0.5}},
    }
    assert (first["model"], first["model_args"]) == (
        "SmolLM2",
        {"attn_implementation": "topk", "tokenizer": "org/name"},
    )
    assert (first["model_type"], first["TOPK_ATTENTION_K"], first["limit"]) == ("hf", "16", 4.0)
    assert first["environment"]["torch"]
    assert "somebody" not in json.dumps(first)
    assert first["tasks"] == second["tasks"]


def test_a_record_beside_an_output_path_and_missing_results_are_told(stand_in, tmp_path):
    record = ["--record", str(tmp_path / "records.jsonl")]
    result = runner.invoke(app, ["lm-eval", "--output_path=out", *record])
    assert result.exit_code == 2
    assert "error: --record writes the results to a file of its own; leave --output_path out" in result.output
    stand_in.writes = False
    result = runner.invoke(app, ["lm-eval", *record])
    assert result.exit_code == 2
    assert "error: lm_eval wrote no results" in result.output


def test_results_that_cannot_be_recorded_are_kept(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(path, record):
        raise OSError("no space left")

    monkeypatch.setattr(harness, "append_json_line", full)
    result = runner.invoke(app, ["lm-eval", "--record", str(tmp_path / "records.jsonl")])
    assert result.exit_code != 0
    (kept,) = tmp_path.rglob("results_*.json")
    assert f"the results were not recorded; they are kept in {kept}" in result.output
    assert json.loads(kept.read_text()) == RESULTS


def test_nothing_is_left_behind_where_results_are_recorded_or_missing(stand_in, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for stand_in.writes in (True, False):
        runner.invoke(app, ["lm-eval", "--record", str(tmp_path / "records.jsonl")])
        assert not list((tmp_path / "temporary").iterdir())


def test_the_model_is_converted_after_loading_and_keeps_the_harness_arguments(stand_in, tiny_model, tmp_path):
    from topk_attention import convert

    build = harness.register()
    assert stand_in.models == {"hf-topk": build}
    loaded = build(str(tiny_model), attention_k=3, feed_forward_k=5, topk_backend="chunked", device="cpu")
    assert loaded.device == "cpu"
    remembered = loaded.model.config.topk_attention
    assert set(remembered["attention_k"].values()) == {3}
    assert set(remembered["feed_forward_k"].values()) == {5}
    assert remembered["attention_backend"] == "chunked"

    loaded.model.save_pretrained(tmp_path)
    again = build(str(tmp_path))
    assert again.model.config.topk_attention == remembered
    assert again.model.config._attn_implementation == "topk"
    with pytest.raises(ValueError, match="nothing to convert: pass attention_k="):
        build(str(tiny_model))
    assert convert(loaded.model, attention_k=4).replaced  # the model is an ordinary converted one
    completed = build(str(tiny_model), attention_k=3, completion=0.5).model.config.topk_attention
    assert completed["every_completion"]["mass_scale"] == 0.5


def test_a_request_in_which_k_leaves_nothing_out_is_named_once(stand_in, tiny_model, caplog):
    import torch

    words = "attention_k, in this request: k = 9 is full attention here: no query has more than {} keys"
    loaded = harness.register()(str(tiny_model), attention_k=9)
    loaded._model_call(torch.ones(1, 12, dtype=torch.long))
    assert "full attention" not in caplog.text
    for length in (9, 7):
        loaded._model_call(torch.ones(1, length, dtype=torch.long))
    assert caplog.text.count("full attention") == 1
    assert words.format(9) in caplog.text
    loaded = harness.register()(str(tiny_model), attention_k=9)
    loaded._model_generate(torch.ones(1, 3, dtype=torch.long), 8, stop=[])
    assert words.format(8) in caplog.text
    loaded = harness.register()(str(tiny_model), attention_k="all")
    loaded._model_call(torch.ones(1, 4, dtype=torch.long))
    assert caplog.text.count("full attention") == 2


def test_a_calibration_file_gives_each_head_its_k(stand_in, tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from topk_attention import MeanK, calibrate

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = torch.randint(0, 14, (1, 64), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(model, [tokens], target=MeanK(8))
    calibration.save(tmp_path / "k.json")
    loaded = harness.register()(str(tiny_model), attention_k=str(tmp_path / "k.json"))
    stored = loaded.model.config.topk_attention["attention_k"].values()
    assert [tuple(k) for k in stored] == [tuple(k) for k in dict(calibration).values()]


def test_without_the_harness_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness.register.cache_clear()
    result = runner.invoke(app, ["lm-eval", "--help"])
    assert result.exit_code == 2
    assert result.output == (
        "error: lm_eval is not installed; in the folder of the clone: pip install --no-build-isolation '.[lm-eval]'\n"
    )


REAL = """
import json, os, sys
from pathlib import Path
from topk_attention.cli.lm_eval import run_harness

folder, model, converted, record, examples = sys.argv[1:]
metadata = json.dumps({"questions": f"{folder}/questions.tsv", "text": f"{folder}/text.txt"})
more = ["--tasks", "local_questions,local_text", "--include_path", examples, "--metadata", metadata, "--device", "cpu"]
more += ["--num_fewshot", "2", "--verbosity", "ERROR"]

def run(kind, arguments, k=None):
    os.environ.pop("TOPK_ATTENTION_K", None)
    if k is not None:
        os.environ["TOPK_ATTENTION_K"] = str(k)
    arguments += ",prefix_token_id=1"  # the tokenizer has no special token
    run_harness(["--model", kind, "--model_args", arguments, *more], Path(record))

run("hf", f"pretrained={model}")
run("hf-topk", f"pretrained={model},attention_k=500")
run("hf-topk", f"pretrained={model},attention_k=2")
run("hf", f"pretrained={model},attn_implementation=topk", k=2)
run("hf", f"pretrained={converted},attn_implementation=topk")
run("hf-topk", f"pretrained={converted}")
"""


def test_the_real_harness_finds_the_same_by_every_way_to_choose_k(tiny_model, tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install --no-build-isolation '.[lm-eval]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from topk_attention import convert

    words, lines = (
        ["a", "query", "keeps", "the", "keys", "that", "score", "best", "and", "leaves", "all", "others", "out"],
        [],
    )
    for number in range(58):
        first, second, third = (words[(number + step) % len(words)] for step in (1, 4, 7))
        lines.append(f"keeps {first} \\n (a) {second} best (b) {third} (c) {first} that score\t{third}")
    (tmp_path / "questions.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "text.txt").write_text(" ".join(words * 20))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    convert(model, attention_k=2)
    model.save_pretrained(tmp_path / "converted")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "converted")

    arguments = [tmp_path, tiny_model, tmp_path / "converted", tmp_path / "records.jsonl", EXAMPLES]
    done = subprocess.run(
        [sys.executable, "-c", REAL, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(records) == 6
    tasks = [record["tasks"] for record in records]
    assert tasks[0]["local_questions"]["num_samples"] == 8
    assert tasks[0]["local_questions"]["num_fewshot"] == 2
    perplexity = [task["local_text"]["metrics"]["word_perplexity,none"] for task in tasks]
    assert perplexity[1] == pytest.approx(perplexity[0], rel=1e-6)
    assert perplexity[2] != pytest.approx(perplexity[0], rel=1e-4)
    assert tasks[2] == tasks[3] == tasks[4] == tasks[5]
