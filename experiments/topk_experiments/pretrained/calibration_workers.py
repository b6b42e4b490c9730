"""What a calibration does in processes of its own: measure a model, and evaluate it with a k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from topk_attention.calibrate import Calibration, LossIncrease, LostMass, MeanK, calibrate, completion_by_name

from ..models.pretrained import ModelSource, load_model, load_model_to_run
from ..models.sentence_embedding import embedding_error, embedding_of, hidden_states
from ..runs.memory import PeakMeter
from ..runs.process import Send
from ..runs.records import Json
from ..runs.timing import Stopwatch
from . import demo
from .calibration_settings import Target

_WINDOWS_AT_A_TIME = 8
MEASURE = f"{__name__}:measure_calibration"
# By what a model is judged -> the function that evaluates it.
EVALUATE = {"perplexity": f"{demo.__name__}:measure_run", "embedding_error": f"{__name__}:measure_embeddings"}


def measure_calibration(request: Json, send: Send) -> Json:
    """Load the model, calibrate it, and write the calibration to request["out"]."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    encoder = request["measure"] == "embedding_error"
    model = load_model(ModelSource(**request["model"]), "AutoModel" if encoder else "AutoModelForCausalLM")
    feed_forward_mean_k = request["feed_forward_mean_k"]
    windows, at_a_time = request["windows"], _WINDOWS_AT_A_TIME if encoder else 1
    with PeakMeter() as meter, Stopwatch() as stopwatch:
        calibration = calibrate(
            model,
            [torch.tensor(windows[first : first + at_a_time]) for first in range(0, len(windows), at_a_time)],
            objective=(lambda output, batch: embedding_of(output)) if encoder else None,
            target=_target(request["target"]),
            completion=completion_by_name(request.get("completion")),
            feed_forward_target=None if feed_forward_mean_k is None else MeanK(feed_forward_mean_k),
            progress=lambda what, done, total: send({"what": what, "done": done / total}),
        )
    save(replace(calibration, about=calibration.about | request["about"]), Path(request["out"]))
    return {
        "loss": calibration.about.get("loss"),
        "search": calibration.about.get("search"),
        "mean_k": calibration.mean_k,
        "elapsed_s": stopwatch.elapsed_s,
        "peak_mib": meter.read().peak_mib,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def measure_embeddings(request: Json, send: Send) -> Json:
    """Embed every window with full attention, then with a k, and compare."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model_to_run(ModelSource(**request["model"]), "AutoModel")
    windows = request["windows"]
    expected = hidden_states(
        model, windows, batch_size=_WINDOWS_AT_A_TIME, progress=lambda done, total: send({"done": done / total / 2})
    )
    demo.convert_as_asked(model, request)
    with PeakMeter() as meter, Stopwatch() as stopwatch:
        ours = hidden_states(
            model,
            windows,
            batch_size=_WINDOWS_AT_A_TIME,
            progress=lambda done, total: send({"done": (1 + done / total) / 2}),
        )
    memory = meter.read()
    vectors = embedding_of([ours]), embedding_of([expected])
    return {
        "attn_implementation": model.config._attn_implementation,
        "hidden_error": ((ours - expected).norm() / expected.norm()).item(),
        "embedding_error": embedding_error(*vectors),
        "cosine": (vectors[0] * vectors[1]).sum(1).double().mean().item(),
        "elapsed_s": stopwatch.elapsed_s,
        "other_cores": stopwatch.other_cores,
        **memory.as_record(),
    }


def target_json(target: Target) -> list[Any]:
    """A target for a request; `_target` reads it."""
    return [type(target).__name__, target.mean_k if isinstance(target, MeanK) else target.bound]


def _target(stored: Sequence[Any]) -> Target:
    name, number = stored
    kinds: dict[str, type[MeanK] | type[LostMass] | type[LossIncrease]]
    kinds = {kind.__name__: kind for kind in (MeanK, LostMass, LossIncrease)}
    return kinds[name](number)


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration in one step: an interrupted run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    calibration.save(partial)
    partial.replace(path)
