"""The table of versions. From the records: nothing in this module measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runs.ledger import is_finished, newest, on_file
from ..runs.records import Json, days_and_commits, reads, write_whole
from ..show.markdown import markdown_table

SCHEMA = "topk_attention/versions/1"
FILE = "versions.jsonl"
PAGE = "versions.md"
_MOST_FAILURES = 8


@reads(FILE)
def report(out: Path) -> list[Path]:
    """Write `versions.md` from the records on file; returns the files written."""
    records = newest(on_file(out / FILE, SCHEMA), lambda record: str(sorted(record["versions"].items())))
    if not records:
        return []
    write_whole(out / PAGE, as_markdown(records))
    return [out / PAGE]


def redraw(out: Path) -> list[Path]:
    """Write the table again from the records in the folder of all results."""
    return report(out / "versions")


def in_words(record: Json) -> str:
    """What to say of a pair, for a cell."""
    if not is_finished(record):
        return str(record["outcome"])
    total = {kind: sum(claim[kind] for claim in record["claims"].values()) for kind in ("passed", "failed")}
    without = "" if record["kernels"] is None else ", without compiled kernels"
    failed = f"**{total['failed']} failed**, " if total["failed"] else ""
    return f"{failed}{total['passed']} passed{without}"


def as_markdown(records: Sequence[Json]) -> str:
    """A table of torch and transformers, what was claimed, and what failed."""
    torch, transformers = (
        sorted({record["versions"][name] for record in records}, key=_in_order) for name in ("torch", "transformers")
    )
    cells = {(record["versions"]["torch"], record["versions"]["transformers"]): in_words(record) for record in records}
    rows = [(f"transformers {row}", *(cells.get((column, row), "") for column in torch)) for row in transformers]
    parts = [
        f"Python {records[-1]['environment']['python']}, {days_and_commits(records)}. A cell counts tests; "
        "an empty one was not tried.",
        markdown_table(("", *(f"torch {version}" for version in torch)), rows),
        f"What was run with each pair: {_claims(records)}.",
    ]
    parts += [_failures(record) for record in records if not is_finished(record) or record["failures"]]
    return "\n\n".join(parts) + "\n"


def _in_order(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _claims(records: Sequence[Json]) -> str:
    """Each claim with its number of tests in the newest record that has any."""
    of: Json = next((record["claims"] for record in reversed(records) if is_finished(record)), {})
    return ", ".join(f"{name} ({sum(counts.values())})" for name, counts in of.items()) or "nothing"


def _failures(record: Json) -> str:
    pair = "torch {torch} with transformers {transformers}".format(**record["versions"])
    if not is_finished(record):
        return f"**{pair}**: {record['outcome']}, {_plain(record['message'])}"
    shown = list(record["failures"].items())[:_MOST_FAILURES]
    lines = [f"- `{test.rpartition('::')[2]}`: {_plain(reason)}" for test, reason in shown]
    more = len(record["failures"]) - len(shown)
    return f"**{pair}**\n\n" + "\n".join([*lines, *([f"- and {more} more"] if more else [])])


def _plain(text: str) -> str:
    """Of an error what Markdown does not take for its own."""
    return text.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")
