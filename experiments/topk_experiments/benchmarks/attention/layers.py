"""Queries, keys and values of a real model reading a real text, in place of random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...models.pretrained import find_model, load_config, load_tokenizer, longest_input, unpacked
from ...models.text import first_tokens, read_text
from ...runs.checks import check_different
from ...runs.progress import Say
from ...runs.turns import Tensors
from ..error.capture import captured, load_layers
from .works import LAYER_K, LAYER_LENGTH, LayerWork


def works_of_layers(
    layers: Sequence[int],
    *,
    model: str | None,
    text: Path | None,
    lengths: Sequence[int] | None,
    out: Path,
    threads: int,
    say: Say,
) -> list[LayerWork]:
    """The causal attention of these layers at each length. Their tensors are captured into the folder `out` / "work".

    model, text  as the options of these names; None: SmolLM2-135M, and Python's own documentation

    Raises:
        ValueError: the model, the text, a layer or a length does not fit; the message says how.
        FileNotFoundError: there is no such text file.
        WorkerError: the model's attention is not plain causal attention.
    """
    if not layers:
        raise ValueError("layers must be numbers from 0, got none")
    check_different("layers", layers)
    check_different("lengths", lengths or ())
    layers, lengths = sorted(layers), sorted(lengths or [LAYER_LENGTH])
    if min(lengths) < 2:
        raise ValueError(f"lengths must be at least 2 tokens, got {min(lengths)}")
    content = read_text(text)
    source = find_model(model, say)
    folder = out / "work"
    loadable = unpacked(source, folder / "model", say)
    config, tokenizer = load_config(loadable), load_tokenizer(loadable)
    if max(layers) >= config.num_hidden_layers:
        raise ValueError(
            f"layers must be below {config.num_hidden_layers}, the model's number of them, got {max(layers)}"
        )
    limit = longest_input(config)
    if limit is not None and max(lengths) > limit:
        raise ValueError(f"lengths must be at most {limit}, the longest input of {source.name}, got {max(lengths)}")
    num_heads = config.num_attention_heads
    works = []
    for length in lengths:
        input_ids = first_tokens(content, tokenizer, length)[0].tolist()
        path = captured(folder, loadable, input_ids, layers, threads, say)
        works += [
            LayerWork(
                length=length,
                k=LAYER_K,
                num_heads=num_heads,
                num_key_heads=getattr(config, "num_key_value_heads", None) or num_heads,
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
                is_causal=True,
                layer=layer,
                model=source.name,
                revision=source.revision,
                text=content.source,
                text_sha256=content.sha256,
                captured=str(path),
            )
            for layer in layers
        ]
    return works


def captured_inputs(work: LayerWork) -> Tensors:
    """Query [1, H, N, D], key and value [1, G, N, D] of the first tokens; the file holds keys for each query head."""
    layer = next(layer for number, layer in load_layers(work.captured) if number == work.layer)
    in_group = work.num_heads // work.num_key_heads
    tensors = layer.query, layer.key[:, ::in_group], layer.value[:, ::in_group]
    return tuple(tensor[:, :, : work.length].clone(memory_format=torch.contiguous_format) for tensor in tensors)
