"""The commands: each reads its options and hands over to `topk_attention.experiments`, imported only then."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

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

Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default as many as torch takes.")]
Seed = Annotated[int, typer.Option(help="Seed of random numbers.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure points again that are there already.")]
Backend = Annotated[str, typer.Option(help='Backend of top-k attention; "auto" takes the best one that runs here.')]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text file. Default: Python's own documentation topics.")]
Layers = Annotated[int, typer.Option(help="Number of layers.")]
ModelSize = Annotated[int, typer.Option(help="Model size.")]
Heads = Annotated[int, typer.Option(help="Number of heads.")]
Neurons = Annotated[int, typer.Option(help="Neurons of a feed-forward layer.")]
Windows = Annotated[int, typer.Option(help="Windows of a step.")]
Steps = Annotated[int, typer.Option(help="Training steps of an arm.")]
LearningRate = Annotated[float, typer.Option(help="The highest; it rises for 40 steps and falls to a tenth.")]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between two points of a curve.")]
TrainAgain = Annotated[bool, typer.Option("--fresh", help="Train all arms again.")]


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


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Local folder or Hugging Face id of a causal model. Default: SmolLM2-135M from a package."),
    ] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Length of the window.")] = 4096,
    k: Annotated[str, typer.Option(help="Keys kept per query, separated by commas.")] = "16,32,64,128,256",
    out: Out = Path("results/demo"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Make all runs again.")] = False,
) -> None:
    """Read a text with full attention and with several k; compare perplexity, time and memory.

    Writes demo.json, demo.png and demo.html. Interrupted, the same command continues with the runs that are missing.
    """
    with _errors_in_words(f"finished runs are in {out / 'demo.json'}"):
        from ..experiments.demo import DemoConfig, run_demo

        run_demo(
            DemoConfig(
                model=model,
                text=text,
                num_tokens=tokens,
                k=_integers("k", k),
                out=out,
                seed=seed,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            _console(),
        )


@app.command()
def calibrate(
    model: Annotated[
        str | None,
        typer.Option(
            help="Local folder or Hugging Face id of a causal model, or of an encoder such as MiniLM. Default: "
            "SmolLM2-135M from a package."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file to measure on. Default: Python's own documentation topics.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of a window: that of later use, a head's need grows with it. Default: 2,048, or the model's "
            "longest input where that is shorter."
        ),
    ] = None,
    start: Annotated[int, typer.Option(help="Character of the text at which the first window begins.")] = 0,
    windows: Annotated[
        int | None,
        typer.Option(help="Windows to measure on, one after the other. Default: 1, for an encoder 16."),
    ] = None,
    mean_k: Annotated[
        float | None, typer.Option(help="Budget: keys per query, mean of all heads. 64 unless another target is given.")
    ] = None,
    lost_mass: Annotated[
        float | None, typer.Option(help="Instead: softmax weight that no head may exceed losing, e.g. 0.05.")
    ] = None,
    loss_increase: Annotated[
        float | None, typer.Option(help="Instead: nats per token by which the loss may rise, e.g. 0.01; searched.")
    ] = None,
    feed_forward_mean_k: Annotated[
        float | None, typer.Option(help="Choose neurons too: their number per token, mean of all layers.")
    ] = None,
    uniform: Annotated[
        str | None, typer.Option(help="k for every head to compare with, separated by commas. Default: the mean k.")
    ] = None,
    also_mean_k: Annotated[
        str | None, typer.Option(help="Other budgets to try, separated by commas. Default: half and twice the mean k.")
    ] = None,
    evaluate_text: Annotated[
        Path | None, typer.Option(help="Text to evaluate on. Default: what follows the measured windows.")
    ] = None,
    evaluate_start: Annotated[int | None, typer.Option(help="Character at which evaluation begins.")] = None,
    evaluate_tokens: Annotated[
        int | None, typer.Option(help="Length of a window to evaluate on. Default: that of --tokens.")
    ] = None,
    evaluate_windows: Annotated[
        int | None, typer.Option(help="Windows to evaluate on. Default: 1, for an encoder 16.")
    ] = None,
    report: Annotated[Path, typer.Option(help="Page with pictures and what they say.")] = Path(
        "results/calibration/calibration.html"
    ),
    out: Annotated[Path, typer.Option(help="The calibration, for convert(model, attention_k=...).")] = Path(
        "results/calibration/calibration.json"
    ),
    records: Annotated[Path, typer.Option(help="Folder for the record, called after --out.")] = Path(
        "results/calibration"
    ),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure and evaluate again.")] = False,
) -> None:
    """Find out how large k must be: measure every head on a text, give each its k, and try them on other text.

    Writes a calibration, a record and a report. Interrupted, the same command continues with what is missing.
    """
    with _errors_in_words(f"what is finished is kept beside {out} and in {records}"):
        from ..calibrate import LossIncrease, LostMass, MeanK
        from ..experiments.calibration import CalibrationConfig, run_calibration

        kinds = ((MeanK, mean_k), (LostMass, lost_mass), (LossIncrease, loss_increase))
        targets = [kind(number) for kind, number in kinds if number is not None]
        if len(targets) > 1:
            raise ValueError("give one of --mean-k, --lost-mass and --loss-increase, got several")
        run_calibration(
            CalibrationConfig(
                model=model,
                text=text,
                start=start,
                num_tokens=tokens,
                windows=windows,
                target=targets[0] if targets else MeanK(64.0),
                feed_forward_mean_k=feed_forward_mean_k,
                uniform=None if uniform is None else _integers("uniform", uniform),
                mean_ks=None if also_mean_k is None else _integers("also-mean-k", also_mean_k),
                evaluate_text=evaluate_text,
                evaluate_start=evaluate_start,
                evaluate_tokens=evaluate_tokens,
                evaluate_windows=evaluate_windows,
                report=report,
                out=out,
                records=records,
                seed=seed,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            _console(),
        )


@app.command()
def transcribe(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of a Whisper model.")],
    audio: Annotated[Path, typer.Option(help="Recording: WAV, FLAC, Ogg or MP3.")],
    k: Annotated[str, typer.Option(help="Keys kept per query, separated by commas.")] = "32,64,128",
    layers: Annotated[
        str, typer.Option(help="Attention that keeps k keys: among encoder, cross and decoder, separated by commas.")
    ] = "encoder,cross",
    language: Annotated[str | None, typer.Option(help='Spoken language, e.g. "en". Default: found out.')] = None,
    out: Out = Path("results/whisper"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Transcribe again.")] = False,
) -> None:
    """Transcribe a recording with full attention and with several k; count the words that differ.

    Appends to transcripts.jsonl and writes transcripts.md. Interrupted, the same command continues with what is
    missing.
    """
    with _errors_in_words(f"finished transcripts are in {out / 'transcripts.jsonl'}"):
        from ..experiments.transcription import TranscriptionConfig, run_transcription

        run_transcription(
            TranscriptionConfig(
                model=model,
                audio=audio,
                k=_integers("k", k),
                layers=_names(layers),
                language=language,
                out=out,
                seed=seed,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            _console(),
        )


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def lm_eval(
    context: typer.Context,
    record: Annotated[Path | None, typer.Option(help="File that gets the results as a JSON line.")] = None,
) -> None:
    """EleutherAI's lm_eval with top-k attention: its own arguments (--help shows them) and --record FILE.

    Two ways to choose k: --model hf-topk --model_args pretrained=ID,attention_k=64, or --model hf --model_args
    pretrained=ID,attn_implementation=topk with the environment variable TOPK_ATTENTION_K, or a checkpoint that
    remembers its k.
    """
    with _errors_in_words():
        from ..experiments.harness import run_harness

        run_harness(context.args, record)


@benchmark.command()
def attention_kernel(
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
    rivals: Annotated[
        str | None,
        typer.Option(help="Among sdpa, topk-chunked, query-chunks and performer, separated by commas."),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Timed rounds of a work; long ones get fewer, but three.")] = 7,
    step_limit: Annotated[
        float, typer.Option(help="Leave a method out where a forward and backward pass should take more seconds.")
    ] = 120,
    time_limit: Annotated[float, typer.Option(help="Seconds after which a work is given up and recorded so.")] = 3600,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    out: Out = Path("results/attention-kernel"),
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    backend: Annotated[str, typer.Option(help="Backend of top-k attention that is held against the rivals.")] = "cpu",
    fresh: Fresh = False,
) -> None:
    """The attention operation alone, forward and with backward, against PyTorch's and others in alternation.

    Methods are checked against the reference first. Points are appended to table.jsonl, length.jsonl or k.jsonl;
    interrupted, the same command continues with those that are missing.
    """
    with _errors_in_words(f"finished points are in {out}"):
        from ..experiments import attention_kernel, kernel_benchmark

        name, plan = attention_kernel.make_plan(
            backend,
            sweep=sweep,
            works=None if works is None else _names(works),
            lengths=None if lengths is None else _integers("lengths", lengths),
            rivals=None if rivals is None else _names(rivals),
        )
        kernel_benchmark.run_and_report(
            kernel_benchmark.KernelBenchmark(
                attention_kernel.SUBJECT,
                name,
                plan,
                out=out,
                threads=threads,
                seed=seed,
                repetitions=repetitions,
                step_limit_s=step_limit,
                time_limit_s=time_limit,
                with_memory=memory,
                fresh=fresh,
            ),
            _console(),
        )


@benchmark.command()
def feed_forward_kernel(
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
    rivals: Annotated[
        str | None, typer.Option(help="Among dense, topk-chunked and token-chunks, separated by commas.")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Timed rounds of a work; long ones get fewer, but three.")] = 7,
    step_limit: Annotated[
        float, typer.Option(help="Leave a method out where a forward and backward pass should take more seconds.")
    ] = 120,
    time_limit: Annotated[float, typer.Option(help="Seconds after which a work is given up and recorded so.")] = 3600,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    out: Out = Path("results/feed-forward-kernel"),
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    backend: Annotated[str, typer.Option(help="Backend of top-k that is held against the rivals.")] = "cpu",
    fresh: Fresh = False,
) -> None:
    """The feed-forward operation alone, forward and with backward, against PyTorch's dense layer in alternation.

    Methods are checked against the reference first. Points are appended to table.jsonl or d_ff.jsonl; interrupted, the
    same command continues with those that are missing.
    """
    with _errors_in_words(f"finished points are in {out}"):
        from ..experiments import feed_forward_kernel, kernel_benchmark

        name, plan = feed_forward_kernel.make_plan(
            backend,
            sweep=sweep,
            works=None if works is None else _names(works),
            d_ffs=None if d_ff is None else _integers("d_ff", d_ff),
            tokens=tokens,
            rivals=None if rivals is None else _names(rivals),
        )
        kernel_benchmark.run_and_report(
            kernel_benchmark.KernelBenchmark(
                feed_forward_kernel.SUBJECT,
                name,
                plan,
                out=out,
                threads=threads,
                seed=seed,
                repetitions=repetitions,
                step_limit_s=step_limit,
                time_limit_s=time_limit,
                with_memory=memory,
                fresh=fresh,
            ),
            _console(),
        )


@benchmark.command()
def model(
    shape: Annotated[str, typer.Option(help="Random weights in the shape of bert-base or t5-base.")] = "bert-base",
    config: Annotated[
        str | None, typer.Option(help="Instead: local folder or Hugging Face id whose configuration to use.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Input lengths, separated by commas; doubling from 2,048 to 32,768 by default.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Among vanilla, sdpa, query-chunks and topk, separated by commas.")
    ] = "topk,query-chunks,sdpa,vanilla",
    k: Annotated[int, typer.Option(help="Keys kept per query (topk).")] = 64,
    feed_forward_k: Annotated[
        str | None,
        typer.Option(help='Neurons kept per token (topk); "all": every neuron, in token chunks. Else dense layers.'),
    ] = None,
    decoder_length: Annotated[int, typer.Option(help="Tokens of the decoder, where there is one.")] = 64,
    dropout: Annotated[float, typer.Option(help="Probability of every dropout that the model has.")] = 0.1,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing, layer by layer.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repetitions: Annotated[int, typer.Option(help="Timed steps of a point; long ones get fewer.")] = 3,
    step_limit: Annotated[float, typer.Option(help="Leave a point out whose step should take more seconds.")] = 600,
    time_limit: Annotated[float, typer.Option(help="Seconds after which a point is given up and recorded so.")] = 3600,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GiB beyond which a point is recorded as out of memory. Default: most of what is free."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the files; default: the shape. Other settings, other name.")] = (
        None
    ),
    out: Out = Path("results/model"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure points again that are there already.")] = False,
) -> None:
    """One training step of a whole model (forward, loss, backward): peak memory and time against length.

    Every point has a process of its own, in which its answer is checked first. Points are appended to NAME.jsonl, those
    that ran out of memory among them; interrupted, the same command continues with those that are missing.
    """
    with _errors_in_words(f"finished points are in {out}"):
        import torch

        from ..experiments import model_benchmark
        from ..experiments.models import find_model

        source = None if config is None else find_model(config)
        if source is not None:
            shape = source.name
        points = model_benchmark.grid(
            [2048, 4096, 8192, 16384, 32768] if lengths is None else _integers("lengths", lengths),
            _names(methods),
            shape=shape,
            k=k,
            feed_forward_k=_feed_forward_k(feed_forward_k),
            decoder_length=decoder_length,
            dropout_p=dropout,
            checkpointing=checkpointing,
            dtype=dtype,
            device=device,
            backend=backend,
            threads=threads or torch.get_num_threads(),
            seed=seed,
            source=source,
        )
        model_benchmark.run_and_report(
            model_benchmark.ModelBenchmark(
                name or shape.replace("/", "--"),
                points,
                out=out,
                repetitions=repetitions,
                step_limit_s=step_limit,
                time_limit_s=time_limit,
                memory_limit_gib=memory_limit,
                fresh=fresh,
            ),
            _console(),
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
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    backend: Backend = "auto",
    fresh: TrainAgain = False,
) -> None:
    """Train one small language model with dense and with top-k feed-forward layers; compare their loss curves.

    Same initial weights and batches for all. Writes feed-forward-curve.json and .png; interrupted, the same command
    continues from the last point of the curve.
    """
    with _errors_in_words(f"finished arms and checkpoints are in {out}"):
        from ..experiments.feed_forward_curve import CurveConfig, run_feed_forward_curve

        config = CurveConfig(
            k=_integers("k", k),
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
        run_feed_forward_curve(config, _console())


@train.command()
def language_model(
    attention_k: Annotated[str, typer.Option(help="Keys kept per query, separated by commas; one arm each.")] = "32",
    feed_forward_k: Annotated[
        str, typer.Option(help="Neurons kept per token, separated by commas; one arm each.")
    ] = "",
    full: Annotated[bool, typer.Option(help="The full model too.")] = True,
    text: Text = None,
    tokens: Annotated[str, typer.Option(help='"bytes", or "words" between spaces, as WikiText has them.')] = "bytes",
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

    Same initial weights and batches for all. Writes TEXT-TOKENS.json and .png; interrupted, the same command continues
    from the last point of the curve.
    """
    with _errors_in_words(f"finished arms and checkpoints are in {out}"):
        from ..experiments.language_model import LanguageModelConfig, run_language_model

        config = LanguageModelConfig(
            settings=_settings(attention_k, feed_forward_k, full),
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
        run_language_model(config, _console())


@qa.command()
def evaluate(
    dataset: Annotated[
        str,
        typer.Option(
            help="Question files, folders with one, or hub ids ID:CONFIGURATION:SPLIT (package datasets), separated by "
            "commas. Forms: UnifiedQA's lines, SQuAD, ARC, OpenBookQA, CommonsenseQA, BoolQ, MCTest."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Local folder or Hugging Face id of a decoder, T5 or BERT. Default: SmolLM2-135M from a package."
        ),
    ] = None,
    attention_k: Annotated[
        str, typer.Option(help="Keys kept per query, separated by commas; a calibration file is one of them.")
    ] = "",
    feed_forward_k: Annotated[
        str, typer.Option(help="Neurons kept per token, separated by commas; a calibration file is one of them.")
    ] = "",
    full: Annotated[bool, typer.Option(help="The full model too.")] = True,
    shots: Annotated[
        int, typer.Option(help="Solved examples before each question, from the same set (decoder models).")
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="Questions of a set, drawn at random. Default: all.")] = None,
    out: Out = Path("results/qa"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    dtype: Annotated[
        str, typer.Option(help='"float32", or "bfloat16", in which processors with units for it are twice as fast.')
    ] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer everything again.")] = False,
) -> None:
    """Let a model answer questions in full and with several k, without training.

    A decoder gives each choice a likelihood, a text-to-text model writes its answer, BERT marks a stretch of the
    passage. Points are appended to evaluations.jsonl; interrupted, the same command continues with the next batch.
    """
    with _errors_in_words(f"finished points and batches are in {out}"):
        from ..experiments.qa.evaluation import EvaluationConfig, run_evaluation

        run_evaluation(
            EvaluationConfig(
                datasets=_names(dataset),
                settings=_settings(attention_k, feed_forward_k, full),
                model=model,
                limit=limit,
                shots=shots,
                seed=seed,
                out=out,
                threads=threads,
                backend=backend,
                dtype=dtype,
                fresh=fresh,
            ),
            _console(),
        )


@qa.command()
def finetune(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of a T5 or BERT.")],
    training: Annotated[str, typer.Option("--train", help="Questions to train on, as for --dataset of evaluate.")],
    dataset: Annotated[
        str | None, typer.Option(help="Questions to evaluate on. Default: passages held out of --train.")
    ] = None,
    hold_out: Annotated[
        float, typer.Option(help="Share of the passages to hold out where --dataset is not given.")
    ] = 0.2,
    attention_k: Annotated[
        str, typer.Option(help="Keys kept per query, separated by commas; one arm each. Calibration files too.")
    ] = "",
    feed_forward_k: Annotated[
        str, typer.Option(help="Neurons kept per token, separated by commas; one arm each. Calibration files too.")
    ] = "",
    full: Annotated[bool, typer.Option(help="The full model too.")] = True,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with random weights of the model's configuration.")
    ] = False,
    steps: Steps = 1000,
    batch: Annotated[int, typer.Option(help="Questions of a step.")] = 16,
    parts: Annotated[int, typer.Option(help="Parts that a batch is cut into, to save memory.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 5e-5,
    warm_up_steps: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 40,
    constant: Annotated[
        bool, typer.Option("--constant", help="Keep the learning rate; by default it falls to a tenth.")
    ] = False,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between two points of the curve, with a checkpoint.")
    ] = 200,
    curve_questions: Annotated[int, typer.Option(help="Questions of a point of the curve; in the end all.")] = 100,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained models, one folder an arm.")] = None,
    out: Out = Path("results/qa"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: TrainAgain = False,
) -> None:
    """Train a text-to-text or span model on questions, in full and with several k, each from the same weights.

    Arms are appended to finetuning.jsonl; interrupted, the same command continues from the last point of the curve.
    """
    with _errors_in_words(f"finished arms and checkpoints are in {out}"):
        from ..experiments.qa.finetuning import FinetuningConfig, run_finetuning

        run_finetuning(
            FinetuningConfig(
                model=model,
                training=training,
                dataset=dataset,
                hold_out=hold_out,
                settings=_settings(attention_k, feed_forward_k, full),
                from_scratch=from_scratch,
                steps=steps,
                batch=batch,
                parts=parts,
                learning_rate=learning_rate,
                warm_up_steps=warm_up_steps,
                falls=not constant,
                evaluate_every=evaluate_every,
                curve_questions=curve_questions,
                save=save,
                seed=seed,
                out=out,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            _console(),
        )


@qa.command()
def table(out: Out = Path("results/qa")) -> None:
    """Write qa.md and qa.png from the records in a folder, with published tables beside them, marked as quoted."""
    with _errors_in_words():
        from ..experiments.qa.report import write_report

        write_report(out, typer.echo)


@qa.command()
def reading_task(
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text whose words are used. Default: Python's own documentation topics.")
    ] = None,
    words: Annotated[int, typer.Option(help="Words of each of three kinds.")] = 100,
    fewest_facts: Annotated[int, typer.Option(help="Facts of the shortest paragraph.")] = 4,
    most_facts: Annotated[int, typer.Option(help="Facts of the longest paragraph.")] = 8,
    training_questions: Annotated[int, typer.Option(help="Questions of a training file.")] = 30_000,
    test_questions: Annotated[int, typer.Option(help="Questions of a test file.")] = 500,
    layers: Layers = 2,
    d_model: ModelSize = 128,
    heads: Heads = 4,
    d_ff: Neurons = 768,
    out: Out = Path("results/qa/work/reading"),
    seed: Seed = 0,
) -> None:
    """Generate a reading task with words of a text, and a small untrained T5 to learn it.

    Writes train.jsonl and test.jsonl, the same for a new kind of question, and small-t5 with its tokenizer, for
    qa finetune --from-scratch and qa evaluate.
    """
    with _errors_in_words():
        from ..experiments.qa.small_reader import SmallReaderConfig, make_small_reader

        make_small_reader(
            SmallReaderConfig(
                text=text,
                words=words,
                facts=(fewest_facts, most_facts),
                num_train=training_questions,
                num_test=test_questions,
                num_layers=layers,
                d_model=d_model,
                num_heads=heads,
                d_ff=d_ff,
                seed=seed,
                out=out,
            ),
            typer.echo,
        )


@app.command()
def info() -> None:
    """Show versions, processor, backends and which of them runs."""
    with _errors_in_words():
        from ..experiments.information import describe_environment

        typer.echo(describe_environment())


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a file has no width; 80 would cut tables


def _integers(name: str, listed: str) -> list[int]:
    try:
        return [int(entry) for entry in listed.split(",") if entry.strip()]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers separated by commas, got {listed!r}") from None


def _settings(attention_k: str, feed_forward_k: str, full: bool) -> list[Any]:
    """What the options of these names ask for, as `experiments.settings.Setting`."""
    from ..experiments.settings import one_at_a_time

    return one_at_a_time(_integers_or_files(attention_k), _integers_or_files(feed_forward_k), full=full)


def _integers_or_files(listed: str) -> list[int | Path]:
    return [int(entry) if entry.lstrip("+-").isdigit() else Path(entry) for entry in _names(listed)]


def _feed_forward_k(given: str | None) -> int | Literal["all"] | None:
    if given is None:
        return None
    if given == "all":
        return "all"
    if not given.isdecimal():
        raise ValueError(f'feed_forward_k must be a number of neurons or "all", got {given!r}')
    return int(given)


def _names(listed: str) -> list[str]:
    return [entry.strip() for entry in listed.split(",") if entry.strip()]


@contextmanager
def _errors_in_words(kept: str = "") -> Iterator[None]:
    """What a user can put right ends with one line and status 2; Ctrl-C with 130 and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; {kept}\nto continue: {_same_command()}", err=True)
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = "lm-eval" if package == "lm_eval" else "experiments"
        typer.echo(f"error: {package} is not installed; pip install 'topk-attention[{extra}]'", err=True)
        raise typer.Exit(2) from error
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _same_command() -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--fresh"]
    return shlex.join(["topk-attention", *arguments])
