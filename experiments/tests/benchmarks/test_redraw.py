import json
import shutil
from pathlib import Path

import pytest

from topk_experiments.benchmarks import redraw
from topk_experiments.runs import steps

RESULTS = Path(__file__).parents[3] / "results"
FOLDERS = ("attention", "attention-kernel", "chunk-size", "feed-forward", "feed-forward-kernel")


def reports(results):
    """The tables and pictures in a folder of results."""
    paths = (path for folder in FOLDERS for path in (results / folder).glob("*") if path.suffix in (".md", ".png"))
    return {str(path.relative_to(results)) for path in paths}


def test_committed_records_of_any_age_are_drawn_again_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "run_in_fresh_process", lambda *_, **__: pytest.fail("it measured"))
    lines = [path for folder in FOLDERS for path in (RESULTS / folder).glob("*.jsonl")]
    for path in lines:
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    written = redraw(tmp_path)
    # Beside some pictures lies the same for a phone, which is not named.
    drawn = reports(tmp_path)
    assert {path for path in drawn if ".narrow" not in path} == {str(path.relative_to(tmp_path)) for path in written}
    assert drawn == reports(RESULTS)
    for path in lines:
        assert (tmp_path / path.parent.name / path.name).read_bytes() == path.read_bytes()
        table = (tmp_path / path.parent.name / f"{path.stem}.md").read_text()
        assert json.loads(path.read_text().splitlines()[-1])["environment"]["commit"] in table
