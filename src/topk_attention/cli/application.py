"""The application and its groups of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__

app = typer.Typer(
    help="Transformers that use only the k best keys per query and the k best feed-forward neurons per token.",
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


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topk-attention {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
