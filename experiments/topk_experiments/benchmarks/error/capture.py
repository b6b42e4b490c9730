"""Queries, keys and values of a real model reading a real text, and the output of dense attention for them."""

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
from ...rivals import VanillaAttention
from ...runs.files import damage_named, load_tensors
from ...runs.process import Send, run_in_fresh_process
from ...runs.records import Json

# Longer than any sequence: such a k keeps every key.
_FULL_K = 2**31 - 1
# Queries whose scores exist at a time, in float64: for 9 heads and 8,192 keys they take 38 MB.
_QUERY_CHUNK_SIZE = 64
_WAY_OUT = "delete it to capture these layers again"


class Layer(NamedTuple):
    """The inputs of attention in one layer, float32, and its output. Each query head has keys and values of its own.

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
    """The file with the inputs of attention in these layers. A process of its own makes it if it does not exist yet.

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
    """Run the model and write the layers asked for; runs in a process of its own."""
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
    with damage_named(Path(path), _WAY_OUT):
        layers = {int(number): Layer(**tensors) for number, tensors in load_tensors(Path(path), mmap=True).items()}
        for layer in layers.values():
            shapes = [tuple(tensor.shape) for tensor in layer]
            if len({shape[:3] for shape in shapes}) != 1 or any(len(shape) != 4 for shape in shapes):
                raise ValueError(f"its tensors must have one number of heads and tokens, got {shapes}")
    for number, layer in layers.items():
        yield number, Layer(*(tensor.to(device, copy=True) for tensor in layer))


@torch.no_grad()
def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention in float64, a few queries at a time: [B, H, N, D], ... -> [B, H, N, E]."""
    return VanillaAttention(_QUERY_CHUNK_SIZE)(query.double(), key.double(), value.double(), is_causal=True)


def _layer(call: AttentionCall) -> Layer:
    query = call.query * (call.scale * call.query.shape[3] ** 0.5)
    repeats = query.shape[1] // call.key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (call.key, call.value))
    output = dense_attention(query, key, value).float()
    return Layer(*(tensor.contiguous() for tensor in (query, key, value, output)))


def _check_plain(call: AttentionCall, number: int) -> None:
    extras = [
        name
        for name in ("attn_mask", "bias", "relative_bias", "sinks", "softcap", "seed")
        if getattr(call, name) is not None
    ]
    if not call.is_causal or extras:
        found = f"{', '.join(extras)} beside it" if call.is_causal else "attention that is not causal"
        raise ValueError(
            f"model must use plain causal attention, which all methods can do, got {found} in layer {number}"
        )
