"""The commands of the Long Range Arena."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import lra
from .options import Out, Seed, Threads, errors_in_words, folder_to_fill, integers, names, new_console

Config = Annotated[
    str,
    typer.Argument(help="A configuration that comes with the library, or a TOML file of your own.", metavar="CONFIG"),
]
Source = Annotated[
    str | None,
    typer.Option(help="File or folder that the task reads. Without it, a task that needs one says what it must hold."),
]
Data = Annotated[Path, typer.Option(help="Folder for prepared data.", callback=folder_to_fill)]
Device = Annotated[str, typer.Option(help='"auto" (a GPU if there is one) or "cpu".')]


@lra.command()
def data(
    config: Config,
    source: Source = None,
    data: Data = Path("results/lra/work/data"),
) -> None:
    """Generate or read a task's data once and write compact files. Repeat an interrupted command to continue."""
    with errors_in_words(f"finished data is in {data}"):
        from ..lra.configuration import read_config
        from ..lra.runs import LraPlan, prepare_data

        prepare_data(LraPlan(read_config(config), source=source, data=data), new_console())


@lra.command()
def train(
    config: Config,
    methods: Annotated[
        str,
        typer.Option(help="Among vanilla, query-chunks, topk, topk-completed, performer and rfa, separated by commas."),
    ] = "vanilla,topk",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    source: Source = None,
    data: Data = Path("results/lra/work/data"),
    out: Out = Path("results/lra"),
    threads: Threads = None,
    device: Device = "auto",
    tensorboard: Annotated[bool, typer.Option(help="Write files for TensorBoard if it is installed.")] = True,
) -> None:
    """Train every method with every seed; a run on file is not trained again.

    Finished runs are lines of runs.jsonl. To continue an interrupted run, repeat the command: it resumes from the last
    point of the curve. If torchrun or accelerate launch starts the command, the processes share every batch.
    """
    with errors_in_words(f"finished runs are in {out / 'runs.jsonl'}, checkpoints in {out / 'work'}"):
        from ..lra.configuration import read_config
        from ..lra.runs import LraPlan, run_plan

        plan = LraPlan(
            read_config(config),
            methods=names(methods),
            seeds=integers("seeds", seeds, least=0, bits=63),
            source=source,
            data=data,
            out=out,
            threads=threads,
            device=device,
        )
        run_plan(plan, new_console(), tensorboard=tensorboard)


@lra.command()
def evaluate(
    config: Config,
    method: Annotated[str, typer.Option(help="Method of attention of the run.")] = "topk",
    seed: Seed = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    weights: Annotated[Path | None, typer.Option(help="File of weights. Default: the file that the run wrote.")] = None,
    source: Source = None,
    data: Data = Path("results/lra/work/data"),
    out: Annotated[Path, typer.Option(help="Folder with the results.")] = Path("results/lra"),
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Loss and accuracy of a run's weights, those of its best validation."""
    with errors_in_words():
        from ..lra.configuration import read_config
        from ..lra.runs import LraPlan, evaluate_run

        plan = LraPlan(
            read_config(config), [method], [seed], source=source, data=data, out=out, threads=threads, device=device
        )
        evaluate_run(plan, method, seed, split, new_console(), weights=weights)


@lra.command()
def table(out: Out = Path("results/lra")) -> None:
    """Write table.md and curves.png from all runs on file, beside published accuracies, which are marked as quoted."""
    with errors_in_words():
        from ..lra.table import write_table

        write_table(out, new_console())
