import json
from pathlib import Path

import pytest

from topk_experiments.runs.ledger import Ledger, experiment_environment, identity, made_when, newest, what_differs

SCHEMA = "topk_attention/test/1"


@pytest.fixture
def code(tmp_path):
    """Folder of an experiment: one module that measures and one that draws."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "measure.py").write_text("rounds = 3\n")
    (folder / "report.py").write_text("title = 'Time'\n")
    return folder


@pytest.fixture
def ledger(tmp_path, code):
    def opened(**options):
        return Ledger(tmp_path / "records.jsonl", schema=SCHEMA, folder=code, **options)

    return opened


def test_a_record_spares_a_run_of_the_same_configuration(ledger):
    first = ledger()
    assert first.find({"point": {"k": 8}}) is None
    first.append(first.new_record({"point": {"k": 8}}) | {"elapsed_s": 1.5})
    for again in (first, ledger()):
        found = again.find({"point": {"k": 8}})
        assert found is not None
        assert found["elapsed_s"] == 1.5
        assert again.find({"point": {"k": 16}}) is None


def test_a_change_to_rivals_spares_no_run(tmp_path, ledger):
    rivals = tmp_path / "rivals"
    rivals.mkdir()
    (rivals / "performer.py").write_text("num_features = 256\n")
    first = ledger(also=[rivals])
    first.append(first.new_record({"k": 8}))
    assert ledger(also=[rivals]).find({"k": 8}) is not None
    (rivals / "performer.py").write_text("num_features = 128\n")
    assert ledger(also=[rivals]).find({"k": 8}) is None


@pytest.mark.parametrize("name", ["torch", "transformers", "python", "cpu", "product_sha256", "experiment_sha256"])
def test_a_record_of_another_environment_or_code_spares_no_run(ledger, name):
    first = ledger()
    record = first.new_record({"k": 8})
    first.append(record | {"environment": record["environment"] | {name: "another"}})
    assert ledger().find({"k": 8}) is None
    differing = what_differs(first.records[0], {"k": 8}, first.here)
    assert differing == [f"{name}: another -> {first.here[name]}"]


@pytest.mark.parametrize("name", ["commit", "date", "num_cpus", "numpy"])
def test_commit_and_date_do_not_make_a_record_another(ledger, name):
    first = ledger()
    record = first.new_record({"k": 8})
    first.append(record | {"environment": record["environment"] | {name: "another"}})
    assert ledger().find({"k": 8}) is not None


def test_a_record_from_before_code_was_hashed_counts_and_the_note_says_so(ledger):
    first = ledger()
    record = first.new_record({"k": 8})
    older = {name: value for name, value in record["environment"].items() if not name.endswith("_sha256")}
    first.append(record | {"environment": older | {"source_sha256": "of every file"}})
    found = ledger().find({"k": 8})
    assert found is not None
    assert made_when(found).endswith(", before code was hashed")
    assert not made_when(record).endswith(", before code was hashed")


def test_code_that_measures_makes_a_record_another_and_code_that_draws_does_not(ledger, code):
    first = ledger()
    first.append(first.new_record({"k": 8}))
    (code / "report.py").write_text("title = 'Seconds'\n")
    (code / "measure.py").write_text("rounds = 3  # as before\n")
    assert ledger().find({"k": 8}) is not None
    (code / "measure.py").write_text("rounds = 5\n")
    assert ledger().find({"k": 8}) is None


def test_a_run_that_did_not_finish_spares_one_only_where_the_experiment_says_so(ledger):
    first = ledger()
    first.append(first.new_record({"k": 8}) | {"outcome": "time limit", "time_limit_s": 60})
    assert first.find({"k": 8}) is None
    assert first.find({"k": 8}, spares=lambda record: record["time_limit_s"] >= 60) is not None


def test_fresh_runs_everything_again_and_finds_what_it_ran(ledger):
    first = ledger()
    first.append(first.new_record({"k": 8}) | {"elapsed_s": 1.0})
    fresh = ledger(fresh=True)
    assert fresh.find({"k": 8}) is None
    fresh.append(fresh.new_record({"k": 8}) | {"elapsed_s": 2.0})
    assert [record["elapsed_s"] for record in fresh.records] == [1.0, 2.0]
    for again in (fresh, ledger()):
        assert again.find({"k": 8})["elapsed_s"] == 2.0


def test_lines_of_another_schema_or_cut_short_are_skipped(ledger, tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps({"schema": "another/1", "k": 8}) + '\n{"schema": "topk_att')
    first = ledger()
    assert first.records == []
    first.append(first.new_record({"k": 8}))
    assert ledger().find({"k": 8}) is not None


def test_a_table_takes_the_newest_record_of_each_configuration_on_the_last_machine():
    def record(k, elapsed_s, cpu="this"):
        return {"k": k, "elapsed_s": elapsed_s, "environment": {"cpu": cpu}}

    records = [record(16, 1.0), record(8, 2.0, cpu="another"), record(8, 3.0), record(16, 4.0)]
    assert [(r["k"], r["elapsed_s"]) for r in newest(records, lambda r: str(r["k"]))] == [(16, 4.0), (8, 3.0)]
    assert newest([], str) == []


def test_the_environment_of_an_experiment_names_no_folder(code):
    assert str(code) not in json.dumps(experiment_environment(code))
    assert str(Path.home()) not in json.dumps(experiment_environment(code))


def test_the_ledger_says_why_a_record_of_the_same_configuration_spares_no_run(ledger):
    first = ledger()
    assert first.why_not({"k": 8}) is None
    record = first.new_record({"k": 8})
    first.append(record | {"environment": record["environment"] | {"torch": "1.0"}})
    note = ledger().why_not({"k": 8})
    assert note == f"on file, but made otherwise (torch: 1.0 -> {first.here['torch']}): run again"
    assert ledger().why_not({"k": 16}) is None
    assert ledger(fresh=True).why_not({"k": 8}) is None


def test_a_configuration_may_name_fields_of_a_section(ledger):
    first = ledger()
    first.append(first.new_record({"run": {"dtype": "float32", "threads": 2}}))
    assert first.find({"run.dtype": "float32"}) is not None
    assert first.find({"run.dtype": "bfloat16"}) is None
    assert what_differs(first.records[0], {"run": {"dtype": "bfloat16", "threads": 2}}, first.here) == [
        "run dtype: float32 -> bfloat16"
    ]


def test_a_checkpoint_belongs_to_one_configuration_environment_and_code(ledger, code):
    first = ledger()
    same = identity({"k": 8}, first.here)
    assert identity({"k": 8}, ledger().here) == same
    assert identity({"k": 16}, first.here) != same
    assert identity({"k": 8}, first.here | {"cpu": "another"}) != same
    assert identity({"k": 8}, first.here | {"commit": "another"}) == same
    (code / "measure.py").write_text("rounds = 5\n")
    assert identity({"k": 8}, ledger().here) != same
