"""A model reads a long document and answers a question about it: in full, with top-k attention, and completed.

All share their weights and keep their caches side by side, so that their tokens take turns.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention import Completion
from topk_attention.convert import convert

from ...models.generation import new_cache, read
from ...models.pretrained import ModelSource, load_model_to_run, load_tokenizer
from ...runs.memory import PeakMeter
from ...runs.process import Send
from ...runs.records import Json
from ...runs.timing import Stopwatch

FULL, TOPK, COMPLETED = "full", "topk", "completed"
IN_WORDS = {FULL: "in full", TOPK: "with top-k", COMPLETED: "with top-k, completed"}
# A token after so few is timed too: there is nothing to leave out.
SHORT = 64
_SHORT_TOKENS = 12


class Reader(NamedTuple):
    """A model with the tokens that it has read."""

    model: Any
    cache: Any


def measure(request: Json, send: Send) -> Json:
    """
    request  model, k, backend, threads and seed
             document: token ids, read first
             following: the real tokens after them, whose perplexity is measured
             question: token ids, read in their place before the answer
             answer_tokens: number of tokens generated
    """
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    source = ModelSource(**request["model"])
    full = load_model_to_run(source)
    models = {FULL: full, TOPK: sharing_weights(full), COMPLETED: sharing_weights(full)}
    for name, completion in ((TOPK, None), (COMPLETED, Completion())):
        convert(models[name], attention_k=request["k"], completion=completion, backend=request["backend"])
    # Each with the cache that `generate` takes by itself.
    kinds = {FULL: "dynamic", TOPK: "topk", COMPLETED: "topk"}
    result: Json = {name: {} for name in models}
    send({"doing": f"tokens after {SHORT}"})
    short = {name: Reader(model, new_cache(kinds[name], model, SHORT + 99)) for name, model in models.items()}
    for name, of_short in _alternate(short, request["document"][:SHORT], _SHORT_TOKENS)[1].items():
        result[name]["short_token_s"] = statistics.median(of_short)
    readers, first, busy = {}, {}, []
    for name, model in models.items():
        send({"doing": f"reading {len(request['document']):,} tokens, {IN_WORDS[name]}"})
        with PeakMeter() as meter, Stopwatch() as stopwatch:
            readers[name] = Reader(model, new_cache(kinds[name], model, len(request["document"]) + 999))
            first[name] = read(model, request["document"], readers[name].cache)
        result[name] |= {"prefill_s": stopwatch.elapsed_s, "prefill_peak_mib": meter.read().peak_mib}
        busy.append(stopwatch.other_cores)
    send({"doing": "the text that follows"})
    found = {name: _following(readers[name], first[name], request["following"]) for name in readers}
    for name, (perplexity, _) in found.items():
        result[name]["perplexity"] = perplexity
        result[name]["agreement"] = (found[name][1] == found[FULL][1]).double().mean().item()
    send({"doing": "answering"})
    tokens, times = _alternate(readers, request["question"], request["answer_tokens"])
    tokenizer = load_tokenizer(source)
    for name in readers:
        result[name] |= {
            "token_s": statistics.median(times[name]),
            "fastest_token_s": min(times[name]),
            "slowest_token_s": max(times[name]),
            "answer": _text(tokenizer, tokens[name], full.generation_config.eos_token_id),
        }
    return result | {"other_cores": max((one for one in busy if one is not None), default=None)}


def sharing_weights(model: Any) -> Any:
    """A copy of a model with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def _following(reader: Reader, first: Tensor, token_ids: list[int]) -> tuple[float, Tensor]:
    """Perplexity of the tokens that really follow, and the token found most likely in the place of each.

    The cache is as before afterwards.

    first  the logits of what comes after the document
    """
    ids = torch.tensor([token_ids])
    logits = reader.model(input_ids=ids, past_key_values=reader.cache, use_cache=True).logits[0, :-1].float()
    reader.cache.crop(-len(token_ids))
    logits = torch.cat([first[None], logits])
    return F.cross_entropy(logits, ids[0]).exp().item(), logits.argmax(-1)


def _alternate(
    readers: dict[str, Reader], prompt: list[int], num_tokens: int
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """The greedy tokens of every reader after a prompt, and the time of each but the first; readers take turns."""
    tokens = {name: [int(read(of.model, prompt, of.cache).argmax())] for name, of in readers.items()}
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(num_tokens - 1):
        for name, of in readers.items():
            with Stopwatch() as stopwatch:
                tokens[name].append(int(read(of.model, tokens[name][-1:], of.cache).argmax()))
            times[name].append(stopwatch.elapsed_s)
    return tokens, times


def _text(tokenizer: Any, tokens: list[int], ends: int | list[int] | None) -> str:
    """The text of tokens up to the first that ends an answer."""
    known = ends if isinstance(ends, list) else [ends]
    end = next((place for place, token in enumerate(tokens) if token in known), len(tokens))
    return str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()
