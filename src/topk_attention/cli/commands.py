"""The commands. Each reads its options and imports what it needs only then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import app
from .options import (
    Backend,
    Seed,
    Threads,
    at_least,
    errors_in_words,
    new_console,
    next_message,
    note_on_stderr,
    write_at_once,
    written_file,
)


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


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of a causal transformers model.")],
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 text file that the model continues.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself, in place of a file.")] = None,
    attention_k: Annotated[
        str | None,
        typer.Option(
            help='Keys kept per query: a number, "all", or the file of a calibration. Default: full attention.'
        ),
    ] = None,
    completed: Annotated[
        bool, typer.Option("--completed", help="Let the keys that are not kept enter each softmax as one more.")
    ] = False,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file in the model's folder.")] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="A conversation: messages from standard input, line by line, until /exit or its end. A prompt is the "
            "first message.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", callback=at_least(1))] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature. Default: the most likely token each time.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
) -> None:
    """Continue a text, or talk, with top-k attention; the text goes to standard output as it comes.

    Tokens a second of the prompt and of the answer, and peak memory, go to standard error. Between the messages of a
    conversation the cache stays, so that only what is new is read.
    """
    with errors_in_words():
        from .generate import GenerationRequest, run_generation

        request = GenerationRequest(
            model=model,
            prompt=prompt,
            prompt_file=prompt_file,
            attention_k=attention_k,
            completed=completed,
            gguf_file=gguf_file,
            chat=chat,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            temperature=temperature,
            seed=seed,
            threads=threads,
            backend=backend,
        )
        run_generation(request, write_at_once, note_on_stderr, next_message)


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
