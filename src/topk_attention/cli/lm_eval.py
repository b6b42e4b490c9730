"""Runs EleutherAI's lm-evaluation-harness with top-k attention and records its results.

The harness's own command runs in a process in which transformers knows "topk" and the harness knows "hf-topk".
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..calibrate import Calibration
from ..convert import convert
from ..convert.settings import K_VARIABLE
from ..environment import environment, package_version
from ..files import append_json_line, check_writable
from ..functional import Completion
from ..functional.words import full_attention_note

SCHEMA = "topk_attention/lm-eval/1"
MODEL = "hf-topk"


def run_harness(arguments: Sequence[str], record: Path | None = None) -> None:
    """Run the command `lm_eval` with these arguments. With `record`, append its results to that file as one line.

    If the results cannot be recorded, the harness's own file of results is kept, and its path is printed.

    Raises:
        ValueError: the arguments name an output path of their own beside a record.
        ModuleNotFoundError: lm-eval is not installed.
    """
    for option, path in _output_paths(arguments):  # the harness itself looks when hours of evaluation are over
        check_writable(option, path, is_folder=path.suffix != ".json")
    register()
    from lm_eval.__main__ import cli_evaluate

    if record is None:
        sys.argv = ["lm_eval", *arguments]
        cli_evaluate()
        return
    if any(_output_paths(arguments)):
        raise ValueError("--record writes the results to a file of its own; leave --output_path out")
    folder = tempfile.mkdtemp()
    try:
        sys.argv = ["lm_eval", *arguments, "--output_path", folder]
        cli_evaluate()
        found = _results_in(folder)
        if not found:
            raise ValueError("lm_eval wrote no results; run it without --record to see why")
        append_json_line(record, _read_results(found[-1]))
    except BaseException:
        # An evaluation can take hours, so its results are kept even if they could not be recorded.
        if kept := _results_in(folder):
            print(f"the results were not recorded; they are kept in {kept[-1]}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _output_paths(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """(option, path) wherever the harness's own arguments say where it writes its results."""
    found = []
    for argument, after in pairwise([*arguments, ""]):
        option, equals, path = argument.partition("=")
        if option in ("--output_path", "-o"):
            found.append((option.lstrip("-"), Path(path if equals else after)))
    return found


def _results_in(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("results_*.json"))


def _read_results(path: Path) -> dict[str, Any]:
    try:
        return as_record(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the results in {path} are not as lm_eval writes them: {error!r}") from error


def as_record(results: dict[str, Any]) -> dict[str, Any]:
    """The harness's results as a record, without folders and the machine's name."""
    config = results["config"]
    options = {name: _without_folder(value) for name, value in config["model_args"].items()}
    return {
        "schema": SCHEMA,
        "model": options.pop("pretrained"),
        "model_type": config["model"],
        "model_args": options,
        K_VARIABLE: os.environ.get(K_VARIABLE),
        "limit": config["limit"],
        "tasks": {
            task: {
                "num_fewshot": results["n-shot"].get(task),
                "num_samples": results["n-samples"].get(task, {}).get("effective"),  # a group has none
                "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
            }
            for task, metrics in results["results"].items()
        },
        "lm_eval": package_version("lm_eval"),
        "environment": environment(),
    }


def _without_folder(value: Any) -> Any:
    """The last part of the path of a file or folder; anything else, such as the id of a model on the hub, as it is."""
    if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
        return Path(value).name
    return value


@cache
def register() -> type:
    """Register a model "hf-topk" with the harness: its own "hf", converted after loading.

    It has four arguments in addition to those of "hf": attention_k (a number, or the file of a calibration),
    feed_forward_k, completion (the mass scale of a `Completion` for every head) and topk_backend, the backend of
    `convert`. Without a k the model must be a checkpoint that remembers its k.

    Returns the model's class.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(MODEL)
    class TopKModel(HFLM):
        _smallest_k: int | None = None

        def __init__(
            self,
            pretrained: Any,
            attention_k: Any = None,
            feed_forward_k: Any = None,
            completion: float | None = None,
            topk_backend: str | None = None,
            **options: Any,
        ) -> None:
            super().__init__(pretrained, **options)
            if isinstance(attention_k, str) and attention_k != "all":
                attention_k = Calibration.load(attention_k)
            self.model.requires_grad_(False)  # nothing trains here, so weights may be stored by neuron
            report = convert(
                self.model,
                attention_k=attention_k,
                feed_forward_k=feed_forward_k,
                backend=topk_backend,
                completion=None if completion is None else Completion(completion),
            )
            logging.getLogger(__name__).info("%s", report)
            ks = [entry.k for entry in report.replaced if entry.kind == "attention"]
            per_head = [k for head_k in ks for k in (head_k if isinstance(head_k, tuple) else (head_k,))]
            numbers = [k for k in per_head if isinstance(k, int)]  # "all" says by itself that it keeps all
            self._smallest_k = min(numbers, default=None)

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            self._say_if_full(inps.shape[-1])
            return super()._model_call(inps, *args, **options)

        def _model_generate(self, context: Any, max_length: int, *args: Any, **options: Any) -> Any:
            self._say_if_full(max_length)
            return super()._model_generate(context, max_length, *args, **options)

        def _say_if_full(self, num_tokens: int) -> None:
            """Warn once about a request in which the smallest k of all heads leaves nothing out."""
            if (note := full_attention_note(self._smallest_k, num_tokens)) is not None:
                self._smallest_k = None
                logging.getLogger(__name__).warning("attention_k, in this request: %s", note)

    return TopKModel


if __name__ == "__main__":
    run_harness(sys.argv[1:])
