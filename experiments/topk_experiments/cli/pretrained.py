"""Commands about pretrained models, and the page of all results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runs.records import Json
from .application import app
from .options import (
    Backend,
    CausalModel,
    CompletedK,
    Out,
    Seed,
    Text,
    Threads,
    at_least,
    errors_in_words,
    integers,
    names,
    new_console,
    written_file,
    written_folder,
)


@app.command()
def demo(
    model: CausalModel = None,
    text: Text = None,
    question: Annotated[
        str | None, typer.Option(help="Asked about the text. Default: one about the default text, or what it is about.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the document, 7,900; with --perplexity of the window, 4,096.")
    ] = None,
    k: Annotated[
        str | None, typer.Option(help="Keys kept per query, 64; with --perplexity several, separated by commas.")
    ] = None,
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity", help="Instead: a table of perplexity, time and memory of reading with several k, in rounds."
        ),
    ] = False,
    completed_k: Annotated[
        str | None,
        typer.Option(
            help="With --perplexity, keys kept per query where attention is completed: the other keys enter the "
            'softmax as one entry. Default: 16,64; "" leaves these runs out.'
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="With --perplexity, times that every setting runs, in turns: 3.", callback=at_least(1)),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results: build/demo, with --perplexity build/demo-perplexity.", callback=written_folder
        ),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Run everything again.")] = False,
) -> None:
    """What top-k attention gives, what it costs and where it does not help, in four parts of under four minutes in all.

    A model answers from a long document, in full and with top-k side by side; the operations against PyTorch's;
    perplexity against k; fine-tuning with dropout. Full attention and top-k take turns. Writes demo.json, demo.png and
    demo.html. To continue an interrupted demo, repeat the command: it runs the parts that are missing.
    """
    folder = out or Path("build/demo-perplexity" if perplexity else "build/demo")
    with errors_in_words(f"finished runs are in {folder / 'demo.json'}"):
        shared: Json = {"model": model, "text": text, "out": folder, "seed": seed, "threads": threads}
        shared |= {"backend": backend, "fresh": fresh}
        shared |= {} if tokens is None else {"num_tokens": tokens}
        if perplexity:
            if question is not None:
                raise ValueError("question cannot go with --perplexity, which asks none; leave one of them out")
            from topk_experiments.pretrained import demo as perplexity_demo

            how: Json = {} if k is None else {"k": integers("k", k)}
            if completed_k is not None:
                how["completed_k"] = integers("completed-k", completed_k, may_be_empty=True)
            how |= {} if rounds is None else {"rounds": rounds}
            perplexity_demo.run_demo(perplexity_demo.DemoConfig(**shared, **how), new_console())
            return
        for name, value in (("completed-k", completed_k), ("rounds", rounds)):
            if value is not None:
                raise ValueError(f"{name} goes with --perplexity; give that too, or leave it out")
        from topk_experiments.pretrained.demo_parts import DemoConfig, run_demo

        kept = [] if k is None else integers("k", k)
        if len(kept) > 1:
            raise ValueError(f"k must be one number, got {k}; several go with --perplexity")
        shared |= {"question": question} | ({"k": kept[0]} if kept else {})
        run_demo(DemoConfig(**shared), new_console())


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
            help="Tokens of a window. Take the length of later inputs: a head needs more "
            "keys in longer ones. Default: 2,048, "
            "or the model's longest input if that is shorter."
        ),
    ] = None,
    start: Annotated[int, typer.Option(help="Character of the text at which the first window begins.")] = 0,
    windows: Annotated[
        int | None,
        typer.Option(help="Windows to measure on, one after the other. Default: 1, or 16 for an encoder."),
    ] = None,
    mean_k: Annotated[
        float | None,
        typer.Option(help="Target: keys per query, mean over all heads. 64 unless another target is given."),
    ] = None,
    lost_mass: Annotated[
        float | None, typer.Option(help="Target: share of softmax weight that a head may lose, such as 0.05.")
    ] = None,
    loss_increase: Annotated[
        float | None,
        typer.Option(help="Target: nats per token by which the loss may rise, such as 0.01; the k are searched."),
    ] = None,
    feed_forward_mean_k: Annotated[
        float | None, typer.Option(help="Choose neurons too: neurons per token, mean over all layers.")
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(
            help='Complete attention at every k that is tried: "on", or "fit" to fit its scale for each head. Default: '
            "without."
        ),
    ] = None,
    uniform: Annotated[
        str | None, typer.Option(help="k for every head to compare with, separated by commas. Default: the mean k.")
    ] = None,
    also_mean_k: Annotated[
        str | None, typer.Option(help="Other mean k to try, separated by commas. Default: half and twice the mean k.")
    ] = None,
    evaluate_text: Annotated[
        Path | None, typer.Option(help="Text to evaluate on. Default: the text after the measured windows.")
    ] = None,
    evaluate_start: Annotated[int | None, typer.Option(help="Character at which evaluation begins.")] = None,
    evaluate_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a window to evaluate on. Default: as --tokens.")
    ] = None,
    evaluate_windows: Annotated[
        int | None, typer.Option(help="Windows to evaluate on. Default: 1, or 16 for an encoder.")
    ] = None,
    report: Annotated[
        Path, typer.Option(help="Page with the recommendation, pictures and table.", callback=written_file)
    ] = Path("results/calibration/calibration.html"),
    out: Annotated[
        Path, typer.Option(help="The calibration, for convert(model, attention_k=...).", callback=written_file)
    ] = Path("results/calibration/calibration.json"),
    records: Annotated[
        Path, typer.Option(help="Folder for the record; its name follows --out.", callback=written_folder)
    ] = Path("results/calibration"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure and evaluate again.")] = False,
) -> None:
    """Find out how large k must be: measure every head on a text, give each a k, and try them on other text.

    Writes a calibration, a record and a report. To continue an interrupted calibration, repeat the command: it does
    what is missing.
    """
    with errors_in_words(f"finished runs are in {records}"):
        from topk_attention.calibrate import LossIncrease, LostMass, MeanK
        from topk_experiments.pretrained.calibration import CalibrationConfig, run_calibration

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
                completion=completion,
                uniform=None if uniform is None else integers("uniform", uniform, may_be_empty=True),
                mean_ks=None if also_mean_k is None else integers("also-mean-k", also_mean_k, may_be_empty=True),
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
            new_console(),
        )


@app.command()
def stand_ins(
    model: CausalModel = None,
    text: Text = None,
    start: Annotated[int, typer.Option(help="Character of the text at which the windows to fit on begin.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of a window to fit on.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows to fit on, one after the other.")] = 8,
    evaluate_start: Annotated[
        int, typer.Option(help="Character at which the window to read begins, apart from those to fit on.")
    ] = 100_000,
    evaluate_tokens: Annotated[int, typer.Option(help="Tokens of the window to read.")] = 4096,
    k: Annotated[str, typer.Option(help="Neurons kept per token, separated by commas.")] = "768,384,192",
    rank: Annotated[
        str, typer.Option(help="Ranks of stand-ins, separated by commas; 0 is a constant for each layer.")
    ] = "0,64",
    out: Out = Path("results/stand-ins"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Make all runs again.")] = False,
) -> None:
    """Read a text with some of the neurons, and with stand-ins for the others; compare perplexity and time.

    Writes stand-ins.json and stand-ins.md. To continue an interrupted run, repeat the command: it makes the k that are
    missing.
    """
    with errors_in_words(f"finished runs are in {out / 'stand-ins.json'}"):
        from topk_experiments.pretrained.stand_ins import StandInsConfig, run_stand_ins

        run_stand_ins(
            StandInsConfig(
                model=model,
                text=text,
                start=start,
                num_tokens=tokens,
                windows=windows,
                evaluate_start=evaluate_start,
                evaluate_tokens=evaluate_tokens,
                k=integers("k", k),
                ranks=integers("rank", rank, least=0),
                out=out,
                seed=seed,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            new_console(),
        )


@app.command()
def passkey(
    model: CausalModel = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the whole prompt.")] = 7500,
    k: Annotated[str, typer.Option(help="Keys kept per query, separated by commas.")] = "64,32",
    completed_k: CompletedK = "32",
    depths: Annotated[
        int, typer.Option(help="Places of the passkey, evenly from the beginning on.", callback=at_least(1))
    ] = 10,
    filler: Annotated[
        str, typer.Option(help="What stands around the passkey: three sentences that are repeated, or text.")
    ] = "sentences",
    frame: Annotated[str, typer.Option(help="The prompt: in the model's chat template (chat), or plain.")] = "chat",
    out: Out = Path("results/passkey"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again.")] = False,
) -> None:
    """Hide a passkey at several depths of a long text; which does a model find in full, with few keys, and completed?

    Beside what is found, the table has how likely each digit is after the right ones before it, which compares settings
    also where a model finds few. Among repeated sentences SmolLM2 finds more than in a text (--filler text).

    About ten minutes on two cores. Appends to passkey.jsonl and writes passkey.md. To continue an interrupted run,
    repeat the command: it asks for what is missing.
    """
    with errors_in_words(f"finished answers are in {out / 'passkey.jsonl'}"):
        from topk_experiments.pretrained.passkey import PasskeyConfig, run_passkey

        run_passkey(
            PasskeyConfig(
                model=model,
                text=text,
                num_tokens=tokens,
                k=integers("k", k, may_be_empty=True),
                completed_k=integers("completed-k", completed_k, may_be_empty=True),
                depths=depths,
                filler=filler,
                frame=frame,
                out=out,
                seed=seed,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            new_console(),
        )


@app.command()
def transcribe(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of a Whisper model.")],
    audio: Annotated[Path, typer.Option(help="Recording: WAV, FLAC, Ogg or MP3.")],
    k: Annotated[str, typer.Option(help="Keys kept per query, separated by commas.")] = "32,64,128",
    completed_k: CompletedK = "",
    layers: Annotated[
        str,
        typer.Option(help="Attention layers that keep k keys: among encoder, cross and decoder, separated by commas."),
    ] = "encoder,cross",
    language: Annotated[
        str | None, typer.Option(help='Spoken language, such as "en". Default: the model detects it.')
    ] = None,
    out: Out = Path("results/whisper"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Transcribe again.")] = False,
) -> None:
    """Transcribe a recording with full attention and with several k; count the words that differ.

    How far the encoder's output is from full attention's is measured too.

    Appends to transcripts.jsonl and writes transcripts.md. To continue an interrupted run, repeat the command: it does
    what is missing.
    """
    with errors_in_words(f"finished transcripts are in {out / 'transcripts.jsonl'}"):
        from topk_experiments.pretrained.transcription import TranscriptionConfig, run_transcription

        run_transcription(
            TranscriptionConfig(
                model=model,
                audio=audio,
                k=integers("k", k),
                completed_k=integers("completed-k", completed_k, may_be_empty=True),
                layers=names(layers),
                language=language,
                out=out,
                seed=seed,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            new_console(),
        )


@app.command()
def report(
    out: Annotated[
        Path, typer.Option(help="Folder with the results; the page is written there.", callback=written_folder)
    ] = Path("results"),
    redraw: Annotated[bool, typer.Option(help="Draw every table and picture again from its records first.")] = True,
) -> None:
    """Draw all tables and pictures again from their records and write one HTML page of them, with what to conclude.

    Nothing is measured.
    """
    with errors_in_words():
        from topk_experiments.results_page import write_page

        new_console().print(f"Written: {write_page(out, redraw=redraw)}", markup=False, highlight=False, soft_wrap=True)
