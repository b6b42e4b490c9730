"""Steps of fine-tuning the first layers of a model with attention dropout: in full and with top-k, in turns."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention import Completion
from topk_attention.convert import convert

from ...models.pretrained import ModelSource, load_model
from ...models.text import layers_of
from ...runs.memory import PeakMeter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.timing import Stopwatch
from .reading import FULL, TOPK

DROPOUT = 0.1
_LEARNING_RATE = 1e-4


def measure(request: Json, send: Send) -> Json:
    """
    request  model, k, backend, layers kept, loss_tokens at the end of a window, threads and seed
             windows: token ids, one window a step
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model = cut(load_model(ModelSource(**request["model"])), request["layers"]).train()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    topk = copy.deepcopy(model)
    convert(topk, attention_k=request["k"], completion=Completion(), backend=request["backend"])
    models = {FULL: model, TOPK: topk}
    optimizers = {name: torch.optim.AdamW(of.parameters(), lr=_LEARNING_RATE) for name, of in models.items()}
    steps: dict[str, list[Json]] = {name: [] for name in models}
    for number, window in enumerate(request["windows"], 1):
        for name, of in models.items():
            send({"doing": f"step {number} of {len(request['windows'])}, {'in full' if name == FULL else 'top-k'}"})
            torch.manual_seed(number)
            with PeakMeter() as meter, Stopwatch() as stopwatch:
                loss = step(of, optimizers[name], torch.tensor([window]), request["loss_tokens"])
            steps[name].append(
                {
                    "elapsed_s": stopwatch.elapsed_s,
                    "peak_mib": meter.read().peak_mib,
                    "loss": loss,
                    "other_cores": stopwatch.other_cores,
                }
            )
    busy = [one["other_cores"] for of in steps.values() for one in of if one["other_cores"] is not None]
    return {
        "num_parameters": num_parameters,
        "layers": len(layers_of(model) or ()),
        "num_tokens": len(request["windows"][0]),
        "loss_tokens": request["loss_tokens"],
        "other_cores": max(busy, default=None),
    } | {
        name: {
            "median_s": statistics.median(one["elapsed_s"] for one in of),
            "peak_mib": max(one["peak_mib"] for one in of),
            "losses": [one["loss"] for one in of],
            "steps_s": [one["elapsed_s"] for one in of],
        }
        for name, of in steps.items()
    }


def cut(model: Any, num_layers: int) -> Any:
    """The model with its first layers alone, and with dropout of attention weights.

    Raises:
        ValueError: its layers, or the dropout of its attention, are not found.
    """
    layers = layers_of(model)
    if layers is None:
        raise ValueError(f"model must be one whose layers are a list, got {type(model).__name__}; give another --model")
    del layers[num_layers:]
    model.config.num_hidden_layers = len(layers)
    with_dropout = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    if not with_dropout:
        raise ValueError(
            f"model must be one whose attention has a dropout, got {type(model).__name__}; give another --model"
        )
    for module in with_dropout:
        module.attention_dropout = DROPOUT
    return model


def step(model: Any, optimizer: torch.optim.Optimizer, input_ids: Tensor, loss_tokens: int) -> float:
    """One step on the loss of the last tokens, as of an answer after a long prompt; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=loss_tokens + 1).logits[0, :-1]
    loss = F.cross_entropy(logits.float(), input_ids[0, -loss_tokens:])
    loss.backward()
    optimizer.step()
    return loss.item()
