import json
import subprocess

import pytest

from topk_attention.experiments import records
from topk_attention.experiments.records import (
    append_json_line,
    environment,
    package_version,
    read_json,
    read_json_lines,
    source_sha256,
    write_json,
)


def test_the_environment_tells_versions_and_processor():
    here = environment()
    assert {"topk_attention", "torch", "transformers", "python", "cpu", "num_cpus", "commit", "date"} <= set(here)
    assert all(here[name] for name in ("topk_attention", "torch", "python", "system", "cpu", "date"))


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("there-is-no-such-package") is None


def test_a_library_inside_somebody_elses_repository_has_no_commit(tmp_path, monkeypatch):
    module = tmp_path / "site-packages" / "topk_attention" / "experiments" / "records.py"
    module.parent.mkdir(parents=True)
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(module))
    assert records.git_commit() is None


def test_the_hash_of_the_source_changes_with_the_source(tmp_path, monkeypatch):
    module = tmp_path / "topk_attention" / "experiments" / "records.py"
    module.parent.mkdir(parents=True)
    module.write_text("a = 1")
    monkeypatch.setattr(records, "__file__", str(module))
    before = source_sha256()
    assert source_sha256() == before
    module.write_text("a = 2")
    assert source_sha256() != before


def test_a_record_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "new folder" / "record.json"
    write_json(path, {"k": 3, "name": "Größe"})
    assert read_json(path) == {"k": 3, "name": "Größe"}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_record_that_fails_to_serialise_leaves_the_old_one(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"k": 3})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"k": object()})
    assert read_json(path) == {"k": 3}


def test_no_file_is_no_record(tmp_path):
    assert read_json(tmp_path / "nothing.json") is None
    assert read_json_lines(tmp_path / "nothing.jsonl") == []


def test_a_file_that_holds_something_else_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("{half")
    with pytest.raises(ValueError, match=r"record\.json is not JSON .*; move it away or give another --out"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"record\.json is not a record"):
        read_json(path)


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path):
    path = tmp_path / "records.jsonl"
    append_json_line(path, {"number": 1})
    path.write_text(path.read_text() + '{"number": 2, "cut')
    append_json_line(path, {"number": 3})
    assert read_json_lines(path) == [{"number": 1}, {"number": 3}]
    assert [json.loads(line)["number"] for line in path.read_text().splitlines() if line.endswith("}")] == [1, 3]
