"""The benchmarks: operations and whole models beside their rivals, the paper's figures, and the error of attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from topk_attention.functional.words import full_attention_note

from .. import benchmarks
from ..benchmarks.attention import works as attention_works
from ..benchmarks.attention.layers import works_of_layers
from ..benchmarks.decode import DecodeBenchmark
from ..benchmarks.error import ErrorBenchmark, run_error_benchmark
from ..benchmarks.feed_forward import works as feed_forward_works
from ..benchmarks.figures import run_figures
from ..benchmarks.generation import GenerationBenchmark
from ..benchmarks.long_cache import LongCacheBenchmark, run_long_cache
from ..benchmarks.long_cache.measure import Point as LongCachePoint
from ..benchmarks.model import ModelBenchmark
from ..benchmarks.model import Point as ModelPoint
from ..benchmarks.networks import NetworkBenchmark
from ..benchmarks.paths import PathBenchmark
from ..benchmarks.rounds import PointBenchmark, RoundBenchmark, Setting, run_and_show_points, run_and_show_rounds
from ..benchmarks.sequence_parallel import SequenceParallelBenchmark, run_sequence_parallel
from ..benchmarks.sequence_parallel.measure import Point as SequencePoint
from ..models.pretrained import find_model
from ..results_page import write_page
from ..runs.progress import say
from ..runs.records import Json
from ..runs.steps import Limits
from .application import benchmark
from .options import Backend, at_least, feed_forward_neurons, new_console, taking

_SETTING = ("device", "threads", "seed")
_USUAL = ("topk", "query-chunks", "sdpa", "vanilla")
_AS_MANY = torch.get_num_threads()  # as torch takes by itself
Rivals = Annotated[Sequence[str] | None, "Methods beside ours."]
Compared = Annotated[str, "Backend of top-k that is compared with the rivals."]


@benchmark.command()
@taking(RoundBenchmark, (Limits, "time_s"), out=Path("results/attention-kernel"), time_s=3600.0)
def attention_kernel(
    rounds: Json,
    limits: Json,
    sweep: Annotated[str | None, 'Instead of the table: "length" (1,024 to 131,072) or "k" (8 to 1,024).'] = None,
    works: Annotated[
        Sequence[str] | None,
        "Rows of the table: plain, long, causal, short, large-k, large-heads, bfloat16, learned-bias, dropout.",
    ] = None,
    layers: Annotated[
        Sequence[int] | None,
        "Instead of the table: queries and keys of these layers of a model that reads a text, such as 0,10,20.",
    ] = None,
    model: Annotated[
        str | None,
        "With --layers: local folder or Hugging Face id of a causal model. Default: SmolLM2-135M from a package.",
    ] = None,
    text: Annotated[Path | None, "With --layers: UTF-8 text file. Default: Python's own documentation topics."] = None,
    lengths: Annotated[
        Sequence[int] | None, "For the sweep over length, instead of its own; with --layers: tokens, instead of 8,192."
    ] = None,
    rivals: Rivals = None,
    backend: Compared = "cpu",
) -> None:
    """The attention operation alone, forward and with backward, against PyTorch's and others in alternation.

    Methods are checked against the reference first. Rivals: sdpa, topk-chunked, query-chunks and performer; also
    topk-completed, if it is named. Points are appended to table.jsonl, length.jsonl, k.jsonl or layers.jsonl;
    interrupted, the same command continues with those that are missing.
    """
    if lengths is not None and sweep != "length" and layers is None:
        raise ValueError('lengths goes with sweep "length" alone, or with layers')
    if layers is not None and (sweep is not None or works is not None):
        raise ValueError("layers are measured instead of a sweep or of works; give one of these options")
    if layers is None and (model is not None or text is not None):
        raise ValueError("model and text go with layers, whose queries and keys are measured, such as 0,10,20")
    if layers is None:
        plan = benchmarks.attention.ROUNDS.plan(backend, sweep=sweep, works=works, sizes=lengths, rivals=rivals)
    else:
        captured = works_of_layers(
            layers,
            model=model,
            text=text,
            lengths=lengths,
            out=rounds["out"],
            threads=rounds["threads"],
            say=functools.partial(say, new_console()),
        )
        plan = "layers", benchmarks.attention.ROUNDS.methods_of(captured, backend, rivals or ("sdpa",))
    _say_if_full((work.k, work.length) for work in plan[1])
    _run_rounds(benchmarks.attention.ROUNDS, plan, rounds, limits)


@benchmark.command()
@taking(RoundBenchmark, (Limits, "time_s"), out=Path("results/feed-forward-kernel"), time_s=3600.0)
def feed_forward_kernel(
    rounds: Json,
    limits: Json,
    sweep: Annotated[str | None, 'Instead of the table: "d-ff", the paper\'s figure (2,048 to 65,536).'] = None,
    works: Annotated[
        Sequence[str] | None,
        "Rows of the table: t5-11b, t5-base, smollm2, phi3-mini, and t5-base-N and smollm2-N for N = 1, 2, 4 and 8 "
        "tokens.",
    ] = None,
    d_ff: Annotated[Sequence[int] | None, "For the sweep, instead of its own."] = None,
    tokens: Annotated[int | None, typer.Option(help="For the sweep, instead of 4,096.", callback=at_least(1))] = None,
    rivals: Rivals = None,
    backend: Compared = "cpu",
) -> None:
    """The feed-forward operation alone, forward and with backward, against PyTorch's dense layer in alternation.

    Methods are checked against the reference first. Rivals: dense, topk-chunked and token-chunks. Points are appended
    to table.jsonl or d_ff.jsonl; interrupted, the same command continues with those that are missing.
    """
    table, sweep = benchmarks.feed_forward.ROUNDS, "d_ff" if sweep == "d-ff" else sweep
    plan = table.plan(backend, sweep=sweep, works=works, sizes=d_ff, rivals=rivals, tokens=tokens)
    _run_rounds(table, plan, rounds, limits)


@benchmark.command()
@taking(
    ModelBenchmark,
    Limits,
    (ModelPoint, "k", "num_features", "decoder_length", "dropout_p", "checkpointing", "dtype", *_SETTING),
    out=Path("results/model"),
    time_s=3600.0,
    threads=_AS_MANY,
)
def model(
    how: Json,
    limits: Json,
    point: Json,
    shape: Annotated[str, "Random weights in the shape of bert-base or t5-base."] = "bert-base",
    config: Annotated[str | None, "Instead: local folder or Hugging Face id whose configuration to use."] = None,
    lengths: Annotated[Sequence[int], "Input lengths."] = (2048, 4096, 8192, 16384, 32768),
    methods: Annotated[Sequence[str], f"Among {', '.join(benchmarks.model.METHODS)}."] = _USUAL,
    feed_forward_k: Annotated[
        str | None, 'Neurons kept per token (topk); "all": every neuron, in token chunks. Else dense layers.'
    ] = None,
    name: Annotated[str | None, "Of the files; default: the shape. Other settings, other name."] = None,
    backend: Backend = "auto",
) -> None:
    """One training step of a whole model (forward, loss, backward): peak memory and time against length.

    Every point has a process of its own, in which its answer is checked first. Points are appended to NAME.jsonl, those
    that ran out of memory among them; interrupted, the same command continues with those that are missing.
    """
    source = None if config is None else find_model(config)
    shape = shape if source is None else source.name
    point |= {"shape": shape, "source": source, "feed_forward_k": feed_forward_neurons(feed_forward_k)}
    points = benchmarks.model.grid(lengths, methods, backend=backend, **point)
    name = name or shape.replace("/", "--")
    _name_full_attention(points)
    benchmarks.model.run_and_report(ModelBenchmark(points, name=name, limits=Limits(**limits), **how), new_console())


@benchmark.command()
@taking(
    PointBenchmark,
    Limits,
    (attention_works.Point, "num_features", "num_heads", "head_dim", "bias", "dropout_p", "projections"),
    Setting,
    out=Path("results/attention"),
    projections=True,
    threads=_AS_MANY,
)
def attention(
    how: Json,
    limits: Json,
    layer: Json,
    setting: Json,
    lengths: Annotated[Sequence[int], "Sequence lengths."] = (2048, 4096, 8192, 16384, 32768),
    implementations: Annotated[
        Sequence[str] | None,
        "Among topk (on --backend), topk-BACKEND, topk-completed, query-chunks, sdpa, vanilla, vanilla-chunks, "
        "performer and rfa. Default: all that can do the bias and the dropout.",
    ] = None,
    k: Annotated[Sequence[int], "Keys kept per query (topk)."] = (128,),
    bias_and_dropout: Annotated[
        bool,
        "Instead of the grid: learned bias, then dropout 0.1, at L = 8192 with 4 heads without projections, topk "
        "against sdpa.",
    ] = False,
    backend: Backend = "auto",
) -> None:
    """One self-attention layer, forward and backward: peak memory and time against length.

    Every point is checked against a dense computation first. One that runs out of memory or time is recorded as such.
    Points are appended to attention.jsonl; interrupted, the same command continues with those that are missing.
    """
    if bias_and_dropout:
        points = attention_works.bias_and_dropout(k[0], backend=backend, **setting)
    else:
        if implementations is None:
            implementations = attention_works.able_to(layer["bias"], layer["dropout_p"])
        points = attention_works.grid(lengths, implementations, k, backend=backend, **layer, **setting)
    _name_full_attention(points)
    _run_points(benchmarks.attention.LAYERS, points, how, limits)


@benchmark.command()
@taking(
    PointBenchmark,
    Limits,
    (feed_forward_works.Point, "tokens", "d_model"),
    Setting,
    out=Path("results/feed-forward"),
    threads=_AS_MANY,
)
def feed_forward(
    how: Json,
    limits: Json,
    layer: Json,
    setting: Json,
    d_ff: Annotated[Sequence[int], "Neurons of the layer."] = (2048, 6144, 16384, 32768, 65536),
    methods: Annotated[
        Sequence[str], "Among topk, topk-BACKEND, vanilla, vanilla-chunks, token-chunks and topk-torch-sparse."
    ] = feed_forward_works.DEFAULT,
    k: Annotated[Sequence[int], "Neurons kept per token (topk)."] = (512,),
) -> None:
    """One feed-forward layer, forward and backward: peak memory and time against its number of neurons.

    Every point is checked against a dense computation first. One that runs out of memory or time is recorded as such.
    Points are appended to feed-forward.jsonl; interrupted, the same command continues with those that are missing.
    """
    points = feed_forward_works.grid(d_ff, methods, k, **layer, **setting)
    _run_points(benchmarks.feed_forward.LAYERS, points, how, limits)


@benchmark.command()
@taking(
    PointBenchmark,
    Limits,
    (attention_works.Point, "k", "num_heads", "head_dim", "is_causal"),
    Setting,
    out=Path("results/chunk-size"),
    threads=_AS_MANY,
)
def chunk_size(
    how: Json,
    limits: Json,
    work: Json,
    setting: Json,
    chunk_sizes: Annotated[Sequence[int], "Queries handled at a time."] = (128, 256, 512, 1024, 2048, 4096, 8192),
    methods: Annotated[
        Sequence[str],
        "Among vanilla-chunks (the paper's query chunking), query-chunks, topk, topk-cpu and sdpa; the last two have "
        "no chunk size.",
    ] = tuple(attention_works.CHUNK_METHODS),
    length: Annotated[int, "Length of the sequence; the paper's is 65536."] = 32768,
) -> None:
    """Attention without a mask, forward: peak memory and time against the number of queries handled at a time.

    Every point is checked against a dense computation first. One that runs out of memory or time is recorded as such.
    Points are appended to chunk-size.jsonl; interrupted, the same command continues with those that are missing.
    """
    points = attention_works.chunk_grid(methods, chunk_sizes, length, **work, **setting)
    _name_full_attention(points)
    _run_points(benchmarks.attention.CHUNKS, points, how, limits)


@benchmark.command()
@taking(ErrorBenchmark, Limits, threads=_AS_MANY)
def error(how: Json, limits: Json) -> None:
    """Top-k attention, Performer and RFA against dense attention, on what a real model attends to: error, time, memory.

    Points are appended to error.jsonl; interrupted, the same command continues with those that are missing.
    """
    benchmark = ErrorBenchmark(limits=Limits(**limits), **how)
    _say_if_full(itertools.product(benchmark.ks, benchmark.lengths))
    run_error_benchmark(benchmark, new_console())


@benchmark.command()
@taking(DecodeBenchmark, Limits, threads=_AS_MANY)
def decode(how: Json, limits: Json) -> None:
    """One query against a long cache of keys, the operation alone: top-k, with and without a kept index, and PyTorch.

    Every answer is checked against float64 first; then the methods take turns. Works are appended to decode.jsonl;
    interrupted, the same command continues with those that are missing.
    """
    benchmarks.decode.run_and_show(DecodeBenchmark(limits=Limits(**limits), **how), new_console())


@benchmark.command()
@taking(GenerationBenchmark, Limits, threads=_AS_MANY)
def generation(how: Json, limits: Json) -> None:
    """A model generates after a long prompt: top-k beside transformers' caches and llama.cpp, in one run.

    Seconds to read the prompt, milliseconds a token after it and after a few tokens, peak memory, and at how many
    places the next token is full attention's. llama.cpp needs pip install --no-deps -r requirements-generation.txt. A
    method that is not there is named with the reason. Points are appended to generation.jsonl; interrupted, the same
    command continues with those that are missing.
    """
    benchmark = GenerationBenchmark(limits=Limits(**limits), **how)
    _say_if_full((benchmark.k, length) for length in benchmark.lengths)
    benchmarks.generation.run_and_show(benchmark, new_console())


@benchmark.command()
@taking(NetworkBenchmark, Limits, time_s=1800.0, threads=_AS_MANY)
def networks(how: Json, limits: Json) -> None:
    """The feed-forward network of a layer in the shapes of real models: experts and fused weights, against dense ones.

    One token, many tokens, and a training step, with random weights; every neuron gives the dense answer first. The
    largest, Mixtral's, takes 18 GiB. Networks are appended to networks.jsonl; interrupted, the same command continues
    with those that are missing.
    """
    benchmarks.networks.run_and_show(NetworkBenchmark(limits=Limits(**limits), **how), new_console())


@benchmark.command()
@taking(PathBenchmark, Limits, time_s=1800.0)
def paths(how: Json, limits: Json) -> None:
    """Peak memory of each way through a converted model against length: forward and a training step, beside eager.

    A model of one layer with random weights for each way and method, in a process of its own. Ways are appended to
    paths.jsonl; interrupted, the same command continues with those that are missing.
    """
    benchmarks.paths.run_and_show(PathBenchmark(limits=Limits(**limits), **how), new_console())


@benchmark.command()
@taking(
    LongCacheBenchmark,
    Limits,
    (LongCachePoint, "k", "layers", "heads", "key_heads", "head_dim", "dtype", "steps", "threads", "seed"),
    time_s=7200.0,
    threads=_AS_MANY,
)
def long_cache(
    how: Json,
    limits: Json,
    point: Json,
    tokens: Annotated[Sequence[int], "Cached tokens. 1,000,000 in the default shape take 30.5 GiB of disk."] = (
        100_000,
    ),
) -> None:
    """A token over a context that may be larger than memory: keys and values in files, an index of keys in memory.

    A stack of attention layers in the shape of a model of 1B parameters, without the rest of it. Files are written
    first (interrupted, the same command continues) and taken away at the end. Answers are checked. With --memory-limit
    the process can have no more memory than that, without the pages of files, which the system lends. On Linux.
    """
    points = [LongCachePoint(tokens=number, **point) for number in sorted(set(tokens))]
    run_long_cache(LongCacheBenchmark(points=points, limits=Limits(**limits), **how), new_console())


@benchmark.command()
@taking(
    SequenceParallelBenchmark,
    Limits,
    (SequencePoint, "tokens", "k", "layers", "hidden", "heads", "key_heads", "neurons", "vocabulary", "method", "seed"),
    time_s=3600.0,
)
def sequence_parallel(
    how: Json,
    limits: Json,
    point: Json,
    processes: Annotated[Sequence[int], "Processes that share the sequence; each has one thread."] = (2,),
) -> None:
    """A training step of one long sequence: on one process, with one thread and with more, and shared by several.

    For each number of processes a process alone with as many threads is measured too, and one with one thread. Time of
    a step, and peak memory of each process. Gradients are checked first.
    """
    numbers = sorted(set(processes) - {1})
    alone = [SequencePoint(threads=threads, **point) for threads in (1, *numbers)]
    shared = [SequencePoint(processes=number, **point) for number in numbers]
    benchmark = SequenceParallelBenchmark(points=[*alone, *shared], limits=Limits(**limits), **how)
    run_sequence_parallel(benchmark, new_console())


@benchmark.command()
@taking(
    (PointBenchmark, "out"),
    (Limits, "memory_gib"),
    (Setting, "device", "threads"),
    out=Path("results"),
    memory_gib=8.0,
    threads=_AS_MANY,
)
def figures(
    how: Json,
    limits: Json,
    setting: Json,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick", help="Sizes up to the paper's, about half an hour; or ten minutes on two cores."
        ),
    ] = False,
    only: Annotated[Sequence[str] | None, "Among attention, feed-forward, chunk-size and error."] = None,
) -> None:
    """The benchmarks of the paper's figures, one after the other, and a page with all of them.

    Interrupted, the same command continues with the points that are missing. The page is what `topk-experiments report`
    makes of the records.
    """
    console = new_console()
    run_figures(is_full=full, only=only, **limits, **how, **setting, console=console)
    say(console, f"Page: {write_page(how['out'])}")


def _name_full_attention(points: Sequence[Any]) -> None:
    """Say which points of top-k keep every key."""
    _say_if_full((point.k, point.length) for point in points if point.method.startswith("topk"))


def _say_if_full(ks_and_lengths: Iterable[tuple[int, int]]) -> None:
    of_length: dict[int, list[int]] = {}
    for k, length in ks_and_lengths:
        of_length.setdefault(length, []).append(k)
    for length, ks in sorted(of_length.items()):
        if note := full_attention_note(ks, length):
            say(new_console(), note)


def _run_rounds(table: Any, plan: tuple[str, Any], rounds: Json, limits: Json) -> None:
    run_and_show_rounds(RoundBenchmark(table, *plan, limits=Limits(**limits), **rounds), new_console())


def _run_points(table: Any, points: Sequence[Any], how: Json, limits: Json) -> None:
    run_and_show_points(table, PointBenchmark(points, limits=Limits(**limits), **how), new_console())
