"""The pages that a person reads, and the code blocks on them."""

from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *SITE]
_NEEDS = "<!-- needs:"


class Block(NamedTuple):
    """
    language  of the fence, such as python or sh
    code      what is in it
    line      of the page, of its first line of code
    needs     modules that it imports beside those of the extra `hf`
    """

    language: str
    code: str
    line: int
    needs: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    found = []
    needs: tuple[str, ...] = ()
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and token.content.startswith(_NEEDS):
            listed = token.content.removeprefix(_NEEDS).partition("-->")[0]
            needs = tuple(name.strip() for name in listed.split(","))
        elif token.type == "fence":
            assert token.map is not None
            found.append(Block(token.info.strip(), token.content, token.map[0] + 2, needs))
            needs = ()
    return found


def name_of(page: Path) -> str:
    """A page's name in a test's name."""
    return str(page.relative_to(ROOT))
