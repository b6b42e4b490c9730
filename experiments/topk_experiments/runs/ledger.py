"""What is on file, and the one rule that says whether a record spares a run.

A record spares a run of the same configuration if it was made in the same environment and by the same code:

configuration  the fields of the record that say what was run, such as its point, model or seed
environment    torch, transformers, Python and the processor
code           a hash of the product, and a hash of the experiment's own folder and of the rivals that it runs.
               Comments, docstrings and the files that only draw (`DRAWING`) do not count

Records made before these hashes existed hold neither. For them the configuration and the environment decide; the note
on a cache hit says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from topk_attention.environment import code_sha256, environment
from topk_attention.files import check_writable

from .files import damage_named
from .progress import Say
from .records import Json, append_json_line, differences, read_json, read_json_lines

# Modules of an experiment that turn records into tables and pictures: a change to them leaves every number as it is.
DRAWING = ("captions", "groups", "picture", "pictures", "published", "quoted", "report", "table")
_HOLDS = "holds a record that is not as these commands write it"
_WAY_OUT = "mend the record or delete it"
_ENVIRONMENT = ("torch", "transformers", "python", "cpu")
_CODE = ("product_sha256", "experiment_sha256")


def experiment_environment(folder: Path, *also: Path) -> Json:
    """`environment()` with the hash of the code of an experiment, `experiment_sha256`.

    folder  of the experiment: `Path(__file__).parent` of one of its modules
    also    other folders whose code the experiment runs, such as that of rivals
    """
    hashes = []
    for code in (folder, *also):
        files = (file for file in code.rglob("*.py") if not file.stem.endswith(DRAWING))
        hashes.append(code_sha256(code, files))
    return environment() | {"experiment_sha256": "-".join(hashes)}


def what_differs(record: Json, configuration: Mapping[str, object], here: Json) -> list[str]:
    """Why a record does not stand for a run of this configuration here, in words; empty where it does.

    configuration  field of the record -> what it must hold; "run.dtype" is the field "dtype" of the section "run"
    here           of `experiment_environment`
    """
    there = record.get("environment", {})
    fields = [*_ENVIRONMENT, *(name for name in _CODE if there.get(name) is not None)]
    old = {name: field_of(record, name) for name in configuration} | {name: there.get(name) for name in fields}
    new = dict(configuration) | {name: here.get(name) for name in fields}
    return differences(old, new)


def field_of(record: Json, name: str) -> object:
    """A field of a record, or "section.field" of one of its sections; None if it is missing."""
    section, _, field = name.rpartition(".")
    return record.get(section, {}).get(field) if section else record.get(name)


def identity(configuration: Mapping[str, object], here: Json) -> Json:
    """What must agree for unfinished work, such as a checkpoint, to belong to a run of this configuration here."""
    return {**configuration, "environment": {name: here.get(name) for name in (*_ENVIRONMENT, *_CODE)}}


def is_finished(record: Json) -> bool:
    """Whether a run came to its end; records without an outcome are of runs that did."""
    return record.get("outcome", "finished") == "finished"


def made_when(record: Json) -> str:
    """Note on a cache hit: the date and the commit of the record."""
    there = record["environment"]
    older = "" if there.get("product_sha256") else ", before code was hashed"
    return f"on file, of {there.get('date', 'unknown date')}, commit {there.get('commit')}{older}"


class Ledger:
    """The records of an experiment, one a line.

    path    file of JSON lines
    schema  of its records; lines of another schema are skipped
    folder, also  of the experiment's code, as `experiment_environment` takes them
    fresh   whether to run everything again: what was on file before spares no run then

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: Path, *, schema: str, folder: Path, also: Sequence[Path] = (), fresh: bool = False
    ) -> None:
        check_writable("out", path)  # the folder may take files, and this one may not be open to us
        self.path = path
        self.here = experiment_environment(folder, *also)
        self._schema = schema
        self.records = on_file(path, schema)
        self._sparing = [] if fresh else list(self.records)

    def find(self, configuration: Mapping[str, object], *, spares: Callable[[Json], bool] = is_finished) -> Json | None:
        """The newest record that spares a run of this configuration; None where there is none.

        spares  whether a record of the same run is good enough, for example has enough repetitions
        """
        with damage_named(self.path, _WAY_OUT, _HOLDS):
            for record in reversed(self._sparing):
                if not what_differs(record, configuration, self.here) and spares(record):
                    return record
            return None

    def why_not(self, configuration: Mapping[str, object]) -> str | None:
        """Note on the newest record of this configuration that spares no run: what differs. None where there is none.

        With `fresh` there is no note: the user asked for the run.
        """
        for record in reversed(self._sparing):
            if all(field_of(record, name) == value for name, value in configuration.items()):
                changed = what_differs(record, configuration, self.here)
                return f"on file, but made otherwise ({'; '.join(changed)}): run again" if changed else None
        return None

    def new_record(self, configuration: Mapping[str, object]) -> Json:
        """The beginning of a record: schema, configuration and environment."""
        return {"schema": self._schema, **configuration, "environment": self.here}

    def append(self, record: Json) -> None:
        """Write a record as the last line of the file."""
        append_json_line(self.path, record)
        self.records.append(record)
        self._sparing.append(record)


def on_file(path: Path, schema: str) -> list[Json]:
    """The records of this schema in a file, oldest first; none where there is no file."""
    return [record for record in read_json_lines(path) if record.get("schema") == schema]


def newest(records: Iterable[Json], configuration: Callable[[Json], str]) -> list[Json]:
    """Records for one table: the newest of each configuration, in the order in which configurations first appear.

    Only records of the environment of the last one: numbers of different machines do not belong in one table.

    configuration  record -> text that is equal for records of the same configuration
    """
    records = list(records)
    by_configuration: dict[str, Json] = {}
    for record in records:
        there, last = record["environment"], records[-1]["environment"]
        if all(there.get(name) == last.get(name) for name in _ENVIRONMENT):
            by_configuration[configuration(record)] = record
    return list(by_configuration.values())


def record_of_same_run(
    path: Path, new: Json, fields: Iterable[str], *, fresh: bool, say: Say, as_planned: Callable[[Json], Json]
) -> Json | None:
    """The record in a file that holds one run, if it is of the same run as `new`; None where a new one begins.

    fields      of the record that say what is run
    fresh       whether to begin anew in any case
    say         receives the reason where a record on file is replaced
    as_planned  a record without what is known only after a run

    Raises:
        ValueError: the file holds no record.
    """
    old = read_json(path)
    if old is None:
        return None
    if fresh:
        say(f"Starting anew as asked: {path} is replaced.")
        return None
    with damage_named(path, "move it away or give another --out", _HOLDS):
        changed = what_differs(as_planned(old), {name: new[name] for name in fields}, new["environment"])
    if changed:
        say(f"{path} was made with another configuration, environment or code and is replaced ({'; '.join(changed)}).")
        return None
    return old
