"""The command `topk-experiments` and its groups of commands."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Experiments with top-k attention. Each one measures, keeps records, and writes tables and pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
benchmark = typer.Typer(help="Measure memory and time; points on file are not measured again.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")
train = typer.Typer(help="Train small models; an interrupted run resumes from its checkpoint.", no_args_is_help=True)
app.add_typer(train, name="train")
qa = typer.Typer(help="Question answering with full and with top-k models.", no_args_is_help=True)
app.add_typer(qa, name="qa")
lra = typer.Typer(help="Long Range Arena: prepare data, train, and write the table of all runs.", no_args_is_help=True)
app.add_typer(lra, name="lra")
