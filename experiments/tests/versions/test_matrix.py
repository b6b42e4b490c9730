import json
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

import topk_experiments
from topk_attention.environment import package_version
from topk_experiments.runs.steps import Limits
from topk_experiments.versions import matrix
from topk_experiments.versions.matrix import TORCH, TRANSFORMERS, Pair, VersionMatrix, pairs, run_matrix
from topk_experiments.versions.report import FILE, PAGE
from topk_experiments.versions.suite import CLAIMS

ROOT = Path(topk_experiments.__file__).parents[2]
HERE = Pair(*(package_version(name).partition("+")[0] for name in ("torch", "transformers")))
OLD, NEW = Pair("0.1.0", "0.2.0"), Pair("99.0.0", "98.10.0")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """In place of pip and pytest: every pair passes but the oldest, which is late. Returns those tried."""
    tried = []

    def run_suite(folders, claims, time_limit_s):
        names = {"torch": HERE.torch, "transformers": HERE.transformers}
        names |= dict(folder.name.split("-") for folder in folders)
        tried.append(Pair(**names))
        if tried[-1] == OLD:
            return {"outcome": "time limit", "message": f"not finished after {time_limit_s:g} s"}
        failures = {"tests/a.py::test_b": "AssertionError: 1 < 2"} if tried[-1] == NEW else {}
        counts = {"passed": 7, "failed": len(failures), "skipped": 1}
        found = {"kernels": None, "claims": {"generation": counts}, "failures": failures, "skips": {}}
        return {"outcome": "finished", "ran_with": names | {"torch": names["torch"] + "+cpu"}} | found

    def folder_of(name, version, packages):
        return None if version == getattr(HERE, name) else packages / f"{name}-{version}"

    monkeypatch.setattr(matrix, "run_suite", run_suite)
    monkeypatch.setattr(matrix, "folder_of", folder_of)
    (tmp_path / "tests" / "convert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tried


def run(**options):
    versions = {"torch": [NEW.torch, OLD.torch], "transformers": [OLD.transformers, NEW.transformers]}
    return run_matrix(VersionMatrix(out=Path("out"), **versions | options), Console(quiet=True))


def test_pairs_are_those_with_an_installed_version_and_the_ends():
    ours = pairs(VersionMatrix(torch=["0.1.0", "0.9.0", "99.0.0"], transformers=["0.2.0", "0.10.0", "98.0.0"]))
    of_ends = {Pair(torch, transformers) for torch in ("0.1.0", "99.0.0") for transformers in ("0.2.0", "98.0.0")}
    with_installed = {Pair(HERE.torch, other) for other in ("0.2.0", "0.10.0", HERE.transformers, "98.0.0")}
    with_installed |= {Pair(one, HERE.transformers) for one in ("0.1.0", "0.9.0", "99.0.0")}
    assert set(ours) == of_ends | with_installed
    assert len(pairs(VersionMatrix(torch=["0.1.0"], transformers=["0.2.0"], every_pair=True))) == 4
    assert ours[0] == OLD


def test_the_oldest_versions_that_are_tried_are_those_that_the_library_promises():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    lowest = dict(one.replace("[sentencepiece]", "").split(">=") for one in promised if ">=" in one)
    assert [f"{lowest[name]}.0" for name in ("torch", "transformers")] == [TORCH[0], TRANSFORMERS[0]]


def test_every_pair_gets_a_record_and_the_table_says_what_became_of_it(tried):
    records = run(limits=Limits(5.0))
    assert tried == pairs(
        VersionMatrix(torch=[OLD.torch, NEW.torch], transformers=[OLD.transformers, NEW.transformers])
    )
    assert [record["versions"] for record in records] == [pair._asdict() for pair in tried]
    page = Path("out", PAGE).read_text()
    assert "|  | torch 0.1.0 | " in page
    assert "| transformers 0.2.0 | time limit | 7 passed | 7 passed |" in page
    assert "| transformers 98.10.0 | 7 passed | 7 passed | **1 failed**, 7 passed |" in page
    assert "What was run with each pair: generation (8)." in page
    assert r"- `test_b`: AssertionError: 1 &lt; 2" in page
    assert "**torch 0.1.0 with transformers 0.2.0**: time limit, not finished after 5 s" in page


def test_what_is_on_file_is_not_tried_again(tried):
    records = run(limits=Limits(5.0))
    written = Path("out", FILE).read_text()
    tried.clear()
    assert run(limits=Limits(5.0)) == records
    assert not tried
    assert Path("out", FILE).read_text() == written
    run(limits=Limits(6.0))  # what was stopped gets the longer time
    assert tried == [OLD]
    tried.clear()
    Path("tests", "convert", "test_more.py").write_text("assert True")  # other tests would give other records
    run(limits=Limits(6.0))
    assert len(tried) == len(records)


def test_tests_that_ran_with_other_versions_end_the_command_without_a_record(tried, monkeypatch):
    monkeypatch.setattr(matrix, "folder_of", lambda name, version, packages: None)
    with pytest.raises(ValueError, match=rf"the tests ran with transformers {HERE.transformers} in place of 98.10.0"):
        run(torch=[], transformers=[NEW.transformers])
    versions = [json.loads(line)["versions"] for line in Path("out", FILE).read_text().splitlines()]
    assert versions == [HERE._asdict()]


def test_a_version_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"torch must be versions such as .*, separated by commas, got 'newest'"):
        pairs(VersionMatrix(torch=["newest"]))


def test_outside_of_the_repository_the_command_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"versions runs the tests of the repository, and there are none in .*; go there"
    ):
        run()


def test_every_test_that_a_claim_names_is_there():
    assert CLAIMS
    for claim in CLAIMS:
        for test in claim.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text()
            assert f"def {name.partition('[')[0] or 'test'}" in text, test
