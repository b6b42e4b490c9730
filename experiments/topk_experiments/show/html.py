"""Parts of the HTML pages: each page is one file, and reads well on a wide screen and on a phone."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from ..runs.records import Json
from .plots import narrow_png_of, png_of

# A table or a block of code that is wider than the screen scrolls in its own box; pictures shrink to the screen.
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; color: #222;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.25rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.numbers td { white-space: nowrap; }
.scroll, pre { overflow-x: auto; margin: 1rem 0; }
pre { background: #f5f5f5; padding: .6rem .8rem; font-size: .85rem; line-height: 1.4; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
summary { cursor: pointer; }
section { border-top: 1px solid #ddd; margin-top: 2rem; }
footer { color: #666; font-size: .85rem; border-top: 1px solid #ddd; margin-top: 2rem; padding-top: .5rem; }
@media (max-width: 40rem) { body { font-size: 15px; } th, td { padding: .2rem .5rem; } .scroll { font-size: .85rem; } }
"""


def page(title: str, *parts: str) -> str:
    """A whole page: its title as the heading, then parts that are HTML already."""
    return (
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
"""
        + "".join(f"{part}\n" for part in parts if part)
        + "</body>\n</html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text in a box that scrolls; the first row holds the headings."""
    headings, *others = rows
    lines = [_row(headings, "th"), *(_row(row, "td") for row in others)]
    return scrolling('<table class="numbers">\n' + "\n".join(lines) + "\n</table>")


def scrolling(html: str) -> str:
    """HTML in a box of its own that scrolls sideways where it is wider than the page."""
    return f'<div class="scroll">{html}</div>'


def picture(description: str, png: bytes, narrow: bytes | None = None) -> str:
    """A picture inside the page; a reader who cannot see it gets the description.

    narrow  the same for a phone
    """
    image = f'<img alt="{escape(description)}" src="{_data(png)}">'
    if narrow is None:
        return image
    return f'<picture><source media="(max-width: 40rem)" srcset="{_data(narrow)}">{image}</picture>'


def drawn(description: str, figure: Any) -> str:
    """A figure inside the page. On a phone its panels stand below one another."""
    return picture(description, png_of(figure), narrow_png_of(figure))


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def footer(record: Json, *more: str) -> str:
    """Versions, processor, threads, backend and date of a record, and what else there is to say."""
    environment, config = record["environment"], record["config"]

    def known(name: str) -> str:
        value = environment.get(name)
        return "unknown" if value is None else str(value)

    parts = [
        f"topk_attention {known('topk_attention')} ({known('commit')})",
        *(f"{name} {known(name.lower())}" for name in ("torch", "transformers", "Python")),
        known("cpu"),
        f"{config['threads']} threads",
        f"backend {config['backend']}",
        known("date"),
        *more,
    ]
    return f"<footer>{escape(', '.join(parts))}</footer>"


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number and its noun, for a sentence.

    >>> counted(1, "layer"), counted(0, "set"), counted(2_000, "process", "es")
    ('1 layer', '0 sets', '2,000 processes')
    """
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
