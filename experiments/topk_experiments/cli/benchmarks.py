"""Benchmarks whose methods take turns, beside their rivals, and of whole models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .application import benchmark
from .options import (
    Backend,
    Fresh,
    Out,
    PointOptions,
    Seed,
    TimeLimit,
    errors_in_words,
    feed_forward_neurons,
    integers,
    integers_or_none,
    names,
    names_or_none,
    new_console,
    taking,
)


@dataclass(frozen=True)
class RoundOptions:
    """Options of benchmarks whose methods take turns."""

    rivals: Annotated[str | None, typer.Option(help="Methods beside ours, separated by commas.")] = None
    repetitions: Annotated[int, typer.Option(help="Timed rounds of a work; long ones get fewer, but three.")] = 7
    step_limit: Annotated[
        float, typer.Option(help="Leave a method out where a forward and backward pass should take more seconds.")
    ] = 120
    time_limit: TimeLimit = 3600
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True
    out: Out = Path("results")
    seed: Seed = 0
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2
    backend: Annotated[str, typer.Option(help="Backend of top-k that is compared with the rivals.")] = "cpu"
    fresh: Fresh = False


@benchmark.command()
@taking(RoundOptions, out=Path("results/attention-kernel"))
def attention_kernel(
    shared: RoundOptions,
    sweep: Annotated[
        str | None, typer.Option(help='Instead of the table: "length" (1,024 to 131,072) or "k" (8 to 1,024).')
    ] = None,
    works: Annotated[
        str | None,
        typer.Option(
            help="Rows of the table, separated by commas: plain, long, causal, short, large-k, learned-bias, dropout."
        ),
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="For the sweep over length, instead of its own.")] = None,
) -> None:
    """The attention operation alone, forward and with backward, against PyTorch's and others in alternation.

    Methods are checked against the reference first. Rivals: sdpa, topk-chunked, query-chunks and performer. Points are
    appended to table.jsonl, length.jsonl or k.jsonl; interrupted, the same command continues with those that are
    missing.
    """
    with errors_in_words(f"finished points are in {shared.out}"):
        from ..benchmarks.attention import ROUNDS

        if lengths is not None and sweep != "length":
            raise ValueError('lengths goes with sweep "length" alone')
        _run_rounds(ROUNDS, shared, sweep=sweep, works=works, sizes=integers_or_none("lengths", lengths))


@benchmark.command()
@taking(RoundOptions, out=Path("results/feed-forward-kernel"))
def feed_forward_kernel(
    shared: RoundOptions,
    sweep: Annotated[
        str | None, typer.Option(help='Instead of the table: "d-ff", the paper\'s figure (2,048 to 65,536).')
    ] = None,
    works: Annotated[
        str | None,
        typer.Option(
            help="Rows of the table, separated by commas: t5-11b, t5-base, smollm2, and t5-base-N and smollm2-N for N "
            "= 1, 2, 4 and 8 tokens."
        ),
    ] = None,
    d_ff: Annotated[str | None, typer.Option(help="For the sweep, instead of its own.")] = None,
    tokens: Annotated[int | None, typer.Option(help="For the sweep, instead of 4,096.")] = None,
) -> None:
    """The feed-forward operation alone, forward and with backward, against PyTorch's dense layer in alternation.

    Methods are checked against the reference first. Rivals: dense, topk-chunked and token-chunks. Points are appended
    to table.jsonl or d_ff.jsonl; interrupted, the same command continues with those that are missing.
    """
    with errors_in_words(f"finished points are in {shared.out}"):
        from ..benchmarks.feed_forward import ROUNDS

        sweep = "d_ff" if sweep == "d-ff" else sweep
        _run_rounds(ROUNDS, shared, sweep=sweep, works=works, sizes=integers_or_none("d_ff", d_ff), tokens=tokens)


def _run_rounds(table: Any, shared: RoundOptions, *, works: str | None, **choice: Any) -> None:
    from ..benchmarks.rounds import RoundBenchmark, run_and_show_rounds
    from ..runs.steps import Limits

    name, plan = table.plan(shared.backend, works=names_or_none(works), rivals=names_or_none(shared.rivals), **choice)
    benchmark = RoundBenchmark(
        table,
        name,
        plan,
        out=shared.out,
        threads=shared.threads,
        seed=shared.seed,
        repetitions=shared.repetitions,
        step_limit_s=shared.step_limit,
        limits=Limits(shared.time_limit),
        with_memory=shared.memory,
        fresh=shared.fresh,
    )
    run_and_show_rounds(benchmark, new_console())


@benchmark.command()
@taking(PointOptions, out=Path("results/model"), time_limit=3600)
def model(
    shared: PointOptions,
    shape: Annotated[str, typer.Option(help="Random weights in the shape of bert-base or t5-base.")] = "bert-base",
    config: Annotated[
        str | None, typer.Option(help="Instead: local folder or Hugging Face id whose configuration to use.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Input lengths, separated by commas; doubling from 2,048 to 32,768 by default.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Among vanilla, sdpa, query-chunks, topk, performer and rfa, separated by commas.")
    ] = "topk,query-chunks,sdpa,vanilla",
    k: Annotated[int, typer.Option(help="Keys kept per query (topk).")] = 64,
    feed_forward_k: Annotated[
        str | None,
        typer.Option(help='Neurons kept per token (topk); "all": every neuron, in token chunks. Else dense layers.'),
    ] = None,
    features: Annotated[int, typer.Option(help="Random features (performer, rfa).")] = 256,
    decoder_length: Annotated[int, typer.Option(help="Tokens of the decoder, where there is one.")] = 64,
    dropout: Annotated[float, typer.Option(help="Probability of every dropout that the model has.")] = 0.1,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, layer by layer.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    step_limit: Annotated[float, typer.Option(help="Leave a point out whose step should take more seconds.")] = 600,
    name: Annotated[str | None, typer.Option(help="Of the files; default: the shape. Other settings, other name.")] = (
        None
    ),
    backend: Backend = "auto",
) -> None:
    """One training step of a whole model (forward, loss, backward): peak memory and time against length.

    Every point has a process of its own, in which its answer is checked first. Points are appended to NAME.jsonl, those
    that ran out of memory among them; interrupted, the same command continues with those that are missing.
    """
    with errors_in_words(f"finished points are in {shared.out}"):
        from ..benchmarks import model as model_benchmark
        from ..models.pretrained import find_model

        source = None if config is None else find_model(config)
        if source is not None:
            shape = source.name
        points = model_benchmark.grid(
            [2048, 4096, 8192, 16384, 32768] if lengths is None else integers("lengths", lengths),
            names(methods),
            shape=shape,
            k=k,
            feed_forward_k=feed_forward_neurons(feed_forward_k),
            num_features=features,
            decoder_length=decoder_length,
            dropout_p=dropout,
            checkpointing=checkpointing,
            dtype=dtype,
            backend=backend,
            **shared.settings(),
            source=source,
        )
        model_benchmark.run_and_report(
            model_benchmark.ModelBenchmark(
                points,
                shared.out,
                name=name or shape.replace("/", "--"),
                repetitions=shared.repetitions,
                step_limit_s=step_limit,
                limits=shared.limits(),
                fresh=shared.fresh,
            ),
            new_console(),
        )
