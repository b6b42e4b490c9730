import functools
import json
import time

import pytest
from rich.console import Console

from topk_experiments.conformance import ConformanceSweep, run_sweep, sweep
from topk_experiments.conformance.catalogue import Model, models, part
from topk_experiments.conformance.report import FILE, NOT_TRIED, verdict
from topk_experiments.runs.process import WorkerError
from topk_experiments.runs.steps import Limits

TYPES = ("bert", "gpt2", "llama", "t5")


@pytest.fixture
def stand_ins(monkeypatch):
    """In place of a process: it finishes every model, but ends at gpt2, and late at t5. Returns the requests."""
    requests = []

    def check_models(function, request, on_message):
        assert function == "topk_experiments.conformance.worker:check_models"
        requests.append(request)
        for number, (model_type, _) in enumerate(request["models"]):
            on_message({"begun": number})
            if model_type == "t5":
                time.sleep(2 * request["time_limit_s"])
            if model_type in ("gpt2", "t5"):
                raise WorkerError("crash", "the process ended with status 3")
            record = {"outcome": "finished", "built": False, "reason": "a stand-in"}
            on_message({"number": number, "record": record})
        return {}

    monkeypatch.setattr(sweep, "run_in_fresh_process", check_models)
    return requests


def run(out, **options):
    return run_sweep(ConformanceSweep(types=TYPES, out=out, workers=1, **options), Console(quiet=True))


def by_type(records):
    return {record["model_type"]: record for record in records}


def test_a_model_that_ends_its_process_or_is_over_its_time_costs_no_other(stand_ins, tmp_path):
    records = by_type(run(tmp_path, limits=Limits(0.01, None)))
    assert {name: record["outcome"] for name, record in records.items()} == {
        "bert": "finished",
        "gpt2": "crash",
        "llama": "finished",
        "t5": "time limit",
    }
    assert records["t5"]["time_limit_s"] == 0.01
    assert "status 3" in records["gpt2"]["message"]
    assert verdict(records["gpt2"]).word == NOT_TRIED


def test_a_model_whose_process_the_system_kills_gets_a_second_one(monkeypatch, tmp_path):
    begun = []

    def check_models(function, request, on_message):
        for number, model in enumerate(request["models"]):
            on_message({"begun": number})
            begun.append(model[0])
            if model[0] == "t5" or begun == ["bert", "bert", "gpt2"]:
                raise WorkerError("out of memory", "the system ended the process (signal 9)")
            record = {"outcome": "finished", "built": False, "reason": "a stand-in"}
            on_message({"number": number, "record": record})
        return {}

    monkeypatch.setattr(sweep, "run_in_fresh_process", check_models)
    outcomes = {name: record["outcome"] for name, record in by_type(run(tmp_path)).items()}
    assert outcomes == {"bert": "finished", "gpt2": "finished", "llama": "finished", "t5": "out of memory"}
    assert begun == ["bert", "bert", "gpt2", "gpt2", "llama", "t5", "t5"]


def test_a_process_that_ends_before_its_first_model_ends_the_command(monkeypatch, tmp_path):
    def end(*_, **__):
        raise WorkerError("error", "no transformers here")

    monkeypatch.setattr(sweep, "run_in_fresh_process", end)
    with pytest.raises(WorkerError, match="no transformers here"):
        run(tmp_path)


def test_what_is_on_file_is_not_checked_again(stand_ins, tmp_path):
    run(tmp_path, limits=Limits(0.01, None))
    written = (tmp_path / FILE).read_text()
    stand_ins.clear()
    assert len(run(tmp_path, limits=Limits(0.01, None))) == len(written.splitlines())
    assert not stand_ins
    assert (tmp_path / FILE).read_text() == written
    run(tmp_path, limits=Limits(0.02, None))  # a model that was stopped gets the longer time
    assert [model for request in stand_ins for model in request["models"]] == [["t5", "T5ForConditionalGeneration"]]


def test_every_record_has_the_versions_and_the_page_names_them(stand_ins, tmp_path):
    records = run(tmp_path, limits=Limits(0.01, None))
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert {line["environment"]["transformers"] for line in lines} == {records[0]["environment"]["transformers"]}
    page = (tmp_path / "supported-models.md").read_text()
    assert f"transformers {lines[0]['environment']['transformers']}" in page
    assert all(f"| {name} |" in page for name in TYPES)


def test_an_unknown_type_is_named():
    with pytest.raises(
        ValueError, match="types must be model types of transformers, such as llama and gpt2, got 'lama'"
    ):
        models(["lama"])


def test_a_sweep_without_workers_is_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        ConformanceSweep(workers=0)


def test_encoders_and_pairs_are_tried_as_decoders_too():
    found = models(["bart", "bert", "llama", "vit"])
    assert found == [
        Model("bart", "BartForConditionalGeneration"),
        Model("bart", "BartForCausalLM"),
        Model("bert", "BertModel"),
        Model("bert", "BertLMHeadModel"),
        Model("llama", "LlamaForCausalLM"),
        Model("vit", "ViTModel"),
    ]


def test_every_type_of_transformers_is_in_the_catalogue():
    from transformers import CONFIG_MAPPING

    assert {model.model_type for model in models()} == set(CONFIG_MAPPING)


def test_a_part_of_the_catalogue_has_every_family_and_depends_on_the_seed_alone():
    drawn = functools.partial(part, models(["bart", "bert", "gpt2", "llama", "vit", "beit"]), of_each_family=1)
    assert drawn(seed=1) == drawn(seed=1)
    assert any(drawn(seed=1) != drawn(seed=seed) for seed in range(2, 9))
    assert {model.family for model in drawn(seed=1)} == {
        "Images and video",
        "Text decoders",
        "Text encoders",
        "Text, encoder and decoder",
    }
