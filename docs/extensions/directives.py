"""Directives of this site: tables that are made from records, and the options of a command."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

import command_tables
import record_tables


class _MarkdownDirective(Directive):
    """Puts Markdown in place of itself."""

    required_arguments = 1
    final_argument_whitespace = True

    def markdown(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        container = nodes.container()
        lines = self.markdown().splitlines()
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), self.content_offset, container)
        return container.children


class RecordTable(_MarkdownDirective):
    """A table of `record_tables.TABLES`, by its name."""

    def markdown(self) -> str:
        return record_tables.markdown(self.arguments[0])


class RecordFile(_MarkdownDirective):
    """A table that an experiment wrote into results/, by its path there; a line in its place where it was not run."""

    def markdown(self) -> str:
        path = record_tables.RESULTS / self.arguments[0]
        return path.read_text("utf-8") if path.exists() else "Not measured yet."


class CommandOptions(_MarkdownDirective):
    """What a command does and the options that it takes, such as `topk-attention calibrate`."""

    def markdown(self) -> str:
        return command_tables.markdown(self.arguments[0])


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("record-table", RecordTable)
    app.add_directive("record-file", RecordFile)
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True}
