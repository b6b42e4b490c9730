"""The page of supported models is what its records say."""

import json
import shutil

from pages import ROOT
from topk_experiments.conformance.report import FILE, NOT_TRIED, PAGE, report, verdict

FOLDER = ROOT / "results" / "conformance"


def test_the_page_of_supported_models_is_made_from_the_records_beside_it(tmp_path):
    shutil.copy(FOLDER / FILE, tmp_path)
    assert report(tmp_path) == [tmp_path / PAGE]
    assert (tmp_path / PAGE).read_text() == (FOLDER / PAGE).read_text()
    assert f"results/conformance/{PAGE}" in (ROOT / "docs/results/supported-models.md").read_text()


def test_at_least_420_types_were_tried():
    records = [json.loads(line) for line in (FOLDER / FILE).read_text().splitlines()]
    assert len({record["model_type"] for record in records if verdict(record).word != NOT_TRIED}) >= 420
