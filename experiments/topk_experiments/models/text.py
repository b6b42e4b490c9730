"""Language modelling: a text, its first tokens, and the perplexity of a causal model on them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topk_attention.files import read_utf8

# progress(layers done, layers in all), after each layer of the one forward pass
Progress = Callable[[int, int], None]

# Tokens whose logits exist at a time: 256 x 49,152 words in float32 are 48 MiB.
_TOKENS_PER_LOGIT_CHUNK = 256
# Long enough to reveal scaled or capped logits, and short enough to cost nothing.
_PREFIX_TOKENS = 64


class Text(NamedTuple):
    """A text and the name of its source, without folder names."""

    content: str
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(path: Path | None = None) -> Text:
    """The text of a UTF-8 file; without a path Python's own language reference (0.5 MB of English).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or it is empty.

    >>> read_text().source
    "Python's documentation topics (pydoc_data)"
    """
    if path is None:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

        content = "\n\n".join(topics[name] for name in sorted(topics))
        return Text(content, "Python's documentation topics (pydoc_data)")
    content = read_utf8(path)
    if not content.strip():
        raise ValueError(f"text file {path} is empty")
    return Text(content, path.name)


def first_tokens(text: Text, tokenizer: Any, num_tokens: int) -> Tensor:
    """The first num_tokens tokens of a text, int64 [1, num_tokens], without any special token.

    Raises:
        ValueError: num_tokens is below 2, or the text is shorter than that.
    """
    if num_tokens < 2:
        raise ValueError(f"tokens must be at least 2 (the first one is never predicted), got {num_tokens}")
    token_ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if len(token_ids) < num_tokens:
        raise ValueError(
            f"{text.source} is too short: {num_tokens:,} tokens needed, it has {len(token_ids):,}; "
            f"give a longer text or ask for at most {len(token_ids)} tokens"
        )
    return torch.tensor([token_ids[:num_tokens]])


def perplexity(
    model: nn.Module,
    input_ids: Tensor,
    *,
    progress: Progress | None = None,
    logits_in_chunks: bool | None = None,
) -> float:
    """exp of the mean negative log-likelihood of tokens 2 to n, each predicted from all tokens before it.

    model      a causal transformers model
    input_ids  [1, n]  int64, one window, without added tokens
    progress          called after each layer
    logits_in_chunks  whether the output embedding of the base model's hidden states gives the logits. Then logits
                      exist for a few hundred tokens at a time, never [n, vocabulary]. None: decide by
                      `hidden_states_give_logits`. False: the model's own forward pass, with all logits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=50,
    ...     hidden_size=8,
    ...     intermediate_size=16,
    ...     num_hidden_layers=1,
    ...     num_attention_heads=2,
    ...     pad_token_id=None,
    ...     bos_token_id=None,
    ...     eos_token_id=None,
    ... )
    >>> 25 < perplexity(LlamaForCausalLM(config).eval(), torch.arange(40)[None]) < 100
    True
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must have shape [1, n] with n of at least 2, got {list(input_ids.shape)}")
    if logits_in_chunks is None:
        logits_in_chunks = hidden_states_give_logits(model, input_ids)
    targets = input_ids[0, 1:]
    total = 0.0
    with torch.no_grad(), _reporting(model, progress):
        if logits_in_chunks:
            hidden_states = _base_model(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0, :-1]
            output_embedding: Any = model.get_output_embeddings()  # type: ignore[operator]
            parts = ((output_embedding(part)) for part in hidden_states.split(_TOKENS_PER_LOGIT_CHUNK))
        else:
            logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1]
            parts = iter(logits.split(_TOKENS_PER_LOGIT_CHUNK))
        for part, target in zip(parts, targets.split(_TOKENS_PER_LOGIT_CHUNK), strict=True):
            total += F.cross_entropy(part.float(), target, reduction="sum").item()
    return math.exp(total / len(targets))


def hidden_states_give_logits(model: nn.Module, input_ids: Tensor) -> bool:
    """Whether the output embedding of the base model's hidden states gives the logits, tested on a short prefix.

    It does not if a model scales or caps its logits, or has a deeper head.
    """
    base_model = _base_model(model)
    get_output_embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    output_embedding = get_output_embeddings()
    if base_model is model or output_embedding is None:
        return False
    prefix = input_ids[:, :_PREFIX_TOKENS]
    with torch.no_grad():
        expected = model(input_ids=prefix, use_cache=False).logits
        hidden_states = base_model(input_ids=prefix, use_cache=False).last_hidden_state
        if hidden_states.shape[-1] != getattr(output_embedding, "in_features", hidden_states.shape[-1]):
            return False
        logits = output_embedding(hidden_states)
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def _base_model(model: Any) -> nn.Module:
    """The part of a model whose output is hidden states."""
    return model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "base_model", model)


@contextmanager
def _reporting(model: Any, progress: Progress | None) -> Iterator[None]:
    layers = layers_of(model) if progress is not None else None
    if progress is None or layers is None:
        yield
        return
    total = len(layers)

    def report_after(number: int) -> Callable[..., None]:
        return lambda *_: progress(number, total)

    handles = [layer.register_forward_hook(report_after(number)) for number, layer in enumerate(layers, 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: Any) -> nn.ModuleList | None:
    """The list of a model's layers, found by its length: its name differs between families."""
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    return None
