"""Every Python block of the README and of the site runs, those of a page in their order and as one script.

A block of the language "text" after a Python block is what that prints, to the letter.
"""

import contextlib
import importlib.util
import io
import os
import warnings

import pytest

from pages import PAGES, blocks, name_of

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
# What other libraries warn of, whatever this one does.
FOREIGN = [
    ("ignore", r".*is deprecated and will be removed in v6", FutureWarning),
    ("ignore", r".*pin_memory.*", UserWarning),
]


def run_blocks(page):
    """Run a page's Python blocks; returns the modules that were missing for some of them."""
    namespace = {"__name__": "__main__"}
    missing = set()
    printed = None
    for block in blocks(page):
        if block.language == "python":
            absent = {name for name in block.needs if importlib.util.find_spec(name) is None}
            missing |= absent
            printed = None
            if not absent:
                # Line numbers of an error are those of the page.
                code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, namespace)
                printed = output.getvalue()
        elif block.language == "text" and printed is not None:
            assert printed == block.code, f"{page.name}, line {block.line}"
            printed = None
    return missing


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_blocks_of_a_page_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with warnings.catch_warnings():
        for action, message, category in FOREIGN:
            warnings.filterwarnings(action, message=message, category=category)
        missing = run_blocks(page)
    if missing:
        pytest.skip(f"blocks of {name_of(page)} were not run for want of {', '.join(sorted(missing))}; all others ran")


def page_of(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_a_block_that_fails_fails_the_page(tmp_path):
    page = page_of(tmp_path, "```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page)


def test_a_block_that_prints_something_else_fails_the_page(tmp_path):
    page = page_of(tmp_path, "```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="line 6"):
        run_blocks(page)


def test_a_block_that_needs_a_missing_module_is_left_out(tmp_path):
    page = page_of(tmp_path, "<!-- needs: no_such_module -->\n```python\nassert False\n```\n")
    assert run_blocks(page) == {"no_such_module"}
