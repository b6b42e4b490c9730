"""What a text costs a model in perplexity: with one k for all heads, with calibrated k, and completed; and in full."""

from __future__ import annotations

from typing import Any

import torch

from topk_attention import Completion
from topk_attention.calibrate import MeanK, calibrate
from topk_attention.convert import convert, unconvert

from ...models.pretrained import ModelSource, load_model_to_run
from ...models.text import perplexity
from ...runs.process import Send
from ...runs.records import Json

# Curve -> its name in words.
CURVES = {
    "alone": "one k for all heads",
    "calibrated": "calibrated k, mean over heads",
    "completed": "one k, completed",
}


def measure(request: Json, send: Send) -> Json:
    """
    request  model, ks, backend, threads and seed
             calibrated_on, window: token ids of two parts of the text
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = load_model_to_run(ModelSource(**request["model"]))
    window, ks = torch.tensor([request["window"]]), request["ks"]
    send({"doing": "in full"})
    full = perplexity(model, window)
    send({"doing": "calibrating"})
    calibration = calibrate(model, [torch.tensor([request["calibrated_on"]])], target=MeanK(min(ks)))
    found: Json = {name: {} for name in CURVES}
    for k in ks:
        ways: dict[str, dict[str, Any]] = {
            "alone": {"attention_k": k},
            "calibrated": {"attention_k": calibration.reallocated(MeanK(k))},
            "completed": {"attention_k": k, "completion": Completion()},
        }
        for name, how in ways.items():
            send({"doing": f"k = {k}, {CURVES[name]}"})
            convert(model, **how, backend=request["backend"])
            found[name][str(k)] = perplexity(model, window)
            unconvert(model)
    return {"full": full, "curves": found, "num_tokens": len(request["window"])}
