"""Commands that train small models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import train
from .options import (
    Backend,
    CompletedK,
    EvaluateEvery,
    Heads,
    Layers,
    LearningRate,
    ModelSize,
    Neurons,
    Out,
    Seed,
    Steps,
    Text,
    Threads,
    TrainAgain,
    Windows,
    errors_in_words,
    integers,
    new_console,
    number_of_threads,
    settings,
)


@train.command()
def feed_forward_curve(
    k: Annotated[str, typer.Option(help="Neurons kept per token, separated by commas; one arm each.")] = "128",
    text: Text = None,
    layers: Layers = 4,
    d_model: ModelSize = 256,
    heads: Heads = 4,
    d_ff: Neurons = 1024,
    context: Annotated[int, typer.Option(help="Bytes of a window.")] = 256,
    batch: Windows = 16,
    steps: Steps = 400,
    learning_rate: LearningRate = 1e-3,
    evaluate_every: EvaluateEvery = 20,
    out: Out = Path("results/feed-forward-curve"),
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", callback=number_of_threads)] = 2,
    backend: Backend = "auto",
    fresh: TrainAgain = False,
) -> None:
    """Train one small language model with dense and with top-k feed-forward layers; compare the loss curves.

    All arms have the same initial weights and batches. Writes feed-forward-curve.json and .png. To continue an
    interrupted training, repeat the command: it resumes from the last point of the curve.
    """
    with errors_in_words(f"finished arms and checkpoints are in {out}"):
        from ..language_model.feed_forward_curve import CurveConfig, run_feed_forward_curve

        config = CurveConfig(
            k=integers("k", k),
            text=text,
            num_layers=layers,
            d_model=d_model,
            num_heads=heads,
            d_ff=d_ff,
            context=context,
            batch=batch,
            steps=steps,
            learning_rate=learning_rate,
            evaluate_every=evaluate_every,
            threads=threads,
            seed=seed,
            backend=backend,
            out=out,
            fresh=fresh,
        )
        run_feed_forward_curve(config, new_console())


@train.command()
def language_model(
    attention_k: Annotated[str, typer.Option(help="Keys kept per query, separated by commas; one arm each.")] = "32",
    completed_k: CompletedK = "",
    feed_forward_k: Annotated[
        str, typer.Option(help="Neurons kept per token, separated by commas; one arm each.")
    ] = "",
    full: Annotated[bool, typer.Option(help="Train the full model too.")] = True,
    text: Text = None,
    tokens: Annotated[str, typer.Option(help='"bytes", or "words" separated by spaces, as in WikiText.')] = "bytes",
    layers: Layers = 4,
    d_model: ModelSize = 128,
    heads: Heads = 4,
    d_ff: Neurons = 512,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    batch: Windows = 8,
    steps: Steps = 1000,
    learning_rate: LearningRate = 1e-3,
    evaluate_every: EvaluateEvery = 100,
    out: Out = Path("results/language-model"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: TrainAgain = False,
) -> None:
    """Train a small GPT from scratch in full and with top-k; compare perplexity on the last tenth of the text.

    All arms have the same initial weights and batches. Writes TEXT-TOKENS.json and .png. To continue an interrupted
    training, repeat the command: it resumes from the last point of the curve.
    """
    with errors_in_words(f"finished arms and checkpoints are in {out}"):
        from ..language_model.language_model import LanguageModelConfig, run_language_model

        config = LanguageModelConfig(
            settings=settings(attention_k, completed_k, feed_forward_k, full),
            text=text,
            tokens=tokens,
            num_layers=layers,
            d_model=d_model,
            num_heads=heads,
            d_ff=d_ff,
            context=context,
            batch=batch,
            steps=steps,
            learning_rate=learning_rate,
            evaluate_every=evaluate_every,
            threads=threads,
            seed=seed,
            backend=backend,
            out=out,
            fresh=fresh,
        )
        run_language_model(config, new_console())
