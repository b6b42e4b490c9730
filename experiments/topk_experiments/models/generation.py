"""Generation step by step: caches by name, the reading of a prompt, and the next token."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import topk_attention

# Cache -> what it is, in words.
CACHES = {
    "dynamic": "transformers' DynamicCache",
    "static": "transformers' StaticCache",
    "quanto": "transformers' QuantizedCache, 4 bits by optimum-quanto",
    "hqq": "transformers' QuantizedCache, 4 bits by HQQ",
    "fp8": "transformers' QuantizedCache, 8-bit floats",
    "topk": "this library's TopKCache",
}
# Where the document goes in a chat template.
_DOCUMENT = "@document@"
_PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}


def why_no_cache(kind: str) -> str | None:
    """Why there is no cache of this kind here; None where there is one."""
    if kind in _PACKAGES:
        module, package = _PACKAGES[kind]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of the package around it
            found = False
        if not found:
            return f"the package {package} is not installed; pip install --no-deps -r requirements-generation.txt"
    return None


def new_cache(kind: str, model: Any, length: int) -> Any:
    """An empty cache of one of `CACHES` for a model; length: of all tokens that it will hold.

    Raises:
        ValueError: there is no such kind, or it is not there.
    """
    from transformers import DynamicCache, QuantizedCache, StaticCache

    if kind not in CACHES:
        raise ValueError(f"cache must be among {', '.join(CACHES)}, got {kind!r}")
    if (reason := why_no_cache(kind)) is not None:
        raise ValueError(f"cache {kind!r} is not there: {reason}")
    match kind:
        case "dynamic":
            return DynamicCache(config=model.config)
        case "static":
            return StaticCache(config=model.config, max_cache_len=length)
        case "topk":
            return topk_attention.TopKCache(config=model.config)
    return QuantizedCache(kind, model.config)


def stepwise(model: Any, *, compiled: bool = False, one_dnn: bool = True) -> Callable[..., Any]:
    """What to call in place of a model, so that tokens which come one by one are read in another way than prompts.

    compiled  by code that torch.compile makes, once for all lengths of the cache
    one_dnn   False: their products without oneDNN
    """
    one_token = torch.compile(model, dynamic=True) if compiled else model

    def call(input_ids: Tensor, **arguments: Any) -> Any:
        if input_ids.shape[1] > 1:
            return model(input_ids=input_ids, **arguments)
        # Not `flags`, which warns of a setting for Intel's GPUs that it sets as well (PyTorch 2.13).
        before, *_ = torch.backends.mkldnn.set_flags(bool(torch.backends.mkldnn.enabled) and one_dnn)
        try:
            return one_token(input_ids=input_ids, **arguments)
        finally:
            torch.backends.mkldnn.set_flags(before)

    return call


@torch.no_grad()
def read(model: Any, token_ids: Sequence[int] | Tensor, cache: Any) -> Tensor:
    """Let a model read further tokens; returns the logits of what comes after the last of them, float32 [vocabulary].

    token_ids  numbers, or a tensor [1, n]
    """
    input_ids = token_ids if isinstance(token_ids, Tensor) else torch.tensor([list(token_ids)])
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].float()


def greedy(model: Any, prompt: Sequence[int], cache: Any, num_tokens: int) -> list[int]:
    """The tokens that a model finds most likely after a prompt, one after the other."""
    tokens = [int(read(model, prompt, cache).argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(read(model, tokens[-1:], cache).argmax()))
    return tokens


def user_turn(tokenizer: Any, before: str, after: str) -> tuple[str, str]:
    """The text before and after a document that stands between two parts of a user's message, up to the answer.

    In the chat template of the model, if it has one.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return before, f"{after}\n"
    turn = [{"role": "user", "content": f"{before}{_DOCUMENT}{after}"}]
    framed = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = framed.split(_DOCUMENT, 1)
    return before, after


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a part of a prompt, without those that tokenizers put around a whole one."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def num_equal(tokens: Sequence[int], others: Sequence[int]) -> int:
    """With how many of the same tokens two sequences begin.

    >>> num_equal([5, 6, 7], [5, 6, 8])
    2
    """
    pairs = zip(tokens, others, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(others)))
