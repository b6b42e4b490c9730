"""The sentences at the top of the page of all results, from the records that are kept with the code."""

import json
import shutil
from pathlib import Path

import pytest

from topk_experiments.results_conclusions import conclusions

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def results(tmp_path):
    """The records that a conclusion reads, and nothing else."""
    for pattern in ("*/*.jsonl", "calibration/*.record.json"):
        for path in RESULTS.glob(pattern):
            target = tmp_path / path.relative_to(RESULTS)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


def test_the_records_of_the_project_give_five_to_eight_sentences_for_and_against(results):
    sentences = conclusions(results)
    assert 5 <= len(sentences) <= 8
    assert any(sentence.startswith("Top-k helps most") for sentence in sentences)
    assert any(sentence.startswith("It costs quality") for sentence in sentences)
    assert sentences[-1].startswith("It does not help everywhere")


def test_the_numbers_are_those_of_the_records(results):
    path = results / "attention-kernel" / "length.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["measured"] == "time_methods" and "sdpa" in line["methods"]:
            line["methods"]["sdpa"]["forward_backward"]["median_s"] = 90.0
            line["methods"]["topk-cpu"]["forward_backward"]["median_s"] = 20.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "took 20 s, PyTorch's 90 s (4.5 times as long)" in conclusions(results)[0]


@pytest.mark.parametrize("missing", ["attention-kernel", "model", "feed-forward-kernel", "attention-error", "lra"])
def test_a_sentence_without_its_records_is_left_out(results, missing):
    before = conclusions(results)
    shutil.rmtree(results / missing)
    assert set(conclusions(results)) < set(before)


def test_no_records_give_no_sentence(tmp_path):
    assert conclusions(tmp_path) == []


def test_calibration_is_judged_without_completion(results):
    for path in (results / "calibration").glob("*.record.json"):
        record = json.loads(path.read_text())
        record["runs"] = [run | {"completed": True} for run in record["runs"]]
        path.write_text(json.dumps(record))
    assert not any(sentence.startswith("It costs quality") for sentence in conclusions(results))
