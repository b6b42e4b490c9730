import json

import pytest

from topk_experiments.runs.records import append_json_line, read_json, read_json_lines, reads, write_json


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


def test_a_record_with_other_separators_of_lines_stays_whole(tmp_path):
    append_json_line(tmp_path / "a.jsonl", {"text": "one\u2028two\x85three"})
    assert read_json_lines(tmp_path / "a.jsonl") == [{"text": "one\u2028two\x85three"}]


def test_json_with_sections_of_another_kind_is_no_record(tmp_path):
    (tmp_path / "a.json").write_text('{"config": [1]}')
    with pytest.raises(
        ValueError, match=r"a\.json is not a record: config must be a JSON object, got \[1\]; move it away"
    ):
        read_json(tmp_path / "a.json")


def test_a_line_whose_section_is_something_else_is_named_with_the_way_out(tmp_path):
    append_json_line(tmp_path / "a.jsonl", {"point": {"k": 1}})
    append_json_line(tmp_path / "a.jsonl", {"point": 5})
    said = r"line 2 of .*a\.jsonl is not a record: point must be a JSON object, got 5; delete the line"
    with pytest.raises(ValueError, match=said):
        read_json_lines(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"point": {}}\n{"caf\xe9": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8 \(line 2"):
        read_json_lines(tmp_path / "a.jsonl")


def test_a_function_that_draws_from_records_names_their_file(tmp_path):
    @reads("a.jsonl")
    def draw(out):
        return read_json_lines(out / "a.jsonl")[0]["elapsed_s"] / 2

    append_json_line(tmp_path / "a.jsonl", {"elapsed_s": "long"})
    with pytest.raises(ValueError, match=r"a\.jsonl holds a record that is not as .*: TypeError .*; mend the record"):
        draw(tmp_path)
