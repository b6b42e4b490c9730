"""Which models are missing on file, and the processes that check them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..runs.checks import check_at_least
from ..runs.ledger import Ledger, made_when
from ..runs.process import WorkerError, run_in_fresh_process
from ..runs.progress import progress_bar, say
from ..runs.records import Json
from ..runs.steps import Limits
from .catalogue import Model, models
from .report import FILE, SCHEMA, in_numbers, report, verdict

if TYPE_CHECKING:
    from rich.console import Console

# To import transformers takes a process some five seconds; what families leave behind in it adds up.
_MODELS_OF_A_PROCESS = 80


@dataclass(frozen=True, kw_only=True)
class ConformanceSweep:
    """Which models to check.

    limits  time of a model, memory of a process
    """

    types: Annotated[Sequence[str] | None, "Model types, such as llama,gpt2. Default: all that transformers has."] = (
        None
    )
    out: Annotated[Path, "Folder for the results."] = Path("results/conformance")
    workers: Annotated[int, "Processes at a time, of one thread each."] = 2
    limits: Limits = Limits(120.0, 4.0)  # noqa: RUF009 - frozen
    fresh: Annotated[bool, "Check again what is on file."] = False

    def __post_init__(self) -> None:
        check_at_least(1, self, "workers")


def run_sweep(sweep: ConformanceSweep, console: Console) -> list[Json]:
    """Check every model that is not on file, append its record to `conformance.jsonl` at once, and write the page.

    A model that ends its process, or is stopped at its limits, gets a record that says so; the others go on in another
    process.

    Raises:
        ValueError: there is no such model type.
        WorkerError: a process ended before it had begun a model.
    """
    chosen = models(sweep.types)
    ledger = Ledger(sweep.out / FILE, schema=SCHEMA, folder=Path(__file__).parent, fresh=sweep.fresh)
    on_file = {one: ledger.find(configuration(one), spares=sweep.limits.spare) for one in chosen}
    missing = [one for one, record in on_file.items() if record is None]
    spared = [record for record in on_file.values() if record is not None]
    say(console, f"{len(chosen)} models, {len(spared)} of them on file, {len(missing)} to check")
    if spared:
        say(console, made_when(spared[-1]))
    with progress_bar(console) as progress:
        task = progress.add_task("models", total=len(missing))

        def finished(record: Json) -> None:
            ledger.append(record)
            progress.advance(task)
            found = verdict(record)
            note = f": {found.reason}" if found.reason else ""
            say(progress.console, f"{record['model_type']}, {record['model_class']}: {found.word}{note}"[:300])

        _Workers(missing, sweep, ledger, finished).run()
    records = [
        record for one in chosen if (record := ledger.find(configuration(one), spares=lambda _: True)) is not None
    ]
    say(console, f"Attention: {in_numbers(records)}")
    for path in report(sweep.out):
        say(console, f"Written: {path}")
    say(console, f"Records: {ledger.path}")
    return records


def configuration(model: Model) -> Json:
    """What identifies the record of a model."""
    return {"model_type": model.model_type, "model_class": model.model_class}


class _Workers:
    """Threads that each keep one process busy.

    finished  receives each record
    """

    def __init__(self, models: Sequence[Model], sweep: ConformanceSweep, ledger: Ledger, finished: Any) -> None:
        self._queue: queue.SimpleQueue[list[Model]] = queue.SimpleQueue()
        for start in range(0, len(models), _MODELS_OF_A_PROCESS):
            self._queue.put(list(models[start : start + _MODELS_OF_A_PROCESS]))
        self._workers = min(sweep.workers, self._queue.qsize())
        self._limits: Json = {"time_limit_s": sweep.limits.time_s, "memory_limit_gib": sweep.limits.memory_gib}
        self._ledger, self._finished = ledger, finished
        self._killed: list[Model] = []
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []

    def run(self) -> None:
        # Daemons: Ctrl-C ends the command and, with it, the processes, whose pipes close.
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        while not self._errors:
            try:
                models = self._queue.get_nowait()
            except queue.Empty:
                return
            try:
                while models:
                    models = self._check(models)
            except BaseException as error:
                self._errors.append(error)

    def _check(self, models: list[Model]) -> list[Model]:
        """Check models in a fresh process; returns those that it did not come to."""
        begun, done, begun_at = -1, 0, 0.0

        def take(message: Json) -> None:
            nonlocal begun, done, begun_at
            if "begun" in message:
                begun, begun_at = message["begun"], time.monotonic()
            else:
                done = message["number"] + 1
                self._keep(models[message["number"]], message["record"])

        request = {"models": [list(model) for model in models], **self._limits}
        try:
            run_in_fresh_process(f"{__package__}.worker:check_models", request, on_message=take)
        except WorkerError as error:
            if begun < done:  # not the fault of a model
                raise
            if error.outcome == "out of memory" and models[begun] not in self._killed:
                # The system ends whom it likes where memory is short; nobody knows whose fault it was.
                self._killed.append(models[begun])
                return models[begun:]
            is_late = time.monotonic() - begun_at > self._limits["time_limit_s"]
            outcome = "time limit" if is_late else error.outcome
            self._keep(models[begun], {"outcome": outcome, "message": str(error)})
            return models[begun + 1 :]
        return []

    def _keep(self, model: Model, found: Json) -> None:
        stopped = {} if found["outcome"] == "finished" else self._limits
        with self._lock:
            self._finished(self._ledger.new_record(configuration(model)) | found | stopped)
