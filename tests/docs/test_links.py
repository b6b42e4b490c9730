"""Links between the texts lead somewhere."""

import re

import pytest

from pages import PAGES, ROOT, name_of

TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "LOG.md", "STYLE.md"))]
TEXTS += sorted((ROOT / "examples").rglob("*.md"))
LINK = re.compile(r"\]\(([^()\s]+)\)|<(\.\.[^>\s]+)>|^```\{include\} (\S+)$", re.MULTILINE)


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_every_link_to_a_file_leads_to_one(text):
    for found in LINK.finditer(text.read_text(encoding="utf-8")):
        target = next(group for group in found.groups() if group).partition("#")[0]
        if target and "://" not in target:
            assert (text.parent / target).exists(), f"{text.name} links to {target}"


def test_every_page_of_the_site_is_in_its_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        if page.parent != ROOT and page.name != "index.md":
            assert str(page.relative_to(ROOT / "docs").with_suffix("")) in index.split()
