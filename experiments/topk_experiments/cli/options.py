"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from topk_attention.cli import options
from topk_attention.cli.options import (
    Backend,
    Seed,
    Threads,
    at_least,
    folder_to_fill,
    integers,
    names,
    new_console,
    number_of_threads,
    seed_of_numbers,
    written_file,
    written_folder,
)

__all__ = [
    "Backend",
    "CausalModel",
    "CompletedK",
    "EvaluateEvery",
    "Heads",
    "Layers",
    "LearningRate",
    "ModelSize",
    "Neurons",
    "Out",
    "Seed",
    "Steps",
    "Text",
    "Threads",
    "TrainAgain",
    "Windows",
    "at_least",
    "errors_in_words",
    "feed_forward_neurons",
    "folder_to_fill",
    "integers",
    "names",
    "new_console",
    "number_of_threads",
    "settings",
    "taking",
    "written_file",
    "written_folder",
]

Out = Annotated[Path, typer.Option(help="Folder for the results.", callback=written_folder)]
CausalModel = Annotated[
    str | None,
    typer.Option(help="Local folder or Hugging Face id of a causal model. Default: SmolLM2-135M from a package."),
]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text file. Default: Python's own documentation topics.")]
Layers = Annotated[int, typer.Option(help="Number of layers.")]
ModelSize = Annotated[int, typer.Option(help="Model size.")]
Heads = Annotated[int, typer.Option(help="Number of heads.")]
Neurons = Annotated[int, typer.Option(help="Neurons of a feed-forward layer.")]
Windows = Annotated[int, typer.Option(help="Windows of a step.")]
Steps = Annotated[int, typer.Option(help="Training steps of each arm.")]
LearningRate = Annotated[
    float, typer.Option(help="Highest learning rate; it is reached after 40 steps and then falls to a tenth.")
]
CompletedK = Annotated[
    str,
    typer.Option(
        help="Keys kept per query where the others enter its softmax as one entry (completion), separated by commas."
    ),
]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between two points of a curve.")]
TrainAgain = Annotated[bool, typer.Option("--fresh", help="Train all arms again.")]


def errors_in_words(kept: str = "") -> AbstractContextManager[None]:
    """As in the product, for `topk-experiments`."""
    return options.errors_in_words(kept, command="topk-experiments", install="make install")


# Field of a dataclass -> its option, where the field's name also says its kind or its unit.
_CALLED = {
    "num_heads": "heads",
    "num_features": "features",
    "is_causal": "causal",
    "with_memory": "memory",
    "dropout_p": "dropout",
    "step_limit_s": "step_limit",
    "time_s": "time_limit",
    "memory_gib": "memory_limit",
}
# Fields whose numbers begin at 0.
_FROM_0 = {"layers"}
# Field of a dataclass -> the callback that looks at its option.
_CALLBACKS = {"out": written_folder, "packages": written_folder, "threads": number_of_threads, "seed": seed_of_numbers}


def taking(*groups: type | tuple[Any, ...], **defaults: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a benchmark options that are described once, where their values are kept: fields of dataclasses.

    A field `k: Annotated[int, "Keys kept per query."]` is an option with this help text, and so is a parameter of the
    command that is annotated like this; fields without a text are none. Sequences are written with commas.

    groups    a dataclass, or (dataclass, *names of fields). The command gets a dict of fields for each, as its first
              arguments
    defaults  of fields, in place of their own
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        handed = [_fields(group, defaults) for group in groups]
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(groups) :]
        parameters = [*own, *itertools.chain(*handed)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            with errors_in_words(f"finished points are in {given['out']}"):
                dicts = [{one.name: _value(one, given) for one in group} for group in (*handed, own)]
                command(*dicts[:-1], **dicts[-1])

        run.__signature__ = inspect.Signature([_option(one) for one in parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {name: one.annotation for name, one in inspect.signature(run).parameters.items()}
        return run

    return decorate


def _fields(group: type | tuple[Any, ...], defaults: dict[str, object]) -> list[inspect.Parameter]:
    """The fields of a dataclass that are options, or those named."""
    kind, *names = group if isinstance(group, tuple) else (group,)
    hints = get_type_hints(kind, include_extras=True)
    names = names or [field.name for field in fields(kind) if get_origin(hints[field.name]) is Annotated]
    own = {field.name: field.default for field in fields(kind)} | defaults
    return [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=own[n], annotation=hints[n]) for n in names]


def _item(field: inspect.Parameter) -> type | None:
    """What a field is a sequence of; None where it is none."""
    kind, *_ = get_args(field.annotation)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next((get_args(one)[0] for one in kinds if get_origin(one) is Sequence), None)


def _option(field: inspect.Parameter) -> inspect.Parameter:
    """As typer takes it; annotations that are typer's already stay."""
    name = _CALLED.get(field.name, field.name)
    kind, text = get_args(field.annotation)
    default = field.default
    if _item(field) is not None:
        kind, text = str | None, f"{text} Separated by commas."
        default = default if default is None else ",".join(map(str, default))
    if isinstance(text, str):
        text = typer.Option(help=text, callback=_CALLBACKS.get(field.name))
    return field.replace(
        name=name, kind=inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, text]
    )


def _value(field: inspect.Parameter, given: dict[str, Any]) -> Any:
    """What a field holds, from the value of its option."""
    value = given[_CALLED.get(field.name, field.name)]
    if value is None or _item(field) is None:
        return value
    if _item(field) is not int:
        return names(value)
    return integers(field.name.replace("_", "-"), value, least=0 if field.name in _FROM_0 else 1)


def settings(attention_k: str, completed_k: str, feed_forward_k: str, full: bool) -> list[Any]:
    """The settings of these options, as `models.settings.Setting`."""
    from topk_experiments.models.settings import one_at_a_time

    return one_at_a_time(
        _integers_or_files("attention-k", attention_k),
        _integers_or_files("feed-forward-k", feed_forward_k),
        full=full,
        completed_k=_integers_or_files("completed-k", completed_k),
    )


def _integers_or_files(name: str, listed: str) -> list[int | Path]:
    entries: list[int | Path] = []
    for entry in names(listed):
        if entry.lstrip("+-").isdigit():
            entries += integers(name, entry)
        elif Path(entry).exists():
            entries.append(Path(entry))
        else:
            raise ValueError(
                f"{name} must be numbers and calibration files separated by commas, got {entry!r}: no such file"
            )
    return entries


def feed_forward_neurons(given: str | None) -> int | Literal["all"] | None:
    """The value of --feed-forward-k: a number, "all", or None if it is not given.

    Raises:
        ValueError: it is something else.
    """
    if given is None:
        return None
    if given == "all":
        return "all"
    if not given.isdecimal():
        raise ValueError(f'feed_forward_k must be a number of neurons or "all", got {given!r}')
    return int(given)
