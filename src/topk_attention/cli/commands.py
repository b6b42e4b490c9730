"""The commands. Each reads its options and imports what it needs only then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import Threads, errors_in_words, new_console, written_file


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of a transformers model.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file, like the text the model will read later.")],
    out: Annotated[
        Path,
        typer.Option(help="File for the calibration: convert(model, attention_k=...) takes it.", callback=written_file),
    ],
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file in the model's folder.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window. Take the length of later inputs: a head needs more keys in longer ones. Default: "
            "2,048, or the longest input of the model where that is shorter."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to measure, one after the other.")] = 3,
    mean_k: Annotated[
        float | None,
        typer.Option(help="Target: keys per query, mean over all heads. 64 unless you give another target."),
    ] = None,
    lost_mass: Annotated[
        float | None, typer.Option(help="Target: the share of softmax weight that a head may lose, such as 0.05.")
    ] = None,
    loss_increase: Annotated[
        float | None, typer.Option(help="Target: nats per token by which the loss may rise, such as 0.01.")
    ] = None,
    feed_forward_mean_k: Annotated[
        float | None, typer.Option(help="Choose neurons too: neurons per token, mean over all layers.")
    ] = None,
    stand_ins: Annotated[
        Path | None,
        typer.Option(
            help="File for stand-ins for the neurons that are not kept, fitted on the same windows: "
            "convert(model, feed_forward_k=StandIns.load(FILE)). Needs --feed-forward-mean-k.",
            callback=written_file,
        ),
    ] = None,
    stand_in_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the stand-ins; 0 is a constant for each layer. Needs --stand-ins. Default: 64."),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(
            help='Choose k for completed attention, in which the keys that are not kept count as one more: "on", or '
            '"fit" to fit its scale for each head. Default: without.'
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Measure how many keys each head of a model needs, and write one k per head to a file.

    To compare the result with one k for every head on other text, use `topk-experiments calibrate`.
    """
    with errors_in_words():
        from .calibration import CalibrationRequest, run_calibration

        run_calibration(
            CalibrationRequest(
                model=model,
                text=text,
                out=out,
                gguf_file=gguf_file,
                num_tokens=tokens,
                windows=windows,
                mean_k=mean_k,
                lost_mass=lost_mass,
                loss_increase=loss_increase,
                feed_forward_mean_k=feed_forward_mean_k,
                stand_ins=stand_ins,
                stand_in_rank=stand_in_rank,
                completion=completion,
                threads=threads,
            ),
            new_console(),
        )


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def lm_eval(
    context: typer.Context,
    record: Annotated[
        Path | None, typer.Option(help="File that gets the results as a JSON line.", callback=written_file)
    ] = None,
) -> None:
    """EleutherAI's lm_eval with top-k attention: its own arguments (--help shows them) and --record FILE.

    Two ways to choose k: --model hf-topk --model_args pretrained=ID,attention_k=64, or --model hf --model_args
    pretrained=ID,attn_implementation=topk with the environment variable TOPK_ATTENTION_K, or a checkpoint that
    remembers its k.
    """
    with errors_in_words():
        from .lm_eval import run_harness

        run_harness(context.args, record)


@app.command()
def info() -> None:
    """Show versions, processor, backends and which of them runs."""
    with errors_in_words():
        from .info import describe_environment

        typer.echo(describe_environment())
