"""The table of versions is what its records say."""

import shutil

from pages import ROOT
from topk_experiments.versions.report import FILE, PAGE, report

FOLDER = ROOT / "results" / "versions"


def test_the_table_of_versions_is_made_from_the_records_beside_it(tmp_path):
    shutil.copy(FOLDER / FILE, tmp_path)
    assert report(tmp_path) == [tmp_path / PAGE]
    assert (tmp_path / PAGE).read_text() == (FOLDER / PAGE).read_text()
    assert f"results/versions/{PAGE}" in (ROOT / "docs/installation.md").read_text()
