"""The command `topk-experiments` and its groups of commands."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Experiments with top-k attention: each measures, keeps records and writes tables and pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
benchmark = typer.Typer(help="Measure memory and time; points that are there already are kept.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")
train = typer.Typer(help="Train small models; an interrupted run goes on from its checkpoint.", no_args_is_help=True)
app.add_typer(train, name="train")
qa = typer.Typer(help="Question answering with full and with top-k models.", no_args_is_help=True)
app.add_typer(qa, name="qa")
lra = typer.Typer(
    help="Long Range Arena: data, runs that are kept, and the table of all of them.", no_args_is_help=True
)
app.add_typer(lra, name="lra")
