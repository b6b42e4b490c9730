"""The commands of question answering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .application import qa
from .options import (
    Backend,
    CompletedK,
    Heads,
    Layers,
    ModelSize,
    Neurons,
    Out,
    Seed,
    Steps,
    Threads,
    TrainAgain,
    at_least,
    errors_in_words,
    names,
    new_console,
    settings,
    written_folder,
)


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
        str, typer.Option(help="Keys kept per query, separated by commas. An entry may be a calibration file.")
    ] = "",
    completed_k: CompletedK = "",
    feed_forward_k: Annotated[
        str, typer.Option(help="Neurons kept per token, separated by commas. An entry may be a calibration file.")
    ] = "",
    full: Annotated[bool, typer.Option(help="Run the full model too, even if it was saved with a k.")] = True,
    shots: Annotated[
        int, typer.Option(help="Solved examples before each question, from the same set (decoder models).")
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="Questions of a set, drawn at random. Default: all.")] = None,
    out: Out = Path("results/qa"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    dtype: Annotated[
        str, typer.Option(help='"float32", or "bfloat16", which is twice as fast on processors with units for it.')
    ] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Answer everything again.")] = False,
) -> None:
    """Let a model answer questions in full and with several k, without training.

    A decoder model gives each choice a likelihood, a text-to-text model writes its answer, and a BERT marks a span of
    the passage. Points are appended to evaluations.jsonl. To continue an interrupted evaluation, repeat the command: it
    continues with the next batch.
    """
    with errors_in_words(f"finished points and batches are in {out}"):
        from ..qa.evaluation import EvaluationConfig, run_evaluation

        run_evaluation(
            EvaluationConfig(
                datasets=names(dataset),
                settings=settings(attention_k, completed_k, feed_forward_k, full),
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
            new_console(),
        )


@qa.command()
def finetune(
    model: Annotated[str, typer.Option(help="Local folder or Hugging Face id of a T5 or BERT.")],
    training: Annotated[str, typer.Option("--train", help="Questions to train on, as for --dataset of evaluate.")],
    dataset: Annotated[
        str | None, typer.Option(help="Questions to evaluate on. Default: passages held out of --train.")
    ] = None,
    hold_out: Annotated[float, typer.Option(help="Share of the passages to hold out if --dataset is not given.")] = 0.2,
    attention_k: Annotated[
        str,
        typer.Option(
            help="Keys kept per query, separated by commas; one arm each. An entry may be a calibration file."
        ),
    ] = "",
    completed_k: CompletedK = "",
    feed_forward_k: Annotated[
        str,
        typer.Option(
            help="Neurons kept per token, separated by commas; one arm each. An entry may be a calibration file."
        ),
    ] = "",
    full: Annotated[bool, typer.Option(help="Run the full model too, even if it was saved with a k.")] = True,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with random weights of the model's configuration.")
    ] = False,
    steps: Steps = 1000,
    batch: Annotated[int, typer.Option(help="Questions of a step.")] = 16,
    parts: Annotated[
        int, typer.Option(help="Parts of like length that a batch is cut into, for less memory and padding.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-5,
    warm_up_steps: Annotated[
        int, typer.Option(help="Steps over which the learning rate rises.", callback=at_least(0))
    ] = 40,
    constant: Annotated[
        bool, typer.Option("--constant", help="Keep the learning rate; by default it falls to a tenth.")
    ] = False,
    position_bias_rate: Annotated[
        float,
        typer.Option(
            help="Learning rate of T5's tables of relative position biases, as a multiple of that of the rest."
        ),
    ] = 1.0,
    beta2: Annotated[
        float, typer.Option(help="Of AdamW: how long it remembers squared gradients; 0.98 is shorter.")
    ] = 0.999,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between two points of the curve, with a checkpoint.")
    ] = 200,
    curve_questions: Annotated[
        int, typer.Option(help="Questions for a point of the curve; the final score takes all.")
    ] = 100,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the trained models, one folder an arm.", callback=written_folder)
    ] = None,
    out: Out = Path("results/qa"),
    seed: Seed = 0,
    threads: Threads = None,
    backend: Backend = "auto",
    fresh: TrainAgain = False,
) -> None:
    """Train a text-to-text or span model on questions, in full and with several k, each from the same weights.

    Arms are appended to finetuning.jsonl. To continue an interrupted training, repeat the command: it resumes from the
    last point of the curve.
    """
    with errors_in_words(f"finished arms and checkpoints are in {out}"):
        from ..qa.finetuning import FinetuningConfig, run_finetuning

        run_finetuning(
            FinetuningConfig(
                model=model,
                training=training,
                dataset=dataset,
                hold_out=hold_out,
                settings=settings(attention_k, completed_k, feed_forward_k, full),
                from_scratch=from_scratch,
                steps=steps,
                batch=batch,
                parts=parts,
                learning_rate=learning_rate,
                warm_up_steps=warm_up_steps,
                falls=not constant,
                position_bias_rate=position_bias_rate,
                beta2=beta2,
                evaluate_every=evaluate_every,
                curve_questions=curve_questions,
                save=save,
                seed=seed,
                out=out,
                threads=threads,
                backend=backend,
                fresh=fresh,
            ),
            new_console(),
        )


@qa.command()
def table(out: Out = Path("results/qa")) -> None:
    """Write qa.md and qa.png from the records in a folder, with published tables beside them, marked as quoted."""
    with errors_in_words():
        from ..qa.report import write_report

        write_report(out, typer.echo)


@qa.command()
def reading_task(
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text whose words are used. Default: Python's own documentation topics.")
    ] = None,
    words: Annotated[int, typer.Option(help="Words of each of three kinds.")] = 16,
    fewest_facts: Annotated[int, typer.Option(help="Facts of the shortest paragraph.", callback=at_least(1))] = 1,
    most_facts: Annotated[int, typer.Option(help="Facts of the longest paragraph.", callback=at_least(1))] = 3,
    forms: Annotated[
        int, typer.Option(help="Sentence forms that state facts, 1 to 3; one form is learnt fastest.")
    ] = 1,
    training_questions: Annotated[
        int, typer.Option(help="Questions of a training file.", callback=at_least(1))
    ] = 200_000,
    test_questions: Annotated[int, typer.Option(help="Questions of a test file.", callback=at_least(1))] = 500,
    layers: Layers = 2,
    d_model: ModelSize = 64,
    heads: Heads = 4,
    d_ff: Neurons = 256,
    out: Out = Path("results/qa/work/reading"),
    seed: Seed = 0,
) -> None:
    """Generate a reading task with words of a text, and a small untrained T5 to learn it.

    Writes train.jsonl and test.jsonl, the same files for a new kind of question, and small-t5 with its tokenizer. Use
    them with qa finetune --from-scratch and qa evaluate.
    """
    with errors_in_words():
        from ..qa.small_reader import SmallReaderConfig, make_small_reader

        make_small_reader(
            SmallReaderConfig(
                text=text,
                words=words,
                facts=(fewest_facts, most_facts),
                forms=forms,
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
