"""The runs of a plan: find those on file, train the missing ones, evaluate the weights they left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from topk_attention.environment import now, package_version
from topk_attention.functional.words import full_attention_note

from ..rivals.names import METHODS
from ..runs.checks import check_at_least, check_different
from ..runs.ledger import Ledger, made_when
from ..runs.progress import progress_bar
from ..runs.records import Json
from ..runs.training import load_whole
from .configuration import LraConfig
from .tasks import SPLITS, PreparedData, prepare
from .training import Report, Run, evaluate, new_accelerator, new_model, train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

SCHEMA = "topk_attention/lra/1"
DEFAULT_OUT = Path("results/lra")
RECORDS = "runs.jsonl"
_FOLDER = Path(__file__).parent
_CONFIGURATION = ("config", "method", "options", "seed", "data")


@dataclass(frozen=True)
class LraPlan:
    """Runs of one configuration: every method with every seed.

    source   file or folder that the task reads; None for a task that generates its data
    data     folder for prepared data
    out      folder for the records; its folder `work` keeps checkpoints, weights and TensorBoard's files
    threads  of the CPU; None: torch's own number
    device   "auto" or "cpu"
    """

    config: LraConfig
    methods: Sequence[str] = ("vanilla", "topk")
    seeds: Sequence[int] = (0,)
    source: str | None = None
    data: Path = DEFAULT_OUT / "work" / "data"
    out: Path = DEFAULT_OUT
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_different("methods", self.methods, "method")
        check_different("seeds", self.seeds)
        for method in self.methods:
            self.config.attention_options(method)
        check_at_least(1, self, "threads")

    def run(self, method: str, seed: int) -> Run:
        """One run of the plan."""
        options = [f"-{name}{value}" for name, value in self.config.attention_options(method).items()]
        place = self.out / "work" / self.config.name / f"{method}{''.join(options)}-{seed}"
        return Run(self.config, method, seed, place.with_name(f"{place.name}.checkpoint.pt"), Path(f"{place}.pt"))


def prepare_data(plan: LraPlan, console: Console) -> PreparedData:
    """The task's data, prepared if it is not on file yet; its sizes and baselines are printed."""
    task = plan.config.new_task(plan.source)
    with progress_bar(console) as bar:
        shown = bar.add_task(f"data of {plan.config.name}", total=None)
        data = prepare(task, plan.data, lambda done, total: bar.update(shown, completed=done, total=total))
        bar.update(shown, completed=1, total=1)
    for name, split in data.description["splits"].items():
        console.print(
            f"{name}: {split['num_examples']:,} examples, {split['majority_share']:.1%} with the most frequent label",
            highlight=False,
        )
    for baseline, shares in data.description["baselines"].items():
        console.print(
            f"{baseline}, without a model: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()),
            highlight=False,
        )
    return data


def run_plan(plan: LraPlan, console: Console, *, tensorboard: bool = True) -> list[Json]:
    """Train every run that is not on file yet and append its record at once. Returns the plan's records.

    Raises:
        ValueError: configuration, method, data or processes do not fit; the message says which.
        FileNotFoundError: the task's source does not exist.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    accelerator = new_accelerator(plan.device, plan.config.training)
    console.quiet |= not accelerator.is_main_process
    with accelerator.main_process_first():  # the other processes read its files
        data = prepare_data(plan, console)
    if any(METHODS[method].keeps_k for method in plan.methods):
        length = plan.config.new_task(plan.source).max_length
        if note := full_attention_note(plan.config.k, length):
            console.print(f"{plan.config.name}: {note}", markup=False, highlight=False, soft_wrap=True)
    records = []
    for method in plan.methods:
        for seed in plan.seeds:
            run = plan.run(method, seed)
            # Opened for every run: with several processes, one alone appends records.
            ledger = Ledger(plan.out / RECORDS, schema=SCHEMA, folder=_FOLDER, also=[_FOLDER.parent / "rivals"])
            record = ledger.find(run.identity(data))
            if record is None:
                if note := ledger.why_not(run.identity(data)):
                    console.print(f"{_name(run)}: {note}", markup=False, highlight=False, soft_wrap=True)
                record = _train(run, plan, data, accelerator, console, tensorboard, ledger.here)
                if accelerator.is_main_process:
                    ledger.append(record)
                    run.checkpoint.unlink(missing_ok=True)
            else:
                console.print(f"{_name(run)} is {made_when(record)}.", highlight=False)
            console.print(in_words(record), highlight=False)
            records.append(record)
            accelerator.wait_for_everyone()
    return records


def evaluate_run(
    plan: LraPlan, method: str, seed: int, split: str, console: Console, *, weights: Path | None = None
) -> Json:
    """Loss and accuracy of the weights that a finished run left.

    weights  file of the weights; None: the file that the run wrote

    Raises:
        ValueError: there is no such file or split, or the weights are of another run.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    run = plan.run(method, seed)
    path = weights or run.model
    if not path.exists():
        raise ValueError(f"{_name(run)} has left no weights at {path}; train it first, or give --weights")
    accelerator = new_accelerator(plan.device, plan.config.training)
    data = prepare_data(plan, console)
    saved = load_whole(path, map_location=accelerator.device)
    identity = run.identity(data)
    if saved["identity"] != identity:
        other = _other_fields(saved["identity"], identity)
        raise ValueError(f"the weights at {path} are of another run: {', '.join(other)} differ from {_name(run)}")
    classifier = new_model(plan.config, plan.config.new_task(plan.source), method, seed)
    classifier.load_state_dict(saved["weights"])
    model, batch_size = accelerator.prepare(classifier), plan.config.training.batch
    loss, accuracy = evaluate(model, data.splits[split], accelerator, batch_size)
    console.print(f"{_name(run)}, {split}: loss {loss:.4f}, accuracy {accuracy:.2%}", highlight=False)
    return {"split": split, "loss": loss, "accuracy": accuracy}


