import os
from pathlib import Path

import pytest

from topk_experiments.versions.suite import Claim, run_suite, summary

SOME = """
import warnings
import pytest

def test_passes():
    pass

def test_sees_the_package_in_front():
    import torch
    assert torch.answer == 42

def test_is_deprecated():
    warnings.warn("old", FutureWarning)

@pytest.mark.parametrize("number", [1, 2])
def test_fails(number):
    assert number == 2, f"{number} is not two"

@pytest.fixture
def broken():
    raise KeyError("nothing there")

def test_cannot_begin(broken):
    pass
"""
OTHERS = """
import pytest

@pytest.mark.skip(reason="no such model")
def test_is_skipped():
    pass
"""


def test_outcomes_go_to_their_claims_with_the_reasons(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(SOME)
    (tmp_path / "test_others.py").write_text(OTHERS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "torch.py").write_text("answer = 42; __version__ = '2.9'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), *map(str, _sources())]))
    monkeypatch.chdir(tmp_path)
    claims = [
        Claim("all", ("test_some.py",)),
        Claim("two", ("test_some.py::test_fails",)),
        Claim("rest", ("test_others.py",)),
    ]
    found = run_suite([tmp_path / "folder"], claims, 120.0)
    assert found["outcome"] == "finished", found
    assert found["claims"] == {
        "all": {"passed": 3, "failed": 1, "skipped": 0},
        "two": {"passed": 1, "failed": 1, "skipped": 0},
        "rest": {"passed": 0, "failed": 0, "skipped": 1},
    }
    assert list(found["failures"]) == ["test_some.py::test_fails[1]", "test_some.py::test_cannot_begin"]
    assert "1 is not two" in found["failures"]["test_some.py::test_fails[1]"]
    assert "nothing there" in found["failures"]["test_some.py::test_cannot_begin"]
    assert found["skips"] == {"Skipped: no such model": 1}
    assert found["ran_with"] == {"torch": "2.9", "transformers": None}


def _sources():
    import topk_attention
    import topk_experiments

    return [Path(package.__file__).parents[1] for package in (topk_attention, topk_experiments)]


def test_a_file_that_cannot_be_imported_and_a_process_that_dies_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), *map(str, _sources())]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_dies.py").write_text("import os\n\ndef test_dies():\n    os._exit(7)\n")
    found = run_suite([], [Claim("it", ("test_dies.py",))], 120.0)
    assert found["outcome"] == "crash"
    assert "status 7" in found["message"]
    (tmp_path / "test_dies.py").write_text("import no_such_module\n")
    found = run_suite([], [Claim("it", ("test_dies.py",))], 120.0)
    assert found["claims"]["it"]["failed"] == 1
    assert "No module named 'no_such_module'" in found["failures"]["test_dies.py"]


def test_a_claim_without_a_test_is_our_mistake_and_named():
    answer = {"outcomes": {"a.py::test_b": "passed"}, "reasons": {}, "versions": {}, "kernels": None}
    with pytest.raises(ValueError, match="no test was run for nothing; mend the names of their tests"):
        summary(answer, [Claim("something", ("a.py",)), Claim("nothing", ("c.py",))])
    with pytest.raises(ValueError, match=r"a\.py::test_b belongs to no claim"):
        summary(answer, [Claim("nothing", ("c.py",))])
