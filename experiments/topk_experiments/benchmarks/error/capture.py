"""Queries, keys and values of a real model reading a real text, and what dense attention makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from topk_attention.backends.calls import AttentionCall, FeedForwardCall
from topk_attention.convert import convert
from topk_attention.functional.observation import observed

from ...models.pretrained import ModelSource, Say, load_model
from ...runs.process import Send, run_in_fresh_process
from ...runs.records import Json

# Above any sequence: such a k keeps every key.
_FULL_K = 2**31 - 1
# Rows of scores in float64 that exist at a time for each head: 64 x 9 x 8,192 are 38 MB.
_ROWS = 64


class Layer(NamedTuple):
    """What attention got in one layer, float32. Heads of keys and values are repeated: each query head has its own.

    query   [1, H, N, D]  scaled such that scores are query . key / sqrt(D)
    key     [1, H, N, D]
    value   [1, H, N, E]
    output  [1, H, N, E]  dense causal attention, computed in float64
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


def captured(
    folder: Path, source: ModelSource, input_ids: Sequence[int], layers: Sequence[int], threads: int, say: Say
) -> Path:
    """The file with what attention gets in these layers; made in a process of its own unless it is there.

    Raises:
        WorkerError: the model's attention is not plain causal attention, or it has no such layer.
    """
    identity = json.dumps([source.name, source.revision, list(input_ids), list(layers)])
    path = folder / f"{len(input_ids)}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pt"
    if not path.exists():
        say(f"Reading {len(input_ids):,} tokens with {source.name} to get queries, keys and values, into {path} ...")
        folder.mkdir(parents=True, exist_ok=True)
        request = {
            "model": vars(source),
            "input_ids": list(input_ids),
            "layers": list(layers),
            "threads": threads,
            "path": str(path),
        }
        run_in_fresh_process(f"{__name__}:capture", request)
    return path


def capture(request: Json, send: Send) -> Json:
    """Run the model and write the layers asked for; in a process of its own."""
    torch.set_num_threads(request["threads"])
    path, wanted = Path(request["path"]), set(request["layers"])
    model = load_model(ModelSource(**request["model"]))
    convert(model, attention_k=_FULL_K)
    calls: dict[int, AttentionCall] = {}
    number = 0

    def observe(call: AttentionCall | FeedForwardCall, output: Tensor) -> None:
        nonlocal number
        if not isinstance(call, AttentionCall):
            return
        if number in wanted:
            _check_plain(call, number)
            calls[number] = call
        number += 1

    with torch.no_grad(), observed(observe):
        model(input_ids=torch.tensor([request["input_ids"]]), use_cache=False, logits_to_keep=1)
    if missing := wanted - set(calls):
        raise ValueError(f"layers must be below {number}, the model's number of them, got {min(missing)}")
    layers = {str(number): _layer(call)._asdict() for number, call in sorted(calls.items())}
    partial = path.with_suffix(".partial")
    torch.save(layers, partial)
    partial.replace(path)
    return {}


def load_layers(path: Path | str, device: str = "cpu") -> Iterator[tuple[int, Layer]]:
    """(number, layer), one in memory at a time."""
    for number, tensors in torch.load(path, weights_only=True, mmap=True).items():
        yield int(number), Layer(**{name: tensor.to(device, copy=True) for name, tensor in tensors.items()})


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention in float64, a few rows at a time: [B, H, N, D], ... -> [B, H, N, E]."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    output = query.new_empty(*query.shape[:3], value.shape[3])
    positions = torch.arange(key.shape[2], device=query.device)
    for start in range(0, query.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = query[:, :, rows] @ key.mT / query.shape[3] ** 0.5
        scores.masked_fill_(positions > positions[rows, None], -torch.inf)
        output[:, :, rows] = scores.softmax(-1) @ value
    return output


def _layer(call: AttentionCall) -> Layer:
    query = call.query * (call.scale * call.query.shape[3] ** 0.5)
    repeats = query.shape[1] // call.key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (call.key, call.value))
    output = dense_attention(query, key, value).float()
    return Layer(*(tensor.contiguous() for tensor in (query, key, value, output)))


def _check_plain(call: AttentionCall, number: int) -> None:
    extras = [name for name in ("attn_mask", "bias", "relative_bias", "seed") if getattr(call, name) is not None]
    if not call.is_causal or extras:
        found = f"{', '.join(extras)} beside it" if call.is_causal else "attention that is not causal"
        raise ValueError(
            f"model must use plain causal attention, which all methods can do, got {found} in layer {number}"
        )