def _other_fields(saved: Json, identity: Json) -> list[str]:
    """The fields of a run's configuration in which saved weights or a checkpoint differ."""
    return [name for name in _CONFIGURATION if saved.get(name) != identity[name]]


def in_words(record: Json) -> str:
    """The result of a run in one line."""
    best, last = record["best"], record["last"]
    return (
        f"{record['name']}, {record['method']}, seed {record['seed']}: test accuracy {best['test_accuracy']:.2%} at "
        f"the best validation (step {best['step']:,}), {last['test_accuracy']:.2%} at the last step {last['step']:,}; "
        f"{record['elapsed_s']:.0f} s of training ({record['processor_s']:.0f} s of processor time), "
        f"{record['peak_mib']:.0f} MiB"
    )


def _train(
    run: Run,
    plan: LraPlan,
    data: PreparedData,
    accelerator: Accelerator,
    console: Console,
    tensorboard: bool,
    here: Json,
) -> Json:
    task = plan.config.new_task(plan.source)
    main = accelerator.is_main_process
    if run.checkpoint.exists():
        saved = load_whole(run.checkpoint, map_location="cpu")["identity"]
        other = _other_fields(saved, run.identity(data))
        if other:
            console.print(
                f"The checkpoint of an unfinished run is not used, and will be overwritten: {', '.join(other)} differ. "
                f"To keep it, interrupt now and move it: {run.checkpoint}",
                highlight=False,
                soft_wrap=True,
            )
    writer = _tensorboard_writer(run, console) if tensorboard and main else None
    with _reporting(run, console, writer) as report:
        result = train(run, task, data, accelerator, report)
    description = data.description["splits"]
    return {
        "schema": SCHEMA,
        "name": run.config.name,
        **run.identity(data),
        "num_examples": {name: split["num_examples"] for name, split in description.items()},
        "majority_share": {name: split["majority_share"] for name, split in description.items()},
        "baselines": data.description["baselines"],
        **result,
        "device": accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "environment": here | {"accelerate": package_version("accelerate"), "date": now()},
    }


@contextlib.contextmanager
def _reporting(run: Run, console: Console, writer: Any) -> Iterator[Report]:
    """A function that shows each step on a bar, prints each point of the curve, and writes it for TensorBoard."""
    with progress_bar(console) as bar:
        shown = bar.add_task(_name(run), total=run.config.training.steps)

        def report(step: int, loss: float, point: Json | None) -> None:
            bar.update(shown, completed=step, description=f"{_name(run)}, loss {loss:.3f}")
            if point is None:
                return
            bar.console.print(
                f"step {step:,}: loss {point['training_loss']:.3f}, validation loss {point['validation_loss']:.3f}, "
                f"accuracy {point['validation_accuracy']:.1%}",
                highlight=False,
            )
            if writer is not None:
                for name in ("training_loss", "training_accuracy", "validation_loss", "validation_accuracy"):
                    writer.add_scalar(name, point[name], step)
                writer.flush()

        try:
            yield report
        finally:
            if writer is not None:
                writer.close()


def _tensorboard_writer(run: Run, console: Console) -> Any:
    """A writer beside the checkpoint; None, with a message, if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("TensorBoard is not installed; its files are not written.", highlight=False)
        return None
    return SummaryWriter(str(run.model.with_suffix("")))


def _name(run: Run) -> str:
    return f"{run.config.name}, {run.method}, seed {run.seed}"
