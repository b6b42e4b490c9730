"""Turns the aligned parameter blocks of our docstrings into tables, when Sphinx reads them.

In the source a parameter takes one aligned line, with further lines indented:

    query      [B, H, N, D]  float16, bfloat16, float32 or float64
    attn_mask  bool, True = may attend, or float, added to
               the scores

In the site that is a row of a table with the columns name, shape and meaning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_ENTRY = re.compile(r"^([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*) {2,}(\S.*)$")
_SHAPE = re.compile(r"^(\[[^\]]*\])(?: {2,}(\S.*))?$")
_CODE = re.compile(r"(`[^`]+`)")
# Characters that mean something to reStructuredText and nothing in our docstrings.
_SPECIAL = re.compile(r"[*|\\]|_(?!\w)")


class Parameter(NamedTuple):
    """One row: names as they are written, a shape such as [B, N] or an empty string, and the meaning."""

    names: str
    shape: str
    meaning: str


def rewrite(lines: Sequence[str]) -> list[str]:
    """The lines of a docstring as reStructuredText, each aligned block as a table; examples stay as they are."""
    result: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        if line.lstrip().startswith(">>>"):
            end = _end_of_paragraph(lines, position)
            result += lines[position:end]
        elif _ENTRY.match(line):
            parameters, end = _read_block(lines, position)
            result += ["", *_table(parameters), ""]
        else:
            result.append(escape(line))
            end = position + 1
        position = end
    return result


def escape(text: str) -> str:
    """Plain text as reStructuredText: `code` becomes code, no other character marks anything up."""
    parts = _CODE.split(text)
    return "".join(
        f"`{part}`" if _CODE.fullmatch(part) else _SPECIAL.sub(lambda found: "\\" + found[0], part) for part in parts
    )


def _end_of_paragraph(lines: Sequence[str], start: int) -> int:
    return next((index for index in range(start, len(lines)) if not lines[index].strip()), len(lines))


def _read_block(lines: Sequence[str], start: int) -> tuple[list[Parameter], int]:
    """The parameters from this line on, and the index of the line after the last of them."""
    entries: list[list[str]] = []
    end = start
    while end < len(lines):
        line = lines[end]
        if found := _ENTRY.match(line):
            entries.append([found[1], found[2]])
        elif line.startswith("  ") and line.strip():
            entries[-1][1] += " " + line.strip()
        else:
            break
        end += 1
    return [_parameter(names, rest) for names, rest in entries], end


def _parameter(names: str, rest: str) -> Parameter:
    if found := _SHAPE.match(rest):
        return Parameter(names, found[1], found[2] or "")
    return Parameter(names, "", re.sub(r" {2,}", " ", rest))


def _table(parameters: Sequence[Parameter]) -> list[str]:
    has_shapes = any(parameter.shape for parameter in parameters)
    lines = [".. list-table::", "   :header-rows: 1", "   :class: parameters", ""]
    header = ["Name", "Shape", "Meaning"] if has_shapes else ["Name", "Meaning"]
    rows = [header]
    for names, shape, meaning in parameters:
        code = ", ".join(f"``{name}``" for name in names.split(", "))
        rows.append([code, *([f"``{shape}``" if shape else ""] if has_shapes else []), escape(meaning)])
    for row in rows:
        lines += [f"   {'* -' if index == 0 else '  -'} {cell}".rstrip() for index, cell in enumerate(row)]
    return lines


def _process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rewrite(lines)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx, before the extension that reads "Raises:" sections."""
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)
    return {"parallel_read_safe": True}
