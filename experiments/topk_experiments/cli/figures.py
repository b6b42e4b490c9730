"""The commands of the paper's figures: layers and chunk sizes, the error that goes with them, and the page of all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .application import benchmark
from .options import (
    Backend,
    Device,
    HeadDim,
    Heads,
    Out,
    PointOptions,
    Text,
    Threads,
    errors_in_words,
    integers,
    integers_or_none,
    names,
    names_or_none,
    new_console,
    taking,
)


@benchmark.command()
@taking(PointOptions, out=Path("results/attention"))
def attention(
    shared: PointOptions,
    lengths: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "2048,4096,8192,16384,32768",
    implementations: Annotated[
        str | None,
        typer.Option(
            help="Among topk (on --backend), topk-BACKEND, query-chunks, sdpa, vanilla, vanilla-chunks, performer and "
            "rfa, separated by commas. Default: all that can do the bias and the dropout."
        ),
    ] = None,
    k: Annotated[str, typer.Option(help="Keys kept per query (topk), separated by commas.")] = "128",
    features: Annotated[int, typer.Option(help="Random features (performer, rfa).")] = 256,
    heads: Heads = 12,
    head_dim: HeadDim = 64,
    bias: Annotated[str, typer.Option(help='"none", or "learned": a number per head and distance.')] = "none",
    dropout: Annotated[float, typer.Option(help="Probability of dropping a weight.")] = 0.0,
    projections: Annotated[
        bool, typer.Option(help="Four linear layers around the attention, or the attention alone.")
    ] = True,
    bias_and_dropout: Annotated[
        bool,
        typer.Option(
            "--bias-and-dropout",
            help="Instead of the grid: learned bias, then dropout 0.1, at L = 8192 with 4 heads without projections, "
            "topk against sdpa.",
        ),
    ] = False,
    backend: Backend = "auto",
) -> None:
    """One self-attention layer, forward and backward: peak memory and time against length.

    Every point is checked against a dense computation first. One that runs out of memory or time is recorded as such.
    Points are appended to attention.jsonl; interrupted, the same command continues with those that are missing.
    """
    with errors_in_words(f"finished points are in {shared.out / 'attention.jsonl'}"):
        from ..benchmarks.attention import LAYERS, works

        settings: Any = {"backend": backend, **shared.settings()}
        ks = integers("k", k)
        if bias_and_dropout:
            points = works.bias_and_dropout(ks[0], **settings)
        else:
            points = works.grid(
                integers("lengths", lengths),
                works.able_to(bias, dropout) if implementations is None else names(implementations),
                ks,
                num_heads=heads,
                head_dim=head_dim,
                num_features=features,
                bias=bias,
                dropout_p=dropout,
                projections=projections,
                **settings,
            )
        _run_points(LAYERS, points, shared)


@benchmark.command()
@taking(PointOptions, out=Path("results/feed-forward"))
def feed_forward(
    shared: PointOptions,
    d_ff: Annotated[
        str, typer.Option(help="Neurons of the layer, separated by commas.")
    ] = "2048,6144,16384,32768,65536",
    methods: Annotated[
        str,
        typer.Option(
            help="Among topk, topk-BACKEND, vanilla, vanilla-chunks, token-chunks and topk-torch-sparse, separated by "
            "commas."
        ),
    ] = "topk,topk-chunked,vanilla,vanilla-chunks,token-chunks,topk-torch-sparse",
    k: Annotated[str, typer.Option(help="Neurons kept per token (topk), separated by commas.")] = "512",
    tokens: Annotated[int, typer.Option(help="Tokens; the paper's are 262144.")] = 4096,
    d_model: Annotated[int, typer.Option(help="Size of a token.")] = 768,
) -> None:
    """One feed-forward layer, forward and backward: peak memory and time against its number of neurons.

    Every point is checked against a dense computation first. One that runs out of memory or time is recorded as such.
    Points are appended to feed-forward.jsonl; interrupted, the same command continues with those that are missing.
    """
    with errors_in_words(f"finished points are in {shared.out / 'feed-forward.jsonl'}"):
        from ..benchmarks.feed_forward import LAYERS
        from ..benchmarks.feed_forward.works import grid

        points = grid(
            integers("d-ff", d_ff),
            names(methods),
            integers("k", k),
            tokens=tokens,
            d_model=d_model,
            **shared.settings(),
        )
        _run_points(LAYERS, points, shared)


@benchmark.command()
@taking(PointOptions, out=Path("results/chunk-size"))
def chunk_size(
    shared: PointOptions,
    chunk_sizes: Annotated[
        str, typer.Option(help="Queries handled at a time, separated by commas.")
    ] = "128,256,512,1024,2048,4096,8192",
    methods: Annotated[
        str,
        typer.Option(
            help="Among vanilla-chunks (the paper's query chunking), query-chunks, topk, topk-cpu and sdpa, separated "
            "by commas; the last two have no chunk size."
        ),
    ] = "vanilla-chunks,query-chunks,topk,topk-cpu,sdpa",
    length: Annotated[int, typer.Option(help="Length of the sequence; the paper's is 65536.")] = 32768,
    k: Annotated[int, typer.Option(help="Keys kept per query (topk, topk-cpu).")] = 128,
    heads: Heads = 12,
    head_dim: HeadDim = 64,
    causal: Annotated[bool, typer.Option(help="A query sees the keys up to its own alone.")] = False,
) -> None:
    """Attention without a mask, forward: peak memory and time against the number of queries handled at a time.

    Every point is checked against a dense computation first. One that runs out of memory or time is recorded as such.
    Points are appended to chunk-size.jsonl; interrupted, the same command continues with those that are missing.
    """
    with errors_in_words(f"finished points are in {shared.out / 'chunk-size.jsonl'}"):
        from ..benchmarks.attention import CHUNKS
        from ..benchmarks.attention.works import chunk_grid

        points = chunk_grid(
            names(methods),
            integers("chunk-sizes", chunk_sizes),
            length=length,
            k=k,
            num_heads=heads,
            head_dim=head_dim,
            is_causal=causal,
            **shared.settings(),
        )
        _run_points(CHUNKS, points, shared)


@benchmark.command()
@taking(PointOptions, out=Path("results/attention-error"))
def error(
    shared: PointOptions,
    model: Annotated[
        str | None,
        typer.Option(help="Local folder or Hugging Face id of a causal model. Default: SmolLM2-135M from a package."),
    ] = None,
    text: Text = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the window, separated by commas.")] = "2048,8192",
    layers: Annotated[
        str | None, typer.Option(help="Numbers from 0, separated by commas. Default: five from first to last.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Among topk, performer, performer-tuned, rfa, uniform and sdpa, separated by commas."),
    ] = "topk,performer,performer-tuned,rfa,uniform,sdpa",
    k: Annotated[
        str | None, typer.Option(help="Keys kept per query, separated by commas. Default: 4 to 1,024.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Numbers of random features, separated by commas. Default: 32 to 4,096.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of random features; errors are means over them.")] = 3,
) -> None:
    """Top-k attention, Performer and RFA against dense attention, on what a real model attends to: error, time, memory.

    Points are appended to error.jsonl; interrupted, the same command continues with those that are missing.
    """
    with errors_in_words(f"finished points are in {shared.out / 'error.jsonl'}"):
        from ..benchmarks.error import ErrorBenchmark, run_error_benchmark

        run_error_benchmark(
            ErrorBenchmark(
                model=model,
                text=text,
                lengths=integers("lengths", lengths),
                layers=integers_or_none("layers", layers),
                methods=names(methods),
                k=integers_or_none("k", k),
                features=integers_or_none("features", features),
                draws=draws,
                repetitions=shared.repetitions,
                limits=shared.limits(),
                out=shared.out,
                fresh=shared.fresh,
                **shared.settings(),
            ),
            new_console(),
        )


@benchmark.command()
def figures(
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick", help="Sizes up to the paper's, about half an hour; or ten minutes on two cores."
        ),
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Among attention, feed-forward, chunk-size and error, separated by commas.")
    ] = None,
    memory_limit: Annotated[float, typer.Option(help="GiB that a point's process may take.")] = 8.0,
    out: Out = Path("results"),
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """The benchmarks of the paper's figures, one after the other, and a page with all of them.

    Interrupted, the same command continues with the points that are missing. The page is what `topk-experiments report`
    makes of the records.
    """
    with errors_in_words(f"finished points are in {out}"):
        import torch

        from ..benchmarks.figures import run_figures
        from ..results_page import write_page
        from ..runs.progress import say

        console = new_console()
        run_figures(
            is_full=full,
            only=names_or_none(only),
            memory_gib=memory_limit,
            out=out,
            device=device,
            threads=threads or torch.get_num_threads(),
            console=console,
        )
        say(console, f"Page: {write_page(out)}")


def _run_points(table: Any, points: Any, shared: PointOptions) -> None:
    from ..benchmarks.rounds import PointBenchmark, run_and_show_points

    limits = shared.limits()
    benchmark = PointBenchmark(points, shared.out, shared.repetitions, limits=limits, fresh=shared.fresh)
    run_and_show_points(table, benchmark, new_console())
